"""Linear subspaces of normal features, in float64, and what they leave of a vector."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsad.ops.neighbors import bucket

#: From all variances, in descending order, to the number of axes kept.
Count = Callable[[np.ndarray], int]
#: Columns of the features that are held in float64 at a time.
COLUMNS = 8192
#: Variance below this share of the largest is rounding: such axes are never kept.
FLOOR = 1e-10


class Subspace(NamedTuple):
    """Mean (D,) and orthonormal principal axes (r, D), float32, and the total variance."""

    mean: np.ndarray
    axes: np.ndarray
    total: float


def patch_errors(mean: jax.Array, axes: jax.Array, values: jax.Array) -> jax.Array:
    """Squared errors (b, gh, gw) of cells (b, gh, gw, d): what axes (r, d) leave of their gaps."""
    high = lax.Precision.HIGHEST
    centred = values - mean[None, None, None, :]
    weights = jnp.einsum("bhwd,rd->bhwr", centred, axes, precision=high)
    inside = jnp.einsum("bhwr,rd->bhwd", weights, axes, precision=high)
    return jnp.sum(jnp.square(centred - inside), axis=3)


def leading(
    variances: np.ndarray, variance: float, components: int = 0, *, reached: bool = False
) -> int:
    """The number of axes: ``components``, or the fewest that explain more than ``variance``.

    Where it is just ``reached`` that is enough, too. ``variances`` are in descending order. Axes
    without variance beyond rounding never count.
    """
    usable = int(np.sum(variances > FLOOR * variances[:1].sum()))
    if components:
        return min(components, usable)
    share = np.cumsum(variances) / max(variances.sum(), np.finfo(np.float64).tiny)
    return min(
        int(np.searchsorted(share, variance, side="left" if reached else "right")) + 1, usable
    )


def subspace(rows: np.ndarray, count: Count) -> Subspace:
    """Principal axes of rows (n, D) through the smaller of the n × n and the D × D matrix.

    ``count`` maps the variances, descending, to the number of axes kept. Memory beyond the rows
    and the axes: two matrices of min(n, D)² and one of n × 8,192 float64.
    """
    n, depth = rows.shape
    mean = rows.mean(axis=0, dtype=np.float64)

    def blocks() -> Iterable[tuple[slice, np.ndarray]]:
        for start in range(0, depth, COLUMNS):
            at = slice(start, start + COLUMNS)
            yield at, rows[:, at].astype(np.float64) - mean[at]

    if depth <= n:
        centred = rows.astype(np.float64) - mean
        return _from_scatter(mean, centred.T @ centred, n, count)
    gram = np.zeros((n, n))
    for _, block in blocks():
        gram += block @ block.T
    values, vectors = _descending(gram)
    kept = count(values / n)
    basis = vectors[:, :kept] / np.sqrt(values[:kept])
    axes = np.zeros((kept, depth), np.float32)
    for at, block in blocks():
        axes[:, at] = basis.T @ block
    return Subspace(mean.astype(np.float32), axes, float(values.sum() / n))


class Moments:
    """Sums of rows (·, d) and of their products, about a shift, in float64."""

    def __init__(self, rows: np.ndarray) -> None:
        # Any shift gives the same covariance; one near the mean keeps its digits.
        self.shift = rows.mean(axis=0, dtype=np.float64)
        self.count = 0
        self.total = np.zeros_like(self.shift)
        self.products = np.zeros((len(self.shift), len(self.shift)))

    def add(self, rows: np.ndarray) -> None:
        """Count further rows (m, d)."""
        centred = rows.astype(np.float64) - self.shift
        self.count += len(rows)
        self.total += centred.sum(axis=0)
        self.products += centred.T @ centred

    def subspace(self, count: Count) -> Subspace:
        """Mean, axes and total variance of all rows."""
        offset = self.total / self.count
        scatter = self.products - self.count * np.outer(offset, offset)
        return _from_scatter(self.shift + offset, scatter, self.count, count)


def _from_scatter(mean: np.ndarray, scatter: np.ndarray, n: int, count: Count) -> Subspace:
    values, vectors = _descending(scatter)
    axes = vectors[:, : count(values / n)].T.astype(np.float32)
    return Subspace(mean.astype(np.float32), axes, float(values.sum() / n))


def _descending(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def bucketed(axes: np.ndarray) -> np.ndarray:
    """The axes with zero rows up to their bucket; at least one row of them."""
    return np.pad(axes, ((0, bucket(max(len(axes), 1), 32) - len(axes)), (0, 0)))
