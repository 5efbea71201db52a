"""Patch features: what a cell and those around it hold, of several layers."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import field
from dsad.core.types import FeatureMaps
from dsad.detectors._features import DetectorConfig, on_one_grid, select
from dsad.ops.resize import neighbourhood_mean


class PatchConfig(DetectorConfig):
    """Which features a detector reads, and how they become one vector per cell.

    Attributes:
      layers: feature maps to use, on the grid of the first.
      neighbourhood: side of the square of cells around each cell.
      pooling: "concat" joins the means over the square of all layers; "published" (PatchCore's
        code, and those that followed it) flattens each square channel by channel, averages it to
        ``level_dim`` values and the joined layers to ``pooled_dim``, by adaptive bins.
      level_dim, pooled_dim: values per layer, and of all layers, of ``pooling`` "published".
      zero_borders: cells beyond the border count as zeros, as published, instead of not at all.

    """

    layers: tuple[str, ...] = field(("layer2", "layer3"), distinct=True, filled=True)
    neighbourhood: int = field(3, at_least=1, odd=True)
    pooling: Literal["concat", "published"] = "concat"
    level_dim: int = field(1024, at_least=1)
    pooled_dim: int = field(1024, at_least=1)
    zero_borders: bool = False


def patch_features(features: FeatureMaps, cfg: PatchConfig) -> jax.Array:
    """Cell descriptors (b, gh, gw, d), on the grid of the first layer."""
    maps, counted = select(features, cfg.layers), not cfg.zero_borders
    if cfg.pooling == "published":
        means = [pooled_neighbourhoods(m, cfg.neighbourhood, cfg.level_dim, counted) for m in maps]
        return adaptive_mean(on_one_grid(means), cfg.pooled_dim)
    return on_one_grid([neighbourhood_mean(m, cfg.neighbourhood, counted) for m in maps])


def adaptive_mean(values: jax.Array, size: int) -> jax.Array:
    """Means (..., size) of bins of the last axis: bin i is floor(i·n/size) to ceil((i+1)·n/size).

    Bins overlap where ``size`` does not divide n, and repeat values where it is larger.
    """
    values = jnp.asarray(values, jnp.float32)
    length = values.shape[-1]
    if length == size:
        return values
    number = np.arange(size)
    low, high = number * length // size, -(-(number + 1) * length // size)
    total = jnp.zeros((*values.shape[:-1], size), jnp.float32)
    for step in range(int((high - low).max())):
        inside = jnp.asarray(low + step < high)
        part = jnp.take(values, jnp.asarray(np.minimum(low + step, length - 1)), axis=-1)
        total = total + part * inside.astype(jnp.float32).reshape((1,) * (values.ndim - 1) + (-1,))
    count = jnp.asarray((high - low).astype(np.float32)).reshape((1,) * (values.ndim - 1) + (-1,))
    return total / count


def pooled_neighbourhoods(
    features: jax.Array, size: int, dim: int, count_normalised: bool = True
) -> jax.Array:
    """The published patch features (b, h, w, dim) of maps (b, h, w, c).

    The size × size cells around each cell, flattened channel by channel and averaged to ``dim``
    values by adaptive bins. Cells beyond the border are zeros; with ``count_normalised`` they are
    left out of the means (a bin without any other cell is 0).
    """
    pooled = adaptive_mean(_unfolded(features, size), dim)
    if not count_normalised:
        return pooled
    share = adaptive_mean(_unfolded(jnp.ones((1, *features.shape[1:])), size), dim)
    return jnp.where(share > 0, pooled / jnp.maximum(share, 1e-6), 0.0)


def _unfolded(features: jax.Array, size: int) -> jax.Array:
    """Neighbourhoods (b, h, w, c · size²), channel major, rows before columns, zero-padded."""
    reach, (height, width) = size // 2, features.shape[1:3]
    padded = jnp.pad(features, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    parts = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.stack(parts, axis=-1).reshape(*features.shape[:3], -1)
