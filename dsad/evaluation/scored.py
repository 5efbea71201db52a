"""The scored images of one source: anomaly maps on original pixels, image scores, labels."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsad.core.channels import HasChannels
from dsad.core.types import Source
from dsad.evaluation import channels
from dsad.evaluation.batches import Picture
from dsad.evaluation.compiled import Fitted
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.maps import MapWriter
from dsad.evaluation.metrics.spro import Units
from dsad.evaluation.preprocessing import Preprocessing
from dsad.evaluation.reader import Reader


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scored images of one category, in source order, on original pixels that were inspected.

    With several processes (``hosts``) scores, labels and kinds are those of all images everywhere,
    but a process has the maps and masks of the images with the numbers ``own`` only, ascending.
    ``pictures`` and ``inputs``, by number, are of the images that it decoded for a report: small
    ones, no larger than their maps, and for panels the network's input and (h, w) of the original.
    ``channels`` are those of the maps, None where the source knows of none.
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
    channels: Sequence[Units] | None = None

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
            channels=None if self.channels is None else [self.channels[i] for i in here],
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
    defects: dict[int, Units] = {}
    known = channels.of(source)
    into = reader.config.preprocessing
    small = (lambda image: picture(into.inspected_part(image))) if picture else None
    for images, count in stream(reader, fitted, source, name, keep=keep, picture=small):

        def originals(images: Sequence[ScoredImage] = images) -> dict[int, np.ndarray]:
            return {x.number: x.original(into) for x in images}

        made = hosts.together(originals)
        drawn = [x for x in images if x.picture is not None]
        pictures.update({x.number: x.picture for x in drawn})
        if reader.device.draws_panels:
            inputs.update({x.number: (x.input, x.shape) for x in drawn})
        truth = {x.number: x.mask for x in images}
        scores.update({x.number: x.score for x in images})
        if hosts.several and (whole or writer):
            sent = hosts.to_main(made)
            if whole:
                made, truth = sent, _masks_on_main(hosts, truth)
        else:
            sent = made
        if writer:
            hosts.together(lambda s=sent: _write(writer, source, s))
        maps.update({i: into.inspected_part(x) for i, x in made.items()})
        parts = {i: None if x is None else into.inspected_part(x) for i, x in truth.items()}
        masks.update(parts)
        if known:
            annotated = functools.partial(_channels, known, into, made, truth)
            defects.update(hosts.together(annotated))
        tick(count)
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
        [defects[i] for i in own] if known else None,
    )


def _channels(
    source: HasChannels, into: Preprocessing, maps: Mapping[int, np.ndarray],
    masks: Mapping[int, np.ndarray | None],
) -> dict[int, Units]:  # fmt: skip
    """Those of the images with these maps and masks (h, w), where they are inspected."""
    return {
        i: channels.read(source, i, masks[i], into.inspected(x.shape), x.shape)
        for i, x in maps.items()
    }


class ScoredImage(NamedTuple):
    """One image of a source as it was scored."""

    number: int
    score: float
    map: np.ndarray  # of a single view (height, width) f32, on the network's input; else (h, w)
    shape: tuple[int, int]  # (h, w) of the original
    mask: np.ndarray | None  # (h, w) bool
    picture: np.ndarray | None  # a small one, where it was asked for and decoded
    input: np.ndarray | None  # (height, width, 3) uint8, the network's, for panels

    def original(self, into: Preprocessing) -> np.ndarray:
        """The map (h, w) f32 on the pixels of the image."""
        return into.to_original(self.map, self.shape) if into.single else self.map


def stream(
    reader: Reader,
    fitted: Fitted,
    source: Source,
    name: str,
    *,
    keep: bool = False,
    picture: Picture | None = None,
) -> Iterator[tuple[list[ScoredImage], int]]:
    """Batches of this process's images, each when the last of its views is scored.

    With them comes how many images all processes have just scored.
    """
    reader.use(fitted.statistics)
    into = reader.config.preprocessing
    first: tuple[Any, ...] = ()  # shape, mask and pictures of the image at hand
    canvas, views, parts = np.zeros((0, 0)), [], []  # its map, and its views with their scores
    for host, features in reader.read(source, name, keep=keep, picture=picture):
        maps, scores = reader.device.score(fitted, features, host)
        drawn = reader.device.draws_panels and len(host.images)
        rows = host.images[host.own] if drawn else [None] * len(maps)
        pictures = host.pictures or [None] * len(maps)
        made = []
        for i, number in enumerate(host.index[host.own].tolist()):
            part, count = host.parts[i]
            if part == 0:
                first, parts = (host.shapes[i], host.masks[i], pictures[i], rows[i]), []
            if into.single:
                made.append(ScoredImage(number, float(scores[i]), maps[i], *first))
                continue
            if part == 0:
                canvas, views = np.empty(first[0], np.float32), into.views(first[0])
            views[part].paint(canvas, maps[i])
            parts.append(float(scores[i]))
            if part == count - 1:
                score = reader.device.image_score(parts, canvas)
                made.append(ScoredImage(number, score, canvas, *first))
        yield made, int(host.valid.sum()) if into.single else len(made)


def held_out(
    reader: Reader, fitted: Fitted, source: Source, name: str, tick: Callable[[int], None]
) -> Scored:
    """Score normal images, whose maps are made anew whenever they are asked for, one at a time."""
    kept: dict[int, ScoredImage] = {}
    scores: dict[int, float] = {}
    for images, count in stream(reader, fitted, source, name):
        # The maps alone: masks and inputs of all held-out images would fill the memory.
        kept.update({x.number: x._replace(mask=None, picture=None, input=None) for x in images})
        scores.update({x.number: x.score for x in images})
        tick(count)
    own, hosts = sorted(kept), reader.device.hosts
    maps = _Originals([kept[i] for i in own], reader.config.preprocessing)
    listed = np.asarray(hosts.listed(scores), np.float32)
    kinds, labels = [r.kind for r in source.records], [r.label for r in source.records]
    return Scored(maps, [None] * len(own), listed, np.asarray(labels, np.int64), kinds, hosts, own)


class _Originals(Sequence[np.ndarray]):
    """Maps (h, w) of inspected pixels; those on the network's inputs are held."""

    def __init__(self, images: Sequence[ScoredImage], into: Preprocessing) -> None:
        self._images, self._into = images, into

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return self._into.inspected_part(self._images[index].original(self._into))


def _masks_on_main(
    hosts: Hosts, masks: dict[int, np.ndarray | None]
) -> dict[int, np.ndarray | None]:
    known = hosts.to_main({i: m for i, m in masks.items() if m is not None})
    numbers = hosts.listed({i: i for i in masks})
    return {i: known.get(i) for i in numbers} if hosts.main else {}


def _write(writer: MapWriter, source: Source, maps: dict[int, np.ndarray]) -> None:
    for number, values in sorted(maps.items()):
        writer.write(source.records[number].path, values)
