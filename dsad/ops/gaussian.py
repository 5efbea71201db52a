"""Gaussians of features: streamed moments, shrinkage, Mahalanobis distances, Gaussian heat maps.

What is fitted once is fitted on the host in float64 (moments, eigenvectors, inverses: the smallest
variances decide a Mahalanobis distance, and float32 loses them); what runs per image are float32
products on the device. Every function takes any number of leading axes: a Gaussian per position is
the same code as a global one.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jax import lax

from dsad.core.errors import ConfigError

#: Host bytes of float64 rows handled at once, see ``position_chunks``.
CHUNK_BYTES = 2**26


# --- moments (host, float64) ----------------------------------------------------------------


class Moments(NamedTuple):
    """Count, ``mean`` (..., d) and ``scatter`` (..., d, d), the sum of centred outer products."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def moments(rows: np.ndarray) -> Moments:
    """Moments over the first axis of ``rows`` (n, ..., d), n ≥ 1, in float64."""
    values = np.asarray(rows, np.float64)
    mean = values.mean(axis=0)
    centred = np.moveaxis(values - mean, 0, -2)
    return Moments(len(values), mean, np.swapaxes(centred, -1, -2) @ centred)


def merge(left: Moments, right: Moments) -> Moments:
    """Moments of two sets together (Chan, Golub and LeVeque, 1983); associative up to rounding."""
    count = left.count + right.count
    gap = right.mean - left.mean
    weight = left.count * right.count / count
    scatter = left.scatter + right.scatter + weight * gap[..., :, None] * gap[..., None, :]
    return Moments(count, left.mean + gap * (right.count / count), scatter)


def covariance(found: Moments, ddof: int = 1) -> np.ndarray:
    """Covariance (..., d, d) with divisor count - ``ddof``."""
    return found.scatter / (found.count - ddof)


# --- principal axes and shrinkage (host, float64) -------------------------------------------


class Principal(NamedTuple):
    """Leading principal axes: ``mean`` (..., d), ``basis`` (..., d, k) with orthonormal columns,
    biased ``variances`` (..., k) along them, descending, and ``fourth`` (...), the mean of |z|⁴ of
    the k coordinates z. A column whose variance is rounding noise is zero.
    """  # noqa: D205

    mean: np.ndarray
    basis: np.ndarray
    variances: np.ndarray
    fourth: np.ndarray


def principal_axes(found: Moments, components: int) -> tuple[np.ndarray, np.ndarray]:
    """(basis (..., d, k), biased variances (..., k)) from moments, exactly."""
    values, vectors = np.linalg.eigh(found.scatter / found.count)
    values, vectors = values[..., ::-1][..., :components], vectors[..., ::-1][..., :components]
    return vectors, np.maximum(values, 0.0)


