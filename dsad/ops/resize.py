"""Resampling and smoothing of maps and feature grids: small fixed matrices, one per axis."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsad.core.errors import ConfigError

Size = tuple[int, int]


@functools.lru_cache(maxsize=64)
def _bilinear(source: int, target: int, align_corners: bool) -> np.ndarray:
    """Weights (target, source) of linear interpolation, clamped at the borders, no antialias."""
    out = np.arange(target, dtype=np.float64)
    if align_corners:
        at = out * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        at = np.clip((out + 0.5) * source / target - 0.5, 0.0, source - 1)
    low = np.minimum(np.floor(at).astype(np.int64), max(source - 2, 0))
    share = at - low
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1.0 - share)
    np.add.at(weights, (np.arange(target), np.minimum(low + 1, source - 1)), share)
    return weights.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _nearest(source: int, target: int) -> np.ndarray:
    """Source index (target,) of each target cell: the cell its centre lies in."""
    centre = (np.arange(target, dtype=np.float64) + 0.5) * source / target
    return np.minimum(np.floor(centre), source - 1).astype(np.int32)


def cubic(t: Any, a: float) -> Any:
    """Keys' cubic kernel at distances ``t`` ≥ 0 in samples, of numpy or jax arrays alike.

    Keys 1981; a = -0.5 is Pillow's, a = -0.75 that of torch without antialiasing.
    """
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return near * (t <= 1) + far * ((t > 1) & (t < 2))


def resize_maps(maps: jax.Array, size: Size, align_corners: bool = False) -> jax.Array:
    """Bilinear resampling of maps (b, h, w) to (b, H, W), without antialiasing.

    The default places samples at half-pixel centres (PatchCore's rule); ``align_corners`` maps
    corner samples onto corner samples (PaDiM's and CFLOW's rule). Borders are clamped.
    """
    maps = _float(maps, 3, "resize_maps")
    _check_size(size)
    rows = jnp.asarray(_bilinear(maps.shape[1], size[0], align_corners))
    columns = jnp.asarray(_bilinear(maps.shape[2], size[1], align_corners))
    return _along_both(maps[..., None], rows, columns)[..., 0]


def match_grid(
    features: jax.Array, size: Size, method: Literal["bilinear", "nearest"] = "bilinear"
) -> jax.Array:
    """Bring features (b, h, w, d) to the grid (H, W) of another layer.

    ``bilinear`` uses half-pixel centres; ``nearest`` repeats the cell each centre falls into.
    """
    features = _float(features, 4, "match_grid")
    _check_size(size)
    height, width = features.shape[1:3]
    if (height, width) == tuple(size):
        return features
    if method == "nearest":
        picked = jnp.take(features, jnp.asarray(_nearest(height, size[0])), axis=1)
        return jnp.take(picked, jnp.asarray(_nearest(width, size[1])), axis=2)
    if method != "bilinear":
        raise ConfigError(f"match_grid.method: expected 'bilinear' or 'nearest', found {method!r}.")
    rows = jnp.asarray(_bilinear(height, size[0], False))
    columns = jnp.asarray(_bilinear(width, size[1], False))
    return _along_both(features, rows, columns)


def _along_both(features: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    wide = jnp.einsum("Ww,bhwd->bhWd", columns, features, precision=lax.Precision.HIGHEST)
    return jnp.einsum("Hh,bhWd->bHWd", rows, wide, precision=lax.Precision.HIGHEST)


def gaussian_smooth(maps: jax.Array, sigma: float, truncate: float = 4.0) -> jax.Array:
    """Gaussian blur of maps (b, h, w), cut at ``truncate`` sigmas and normalised.

    Beyond a border the map is mirrored with the edge pixel repeated, as often as needed. ``sigma``
    is in pixels and static; 0 returns the maps unchanged.
    """
    maps = _float(maps, 3, "gaussian_smooth")
    if sigma < 0 or truncate <= 0:
        raise ConfigError(
            f"gaussian_smooth: expected sigma >= 0 and truncate > 0, found {sigma} and {truncate}."
        )
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return maps
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    return _convolve(_convolve(maps, taps, 1), taps, 2)


def _convolve(maps: jax.Array, taps: np.ndarray, axis: int) -> jax.Array:
    """Mirror-padded convolution with symmetric ``taps`` along one axis, as a sum of slices."""
    radius, length = taps.size // 2, maps.shape[axis]
    position = np.arange(-radius, length + radius) % (2 * length)
    mirrored = np.where(position < length, position, 2 * length - 1 - position)
    padded = jnp.take(maps, jnp.asarray(mirrored, jnp.int32), axis=axis)

    def part(start: int) -> jax.Array:
        return lax.slice_in_dim(padded, start, start + length, axis=axis)

    total = part(radius) * np.float32(taps[radius])
    for offset in range(1, radius + 1):
        pair = part(radius - offset) + part(radius + offset)
        total = total + pair * np.float32(taps[radius + offset])
    return total


def neighbourhood_mean(
    features: jax.Array, size: int = 3, count_normalised: bool = True
) -> jax.Array:
    """Mean of features (b, h, w, d) over the size × size cells around each cell.

    At the borders the mean runs over the cells that exist; with ``count_normalised`` False the
    missing cells count as zeros, which dims the borders (PatchCore's published code).
    """
    features = _float(features, 4, "neighbourhood_mean")
    if size < 1 or size % 2 == 0:
        raise ConfigError(f"neighbourhood: expected an odd number >= 1, found {size}.")
    if size == 1:
        return features
    reach = size // 2
    total = features
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (reach, reach)
        padded, length = jnp.pad(total, pads), total.shape[axis]
        total = sum(
            (lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(1, size)),
            start=lax.slice_in_dim(padded, 0, length, axis=axis),
        )
    rows, columns = (_cells(n, reach) for n in features.shape[1:3])
    count = rows[:, None] * columns[None, :] if count_normalised else np.full((1, 1), size**2)
    return total / jnp.asarray(count[None, :, :, None], jnp.float32)


def _cells(length: int, reach: int) -> np.ndarray:
    at = np.arange(length)
    return np.minimum(at + reach, length - 1) - np.maximum(at - reach, 0) + 1


def _float(values: jax.Array, rank: int, what: str) -> jax.Array:
    values = jnp.asarray(values, jnp.float32)
    if values.ndim != rank or 0 in values.shape:
        axes = "(b, h, w)" if rank == 3 else "(b, h, w, d)"
        raise ConfigError(f"{what}: expected a non-empty {axes} array, found {values.shape}.")
    return values


def _check_size(size: Size) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"size: expected (height, width) of at least 1, found {size}.")


def top_count(share: float, pixels: int) -> int:
    """⌈share · pixels⌉, where a product that is whole but for rounding counts as whole."""
    return max(1, math.ceil(round(share * pixels, 6)))
