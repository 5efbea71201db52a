"""From files to batches: decoded and resized ahead by threads."""

import concurrent.futures
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from dsad.core.errors import ConfigError
from dsad.core.hosts import own_rows
from dsad.core.types import KnownSource, Source
from dsad.evaluation import stored
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.hosts import Hosts
from dsad.evaluation.preprocessing import WHOLE, Preprocessing, View

#: Shrinks a decoded image (h, w, 3) uint8 for a report.
Picture = Callable[[np.ndarray], np.ndarray]
#: By path of an image that was decoded before: the network's input, and (h, w) of the original.
Inputs = Mapping[str, tuple[np.ndarray, tuple[int, int]]]


class HostBatch(NamedTuple):
    """A fixed-size batch; what is a list belongs to its ``own`` rows.

    These are the valid ones, with several processes those of them that lie on this one's devices;
    images of other rows are black. A row is a view of an image, which has one or more of them, in
    order; mask and picture come with the first.
    """

    images: np.ndarray  # (b, s, s, 3) uint8
    valid: np.ndarray  # (b,) bool
    index: np.ndarray  # (b,) int, -1 for padding
    shapes: list[tuple[int, int]]
    masks: list[np.ndarray | None]
    found: list[stored.Found]  # of the own rows, empty without a store
    own: np.ndarray  # (b,) bool
    pictures: list[np.ndarray | None]  # of the own rows, where asked for and decoded
    parts: list[tuple[int, int]]  # number of the view, and how many the image has
    inside: np.ndarray | None = None  # (b, 2, 2, 2), see ``Preprocessing.inside``

    def images_of(self, rows: np.ndarray) -> int:
        """How many images begin in these rows (b,) bool; of several processes each has one row."""
        if all(count == 1 for _, count in self.parts):
            return int(rows.sum())
        first = np.zeros(len(rows), bool)
        first[self.own] = [number == 0 for number, _ in self.parts]
        return int((first & rows).sum())


class _Row(NamedTuple):
    """A view of an image; ``image`` is None where its features are stored."""

    image: np.ndarray | None
    shape: tuple[int, int]
    mask: np.ndarray | None
    found: stored.Found | None
    picture: np.ndarray | None = None
    part: tuple[int, int] = (0, 1)
    inside: np.ndarray | None = None


class _Opened(NamedTuple):
    """What is known of an image before a view of it is made."""

    identity: str | None  # by its file, of the store
    first: stored.Found | None  # what is stored of the first view
    shape: tuple[int, int]  # (h, w) of the original
    views: Sequence[View]