def principal(rows: Sequence[np.ndarray] | np.ndarray, components: int) -> Principal:
    """Principal axes per position of n ``rows`` (p, d), from the smaller of n × n and d × d.

    ``components`` is at most min(n, d). The result is float32, but computed in float64, a few
    positions at a time.
    """
    positions, depth = rows[0].shape
    found = Principal(
        np.empty((positions, depth), np.float32),
        np.empty((positions, depth, components), np.float32),
        np.empty((positions, components)),
        np.empty(positions),
    )

    def work(part: slice) -> None:
        chunk = np.stack([np.asarray(row[part], np.float64) for row in rows])
        for whole, piece in zip(found, _principal(chunk, components), strict=True):
            whole[part] = piece

    # Not by jax: its batched eigh waits inside XLA's thread pool for work that it put there, and
    # two at once never end (jaxlib 0.10.2 on a CPU). numpy releases the interpreter's lock.
    workers = os.cpu_count() or 1
    step = max(1, CHUNK_BYTES // (8 * len(rows) * depth * workers))
    parts = [slice(at, min(at + step, positions)) for at in range(0, positions, step)]
    with one_blas_thread(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, parts))
    return found


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep numpy's BLAS to one thread, for many small matrices.

    More gain nothing there, and cost a hundredfold where other processes want the cores: the
    threads of OpenBLAS spin while they wait for each other.
    """
    with _blas().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def position_chunks(
    rows: Sequence[np.ndarray] | np.ndarray, row_bytes: int = 0
) -> Iterator[tuple[slice, np.ndarray]]:
    """(positions, their rows (n, positions, d) in float64), of n ``rows`` (p, d), piece by piece.

    A piece takes ``CHUNK_BYTES``, at n · d · 8 or ``row_bytes`` bytes a position if more.
    """
    positions, depth = rows[0].shape
    step = max(1, CHUNK_BYTES // max(row_bytes, 8 * len(rows) * depth))
    for at in range(0, positions, step):
        part = slice(at, min(at + step, positions))
        yield part, np.stack([np.asarray(row[part], np.float64) for row in rows])


def _principal(rows: np.ndarray, components: int) -> Principal:
    """The same for float64 rows (n, p, d), all positions at once."""
    count, _, depth = rows.shape
    mean = rows.mean(axis=0)
    centred = np.ascontiguousarray(np.swapaxes(rows - mean, 0, 1))  # (p, n, d)
    other = np.swapaxes(centred, 1, 2)
    squares, vectors = np.linalg.eigh(centred @ other if count < depth else other @ centred)
    squares = np.maximum(squares[:, ::-1][:, :components], 0.0)
    vectors = vectors[:, :, ::-1][:, :, :components]
    # Below this an eigenvalue is rounding, and so is its axis.
    real = squares > max(count, depth) * np.finfo(np.float64).eps * squares[:, :1]
    if count < depth:
        inverse = np.where(real, 1 / np.sqrt(np.where(real, squares, 1.0)), 0.0)
        coordinates = vectors * np.sqrt(squares)[:, None, :]
        # Rounded first: sums of n terms without cancellation, at twice the speed.
        scaled = np.ascontiguousarray(vectors * inverse[:, None, :], np.float32)
        basis = np.swapaxes(centred.astype(np.float32), 1, 2) @ scaled
    else:
        basis = vectors * real[:, None, :]
        coordinates = centred @ basis
    fourth = np.mean(np.sum(coordinates**2, axis=2) ** 2, axis=1)
    return Principal(mean, basis, squares / count, fourth)


def ledoit_wolf(
    variances: np.ndarray, fourth: np.ndarray, count: int, dimensions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ledoit-Wolf shrinkage in principal coordinates: (shrinkage s, mean variance μ), each (...).

    The shrunk covariance is (1 - s) diag(variances) + s μ I. ``variances`` (..., k) are biased;
    ``dimensions`` ≥ k is how many there are with those that are zero; ``fourth`` (...) is the mean
    of |z|⁴ over the ``count`` centred rows. Ledoit and Wolf, "A well-conditioned estimator for
    large-dimensional covariance matrices" (2004).
    """
    variances, fourth = np.asarray(variances, np.float64), np.asarray(fourth, np.float64)
    mu = np.sum(variances, axis=-1) / dimensions
    norm = np.sum(variances**2, axis=-1)
    spread = (norm - dimensions * mu**2) / dimensions
    error = np.minimum((fourth - norm) / (dimensions * count), spread)
    safe = np.where(error > 0, spread, 1.0)
    return np.where(error > 0, error / safe, 0.0), mu


# --- ridge covariances: full and low-rank (host, float64) -----------------------------------


def whitening(cov: np.ndarray, ridge: float) -> np.ndarray:
    """W (..., d, d) float32 with W Wᵀ = (``cov`` + ``ridge`` I)⁻¹, upper triangular."""
    with one_blas_thread():
        inverse = np.linalg.inv(np.linalg.cholesky(cov + ridge * np.eye(cov.shape[-1])))
    return np.swapaxes(inverse, -1, -2).astype(np.float32)


