"""From files to batches: decoded and resized ahead by threads."""

import concurrent.futures
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from dsad.core.hosts import own_rows
from dsad.core.types import (
    KnownSource,
    Source,
)
from dsad.evaluation import stored
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.hosts import Hosts
from dsad.evaluation.preprocessing import Preprocessing

#: Shrinks a decoded image (h, w, 3) uint8 for a report.
Picture = Callable[[np.ndarray], np.ndarray]
#: By path of an image that was decoded before: the network's input, and (h, w) of the original.
Inputs = Mapping[str, tuple[np.ndarray, tuple[int, int]]]


class HostBatch(NamedTuple):
    """A fixed-size batch; ``shapes`` and ``masks`` belong to its ``own`` rows.

    These are the valid ones, with several processes those of them that lie on this one's devices;
    images of other rows are black.
    """

    images: np.ndarray  # (b, s, s, 3) uint8
    valid: np.ndarray  # (b,) bool
    index: np.ndarray  # (b,) int, -1 for padding
    shapes: list[tuple[int, int]]
    masks: list[np.ndarray | None]
    found: list[stored.Found]  # of the own rows, empty without a store
    own: np.ndarray  # (b,) bool
    pictures: list[np.ndarray | None]  # of the own rows, where asked for and decoded


class _Row(NamedTuple):
    """One image of a batch; ``image`` is None where its features are stored."""

    image: np.ndarray | None
    shape: tuple[int, int]
    mask: np.ndarray | None
    found: stored.Found | None
    picture: np.ndarray | None = None


def _row(
    source: Source,
    index: int,
    into: Preprocessing,
    store: stored.FeatureStore | None,
    picture: Picture | None,
    inputs: Inputs,
) -> _Row:
    """Decode and resize an image, as far as nothing is known of it."""
    identity = stored.of_file(source, index) if store else None
    if store and identity and (found := store.find(identity)):
        mask = cast(KnownSource, source).annotation(index, found.shape)
        return _Row(None, found.shape, mask, found)
    mask = small = found = None
    if known := inputs.get(source.records[index].path):
        image, shape = known
    else:
        sample = source[index]
        image, shape, mask = into.to_input(sample.image), sample.image.shape[:2], sample.mask
        small = picture(sample.image) if picture else None
    if store and not identity:
        identity = stored.of_pixels(image)
        found = store.find(identity, shape)
    if store and identity and not found:
        found = stored.Found(identity, shape, None)
    return _Row(image, shape, mask, found, small)


def batches(
    source: Source,
    config: EvalConfig,
    mesh: Mesh,
    batch: int,
    store: stored.FeatureStore | None = None,
    *,
    picture: Picture | None = None,
    inputs: Inputs | None = None,
) -> Iterator[HostBatch]:
    """Batches of a fixed size in source order, decoded ahead by threads; the last is padded.

    Each process decodes the rows that are to lie on its devices of the mesh. Images whose features
    are in the ``store`` may be left black, as nobody needs them. ``inputs`` are not decoded again,
    and have neither mask nor picture.
    """
    into = config.preprocessing
    prepare = functools.partial(
        _row, source, into=into, store=store, picture=picture, inputs=inputs or {}
    )
    ahead = batch + 2 * config.workers
    here, together = own_rows(mesh, batch), Hosts.of(mesh).together
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        waiting: deque[concurrent.futures.Future[_Row]] = deque()
        upcoming = iter(i for i in range(len(source)) if here[i % batch])

        def following() -> _Row:
            while len(waiting) < ahead and (index := next(upcoming, None)) is not None:
                waiting.append(pool.submit(prepare, index))
            return waiting.popleft().result()

        try:
            for start in range(0, len(source), batch):
                index = np.arange(start, start + batch)
                index[index >= len(source)] = -1
                own = here & (index >= 0)
                # A broken file is known to all before they wait for each other's features.
                made = together(lambda own=own: [following() for _ in range(own.sum())])
                images = np.zeros((batch, *into.size, 3), np.uint8)
                for row, at in zip(made, np.flatnonzero(own), strict=True):
                    if row.image is not None:
                        images[at] = row.image
                shapes, masks = [row.shape for row in made], [row.mask for row in made]
                found = [row.found for row in made if row.found]
                pictures = [row.picture for row in made]
                yield HostBatch(images, index >= 0, index, shapes, masks, found, own, pictures)
        finally:
            for future in waiting:
                future.cancel()
