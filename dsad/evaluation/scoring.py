"""From files to anomaly maps: decoding ahead, compiled features and scores."""

import concurrent.futures
import functools
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from jax import lax
from jax.sharding import Mesh

from dsad.core.hosts import own_part, own_rows, put
from dsad.core.mesh import batch_sharding, replicated
from dsad.core.types import (
    Backbone,
    Detector,
    DetectorTraits,
    FeatureBatch,
    FeatureMaps,
    HasPanels,
    KnownSource,
    Scores,
    Source,
    Tree,
)
from dsad.evaluation import stamp, stored
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.extract import Extractor, placed
from dsad.evaluation.hosts import Hosts
from dsad.evaluation.preprocessing import Preprocessing
from dsad.ops import resize
from dsad.ops.resize import top_count


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


class _Row(NamedTuple):
    """One image of a batch; ``image`` is None where its features are stored."""

    image: np.ndarray | None
    shape: tuple[int, int]
    mask: np.ndarray | None
    found: stored.Found | None


def _row(
    source: Source, index: int, into: Preprocessing, store: stored.FeatureStore | None
) -> _Row:
    """Decode and resize an image, as far as nothing is known of it."""
    identity = stored.of_file(source, index) if store else None
    if store and identity and (found := store.find(identity)):
        mask = cast(KnownSource, source).annotation(index, found.shape)
        return _Row(None, found.shape, mask, found)
    sample = source[index]
    image, shape = into.to_input(sample.image), sample.image.shape[:2]
    found = None
    if store and not identity:
        identity = stored.of_pixels(image)
        found = store.find(identity, shape)
    if store and identity and not found:
        found = stored.Found(identity, shape, None)
    return _Row(image, shape, sample.mask, found)


def batches(
    source: Source,
    config: EvalConfig,
    mesh: Mesh,
    batch: int,
    store: stored.FeatureStore | None = None,
) -> Iterator[HostBatch]:
    """Batches of a fixed size in source order, decoded ahead by threads; the last is padded.

    Each process decodes the rows that are to lie on its devices of the mesh. Images whose features
    are in the ``store`` may be left black, as nobody needs them.
    """
    into = config.preprocessing
    prepare = functools.partial(_row, source, into=into, store=store)
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
                yield HostBatch(images, index >= 0, index, shapes, masks, found, own)
        finally:
            for future in waiting:
                future.cancel()


def finished(
    traits: DetectorTraits, size: tuple[int, int], align_corners: bool, scores: Scores
) -> Scores:
    """Scores with maps (b, *size): upsampled, smoothed, and summed up as the traits say."""
    maps = resize.resize_maps(scores.map, size, align_corners=align_corners)
    maps = resize.gaussian_smooth(maps, traits.sigma) if traits.sigma > 0 else maps
    if traits.image_score == "method":
        return Scores(map=maps, image=scores.image)
    pixels = size[0] * size[1]
    count = top_count(traits.image_share, pixels) if traits.image_score == "top" else 1
    highest, _ = lax.top_k(maps.reshape(-1, pixels), count)
    return Scores(map=maps, image=jnp.mean(highest, axis=1))