def low_rank(
    rows: Sequence[np.ndarray] | np.ndarray, ridge: float, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The covariance (divisor n - 1) + ``ridge`` I of n ``rows`` (p, d), without a d × d matrix.

    Returns, float32, mean (p, d), factor Y (p, m, d) with Yᵀ Y the covariance, and the inverse
    (p, m, m) of Y Yᵀ + ridge I on the span of Y: what ``low_rank_mahalanobis`` takes.
    ``multiple`` pads m with zero rows, which change nothing, so that few sizes are compiled.
    """
    count, (positions, depth) = len(rows), rows[0].shape
    size = count + -count % multiple
    mean = np.empty((positions, depth), np.float32)
    factor = np.zeros((positions, size, depth), np.float32)
    inner = np.zeros((positions, size, size), np.float32)
    for part, values in position_chunks(rows):
        mean[part], factor[part, :count], inner[part, :count, :count] = _ridge(values, ridge)
    return mean, factor, inner


def _ridge(values: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, centred rows over √(n - 1), and inverse, of rows (n, p, d) in float64."""
    count = len(values)
    centre = values.mean(axis=0)
    centred = np.swapaxes(values - centre, 0, 1) / np.sqrt(count - 1)
    with one_blas_thread():
        gram = centred @ np.swapaxes(centred, 1, 2) + ridge * np.eye(count)
        inverse = np.linalg.inv(gram)
    # Centred rows sum to zero: the axis of ones has no part in Y d but its rounding errors, which
    # the inverse would multiply by 1 / ridge.
    return centre, centred, inverse - 1 / (ridge * count)


# --- distances (device, float32) ------------------------------------------------------------


def mahalanobis(rows: jax.Array, mean: jax.Array, factor: jax.Array) -> jax.Array:
    """|factorᵀ (row - mean)| (..., b) of ``rows`` (..., b, d); ``factor`` is (..., d, k).

    With factor factorᵀ the inverse covariance this is the Mahalanobis distance, and cannot be NaN
    by a slightly negative square.
    """
    white = _product(rows - mean[..., None, :], factor)
    return jnp.sqrt(jnp.sum(jnp.square(white), axis=-1))


def low_rank_mahalanobis(
    rows: jax.Array, mean: jax.Array, factor: jax.Array, inner: jax.Array, ridge: float
) -> jax.Array:
    """Mahalanobis distance (..., b) under Yᵀ Y + ``ridge`` I, from the parts of ``low_rank``.

    The inverse by Woodbury's identity is a difference of large numbers. The same value is the
    minimum over w of |d - Yᵀ w|² / ridge + |w|², a sum of squares, at w = (Y Yᵀ + ridge I)⁻¹ Y d;
    rounding of w enters it in second order only.
    """
    gap = rows - mean[..., None, :]
    weights = _product(_product(gap, jnp.swapaxes(factor, -1, -2)), inner)
    rest = gap - _product(weights, factor)
    squares = jnp.sum(jnp.square(rest), axis=-1) / ridge + jnp.sum(jnp.square(weights), axis=-1)
    return jnp.sqrt(squares)


def damped_mahalanobis(
    rows: jax.Array, mean: jax.Array, basis: jax.Array, scale: jax.Array
) -> jax.Array:
    """``scale`` |d - B Bᵀ d| (..., b) for d = row - mean: the symmetric root of an inverse.

    For a covariance V diag(a) Vᵀ with variance c in every direction outside V, scale = 1 / √c and
    B = V √(1 - √(c / a)) give the Mahalanobis distance. ``basis`` is (..., d, k), ``scale`` (...).
    """
    gap = rows - mean[..., None, :]
    rest = gap - _product(_product(gap, basis), jnp.swapaxes(basis, -1, -2))
    return scale[..., None] * jnp.sqrt(jnp.sum(jnp.square(rest), axis=-1))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def per_position(
    features: jax.Array, state: Any, distance: Callable[[jax.Array, Any], jax.Array]
) -> jax.Array:
    """Scores (b, gh, gw) of ``features`` (b, gh, gw, d) under one Gaussian per cell.

    ``state`` is a tree of arrays (gh, gw, ...). ``distance`` takes (gw, b, d) and one row of the
    state, and gives (gw, b). Row by row of the grid, so that temporaries are 1/gh of a batch.
    """
    cells = jnp.transpose(features, (1, 2, 0, 3))
    return jnp.transpose(lax.map(lambda row: distance(*row), (cells, state)), (2, 0, 1))


# --- heat maps ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def patch_kernel(size: int) -> np.ndarray:
    """The ``size`` (even) taps of DS2's heat-map kernel along one axis, float64.

    A Gaussian of size - 1 taps with the centre tap doubled, halved; its standard deviation is 10
    pixels, for sizes below 32 log10(0.45 size + 1) + 0.25.
    """
    if size < 2 or size % 2:
        raise ConfigError(f"patch size: expected an even number >= 2, found {size}.")
    sigma = np.log10(0.45 * size + 1) + 0.25 if size < 32 else 10.0
    half = np.exp(-np.square(np.arange(size // 2) / sigma) / 2) / 2
    return np.concatenate([half[::-1], half])


@functools.lru_cache(maxsize=16)
def _spread(cells: int, size: int, stride: int) -> np.ndarray:
    """Matrix (pixels, cells) of the transposed convolution along one axis."""
    matrix = np.zeros((stride * (cells - 1) + size, cells))
    for cell in range(cells):
        matrix[stride * cell : stride * cell + size, cell] = patch_kernel(size)
    return matrix


def patch_heatmap(
    scores: jax.Array, size: int, stride: int, *, normalise: bool = True
) -> jax.Array:
    """Pixel map (b, H, W) of the scores (b, gh, gw) of patches: a transposed convolution.

    The patch of cell (i, j) covers rows ``stride`` i to stride i + ``size`` - 1, and columns
    likewise; H = stride (gh - 1) + size. Each patch spreads its score by ``patch_kernel``.
    ``normalise`` divides by the kernels' sum at every pixel, so that a constant stays constant up
    to the border; without it borders fade (DS2's published code).
    """
    rows, columns = (_spread(n, size, stride) for n in scores.shape[1:])
    if normalise:
        rows, columns = (m / m.sum(axis=1, keepdims=True) for m in (rows, columns))
    wide = jnp.einsum(
        "Ww,bhw->bhW", jnp.asarray(columns, jnp.float32), scores, precision=lax.Precision.HIGHEST
    )
    return jnp.einsum(
        "Hh,bhW->bHW", jnp.asarray(rows, jnp.float32), wide, precision=lax.Precision.HIGHEST
    )
