"""From files to anomaly maps: decoding ahead, compiled features and scores, geometry."""

import concurrent.futures
import dataclasses
import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh

from dsad.core.config import check_options
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import replicated
from dsad.core.types import Detector, FeatureBatch, FeatureMaps, Sample, Scores, Source, Tree
from dsad.evaluation import metrics
from dsad.evaluation.extract import Extractor, fetched, placed
from dsad.ops import resize


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How numbers are measured; everything here that changes their meaning is in the stamp."""

    #: Side in pixels of the square network input; `dsad evaluate` takes 0 for the backbone's own.
    image_size: int = 224
    #: Images per device step over the whole mesh; rounded up to a multiple of its devices.
    batch_size: int = 32
    #: Standard deviation of the Gaussian on the upsampled map, in pixels at ``image_size``.
    sigma: float = 4.0
    #: Cell centres (False) or corner cells (True) are placed at the border when upsampling.
    align_corners: bool = False
    #: AUPRO integrates up to this false-positive rate; 0.05 is always measured as well.
    fpr_limit: float = 0.3
    #: Pixel numbers by sorting ("exact") or by counting ("streaming"), within 1e-5 of each other.
    method: metrics.Method = "exact"
    #: Anomalous images per category kept for the report: a third each best, median and worst.
    gallery: int = 9
    #: Threads that read, decode and resize.
    workers: int = 4
    #: Share of normal images (and of their pixels) that the thresholds may flag; 0: no thresholds.
    false_alarm_rate: float = 0.0
    #: With a false-alarm rate, every so manieth training image is kept from the detector.
    holdout: int = 5
    #: Save every anomaly map on original pixels: float32 TIFF, or 16-bit PNG with its scale.
    save_maps: Literal["none", "tiff", "png"] = "none"
    #: Features of one category that stay on the devices for further passes and seeds, in MiB.
    cache_mb: int = 1024

    def __post_init__(self) -> None:
        check_options(self, "evaluation")
        for field in ("batch_size", "workers"):
            if getattr(self, field) < 1:
                raise ConfigError(f"evaluation.{field}: expected ≥ 1, found {getattr(self, field)}")
        for field in ("image_size", "sigma", "gallery", "cache_mb"):
            if getattr(self, field) < 0:
                raise ConfigError(f"evaluation.{field}: expected ≥ 0, found {getattr(self, field)}")
        if not 0 <= self.false_alarm_rate < 1:
            raise ConfigError(
                f"evaluation.false_alarm_rate: expected in [0, 1), found {self.false_alarm_rate}"
            )
        if self.holdout < 2:
            raise ConfigError(
                f"evaluation.holdout: expected ≥ 2 (every second image), found {self.holdout}"
            )
        if not 0 < self.fpr_limit <= 1:
            raise ConfigError(f"evaluation.fpr_limit: expected in (0, 1], found {self.fpr_limit}")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of one row of numbers; the last follow the limits."""
        kinds = ("auroc", "ap", "f1_max")
        names = [f"{unit}_{kind}" for unit in ("image", "pixel") for kind in kinds]
        return (*names, *(metrics.aupro_key(limit) for limit in self.fpr_limits))

    @property
    def fpr_limits(self) -> tuple[float, ...]:
        """The chosen limit, and the strict one of newer data sets."""
        return tuple(dict.fromkeys((self.fpr_limit, 0.05)))


def check_smoothing(detector: Any, config: EvalConfig) -> None:
    """Refuse a second Gaussian on the maps of a detector that has one of its own (``smooths``)."""
    if config.sigma > 0 and getattr(detector, "smooths", False):
        raise ConfigError(
            "evaluation.sigma: this detector smooths its maps itself (detector.sigma); expected 0, "
            f"found {config.sigma:g}. Set --config.evaluation.sigma=0."
        )


# --- geometry -------------------------------------------------------------------------------


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) uint8 to (size, size, 3) uint8: Pillow's antialiased bilinear, aspect not kept."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"expected a (h, w, 3) uint8 image, found {image.shape} {image.dtype}")
    picture = PIL.Image.fromarray(image)
    return np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR))


def input_affine(height: int, width: int, size: int) -> np.ndarray:
    """(2, 3) map from original (x, y) to network input, continuous: pixel centres are at + 1/2."""
    return np.array([[size / width, 0, 0], [0, size / height, 0]], np.float64)


def to_original(scores: np.ndarray, affine: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear sample of a map (s, s) at the centres of the original pixels: (height, width) f32.

    ``affine`` is axis-parallel, as ``input_affine`` gives it; beyond the outer centres the edge
    value continues.
    """
    rows = _positions(affine[1, 1], affine[1, 2], height, scores.shape[0])
    columns = _positions(affine[0, 0], affine[0, 2], width, scores.shape[1])
    values = scores.astype(np.float32)
    low, high, part = rows
    values = values[low] + (values[high] - values[low]) * part[:, None]
    low, high, part = columns
    return values[:, low] + (values[:, high] - values[:, low]) * part[None, :]


def _positions(
    scale: float, offset: float, n: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper cell, and the weight of the upper, for n pixel centres."""
    at = np.clip((np.arange(n) + 0.5) * scale + offset - 0.5, 0, size - 1)
    low = np.minimum(np.floor(at).astype(np.int64), max(size - 2, 0))
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)