class _Image:
    """An image of a source, opened and decoded when a view of it is asked for, once.

    Threads wait for each other within an image alone: ``functools.cached_property`` has one lock
    for all instances before Python 3.12, and would decode one image at a time.
    """

    def __init__(
        self, source: Source, index: int, into: Preprocessing, store: stored.FeatureStore | None,
        picture: Picture | None, inputs: Inputs,
    ) -> None:  # fmt: skip
        self._source, self.index, self._into, self._store = source, index, into, store
        self._picture, self._given = picture, inputs.get(source.records[index].path)
        self._lock = threading.RLock()
        self._known: _Opened | None = None
        self._parts: tuple[np.ndarray, np.ndarray | None, np.ndarray | None] | None = None

    def opened(self) -> _Opened:
        """Reads what is stored, or else decodes the image."""
        with self._lock:
            if self._known is None:
                identity = stored.of_file(self._source, self.index) if self._store else None
                first = self._stored(identity, 0) if identity else None
                if self._given:
                    shape = self._given[1]
                else:
                    shape = first.shape if first else self._decoded()[0].shape[:2]
                self._known = _Opened(identity, first, shape, self._into.views(shape))
            return self._known

    def _decoded(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Pixels, mask and small picture."""
        with self._lock:
            if self._parts is None:
                sample = self._source[self.index]
                small = self._picture(sample.image) if self._picture else None
                self._parts = sample.image, sample.mask, small
            return self._parts

    def _stored(self, identity: str, number: int) -> stored.Found | None:
        assert self._store
        return self._store.find(stored.of_view(identity, number))

    def row(self, number: int = 0) -> _Row:
        """A view of the image, as far as nothing is known of it."""
        identity, found, shape, views = self.opened()
        if number:
            found = self._stored(identity, number) if identity else None
        known = found is not None and found.maps is not None
        pixels = mask = small = None
        if self._given:
            pixels = self._given[0]
        elif not known:
            image, mask, small = self._decoded()
            pixels = self._into.to_input(image, views[number])
        if known and number == 0 and not self._given:
            mask = cast(KnownSource, self._source).annotation(self.index, shape)
        if self._store and not found:
            assert pixels is not None
            if identity:
                found = stored.Found(stored.of_view(identity, number), shape, None)
            else:
                by_pixels = stored.of_pixels(pixels)
                found = self._store.find(by_pixels, shape) or stored.Found(by_pixels, shape, None)
        first = number == 0
        return _Row(
            pixels, shape, mask if first else None, found, small if first else None,
            (number, len(views)),
            None if self._into.whole else self._into.inside([views[number]], shape)[0],
        )  # fmt: skip


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

    Raises ConfigError for windows with several processes.
    """
    into, together = config.preprocessing, Hosts.of(mesh).together
    images = functools.partial(
        _Image, source, into=into, store=store, picture=picture, inputs=inputs or {}
    )
    here = own_rows(mesh, batch)
    if into.single:
        starts = range(0, len(source), batch)
        rows = ((i, images(i).row) for i in range(len(source)) if here[i % batch])
    elif not here.all():
        raise ConfigError(
            'config.evaluation.resize: "windows" need one process, found several. Evaluate on one '
            'machine, or set it to "longer".'
        )
    else:
        starts, rows = itertools.count(0, batch), None
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        ahead = _Ahead(
            pool,
            rows or _window_rows(images, len(source), pool, config.workers),
            batch,
            config.workers,
        )
        try:
            for start in starts:
                index = np.arange(start, start + batch)
                index[index >= len(source)] = -1
                wanted = here & (index >= 0) if into.single else here
                # A broken file is known to all before they wait for each other's features.
                count = int(wanted.sum())
                made = together(lambda count=count: list(itertools.islice(ahead, count)))
                if not into.single:
                    index = np.full(batch, -1)
                    index[: len(made)] = [number for number, _ in made]
                    wanted = index >= 0
                    if not made:
                        return
                yield _gathered(into, index, wanted, [row for _, row in made])
        finally:
            ahead.cancel()


class _Ahead:
    """The results of calls, in order, some of them made ahead by threads."""

    def __init__(
        self, pool: concurrent.futures.Executor, calls: Iterator[tuple[int, Callable[[], _Row]]],
        batch: int, workers: int,
    ) -> None:  # fmt: skip
        self._pool, self._calls, self._most = pool, calls, batch + 2 * workers
        self._waiting: deque[tuple[int, concurrent.futures.Future[_Row]]] = deque()

    def __iter__(self) -> Iterator[tuple[int, _Row]]:
        return self

    def __next__(self) -> tuple[int, _Row]:
        while len(self._waiting) < self._most and (call := next(self._calls, None)):
            self._waiting.append((call[0], self._pool.submit(call[1])))
        if not self._waiting:
            raise StopIteration
        number, row = self._waiting.popleft()
        return number, row.result()

    def cancel(self) -> None:
        for _, row in self._waiting:
            row.cancel()


def _window_rows(
    images: Callable[[int], _Image], count: int, pool: concurrent.futures.Executor, workers: int
) -> Iterator[tuple[int, Callable[[], _Row]]]:
    """All views of every image, the next images opened meanwhile.

    As many as keep the workers busy: of large images, which have many views, a single one.
    """

    def opened(number: int) -> tuple[_Image, int]:
        image = images(number)
        return image, len(image.opened().views)

    numbers = iter(range(count))
    coming: deque[tuple[int, concurrent.futures.Future[tuple[_Image, int]]]] = deque()
    most = 1
    while True:
        while len(coming) <= most and (number := next(numbers, None)) is not None:
            coming.append((number, pool.submit(opened, number)))
        if not coming:
            return
        number, future = coming.popleft()
        image, views = future.result()
        most = max(1, workers // views)
        for view in range(views):
            yield number, functools.partial(image.row, view)


def _gathered(
    into: Preprocessing, index: np.ndarray, own: np.ndarray, made: Sequence[_Row]
) -> HostBatch:
    images = np.zeros((len(index), *into.size, 3), np.uint8)
    inside = None if into.whole else np.tile(WHOLE, (len(index), 1, 1, 1))
    for row, at in zip(made, np.flatnonzero(own), strict=True):
        if row.image is not None:
            images[at] = row.image
        if inside is not None:
            inside[at] = row.inside
    return HostBatch(
        images, index >= 0, index, [row.shape for row in made], [row.mask for row in made],
        [row.found for row in made if row.found], own, [row.picture for row in made],
        [row.part for row in made], inside,
    )  # fmt: skip
