"""Feature maps on disk: a network runs once per image for many detectors, scores and seeds.

One file holds the maps of one image, so neither batch size nor device count matters. Its name says
which image they are of, its folder which network made them: whatever could change a value is part
of one of the two (``Extractor.fingerprint``, ``FeatureStore.find``), so nothing ever goes stale.
Maps are kept as they come, float32; a file is used only if its SHA-256 is right.
"""

import hashlib
import io
import json
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.core.types import KnownSource, Source

KEY = "evaluation.feature_cache"
_ADVICE = f"Every folder in {KEY} can be deleted; name another one, or leave the key empty."
#: Of the files; another one makes other folders.
FORMAT = 1
_DIGEST = 32  # bytes of a SHA-256, in front of the packed arrays
#: Python 3.11 miscounts its recursion, and raises SystemError, where threads parse at once what
#: NumPy's files begin with (CPython issue 106905).
_PARSING = threading.Lock()


class Found(NamedTuple):
    """What the store has of one image: ``maps`` {layer: (...)}, None if it has to be computed.

    ``shape`` is (height, width) of the original image.
    """

    identity: str
    shape: tuple[int, int]
    maps: Mapping[str, np.ndarray] | None


class FeatureStore:
    """The stored maps of one network and its layers, in a folder of their own.

    Several processes, of one run or of many, may read and write at once: two that write the same
    file write the same values, to rounding.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: str, about: Mapping[str, Any]
    ) -> None:
        """Use ``folder/<fingerprint>``; ``about`` is noted there, for people who tidy up.

        Raises WorkdirError if the folder cannot be made or written to.
        """
        self.folder = pathlib.Path(os.path.expanduser(folder)) / fingerprint[:32]
        paths.write_whole(self.folder / "about.json", json.dumps(about, indent=1), _ADVICE)

    def find(self, identity: str, shape: tuple[int, int] | None = None) -> Found | None:
        """What is stored of an image, None if nothing is or its file is damaged.

        Args:
          identity: tells images apart by content, see ``KnownSource.identity`` and ``of_pixels``.
          shape: that of the original, where the identity leaves it open.

        """
        path = self._path(identity)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise ConfigError(
                f"{KEY}: {path} cannot be read ({problem.strerror}). Make it readable, name "
                "another folder, or leave the key empty."
            ) from problem
        packed = content[_DIGEST:]
        if hashlib.sha256(packed).digest() != content[:_DIGEST]:
            warnings.warn(
                f"{KEY}: {path} is damaged (its SHA-256 is wrong); computed again.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        with _PARSING, np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            height, width = (int(n) for n in arrays["shape"])
            prefix = "map/"
            names = [n for n in arrays.files if n.startswith(prefix)]
            maps = {n.removeprefix(prefix): arrays[n] for n in names}
        return Found(identity, shape or (height, width), maps)

    def save(self, found: Found, maps: Mapping[str, np.ndarray]) -> None:
        """Store the maps {layer: (...)} of an image; WorkdirError if the disk is full."""
        packed = io.BytesIO()
        arrays: dict[str, Any] = {f"map/{n}": x for n, x in maps.items()}
        np.savez(packed, shape=np.asarray(found.shape, np.int64), **arrays)
        content = packed.getvalue()
        content = hashlib.sha256(content).digest() + content
        paths.write_whole(self._path(found.identity), content, _ADVICE)

    def complete(
        self, rows: Sequence[Found], compute: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Maps {layer: (b, ...)} of a batch: those stored, and the others computed and stored.

        ``compute`` gives the maps of the whole batch, of at least as many rows. It is called only
        if a row is missing; where none is, the result has no padding.
        """
        missing = [i for i, row in enumerate(rows) if row.maps is None]
        if not missing:
            first: Mapping[str, np.ndarray] = rows[0].maps or {}
            return {n: np.stack([(row.maps or {})[n] for row in rows]) for n in first}
        computed = compute()
        arrays = {n: np.array(x) for n, x in computed.items()}
        for i in missing:
            self.save(rows[i], {n: x[i] for n, x in arrays.items()})
        if len(missing) == len(rows):
            return computed
        for i, row in enumerate(rows):
            for n, x in (row.maps or {}).items():
                arrays[n][i] = x
        return arrays

    def _path(self, identity: str) -> pathlib.Path:
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.features"


def of_file(source: Source, index: int) -> str | None:
    """Identity by what an image is decoded from, for sources that tell."""
    return f"file {source.identity(index)}" if isinstance(source, KnownSource) else None


def of_view(identity: str, number: int) -> str:
    """Identity of one of the inputs that an image becomes; the first has that of the image."""
    return f"{identity} view {number}" if number else identity


def of_pixels(image: np.ndarray) -> str:
    """Identity by the network's input (s, s, 3) uint8, for any other source."""
    return f"pixels {hashlib.sha256(image.tobytes()).hexdigest()}"
