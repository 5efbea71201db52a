"""Directories on a disk or in a bucket (``gs://``): names, whole writes, and what went wrong."""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator

from etils import epath

from dsad.core.errors import ConfigError, DsadError, WorkdirError

#: Ends the names of files that are not complete.
TEMPORARY = ".writing"
#: Of a name within a path: file systems take 255 bytes, of which temporary names need some.
_LONGEST = 150
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: How the libraries that write checkpoints spell a full disk.
_FULL_WORDS = re.compile(r"no space left|quota exceeded|file too large|resource_exhausted", re.I)


def is_remote(path: str | epath.PathLike) -> bool:
    """Whether a path lies in an object store, which has no append and no rename."""
    return "://" in os.fspath(path)


def directory(path: str | epath.PathLike) -> epath.Path:
    """An absolute path with ``~`` expanded; ``gs://`` paths as they are.

    Raises ConfigError if the library that a bucket needs is missing, or for another scheme.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    if not text.startswith("gs://"):
        raise ConfigError(f"{text}: expected a directory or gs://BUCKET/DIRECTORY.")
    if not text.removeprefix("gs://").strip("/"):
        raise ConfigError(f"{text}: names no bucket; expected gs://BUCKET/DIRECTORY.")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{text}: gs:// needs the library gcsfs: pip install 'dsad[gcs]'.")
    from fsspec.config import conf

    # Checkpoints are written past this library, so a listing it remembers would be a stale one.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def component(name: str) -> str:
    """Any name as one component of a path, unlike that of any other name; long ones are cut."""
    quoted = urllib.parse.quote(name, safe=" ")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def write_whole(path: str | epath.PathLike, content: str | bytes, advice: str = "") -> epath.Path:
    """Write a file so that a kill at any moment leaves the old content or the new one.

    Makes the folders above it and returns its absolute path. Several processes may write it at
    once: the last one wins. A write that fails raises WorkdirError as ``writing`` does, with
    ``advice``, and leaves nothing behind.
    """
    path = directory(path)
    # Names of files need not be text; in JSON what stands for their bytes gives them back.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with writing(path, advice):
        if is_remote(path):  # an object appears when it is complete
            path.write_bytes(data)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes on other machines, with equal numbers, may share the disk. Without the name of
        # the file, which may be as long as names can be.
        temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def writing(path: str | epath.PathLike, advice: str = "") -> Iterator[None]:
    """Turn what a disk or bucket answers to a write into a WorkdirError.

    The message names the path, the cause, and for a full disk the free space; ``advice`` follows.
    """
    try:
        yield
    except DsadError:
        raise
    except Exception as error:  # the libraries below raise nearly every type there is
        raise failure(path, error, advice) from error


def failure(path: str | epath.PathLike, error: BaseException, advice: str = "") -> WorkdirError:
    """The WorkdirError of a write that failed."""
    if is_full(error):
        left = free(path)
        room = "" if left is None else f" ({size(left)} free there)"
        what = f"the disk or quota is full{room}: {cause(error)}. Free space there."
    else:
        what = f"cannot be written: {cause(error)}."
    return WorkdirError(f"{os.fspath(path)}: {what}{' ' if advice else ''}{advice}")


def check_place(path: str | epath.PathLike, advice: str = "", *, file: bool = False) -> None:
    """Refuse a folder, or a ``file``, that cannot be written, before there is anything to write.

    Raises WorkdirError for one that is there as something else, or where the nearest folder that
    exists takes no file. Leaves nothing behind; buckets are not asked.
    """
    if is_remote(path):
        return
    place = directory(path)
    with writing(path, advice):
        if place.exists() and not (place.is_file() if file else place.is_dir()):
            what = "file, found a directory" if file else "directory, found a file"
            raise WorkdirError(f"{os.fspath(path)}: expected a {what}. {advice}")
        above = place.parent if file else place
        while not above.exists():
            above = above.parent
        try:
            with tempfile.TemporaryFile(dir=above) as probe:
                probe.write(b"\0")
                probe.flush()
        except OSError as error:  # names the temporary file
            raise OSError(error.errno, error.strerror, os.fspath(above)) from error


def clear(folder: epath.Path, keep: str) -> None:
    """Empty a folder but for the file that says whose it is, so that a stopped one can go on."""
    for path in folder.iterdir():
        if path.name != keep:
            path.rmtree() if path.is_dir() else path.unlink()


def is_full(error: BaseException) -> bool:
    """Whether a failed write was one for lack of space."""
    code = getattr(error, "errno", None)
    return code in _FULL or (code is None and bool(_FULL_WORDS.search(str(error))))


def cause(error: BaseException) -> str:
    """One line that says what happened."""
    if isinstance(error, OSError) and error.strerror:
        at = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{at}"
    if named := re.search(r"([^:]+?) \[os_error_code", str(error)):  # at the end of a long line
        return named[1].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return (text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}").rstrip(".")


def free(path: str | epath.PathLike) -> int | None:
    """Bytes that are left on the disk of a path, None where that has no meaning."""
    if is_remote(path):
        return None
    place = os.fspath(path)
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free


def size(count: float) -> str:
    """``1.5 GB`` and the like."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
