"""Sources made of others: several after one another, or some samples of one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dsad.core.batch import BatchSpec
from dsad.core.channels import Channel, HasChannels
from dsad.core.types import CanvasSource, Dataset, HasFiles, KnownSource, Record, Sample, Source


class _Joined:
    """The samples of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Any]):
        self.records: Sequence[Record] = [record for part in parts for record in part.records]
        self.parts = parts
        self.at = [(n, i) for n, part in enumerate(parts) for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int, /) -> Sample:
        number, place = self.at[index]
        return self.parts[number][place]


class _JoinedKnown(_Joined):
    """Likewise, of ``KnownSource``s."""

    def identity(self, index: int) -> str:
        number, place = self.at[index]
        return self.parts[number].identity(place)

    def annotation(self, index: int, shape: tuple[int, int]) -> Any:
        number, place = self.at[index]
        return self.parts[number].annotation(place, shape)


class _JoinedCanvases(_Joined):
    """Likewise, of sources that hold canvases."""

    def canvas_reader(self, spec: BatchSpec) -> Callable[[int, dict[str, Any]], None]:
        readers = [part.canvas_reader(spec) for part in self.parts]

        def read(index: int, row: dict[str, Any]) -> None:
            number, place = self.at[index]
            readers[number](place, row)

        return read


def training_source(dataset: Dataset, split: str) -> Source:
    """What ``config.data.split`` asks for: a split of the data set, or both."""
    if split != "all":
        return dataset.source(split)
    return joined([part for name in ("train", "test") if len(part := dataset.source(name))])


def joined(parts: Sequence[Source]) -> Source:
    """The samples of several sources, one source after the other."""
    for kind, made in ((CanvasSource, _JoinedCanvases), (KnownSource, _JoinedKnown)):
        if parts and all(isinstance(part, kind) for part in parts):
            return made(parts)
    return _Joined(parts)


class _Selected:
    """The samples of a source with the numbers ``rows``, in their order."""

    def __init__(self, source: Any, rows: Sequence[int]):
        self.source, self.rows = source, rows
        self.records: Sequence[Record] = [source.records[i] for i in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Sample:
        return self.source[self.rows[index]]


class _SelectedKnown(_Selected):
    """Likewise of a ``KnownSource``."""

    def identity(self, index: int) -> str:
        return self.source.identity(self.rows[index])

    def annotation(self, index: int, shape: tuple[int, int]) -> Any:
        return self.source.annotation(self.rows[index], shape)


class _SelectedChannels(_SelectedKnown):
    """Likewise of one that also ``HasChannels``."""

    @property
    def saturated(self) -> bool:
        return self.source.saturated

    def channels(self, index: int, shape: tuple[int, int]) -> list[Channel]:
        return self.source.channels(self.rows[index], shape)


class _SelectedCanvases(_Selected):
    """Likewise of a ``CanvasSource``."""

    def canvas_reader(self, spec: BatchSpec) -> Callable[[int, dict[str, Any]], None]:
        reader = self.source.canvas_reader(spec)
        return lambda index, row: reader(self.rows[index], row)


def selected(source: Source, rows: Sequence[int]) -> Source:
    """The samples with these numbers, in their order, as much of a source as they were in."""
    if isinstance(source, CanvasSource):
        return _SelectedCanvases(source, rows)
    known = isinstance(source, KnownSource)
    if known and isinstance(source, HasChannels):
        return _SelectedChannels(source, rows)
    return (_SelectedKnown if known else _Selected)(source, rows)


def file_lines(source: Source, rows: Iterable[int]) -> Iterator[str]:
    """Per file of these samples a line with its size and time, where the source tells of files."""
    if not isinstance(source, HasFiles):
        return
    for i in rows:
        for file in source.files(i):
            about = file.stat() if file.exists() else None  # reading it will say so
            times = (about.st_size, about.st_mtime_ns) if about else ()
            yield f"{source.records[i].path}\t{file.name}\t{times}\n"
