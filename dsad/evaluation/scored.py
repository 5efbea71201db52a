"""The scored images of one source: anomaly maps on original pixels, image scores, labels."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core.types import Source
from dsad.evaluation.batches import HostBatch, Picture
from dsad.evaluation.compiled import Fitted
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.maps import MapWriter
from dsad.evaluation.reader import Reader


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scored images of one category, in source order, on original pixels.

    With several processes (``hosts``) scores, labels and kinds are those of all images everywhere,
    but a process has the maps and masks of the images with the numbers ``own`` only, ascending.
    ``pictures`` and ``inputs``, by number, are of the images that it decoded for a report: small
    ones, no larger than their maps, and for panels the network's input and (h, w) of the original.
    """

    maps: Sequence[np.ndarray]  # (h, w) f32
    masks: Sequence[np.ndarray | None]  # (h, w) bool
    scores: np.ndarray  # (n,) f32
    labels: np.ndarray  # (n,) int
    kinds: list[str]
    hosts: Hosts = ALONE
    own: Sequence[int] = ()  # all, for one process
    pictures: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    inputs: Mapping[int, tuple[np.ndarray, tuple[int, int]]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.hosts.several:
            object.__setattr__(self, "own", range(len(self.maps)))

    @property
    def own_labels(self) -> np.ndarray:
        """Labels of the images whose maps are here."""
        return self.labels[np.asarray(self.own, np.int64)]

    def counts(self) -> dict[str, int]:
        """Images by label, and anomalous ones without a defect pixel."""
        without = [sum(m is None for m in self.masks), 0]
        for mask, label in zip(self.masks, self.own_labels, strict=True):
            without[1] += mask is not None and not bool(mask.any()) and int(label) == 1
        without = self.hosts.total(np.asarray(without, np.int64)).tolist()
        return {
            "normal": int(np.sum(self.labels == 0)),
            "anomalous": int(np.sum(self.labels == 1)),
            "anomalous_without_mask": without[0],
            "anomalous_with_empty_mask": without[1],
        }

    def part(self, rows: Sequence[int]) -> "Scored":
        """The images with these numbers, ascending."""
        place = {row: i for i, row in enumerate(rows)}
        here = [i for i, number in enumerate(self.own) if number in place]
        return Scored(
            [self.maps[i] for i in here],
            [self.masks[i] for i in here],
            self.scores[list(rows)],
            self.labels[list(rows)],
            [self.kinds[i] for i in rows],
            self.hosts,
            [place[self.own[i]] for i in here],
        )


def score(
    reader: Reader,
    fitted: Fitted,
    source: Source,
    name: str,
    tick: Callable[[int], None],
    *,
    keep: bool,
    writer: MapWriter | None = None,
    whole: bool = False,
    picture: Picture | None = None,
) -> Scored:
    """Score the images of a source and bring their maps back to original pixels.

    ``keep`` lets the reader hold the features for the next seed; ``writer`` saves every map as
    soon as it is made. With several processes process 0 saves them all, and ``whole`` leaves all
    maps and masks to it: for what cannot be added up. ``picture`` shrinks what is decoded.
    """
    hosts = reader.device.hosts
    maps: dict[int, np.ndarray] = {}
    masks: dict[int, np.ndarray | None] = {}
    scores: dict[int, float] = {}
    pictures, inputs = {}, {}
    for host, found, image in stream(reader, fitted, source, name, keep=keep, picture=picture):
        numbers = host.index[host.own].tolist()
        made = hosts.together(lambda f=found, h=host, n=numbers: _originals(f, h, n, reader))
        drawn = [i for i, small in enumerate(host.pictures) if small is not None]
        pictures.update({numbers[i]: host.pictures[i] for i in drawn})
        if drawn and reader.device.draws_panels:
            rows = host.images[host.own]
            inputs.update({numbers[i]: (rows[i], host.shapes[i]) for i in drawn})
        truth = dict(zip(numbers, host.masks, strict=True))
        scores.update(zip(numbers, image.tolist(), strict=True))
        if hosts.several and (whole or writer):
            sent = hosts.to_main(made)
            if whole:
                made, truth = sent, _masks_on_main(hosts, truth)
        else:
            sent = made
        if writer:
            hosts.together(lambda s=sent: _write(writer, source, s))
        maps.update(made)
        masks.update(truth)
        tick(int(host.valid.sum()))
    own = sorted(maps)
    return Scored(
        [maps[i] for i in own],
        [masks[i] for i in own],
        np.asarray(hosts.listed(scores), np.float32),
        np.asarray([r.label for r in source.records], np.int64),
        [r.kind for r in source.records],
        hosts,
        own,
        pictures,
        inputs,
    )


def stream(
    reader: Reader,
    fitted: Fitted,
    source: Source,
    name: str,
    *,
    keep: bool = False,
    picture: Picture | None = None,
) -> Iterator[tuple[HostBatch, np.ndarray, np.ndarray]]:
    """Batches with maps on the network's input and scores, of the own rows."""
    reader.use(fitted.statistics)
    for host, features in reader.read(source, name, keep=keep, picture=picture):
        yield host, *reader.device.score(fitted, features, host)


def held_out(
    reader: Reader, fitted: Fitted, source: Source, name: str, tick: Callable[[int], None]
) -> Scored:
    """Score normal images, whose maps are made anew whenever they are asked for, one at a time."""
    kept: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
    scores: dict[int, float] = {}
    for host, small, image in stream(reader, fitted, source, name):
        numbers = host.index[host.own].tolist()
        kept.update(zip(numbers, zip(small, host.shapes, strict=True), strict=True))
        scores.update(zip(numbers, image.tolist(), strict=True))
        tick(int(host.valid.sum()))
    own, hosts = sorted(kept), reader.device.hosts
    maps = _Originals([kept[i] for i in own], reader.config.preprocessing.to_original)
    listed = np.asarray(hosts.listed(scores), np.float32)
    kinds, labels = [r.kind for r in source.records], [r.label for r in source.records]
    return Scored(maps, [None] * len(own), listed, np.asarray(labels, np.int64), kinds, hosts, own)


class _Originals(Sequence[np.ndarray]):
    """Maps (h, w) on original pixels; those on the network's input are held."""

    def __init__(
        self,
        small: Sequence[tuple[np.ndarray, tuple[int, int]]],
        back: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    ) -> None:
        self._small, self._back = small, back

    def __len__(self) -> int:
        return len(self._small)

    def __getitem__(self, index: Any) -> Any:
        return self._back(*self._small[index])


def _originals(
    found: np.ndarray, host: HostBatch, numbers: Sequence[int], reader: Reader
) -> dict[int, np.ndarray]:
    """Maps on original pixels by the number of their image."""
    back = reader.config.preprocessing.to_original
    pairs = zip(numbers, found, host.shapes, strict=True)
    return {number: back(small, shape) for number, small, shape in pairs}


def _masks_on_main(
    hosts: Hosts, masks: dict[int, np.ndarray | None]
) -> dict[int, np.ndarray | None]:
    known = hosts.to_main({i: m for i, m in masks.items() if m is not None})
    numbers = hosts.listed({i: i for i in masks})
    return {i: known.get(i) for i in numbers} if hosts.main else {}


def _write(writer: MapWriter, source: Source, maps: dict[int, np.ndarray]) -> None:
    for number, values in sorted(maps.items()):
        writer.write(source.records[number].path, values)
