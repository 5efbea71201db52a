"""Gaussian density of patch embeddings: the second stage of DS2, after CutPaste's.

Li et al., "CutPaste" (CVPR 2021) and He et al., "Learning Transferable Representations for Image
Anomaly Localization Using Dense Pretraining" (WACV 2024): patches are embedded, a PCA and a
Ledoit-Wolf Gaussian are fitted to those of normal images, the score of a patch is its Mahalanobis
distance, and a transposed convolution turns patch scores into pixels. In principal coordinates the
covariance is diagonal, so nothing is inverted: score² = Σ z² / ((1 - s) λ + s μ).
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores, highest
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import Cells, DetectorConfig, FeatureDetector, joined
from dsad.ops import gaussian, similarity

#: Rows whose moments are taken at once.
ROWS = 2**14


class Config(DetectorConfig):
    """How patches are modelled and how their scores become a map.

    Attributes:
      layers: embeddings to concatenate; the result is brought to unit length.
      per_position: one Gaussian for every patch position (aligned objects) or one for all
        (textures).
      components: of the PCA; 0 for none: then directions without variance count as well, by the
        shrinkage alone.
      images: at most that many normal images, a random subset; 0 takes all.
      patch, stride: in pixels, as in the backbone ``patches:PATCH/STRIDE:...``.
      normalise: divides the map by the coverage of each pixel; False fades towards the borders as
        the published code does.
      floor: per position, the smallest mean variance, as a fraction of that of an average position;
        a position below it (background that is saturated in every image) takes that variance in all
        directions. 0 is the published rule and refuses such positions.
      cache_gb: a global fit passes over the features twice, and keeps them on the host between the
        passes where they fit into that many GB.

    """

    layers: tuple[str, ...] = field(("layer4",), distinct=True, filled=True)
    sigma: float = field(0.0, at_least=0)
    per_position: bool = True
    components: int = field(200, at_least=0)
    images: int = field(350, at_least=0)
    patch: int = field(32, at_least=2)
    stride: int = field(4, at_least=1)
    normalise: bool = True
    floor: float = field(0.01, at_least=0)
    cache_gb: float = field(2.0, at_least=0)

    def check(self) -> None:
        if self.patch % 2:
            raise Refused("patch", "an even number", self.patch)
        if self.stride > self.patch:
            raise Refused("stride", f"at most detector.patch = {self.patch}", self.stride)


class Gde(FeatureDetector[Config]):
    """The detector; its state is the mean and a factor of the inverse covariance.

    {"mean": (gh, gw, d), "factor": (gh, gw, d, k)}, without the grid for a global model; without
    PCA and with fewer images than dimensions {"mean", "basis", "scale"} of a damped projection.
    """

    @property
    def traits(self) -> DetectorTraits:
        """The patches that its maps are laid out for, and the images that span its components."""
        least = max(2, self.config.components + 1) if self.config.per_position else 1
        patches = f"{self.config.patch}/{self.config.stride}"
        positions = self.config.per_position
        return dataclasses.replace(
            super().traits, patches=patches, least_images=least, positions=positions,
            leaves_out=not positions,
        )  # fmt: skip

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Unit vectors (b, gh, gw, d) of the joined layers."""
        return similarity.unit(joined(features, self.layers))

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Mean and shrunk covariance of the normal images' patches, on the host in float64.

        Per position the embeddings of all images are held at once (images × gh × gw × d float32);
        a global model streams, in memory independent of the number of images. The subset of
        ``images`` images is drawn from (key, sample index) and is the same for any order of the
        source. Raises DataError for too few images or patches without any variance.
        """
        key = rng.named(key, "gde images")
        blocks = _Cache(lambda: self._cells(source), self.config)
        fit = self._fit_positions if self.config.per_position else self._fit_global
        return jax.tree.map(jnp.asarray, fit(blocks, key))

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, H, W) in input pixels, see ``patch_heatmap``; image (b,): largest patch score.

        The image score is taken before the map is smoothed, as published.
        """
        scores = patch_scores(state, self.embed(features))
        maps = gaussian.patch_heatmap(
            scores, self.config.patch, self.config.stride, normalise=self.config.normalise
        )
        return Scores(map=maps, image=highest(scores, inside))

    # --- fitting

    def _fit_positions(self, blocks: "_Cache", key: jax.Array) -> Tree:
        kept: list[tuple[int, np.ndarray]] = []
        category, grid, most = "", (0, 0), self.config.images
        for block in blocks:
            values, index, category = block.values, block.index, block.category
            grid = values.shape[1:3]
            # Once images are dropped, a view would hold those beside it.
            drops = bool(most) and len(kept) + len(index) > most
            flat = values.reshape(len(values), -1, values.shape[-1])
            kept += [(int(i), v.copy() if drops else v) for i, v in zip(index, flat, strict=True)]
            if drops:
                kept = [kept[i] for i in _lowest(key, np.array([i for i, _ in kept]), most)]
        if len(kept) < 2:
            raise DataError(f"detector gde: expected at least 2 normal images, found {len(kept)}.")
        rows = [v for _, v in sorted(kept, key=lambda pair: pair[0])]
        depth = rows[0].shape[-1]
        wanted = self._components(len(rows), depth, category)
        found = gaussian.principal(rows, wanted or min(len(rows), depth))
        state = self._state(found, len(rows), depth)
        return {n: v.reshape(*grid, *v.shape[1:]) for n, v in state.items()}

    def _fit_global(self, blocks: "_Cache", key: jax.Array) -> Tree:
        seen: list[np.ndarray] = []
        total = _moments(blocks, None, seen)
        index = np.concatenate(seen) if seen else np.zeros(0, np.int64)
        chosen = index[_lowest(key, index, self.config.images)]
        if len(chosen) < len(index):
            total = _moments(blocks, chosen, [])
        if total is None or total.count < 2:
            found = 0 if total is None else total.count
            raise DataError(f"detector gde: expected at least 2 normal patches, found {found}.")
        depth = len(total.mean)
        wanted = self._components(total.count, depth, "the source") or min(total.count, depth)
        basis, variances = gaussian.principal_axes(total, wanted)
        mean, axes = jnp.asarray(total.mean, jnp.float32), jnp.asarray(basis, jnp.float32)
        fourth = 0.0
        for block in blocks:
            used = np.isin(block.index, chosen)
            if used.any():
                values, counted = block.values[used], _counted(block)[used]
                means = _fourth(jnp.asarray(values), jnp.asarray(counted), mean, axes)
                fourth += float(np.asarray(means, np.float64) @ counted.sum(axis=1))
        mean_fourth = np.asarray(fourth / total.count)
        principal = gaussian.Principal(total.mean, basis, variances, mean_fourth)
        return self._state(principal, total.count, depth)

    def _components(self, count: int, depth: int, category: str) -> int:
        most = min(count - 1, depth)
        if self.config.components > most:
            raise DataError(
                f"detector gde: components = {self.config.components}, but {count} normal rows of "
                f"{category} with {depth} features span at most {most} dimensions. Set "
                f"--config.detector.components={most} or lower, or 0 for no PCA."
            )
        return self.config.components

    def _state(self, found: gaussian.Principal, count: int, depth: int) -> dict[str, np.ndarray]:
        size = found.variances.shape[-1]
        dimensions = size if self.config.components else depth
        shrinkage, mu = gaussian.ledoit_wolf(found.variances, found.fourth, count, dimensions)
        least = self.config.floor * np.mean(mu)
        low = mu < least
        if low.any():  # per position only: a single mean is never below a part of itself
            shrinkage, mu = np.where(low, 1.0, shrinkage), np.where(low, least, mu)
            found.basis[low] = _pooled_axes(found, ~low, size) if self.config.components else 0
        floor = shrinkage * mu
        variances = (1 - shrinkage)[..., None] * found.variances + floor[..., None]
        damped = not self.config.components and count <= depth
        smallest = floor if damped else variances.min(axis=-1)
        if flat := int(np.sum(smallest <= 0)):
            raise DataError(
                f"detector gde: the normal patches of {flat} of {smallest.size} positions do not "
                "vary in every direction that is modelled, so that distances are infinite. Raise "
                "--config.detector.floor, lower --config.detector.components, or set "
                "--config.detector.per_position=False."
            )
        mean = found.mean.astype(np.float32)
        if damped:
            gain = np.sqrt(1 - np.sqrt(floor[..., None] / variances))
        else:
            gain = 1 / np.sqrt(variances)
        # In place: the axes of all positions are the largest array of a fit.
        factor = found.basis
        factor *= gain[..., None, :].astype(factor.dtype)
        factor = factor.astype(np.float32, copy=False)
        if not damped:
            return {"mean": mean, "factor": factor}
        return {"mean": mean, "basis": factor, "scale": (1 / np.sqrt(floor)).astype(np.float32)}


