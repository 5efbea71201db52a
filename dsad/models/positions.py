"""Positions of vision transformers: tables, fixed ones too, for any grid, and rotations."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsad.ops.resize import cubic

#: How a table is brought to another grid, all bicubic. "antialias": Keys' kernel with a = -0.5,
#: widened when shrinking (timm, open_clip, DINOv2 with registers). "plain": a = -0.75, never
#: widened (DeiT, MAE). "offset": like plain, but the step between samples comes from
#: (cells + 0.1) / cells of the table, as DINOv2 without registers was trained and is published.
Rule = Literal["antialias", "plain", "offset"]
OFFSET = 0.1
#: DINOv3's longest period, of coordinates from -1 to 1.
LONGEST = 100.0


def sincos_table(width: int, grid: tuple[int, int], prefix: int = 1) -> np.ndarray:
    """Fixed 2-D positions (prefix + height · width of the grid, width) f32 (He et al. 2022).

    The row of cell (y, x) is [sin(x w), cos(x w), sin(y w), cos(y w)] with w_k = 10000^(-4k/width):
    the first half tells the column. Cells come row by row after ``prefix`` rows of zeros.
    """
    quarter = width // 4
    omega = 1.0 / 10000.0 ** (np.arange(quarter, dtype=np.float64) / quarter)
    y, x = (c.reshape(-1) for c in np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"))
    parts = [f(np.outer(c, omega)) for c in (x, y) for f in (np.sin, np.cos)]
    table = np.concatenate(parts, axis=1)
    return np.concatenate([np.zeros((prefix, width)), table]).astype(np.float32)


@functools.lru_cache(maxsize=64)
def cubic_weights(source: int, target: int, rule: Rule) -> np.ndarray:
    """Weights (target, source) f32 of bicubic resampling along one axis, see ``Rule``."""
    scale = (target + OFFSET) / source if rule == "offset" else target / source
    centre = (np.arange(target) + 0.5) / scale
    if rule == "antialias":
        wide = max(1.0, 1.0 / scale)
        gaps = (np.arange(source)[None, :] + 0.5 - centre[:, None]) / wide
        weights = cubic(np.abs(gaps), -0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    at = centre - 0.5
    low = np.floor(at).astype(np.int64)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        place = np.clip(low + tap, 0, source - 1)  # cells beyond the ends repeat the outermost
        np.add.at(weights, (np.arange(target), place), cubic(np.abs(at - low - tap), -0.75))
    return weights.astype(np.float32)


def resample_table(
    table: jax.Array, source: tuple[int, int], target: tuple[int, int], prefix: int, rule: Rule
) -> jax.Array:
    """A table (prefix + cells of ``source``, d) for the grid ``target``; prefix rows stay."""
    if source == target:
        return table
    rows = jnp.asarray(cubic_weights(source[0], target[0], rule))
    columns = jnp.asarray(cubic_weights(source[1], target[1], rule))
    cells = table[prefix:].reshape(*source, -1)
    exact = jax.lax.Precision.HIGHEST
    cells = jnp.einsum("th,hwd->twd", rows, cells, precision=exact)
    cells = jnp.einsum("sw,twd->tsd", columns, cells, precision=exact)
    return jnp.concatenate([table[:prefix], cells.reshape(-1, table.shape[1])])


def periods(head: int) -> np.ndarray:
    """DINOv3's periods (head / 4,) f32: 100^(4t/head), as its weights hold them, in bfloat16."""
    exact = LONGEST ** (4 * np.arange(head // 4, dtype=np.float64) / head)
    return exact.astype(jnp.bfloat16).astype(np.float32)


def rotation(periods: jax.Array, grid: tuple[int, int], prefix: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (prefix + cells, 4 · periods) f32 that ``rotated`` takes (DINOv3).

    Each axis goes from -1 to 1 by its own length, whatever the aspect: cell i of n lies at
    2 (i + 1/2) / n - 1, and its angles are 2π of that over the ``periods``, those of rows first.
    Tokens of the prefix are not turned.
    """
    y, x = (2 * (np.arange(n) + 0.5) / n - 1 for n in grid)
    places = np.stack(np.broadcast_arrays(y[:, None], x[None, :]), axis=-1).reshape(-1, 2)
    angles = jnp.asarray(2 * np.pi * places, jnp.float32)[:, :, None] / periods[None, None, :]
    angles = jnp.tile(angles.reshape(len(places), -1), (1, 2))
    angles = jnp.pad(angles, ((prefix, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def rotated(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys x (b, n, heads, d), turned by a ``rotation``; in f32, the result as x.

    Channel c of the first half and channel c + d/2 are the two axes of one plane.
    """
    cos, sin = (t[None, :, None, :] for t in turn)
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
