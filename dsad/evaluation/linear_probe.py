"""Multinomial logistic regression of vectors: what a linear probe fits.

Minimised are the mean cross entropy of n samples and ‖W‖² / (2 C n), as scikit-learn's
``LogisticRegression(C=C)`` has it; the intercepts are free. The objective is convex, so that the
start (zeros) decides nothing. Sums over samples are made block by block on the devices, the steps
of L-BFGS on the host in float64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core.hosts import put, whole
from dsad.core.mesh import BATCH_SPEC, replicated
from dsad.core.types import Progress, silent
from dsad.ops.gaussian import one_blas_thread

#: Logits of samples × classes that exist at once over all devices, at most.
LOGITS = 2**22
#: Largest entry of the gradient at which the search ends, and at which a fit counts as converged:
#: what float32 allows, and what scikit-learn asks for by default.
TARGET, CONVERGED = 1e-6, 1e-4


class Linear(NamedTuple):
    """Weights (d, c) and intercepts (c,) float32 for standardised vectors.

    ``gradient`` is the largest entry of the gradient at the end, ``loss`` the objective there.
    """

    weights: np.ndarray
    intercepts: np.ndarray
    iterations: int
    loss: float
    gradient: float

    @property
    def converged(self) -> bool:
        """Whether more iterations would change nothing of note."""
        return self.gradient <= CONVERGED

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Logits (n, c) of standardised vectors (n, d)."""
        product = _product(jnp.asarray(rows), jnp.asarray(self.weights))
        return np.asarray(product) + self.intercepts[None, :]


_product = jax.jit(functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST))


class Standard(NamedTuple):
    """Mean and standard deviation (d,) of the vectors that a probe is fitted on.

    A channel that does not vary beyond float32 rounding has the deviation 1.
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Standard":
        """Those of vectors (n, d), in float64."""
        mean = np.asarray(np.mean(rows, axis=0, dtype=np.float64))
        squares = sum(np.sum((part - mean) ** 2, axis=0) for part in _parts(rows))
        std = np.sqrt(squares / len(rows))
        varies = std > 1e-6 * np.abs(mean)
        return cls(mean, np.where(varies, std, 1.0))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (n, d) float32 in these units."""
        units = [((part - self.mean) / self.std).astype(np.float32) for part in _parts(rows)]
        return np.concatenate(units) if units else rows.astype(np.float32)


def _parts(rows: np.ndarray, size: int = 65_536) -> list[np.ndarray]:
    """The rows in pieces, so that float64 copies stay small."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def fit(
    rows: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    strength: float,
    iterations: int,
    mesh: Mesh,
    progress: Progress = silent,
) -> Linear:
    """The minimum for standardised vectors (n, d) float32 with labels (n,) below ``classes``.

    ``strength`` is C; ``progress`` is called with the iterations so far and their limit. The rows
    are split over the mesh, on which all of them lie during the fit.
    """
    count, depth = rows.shape
    packed = _blocks(rows, labels, classes, mesh)
    penalty, everywhere = 1.0 / (strength * count), replicated(mesh)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        table = flat.reshape(depth + 1, classes)
        losses, gradient = _sums(put(table.astype(np.float32), everywhere), *packed)
        weights = table.copy()
        weights[-1] = 0.0  # of intercepts
        # Losses of blocks are added in float64: a line search compares values that hardly differ.
        total = np.sum(whole(losses), dtype=np.float64) / count
        slope = whole(gradient).astype(np.float64) / count + penalty * weights
        return float(total + 0.5 * penalty * np.sum(weights**2)), slope.reshape(-1)

    done = 0

    def tell(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal done
        done += 1
        progress(done, iterations, f"loss {intermediate_result.fun:.4f}")

    # The vectors of L-BFGS are small, and threads of BLAS would take the cores from the devices.
    with one_blas_thread():
        ended = scipy.optimize.minimize(
            value, np.zeros((depth + 1) * classes), jac=True, method="L-BFGS-B", callback=tell,
            options={"maxiter": iterations, "maxfun": 4 * iterations, "gtol": TARGET, "ftol": 0.0,
                     "maxls": 40},
        )  # fmt: skip
    progress(iterations, iterations, f"ended after {ended.nit}, loss {ended.fun:.4f}")
    table = ended.x.reshape(depth + 1, classes).astype(np.float32)
    return Linear(
        weights=table[:-1], intercepts=table[-1], iterations=int(ended.nit),
        loss=float(ended.fun), gradient=float(np.max(np.abs(ended.jac))),
    )  # fmt: skip


def _blocks(
    rows: np.ndarray, labels: np.ndarray, classes: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors (blocks, b, d), labels (blocks, b), and weights: 1, and 0 for padding."""
    count = len(rows)
    size = min(max(LOGITS // classes, 256), count)
    number = -(-count // size)
    size = -(-count // number)  # even ones, so that little is padding
    size += -size % mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH_SPEC))

    def placed(values: np.ndarray) -> jax.Array:
        padded = np.zeros((number * size, *values.shape[1:]), values.dtype)
        padded[:count] = values
        return put(padded.reshape(number, size, *values.shape[1:]), sharding)

    return placed(rows), placed(labels.astype(np.int32)), placed(np.ones(count, np.float32))


@jax.jit
def _sums(
    table: jax.Array, rows: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross entropies summed by block (blocks,), and their gradient (d + 1, c) over all."""
    highest = lax.Precision.HIGHEST

    def block(gradient: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, y, used = part
        logits = jnp.matmul(x, table[:-1], precision=highest) + table[-1:]
        logs = jax.nn.log_softmax(logits)
        loss = -jnp.sum(used * jnp.take_along_axis(logs, y[:, None], axis=1)[:, 0])
        wrong = (jnp.exp(logs) - jax.nn.one_hot(y, table.shape[1])) * used[:, None]
        slope = jnp.matmul(x.T, wrong, precision=highest)
        return gradient + jnp.concatenate([slope, jnp.sum(wrong, axis=0)[None, :]]), loss

    gradient, losses = lax.scan(block, jnp.zeros_like(table), (rows, labels, valid))
    return losses, gradient