def patch_scores(state: Tree, embedded: jax.Array) -> jax.Array:
    """Mahalanobis distances (b, gh, gw) of embedded patches (b, gh, gw, d)."""
    if state["mean"].ndim == 1:
        rows = embedded.reshape(-1, embedded.shape[-1])
        return _distance(rows, state).reshape(embedded.shape[:3])
    return gaussian.per_position(embedded, state, _distance)


class _Cache:
    """A re-iterable of ``Cells``; later passes come from memory where all of it fits."""

    def __init__(self, make: Callable[[], Iterator[Cells]], config: Config):
        self._make = make
        self._budget = 0 if config.per_position else int(config.cache_gb * 1e9)
        self._kept: list[Cells] | None = None

    def __iter__(self) -> Iterator[Cells]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for block in self._make():
            size += block.values.nbytes
            if size <= self._budget:
                kept.append(block)
            else:
                kept = []
            yield block
        if size <= self._budget:
            self._kept = kept


def _pooled_axes(found: gaussian.Principal, places: np.ndarray, size: int) -> np.ndarray:
    """Leading axes (d, size) of the covariance averaged over at most 64 of ``places``."""
    picked = np.nonzero(places)[0]
    picked = picked[:: -(-len(picked) // 64)]
    scaled = found.basis[picked] * np.sqrt(found.variances[picked])[:, None, :]
    flat = np.moveaxis(scaled, 1, 0).reshape(scaled.shape[1], -1).astype(np.float64)
    return np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :size]


def _moments(
    blocks: _Cache, chosen: np.ndarray | None, seen: list[np.ndarray]
) -> gaussian.Moments | None:
    """Moments of all patches of the ``chosen`` images (None: all); notes the indices met."""
    total = None
    for block in blocks:
        seen.append(block.index)
        counted = _counted(block)
        if chosen is not None:
            counted = counted & np.isin(block.index, chosen)[:, None]
        rows = block.values.reshape(-1, block.values.shape[-1])[counted.ravel()]
        for at in range(0, len(rows), ROWS):
            part = gaussian.moments(rows[at : at + ROWS])
            total = part if total is None else gaussian.merge(total, part)
    return total


def _lowest(key: jax.Array, index: np.ndarray, most: int) -> np.ndarray:
    """Places (≤ most) of the images with the lowest random priorities; all when ``most`` is 0."""
    if not most or len(index) <= most:
        return np.arange(len(index))
    return rng.lowest(np.stack([rng.priorities(key, index), index]), most)


def _counted(block: Cells) -> np.ndarray:
    return block.counted(block.values.shape[1:3])


@jax.jit
def _fourth(
    values: jax.Array, counted: jax.Array, mean: jax.Array, basis: jax.Array
) -> jax.Array:  # fmt: skip
    """Mean (n,) over the patches of each image that count of |z|⁴."""

    def one(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, used = image
        z = jnp.matmul(rows - mean[None, :], basis, precision=lax.Precision.HIGHEST)
        powers = jnp.square(jnp.sum(jnp.square(z), axis=1))
        return jnp.sum(jnp.where(used, powers, 0)) / jnp.sum(used, dtype=jnp.float32)

    return lax.map(one, (values.reshape(len(values), -1, values.shape[-1]), counted))


def _distance(rows: jax.Array, state: Tree) -> jax.Array:
    if "factor" in state:
        return gaussian.mahalanobis(rows, state["mean"], state["factor"])
    return gaussian.damped_mahalanobis(rows, state["mean"], state["basis"], state["scale"])


build = Gde
