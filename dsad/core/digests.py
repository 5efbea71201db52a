"""SHA-256 of the files in a folder: a disk that lost or changed one is noticed when they are read.

``digests.json``, the last file to be written, holds those of all others.
"""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError

NAME = "digests.json"
#: Files that are read at once: one reader of a bucket would wait most of the time.
_READERS = 4


class DigestError(WorkdirError):
    """A file that is missing, or holds something else than was written."""


def of_files(folder: str | os.PathLike[str], names: list[str]) -> dict[str, str]:
    """SHA-256 of each of the files, paths relative to the folder; raises OSError."""
    root = paths.directory(folder)

    def digest(name: str) -> str:
        with (root / name).open("rb") as file:
            opened: Any = file  # declared as text or bytes
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(names, readers.map(digest, names), strict=True))


def write(folder: str | os.PathLike[str]) -> None:
    """Write ``digests.json`` about every other file in the folder and below; raises OSError."""
    root = paths.directory(folder)
    (root / NAME).write_text(json.dumps(of_files(root, _names(root)), indent=1))


def _names(root: epath.Path) -> list[str]:
    """Every other file in the folder and below."""
    top = os.fspath(root).rpartition("://")[2]  # how those below it are spelled
    below = (at / name for at, _, names in root.walk() for name in names)
    return sorted({os.path.relpath(path, top) for path in below} - {NAME})


def check(
    folder: str | os.PathLike[str], below: str = "", *, part: int = 0, parts: int = 1
) -> None:
    """Compare the files whose names begin with ``below`` with ``digests.json``.

    Several readers may share the work, each with a ``part`` of its own, from 0, of ``parts``.
    Raises DigestError naming a file that differs, is missing or was not written with the others,
    OSError if one cannot be read. What lies in the folder itself may have come later.
    """
    root = paths.directory(folder)
    try:
        written = json.loads((root / NAME).read_text())
    except FileNotFoundError as error:
        raise DigestError(
            f"{root / NAME}: no such file; expected the SHA-256 of every file, without which "
            "damage cannot be told"
        ) from error
    except ValueError as error:
        raise DigestError(f"{root / NAME}: not valid JSON ({error})") from error
    if not isinstance(written, dict):
        raise DigestError(f"{root / NAME}: expected the SHA-256 of every file by name")
    names = sorted(name for name in written if name.startswith(below))[part::parts]
    if further := [
        n for n in _names(root) if "/" in n and n.startswith(below) and n not in written
    ]:
        raise DigestError(f"{root / further[0]}: {NAME} does not know this file")
    try:
        read = of_files(root, names)
    except FileNotFoundError as error:
        raise DigestError(f"{root}: a file is missing: {paths.cause(error)}") from error
    for name in names:
        if read[name] != written[name]:
            raise DigestError(
                f"{root / name}: its SHA-256 is {read[name][:16]}..., not {written[name][:16]}... "
                "as when it was written"
            )
