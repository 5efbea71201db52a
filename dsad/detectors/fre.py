"""FRE: the part of the features that a linear subspace of the normal ones cannot reconstruct.

Ndiour et al., "FRE: A Fast Method For Anomaly Detection And Segmentation" (2022): u is projected
onto the leading principal axes W of the normal features, û = μ + Wᵀ W (u - μ); the map is the
squared error e = u - û summed over channels, the image score the sum of the map.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core.config import field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores, within
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import Cells, DetectorConfig, FeatureDetector, select
from dsad.detectors._subspace import (
    Moments,
    Subspace,
    bucketed,
    leading,
    patch_errors,
    subspace,
)
from dsad.ops.resize import resize_maps


class Config(DetectorConfig):
    """Which features are reconstructed, and from how many axes.

    Attributes:
      layers: feature maps, each with a subspace of its own.
      mode: "image" takes a whole map as one vector (positions matter: aligned objects), "patch" the
        cells of all positions alike (textures, unaligned objects).
      pool: side of the square of cells averaged first.
      variance: share of the normal features' variance that the axes explain.
      components: unless 0, the number of axes instead.
      balance: with several layers, divide the errors of each by its total variance over the normal
        images, so that no layer outweighs the others by scale; a single layer keeps its squared
        errors.

    """

    layers: tuple[str, ...] = field(("layer3",), distinct=True, filled=True)
    sigma: float = field(0.0, at_least=0)
    mode: Literal["image", "patch"] = "image"
    pool: int = field(2, at_least=1)
    variance: float = field(0.97, above=0, at_most=1)
    components: int = field(0, at_least=0)
    balance: bool = True


#: By layer: the shape of what is one vector there, and its subspace.
Subspaces = dict[str, tuple[tuple[int, ...], Subspace]]


class Fre(FeatureDetector[Config]):
    """The detector; its state is {layer: {"mean", "axes", "weight"}}, float32.

    "mean" is (gh, gw, d) in mode "image" and (d,) in mode "patch"; "axes" has a leading axis of r
    rows, filled up with zero rows, which change nothing, to a bucket of at least 32: so categories
    share compiled programs. "weight" is a factor on the squared errors.
    """

    @property
    def traits(self) -> DetectorTraits:
        """A single image has no variance; of maps as vectors every place is a part."""
        whole = self.config.mode == "image"
        return dataclasses.replace(
            super().traits, least_images=2, positions=whole, leaves_out=not whole, seeded=False
        )

    def embed(self, features: FeatureMaps) -> dict[str, jax.Array]:
        """Pooled maps {layer: (b, gh, gw, d)} of a batch."""
        maps = select(features, self.layers)
        return {n: pooled(m, self.config.pool) for n, m in zip(self.layers, maps, strict=True)}

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Mean and principal axes of the normal images, computed in float64 on the host.

        Mode "image" keeps the pooled maps of all n images (4 · n · D bytes) and an n × n matrix
        (D × D if that is smaller), in float64; mode "patch" streams over the images and keeps a
        d × d matrix. Raises DataError with fewer than 2 images, or NaN or infinite features.
        """
        parts = self._cells(source)
        count, found = (self._images if self.config.mode == "image" else self._patches)(parts)
        if count < 2:
            raise DataError(
                f"detector fre: expected at least 2 normal images, found {count}. Check the train "
                "split."
            )
        several = self.config.balance and len(self.layers) > 1
        state = {}
        for name, (grid, space) in found.items():
            weight = 1.0 / space.total if several and space.total > 0 else 1.0
            axes = bucketed(space.axes)
            state[name] = {
                "mean": jnp.asarray(space.mean.reshape(grid)),
                "axes": jnp.asarray(axes.reshape(len(axes), *grid)),
                "weight": jnp.asarray(weight, jnp.float32),
            }
        return state

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Squared errors: map (b, gh, gw) on the first layer's pooled grid, image (b,) their sum.

        Maps of further layers are brought to that grid bilinearly and scaled by the ratio of the
        cell counts, which keeps their sum where one grid divides the other; then they are added.
        """
        maps, image = [], []
        for name, values in self.embed(features).items():
            errors = state[name]["weight"] * self._errors(state[name], values)
            counted = errors if inside is None else errors * within(inside, errors.shape[1:])
            image.append(jnp.sum(counted, axis=(1, 2)))
            grid = maps[0].shape[1:] if maps else errors.shape[1:]
            if errors.shape[1:] != grid:
                share = errors.shape[1] * errors.shape[2] / (grid[0] * grid[1])
                errors = share * resize_maps(errors, grid)
            maps.append(errors)
        return Scores(map=sum(maps[1:], start=maps[0]), image=sum(image[1:], start=image[0]))

    def _errors(self, state: Tree, values: jax.Array) -> jax.Array:
        """Σ_c e² of pooled maps (b, gh, gw, d): (b, gh, gw)."""
        if self.config.mode == "patch":
            return patch_errors(state["mean"], state["axes"], values)
        high = lax.Precision.HIGHEST
        centred = values - state["mean"][None]
        weights = jnp.einsum("bhwd,rhwd->br", centred, state["axes"], precision=high)
        inside = jnp.einsum("br,rhwd->bhwd", weights, state["axes"], precision=high)
        return jnp.sum(jnp.square(centred - inside), axis=3)

    def _images(self, parts: Iterable[Cells]) -> tuple[int, Subspaces]:
        kept = list(parts)
        if not kept:
            return 0, {}
        # In the order of the samples, so that the order of the source does not even touch rounding.
        index = np.concatenate([part.index for part in kept])
        category = np.concatenate([[part.category] * len(part.index) for part in kept])
        order = np.lexsort((index, category))
        found = {}
        for name in self.layers if len(index) > 1 else ():
            rows = np.concatenate([part.values[name] for part in kept])[order]
            space = subspace(rows.reshape(len(rows), -1), self._count)
            found[name] = rows.shape[1:], space
        return len(index), found

    def _patches(self, parts: Iterable[Cells]) -> tuple[int, Subspaces]:
        images, moments = 0, {}
        for part in parts:
            images += len(part.index)
            for name in self.layers:
                values = part.values[name]
                rows = values.reshape(-1, values.shape[3])[part.counted(values.shape[1:3]).ravel()]
                moments.setdefault(name, Moments(rows)).add(rows)
        found = {n: ((len(m.shift),), m.subspace(self._count)) for n, m in moments.items()}
        return images, found

    def _count(self, variances: np.ndarray) -> int:
        """How many axes to keep, from all variances in descending order."""
        return leading(variances, self.config.variance, self.config.components)


def pooled(maps: jax.Array, side: int) -> jax.Array:
    """Means of maps (b, h, w, d) over squares of ``side`` cells; incomplete squares are dropped."""
    _, height, width, depth = maps.shape
    rows, columns = height // side, width // side
    if min(rows, columns) < 1:
        raise ConfigError(
            f"config.detector.pool: {side} exceeds the grid {(height, width)} of a layer."
        )
    whole = maps[:, : rows * side, : columns * side]
    blocks = whole.reshape(maps.shape[0], rows, side, columns, side, depth)
    return jnp.mean(blocks, axis=(2, 4))


build = Fre
