"""The shards of ``dsad prepare`` while they are written: read ahead, noted, taken over.

A shard that a stopped preparation completed has a key, and is taken over by the next one whose key
is the same.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsad.core.types import Progress, silent
from dsad.data import records
from dsad.data.combined import file_lines

THREADS = max(2, min(16, os.cpu_count() or 2))


class Counter:
    """Tells how many files are measured, or examples written, over all shards."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress or silent
        self.progress(0, total, "")

    def add(self, note: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, note)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The examples of one file, read ahead by threads; ``same`` are the settings of all."""

    source: Any
    rows: range
    canvas: int
    make: Callable[[Any, int, int], dict[str, Any]]
    counter: Counter
    same: str

    @functools.cached_property
    def key(self) -> str:
        """Changes with the settings, with the records, and with size and time of their files."""
        digest = hashlib.sha256(self.same.encode())
        for line in file_lines(self.source, self.rows):
            digest.update(line.encode(errors="surrogatepass"))
        for i in self.rows:
            digest.update(repr(self.source.records[i]).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with ThreadPoolExecutor(THREADS) as pool:
            examples = pool.map(lambda i: self.make(self.source, i, self.canvas), self.rows)
            try:
                for index, example in zip(self.rows, examples, strict=True):
                    yield index, example
                    self.counter.add(example["path"])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class Kept:
    """The complete shards of stopped calls and of this one, by the key of ``Shard``.

    ``found`` are the SHA-256 of the former, ``checks`` what will be noted of this call's files.
    A line of the journal says which file was complete, and with what SHA-256: what was lost since,
    such as to a machine that went down, is not taken over.
    """

    def __init__(self, part: pathlib.Path):
        self.part, self.journal, self.folder = part, part / "complete.txt", part / "complete"
        self.found: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.folder.mkdir(exist_ok=True)
        written = {f.name: f for f in part.rglob("*") if f.is_file()}
        known = functools.cache(records.checksum)
        lines = self.journal.read_text("utf-8").splitlines() if self.journal.exists() else []
        for key, name, digest in (line.split() for line in lines if len(line.split()) == 3):
            for file in (written.get(key), written.get(name)):
                if file and key not in self.found and known(file) == digest:
                    self.found[key] = digest
                    written[key] = file.replace(self.folder / key)
        for other in part.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other)

    def files(self) -> list[pathlib.Path]:
        """What lies there for this call or the next one."""
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def fit(self, shards: Sequence[Shard], say: Callable[[str], None]) -> None:
        """Remove what belongs to none of the shards."""
        if not self.found:
            return
        useless = self.found.keys() - {shard.key for shard in shards}
        for key in useless:
            (self.folder / key).unlink()
            del self.found[key]
        again = f", {len(useless)} not: their images or the settings changed" if useless else ""
        say(f"{len(self.found)} of {len(shards)} shards taken over from before{again}.")

    def examples(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those of a shard to write, or as many of one that is there."""
        if shard.key not in self.found:
            return shard()
        shard.counter.done += len(shard.rows) - 1
        shard.counter.add(shard.source.records[shard.rows[-1]].path)
        return ((i, {}) for i in shard.rows)

    def write(self, shard: Shard, path: pathlib.Path, make: Callable[[], Any]) -> None:
        """Have a shard at ``path``: that which is there, or what ``make`` writes."""
        if digest := self.found.get(shard.key):
            (self.folder / shard.key).replace(path)
        else:
            try:
                make()
            except BaseException:  # for which the builder removes its folder
                for name, key in self._keys.items():
                    (path.parent / name).replace(self.folder / key)
                raise
            digest = records.checksum(path)
        self._keys[path.name] = shard.key
        self.checks[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(f"{shard.key} {path.name} {digest}\n")

    def finish(self) -> None:
        """Leave nothing but the records."""
        shutil.rmtree(self.folder)
        self.journal.unlink(missing_ok=True)
        (self.part / "lock").unlink()


@dataclasses.dataclass(frozen=True)
class Writer:
    """What the builder has each shard written by, in the order of the shards."""

    library: Any
    order: Iterator[Shard]
    kept: Kept

    def write(self, path: os.PathLike[str], examples: Any) -> None:
        """Called once per shard."""
        make = functools.partial(self.library.write, path, examples)
        self.kept.write(next(self.order), pathlib.Path(path), make)
