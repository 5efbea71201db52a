"""Passes over the features of a source; what fits into memory is computed once."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from dsad.core.detection import FeatureBatch
from dsad.core.types import FeatureMaps, Source, Tree
from dsad.evaluation.batches import HostBatch, Picture, batches
from dsad.evaluation.compiled import Device
from dsad.evaluation.config import EvalConfig


class Reader:
    """Batches of a source with their features; what fits a byte limit is computed once.

    A source's features stay on the devices after the first whole pass if all of them fit beside
    those already kept; ``kept_bytes`` and ``recomputed`` (sources that did not fit) say so.
    """

    def __init__(self, device: Device, config: EvalConfig) -> None:
        self.device, self.config = device, config
        self.limit = config.cache_mb * 2**20
        self.kept_bytes = 0
        self.recomputed: set[str] = set()
        self._kept: dict[tuple[str, tuple[str, ...]], list[tuple[HostBatch, FeatureMaps]]] = {}

    def use(self, statistics: Tree) -> None:
        """Read features of the encoder with these statistics; {} leaves it as it is."""
        if self.device.recalibrate(statistics):
            self._kept.clear()
            self.kept_bytes = 0

    def read(
        self, source: Source, name: str, *, keep: bool, picture: Picture | None = None
    ) -> Iterator[tuple[HostBatch, FeatureMaps]]:
        """One pass; kept batches come without their images and pictures."""
        key = (name, tuple(r.path for r in source.records))
        if key in self._kept:
            yield from self._kept[key]
            return
        made, size = [], 0
        device = self.device
        passes = (source, self.config, device.mesh, device.batch, device.store)
        for host in batches(*passes, picture=picture):
            maps = device.stored_features(host)
            device.note(name, [source.records[i].path for i in host.index[host.own]], host)
            if keep:
                size += sum(x.nbytes for x in maps.values())
                masks = sum(m.nbytes for m in host.masks if m is not None)
                size += int(device.hosts.total(np.int64(masks)))  # all decide alike
                if keep := self.kept_bytes + size <= self.limit:
                    slim = host._replace(images=host.images[:0], found=[], pictures=[])
                    made.append((slim, maps))
                else:
                    made.clear()
                    self.recomputed.add(name)
            yield host, maps
        if keep:
            self._kept[key] = made
            self.kept_bytes += size


class Features:
    """A re-iterable ``FeatureSource`` over sources, category by category.

    Sample indices continue from one source to the next. ``banks`` are those of the map wrappers
    that the features have passed. Images ``left_out``, by path, are padding, and have no index.
    ``seconds`` are those spent in reading and the network. Of ``rotations`` samples each are one
    image; with ``by_image`` its number is that of them all. An image that becomes several inputs
    is as many samples.
    """

    def __init__(
        self,
        reader: Reader,
        parts: Sequence[tuple[str, Source]],
        tick: Callable[[int], None],
        *,
        keep: bool = True,
        split: str = "train",
        banks: tuple[Tree, ...] = (),
        left_out: Collection[str] = (),
        rotations: int = 1,
        by_image: bool = False,
    ) -> None:
        self.categories = tuple(category for category, _ in parts)
        self.seconds = 0.0
        self._passes = 0
        self._parts = (reader, parts, tick, keep, split)
        self._banks, self._left_out = banks, frozenset(left_out)
        self._rotations, self._by_image = rotations, by_image
        #: Those that are used, by part.
        self.images = [sum(r.path not in self._left_out for r in x.records) for _, x in parts]

    def __iter__(self) -> Iterator[FeatureBatch]:
        reader, parts, tick, keep, split = self._parts
        self._passes += 1
        first = self._passes == 1  # progress counts images, not passes
        start, offset, inputs = time.perf_counter(), 0, 0
        single = reader.config.preprocessing.single
        for category, source in parts:
            used = np.asarray([r.path not in self._left_out for r in source.records], bool)
            numbers = np.where(used, np.cumsum(used) - 1 + offset, -1)
            for host, maps in reader.read(source, f"{category}/{split}", keep=keep):
                self.seconds += time.perf_counter() - start
                index = np.where(host.valid, numbers[host.index], -1)
                valid = index >= 0
                tick(host.images_of(valid) if first else 0)
                image = np.where(valid, index // self._rotations, -1)
                maps = reader.device.transform(self._banks, maps, image)
                if not single:  # every input has a number of its own
                    index = np.where(valid, inputs + np.cumsum(valid) - 1, -1)
                    inputs += int(valid.sum())
                inside = None if host.inside is None else host.inside[:, 0]
                number = image if self._by_image else index
                yield FeatureBatch(maps, valid, category, number, inside, image)
                start = time.perf_counter()
            offset += int(used.sum())
