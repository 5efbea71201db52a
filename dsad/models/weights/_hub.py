"""Files of a repository on the Hugging Face hub, or their copies in its cache."""

import importlib
import pathlib
import re
from typing import Any, NamedTuple

from dsad.core.errors import ConfigError
from dsad.models.weights import _files

_SPEC = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^/\s]+))?(?:/(\S+))?")


class Found(NamedTuple):
    """A downloaded file of weights, its repository, and its name for people."""

    path: pathlib.Path
    repository: "Repository"
    source: str


class Repository(NamedTuple):
    """A repository at a revision."""

    name: str
    revision: str | None

    def get(self, file: str) -> pathlib.Path | None:
        """The local copy of a file, None if the repository does not have it.

        Raises ConfigError if that cannot be known without the network.
        """
        hub = _library()
        errors = hub.errors
        try:
            return pathlib.Path(hub.hf_hub_download(self.name, file, revision=self.revision))
        # The error of a file that is neither cached nor reachable is a kind of the next one.
        except errors.LocalEntryNotFoundError as error:
            cached = hub.try_to_load_from_cache(self.name, file, revision=self.revision)
            if cached is not None and not isinstance(cached, str):
                return None  # known from an earlier answer of the hub
            raise ConfigError(
                f"weights {self}: {file} is not in the local cache and the hub cannot be reached: "
                f"{_first_line(error)} Check the network, or give the path of a local file."
            ) from error
        except errors.EntryNotFoundError:
            return None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise ConfigError(
                f"weights {self}: no such repository or revision, or it needs a log-in: "
                f"{_first_line(error)}"
            ) from error
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
            raise ConfigError(
                f"weights {self}: {file} cannot be downloaded: {_first_line(error)}"
            ) from error

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")


def fetch(spec: str) -> Found:
    """The file that ``hf:owner/name[@revision][/file]`` means, downloaded unless it is cached."""
    parsed = _SPEC.fullmatch(spec)
    if not parsed:
        raise ConfigError(f"weights {spec}: expected hf:owner/name[@revision][/file].")
    repository = Repository(parsed[1], parsed[2])
    for file in [parsed[3]] if parsed[3] else _files.STANDARD:
        path = repository.get(file)
        if path is not None:
            return Found(path, repository, f"{repository}/{file}{_commit(path)}")
    raise ConfigError(
        f"weights {repository}: has no {parsed[3] or ' or '.join(_files.STANDARD)}. Name a file: "
        f"{repository}/FILE."
    )


def _commit(path: pathlib.Path) -> str:
    """`` (commit ...)``: names move, commits do not."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return f" (commit {found[1]})" if found else ""


def _library() -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ConfigError(
            "weights hf:...: the hub's library is missing: pip install 'dsad[hf]'; or give the "
            "path of a local file."
        ) from error
    return hub


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