class Device:
    """The compiled parts of a run: features, scores, maps at network input size.

    Every part is compiled once per combination of shapes, so categories whose detector states have
    equal shapes share one program. The detector's ``score`` gets the mesh where there are several
    devices.
    """

    def __init__(
        self, backbone: Backbone, detector: Detector, config: EvalConfig, mesh: Mesh
    ) -> None:
        self.mesh = mesh
        self.batch = -(-config.batch_size // mesh.size) * mesh.size
        self.layers = tuple(detector.layers)
        self.preprocessing = config.preprocessing
        several = mesh if mesh.size > 1 else None
        self._score = jax.jit(functools.partial(detector.score, mesh=several))
        finish = functools.partial(
            finished, detector.traits, self.preprocessing.size, config.align_corners
        )
        self._finish = jax.jit(finish, out_shardings=batch_sharding(mesh))
        self.hosts = Hosts.of(mesh)
        self.folder = config.feature_cache
        self.store: stored.FeatureStore | None = None
        self.panel_store: stored.FeatureStore | None = None
        #: By name of a source: whether the features of an image, by path, were stored before.
        self.from_store: dict[str, dict[str, bool]] = {}
        #: Whether those of the latest batch all were.
        self.all_stored = False
        self._features = Extractor(self.layers, self.preprocessing.size, mesh)
        self._panels: Extractor | None = None
        if config.gallery > 0 and isinstance(detector, HasPanels):
            self._panels = Extractor(
                detector.panel_layers, self.preprocessing.size, mesh, detector.panels
            )
        self.use(backbone)

    def use(self, backbone: Backbone) -> None:
        """Take another backbone; one of the same architecture needs no new program."""
        about = stamp.describe_backbone(backbone)
        backbone = placed(backbone, self.mesh)  # once for both
        self._features.use(backbone)
        self.store = self.hosts.together(lambda: self._opened(self._features, about))
        if self._panels:
            self._panels.use(backbone)
            if not self.hosts.several:  # every process draws all panels, but has few of the images
                self.panel_store = self._opened(self._panels, {**about, "panels": True})

    def _opened(self, extractor: Extractor, about: dict[str, Any]) -> stored.FeatureStore | None:
        if not self.folder:
            return None
        preprocessing = self.preprocessing.describe()
        about = {**about, "layers": extractor.layers, "preprocessing": preprocessing}
        text = f"{stored.FORMAT} {preprocessing} {PIL.__version__} {extractor.fingerprint()}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return stored.FeatureStore(self.folder, name, about)

    def stored_features(self, host: HostBatch) -> FeatureMaps:
        """Feature maps of a batch, read if all are stored, else computed where they are not."""
        if self.store is None:
            return self._features(host.images)
        if self.hosts.several:
            return self._stored_by_all(self.store, host)
        maps = self.store.complete(host.found, lambda: self._features(host.images))
        # Padding repeats a row, so that it is as finite as the others.
        rows = np.minimum(np.arange(self.batch), len(host.found) - 1)

        sharding = batch_sharding(self.mesh)
        arrays = {
            n: x if isinstance(x, jax.Array) else put(x[rows], sharding) for n, x in maps.items()
        }
        return jax.block_until_ready(arrays)

    def _stored_by_all(self, store: stored.FeatureStore, host: HostBatch) -> FeatureMaps:
        """The same where every process reads and stores its own images."""
        missing = [row.maps is None for row in host.found]
        total, images = int(self.hosts.total(np.int64(sum(missing)))), int(host.valid.sum())
        computed = self._features(host.images) if total else {}
        here = own_rows(self.mesh, self.batch)
        fresh = {n: own_part(x)[host.own[here]] for n, x in computed.items()}

        def complete() -> Mapping[str, Any]:
            return store.complete(host.found, lambda: fresh) if host.found else {}

        rows = self.hosts.together(complete)
        if total == images:
            return computed
        made = {}
        for name, spec in self._features.shapes(self.batch).items():
            values = np.zeros(spec.shape, spec.dtype)  # padding is finite
            if host.found:
                values[host.own] = rows[name]
            made[name] = put(values, batch_sharding(self.mesh))
        return jax.block_until_ready(made)

    def note(self, name: str, paths: Sequence[str], host: HostBatch) -> None:
        """Remember which images of a source had their features in the store at first sight."""
        were = [found.maps is not None for found in host.found]
        self.all_stored = bool(were) and all(were)
        known = self.from_store.setdefault(name, {})
        for path, was in zip(paths, were, strict=bool(were)):
            known.setdefault(path, was)

    def panels(self, host: HostBatch) -> dict[str, np.ndarray]:
        """What the detector shows of a batch beside its map; nothing for most detectors."""
        if self._panels is None:
            return {}
        extractor = self._panels

        def compute() -> dict[str, np.ndarray]:
            return {n: np.asarray(x, np.float32) for n, x in extractor(host.images).items()}

        if self.panel_store is None:
            return compute()
        return dict(self.panel_store.complete(host.found, compute))

    def place(self, state: Tree) -> Tree:
        """The detector's state on the mesh: what is not there yet is replicated.

        Processes that fitted it to slightly different values, by rounding, take process 0's.
        """
        leaves, structure = jax.tree.flatten(state)
        devices = set(self.mesh.devices.flat)
        missing = {
            i: x
            for i, x in enumerate(leaves)
            if not (isinstance(x, jax.Array) and x.sharding.device_set == devices)
        }
        everywhere = replicated(self.mesh)
        place = put if self.hosts.several else jax.device_put
        for i, x in self.hosts.agreed(missing).items():
            leaves[i] = place(x, everywhere)
        return jax.tree.unflatten(structure, leaves)

    def score(
        self, state: Tree, maps: FeatureMaps, host: HostBatch
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maps (n, s, s) and image scores (n,) f32 of the own rows of a batch."""
        scores = self._finish(self._score(state, maps))
        own = host.own[own_rows(self.mesh, self.batch)]
        found = (np.asarray(own_part(x), np.float32)[own] for x in (scores.map, scores.image))
        return next(found), next(found)


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

    def read(
        self, source: Source, name: str, *, keep: bool
    ) -> Iterator[tuple[HostBatch, FeatureMaps]]:
        """One pass; kept batches come without their images."""
        key = (name, tuple(r.path for r in source.records))
        if key in self._kept:
            yield from self._kept[key]
            return
        made, size = [], 0
        device = self.device
        for host in batches(source, self.config, device.mesh, device.batch, device.store):
            maps = device.stored_features(host)
            device.note(name, [source.records[i].path for i in host.index[host.own]], host)
            if keep:
                size += sum(x.nbytes for x in maps.values())
                masks = sum(m.nbytes for m in host.masks if m is not None)
                size += int(device.hosts.total(np.int64(masks)))  # all decide alike
                if keep := self.kept_bytes + size <= self.limit:
                    made.append((host._replace(images=host.images[:0], found=[]), maps))
                else:
                    made.clear()
                    self.recomputed.add(name)
            yield host, maps
        if keep:
            self._kept[key] = made
            self.kept_bytes += size


class Features:
    """A re-iterable ``FeatureSource`` over sources, category by category.

    Sample indices continue from one source to the next. ``seconds`` are those spent in features.
    """

    def __init__(
        self,
        reader: Reader,
        parts: Sequence[tuple[str, Source]],
        tick: Callable[[int], None],
        *,
        keep: bool = True,
    ) -> None:
        self.categories = tuple(category for category, _ in parts)
        self.seconds = 0.0
        self._passes = 0
        self._parts = (reader, parts, tick, keep)

    def __iter__(self) -> Iterator[FeatureBatch]:
        reader, parts, tick, keep = self._parts
        self._passes += 1
        first = self._passes == 1  # progress counts images, not passes
        start, offset = time.perf_counter(), 0
        for category, source in parts:
            for host, maps in reader.read(source, f"{category}/train", keep=keep):
                self.seconds += time.perf_counter() - start
                tick(int(host.valid.sum()) if first else 0)
                index = np.where(host.valid, host.index + offset, -1)
                yield FeatureBatch(maps, host.valid, category, index)
                start = time.perf_counter()
            offset += len(source)