# --- host and device ------------------------------------------------------------------------


class HostBatch(NamedTuple):
    """A fixed-size batch; ``shapes`` and ``masks`` belong to its valid rows."""

    images: np.ndarray  # (b, s, s, 3) uint8
    valid: np.ndarray  # (b,) bool
    index: np.ndarray  # (b,) int, -1 for padding
    shapes: list[tuple[int, int]]
    masks: list[np.ndarray | None]


def batches(source: Source, config: EvalConfig, batch: int) -> Iterator[HostBatch]:
    """Batches of a fixed size in source order, decoded ahead by threads; the last is padded."""

    def prepare(index: int) -> tuple[Sample, np.ndarray]:
        sample = source[index]
        return sample, resize_image(sample.image, config.image_size)

    ahead = batch + 2 * config.workers
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        waiting: deque[concurrent.futures.Future[tuple[Sample, np.ndarray]]] = deque()
        upcoming = iter(range(len(source)))
        try:
            for start in range(0, len(source), batch):
                rows = range(start, min(start + batch, len(source)))
                images = np.zeros((batch, config.image_size, config.image_size, 3), np.uint8)
                shapes, masks = [], []
                for row in range(len(rows)):
                    while len(waiting) < ahead and (index := next(upcoming, None)) is not None:
                        waiting.append(pool.submit(prepare, index))
                    sample, images[row] = waiting.popleft().result()
                    shapes.append(sample.image.shape[:2])
                    masks.append(sample.mask)
                index = np.full(batch, -1, np.int64)
                index[: len(rows)] = rows
                yield HostBatch(images, index >= 0, index, shapes, masks)
        finally:
            for future in waiting:
                future.cancel()


class Device:
    """The compiled parts of a run: features, scores, maps at network input size.

    Every part is compiled once per combination of shapes, so categories whose detector states have
    equal shapes share one program. A detector whose ``score`` takes ``mesh`` gets it when there
    are several devices.
    """

    def __init__(self, backbone: Any, detector: Detector, config: EvalConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        self.batch = -(-config.batch_size // mesh.size) * mesh.size
        self.layers = tuple(detector.layers)
        side = (config.image_size, config.image_size)

        def finish(cells: jax.Array) -> jax.Array:
            maps = resize.resize_maps(cells, side, align_corners=config.align_corners)
            return resize.gaussian_smooth(maps, config.sigma) if config.sigma > 0 else maps

        score: Callable[..., Scores] = detector.score
        if mesh.size > 1 and "mesh" in inspect.signature(score).parameters:
            score = functools.partial(score, mesh=mesh)
        self._score = jax.jit(score)
        self._finish = jax.jit(
            lambda scores: Scores(map=finish(scores.map), image=scores.image),
            out_shardings=fetched(mesh),
        )
        self._features = Extractor(self.layers, config.image_size, mesh)
        self._panels: Extractor | None = None
        more: Any = detector  # optional, not part of the seam: see ``evaluation.panels``
        if config.gallery > 0 and hasattr(more, "panels"):
            self._panels = Extractor(more.panel_layers, config.image_size, mesh, more.panels)
        self.use(backbone)

    def use(self, backbone: Any) -> None:
        """Take another backbone; one of the same architecture needs no new program."""
        backbone = placed(backbone, self.mesh)  # once for both
        self._features.use(backbone)
        if self._panels:
            self._panels.use(backbone)

    def features(self, images: np.ndarray) -> FeatureMaps:
        """Feature maps of uint8 images, ready."""
        return self._features(images)

    def panels(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the detector shows of uint8 images beside its map; nothing for most detectors."""
        found = self._panels(images) if self._panels else {}
        return {n: np.asarray(x, np.float32) for n, x in found.items()}

    def place(self, state: Tree) -> Tree:
        """The detector's state on the mesh: what is not there yet is replicated."""
        devices = set(self.mesh.devices.flat)

        def put(x: Any) -> Any:
            there = isinstance(x, jax.Array) and x.sharding.device_set == devices
            return x if there else jax.device_put(x, replicated(self.mesh))

        return jax.tree.map(put, state)

    def score(self, state: Tree, maps: FeatureMaps) -> tuple[np.ndarray, np.ndarray]:
        """Maps (b, s, s) and image scores (b,) f32."""
        scores = self._finish(self._score(state, maps))
        return np.asarray(scores.map, np.float32), np.asarray(scores.image, np.float32)


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
        for host in batches(source, self.config, self.device.batch):
            maps = self.device.features(host.images)
            if keep:
                size += sum(x.nbytes for x in maps.values())
                size += sum(m.nbytes for m in host.masks if m is not None)
                if keep := self.kept_bytes + size <= self.limit:
                    made.append((host._replace(images=host.images[:0]), maps))
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
