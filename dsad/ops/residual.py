"""Residual features of cells, and the losses on them by angle and by norm.

Yao et al., "ADPretrain: Advancing industrial anomaly detection via anomaly representation
pretraining", NeurIPS 2025, arXiv 2511.05245. All of it is computed in float32, with static shapes:
which cells take part is a matter of weights.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsad.core.mesh import BATCH_SPEC, devices_holding, split_samples
from dsad.ops.contrast import placed
from dsad.ops.neighbors import nearest
from dsad.ops.similarity import unit

#: Cells that all others are compared with at once.
BLOCK = 512
#: Beyond this the norm loss grows linearly: exp would leave float32.
STEEPEST = 30.0

Radius = Literal["released", "pseudo_huber"]


def residual(cells: jax.Array, references: jax.Array, valid: jax.Array) -> jax.Array:
    """Each cell minus the reference cell of highest cosine similarity, (b, n, d) float32.

    Every image has references of its own; of equal ones the first counts. Vectors are subtracted as
    they are, not their directions.

    Args:
      cells: (b, n, d).
      references: (b, m, d).
      valid: (b, m) bool; the others are never taken. Where none is, cells stay as they are.

    """
    x, y = cells.astype(jnp.float32), references.astype(jnp.float32)
    alike = jnp.einsum("bnd,bmd->bnm", unit(x), unit(y), precision="highest")
    best = jnp.argmax(jnp.where(valid[:, None, :], alike, -jnp.inf), axis=-1)
    matched = jnp.take_along_axis(y, best[:, :, None], axis=1)
    return x - jnp.where(jnp.any(valid, axis=1)[:, None, None], matched, 0.0)


def bank_residual(cells: jax.Array, rows: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The same for cells (n, d) and the first ``valid`` rows (m, d) of a bank of any size."""
    x, y = cells.astype(jnp.float32), rows.astype(jnp.float32)
    length = jnp.linalg.norm(y, axis=-1, keepdims=True)
    # A row of length 0 has no direction; so far out it is nearest only if there is no other.
    far = 3.0 / math.sqrt(y.shape[-1])
    directions = jnp.where(length > 0, unit(y), far)
    _, best = nearest(unit(x), directions, 1, valid=valid)
    return x - y[jnp.maximum(best[:, 0], 0)]


def pooled(maps: jax.Array, most: int | tuple[int, int]) -> jax.Array:
    """Maps (b, h, w, d) averaged over equal blocks so that no side has more than ``most`` cells.

    Sides become ⌈h / ⌈h / most⌉⌉; blocks at the far border may be smaller.
    """
    for axis, cells in zip((1, 2), (most, most) if isinstance(most, int) else most, strict=True):
        maps = _averaged(maps, axis, -(-maps.shape[axis] // cells))
    return maps


def _averaged(maps: jax.Array, axis: int, block: int) -> jax.Array:
    if block == 1:
        return maps
    length = maps.shape[axis]
    count = -(-length // block)
    pads = [(0, 0)] * maps.ndim
    pads[axis] = (0, count * block - length)
    shape = (*maps.shape[:axis], count, block, *maps.shape[axis + 1 :])
    total = jnp.sum(jnp.pad(maps, pads).reshape(shape), axis=axis + 1)
    sizes = np.minimum(block, length - block * np.arange(count)).astype(np.float32)
    sizes = sizes.reshape(tuple(count if i == axis else 1 for i in range(maps.ndim)))
    return total / sizes.astype(maps.dtype)


def covered(masks: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Pixels (b, gh, gw) float32 of masks (b, H, W) in each cell of a grid, shares included."""
    rows, columns = (
        jnp.asarray(_overlaps(n, cells))
        for n, cells in zip(masks.shape[1:3], grid, strict=True)
    )  # fmt: skip
    wide = jnp.einsum("bhw,gw->bhg", masks.astype(jnp.float32), columns, precision="highest")
    return jnp.einsum("bhx,gh->bgx", wide, rows, precision="highest")


def _overlaps(pixels: int, cells: int) -> np.ndarray:
    """(cells, pixels): which part of a pixel lies in which cell."""
    edges = np.arange(cells + 1) * pixels / cells
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(pixels)[None, :]
    return np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, 1).astype(np.float32)


def token_labels(
    masks: jax.Array, grid: tuple[int, int], *, pixels: float = 32.0, patch: int = 14
) -> jax.Array:
    """Which cells (b, gh, gw) of a grid are anomalous, by masks (b, H, W) of 0 and 1.

    Those with more than ``pixels`` defective ones of the ``patch`` × ``patch`` that a cell is taken
    to have; for larger or smaller cells in proportion to their area.
    """
    area = masks.shape[1] * masks.shape[2] / (grid[0] * grid[1])
    return covered(masks, grid) > np.float32(pixels * area / patch**2)


def corner_labels(masks: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The same by the top left pixel of each cell, as published for the norm loss."""
    rows, columns = (
        jnp.asarray(np.arange(cells) * n // cells)
        for n, cells in zip(masks.shape[1:3], grid, strict=True)
    )  # fmt: skip
    return masks[:, rows[:, None], columns[None, :]] > 0


def radius(cells: jax.Array, form: Radius = "released") -> jax.Array:
    """√(‖e‖ + 1) − 1 of cells (..., d), as the released code has it, or √(‖e‖² + 1) − 1.

    Written so that short vectors keep their digits.
    """
    length = jnp.sum(jnp.square(cells.astype(jnp.float32)), axis=-1)
    if form == "released":
        positive = length > 0  # the slope of a norm at 0 is none
        length = jnp.where(positive, jnp.sqrt(jnp.where(positive, length, 1.0)), 0.0)
    return length / (jnp.sqrt(length + 1) + 1)


def norm_loss(
    cells: jax.Array,
    anomalous: jax.Array,
    counted: jax.Array,
    *,
    shell: float = 0.4,
    margin: float = 0.75,
    form: Radius = "released",
) -> jax.Array:
    """Normal cells onto a thin shell, anomalous ones out of it.

    With A the ``radius`` of a cell and r = min(0.9 · least A of the anomalous, ``shell``): the mean
    of φ(A − r) of the normal cells outside r, of φ(0.99 r − A) of those inside 0.99 r, and of
    φ(r + ``margin`` − A) of the anomalous ones nearer than that; φ(x) = softplus(x) exp(x), the
    exponential without gradient. Means are over the cells that violate; without any they are 0.

    Args:
      cells: (n, d), of one view of the whole batch.
      anomalous: (n,) bool.
      counted: (n,) bool; the other cells take no part.
      shell: largest r.
      margin: see above.
      form: of the radius.

    """
    at = radius(cells, form)
    bad, good = anomalous & counted, ~anomalous & counted
    least = jnp.min(jnp.where(bad, at, jnp.inf))
    r = jax.lax.stop_gradient(jnp.minimum(0.9 * least, shell))

    def term(gap: jax.Array, cells: jax.Array) -> jax.Array:
        cells = cells & (gap > 0)
        safe = jnp.where(cells, gap, 0.0)
        steep = jax.lax.stop_gradient(jnp.exp(jnp.minimum(safe, STEEPEST)))
        return mean_of(jax.nn.softplus(safe) * steep, cells)

    return term(at - r, good) + term(0.99 * r - at, good) + term(r + margin - at, bad)


def angle_loss(
    first: jax.Array,
    second: jax.Array,
    centre: jax.Array,
    anomalous: jax.Array,
    counted: jax.Array,
    *,
    temperature: float = 0.15,
) -> jax.Array:
    """Both views of a cell into one direction as seen from a centre, other labels into others.

    Mean over all cells of both views of logsumexp(s / t) over the cells of the other label, in both
    views, less s / t with the other view of the cell; s is the cosine of cells minus ``centre``.
    0 where one of the labels does not occur. Costs n times the number of anomalous cells.

    Args:
      first: (n, d), one view of the cells of the global batch.
      second: the other view.
      centre: (d,).
      anomalous: (n,) bool.
      counted: (n,) bool; the other cells take no part.
      temperature: t, at least 0.03 (exp of its reciprocal has to be a float32).

    """
    views = jnp.stack([first, second]).astype(jnp.float32) - centre.astype(jnp.float32)[None, None]
    rows = placed(unit(views), PartitionSpec(None, *BATCH_SPEC))
    together = jnp.sum(rows[0] * rows[1], axis=-1) / temperature
    opposite = _exponentials(rows, anomalous, counted, temperature)
    bad, good = anomalous & counted, ~anomalous & counted
    both = jnp.any(bad) & jnp.any(good)
    away = jnp.log(jnp.where(both & counted[None], opposite, 1.0))
    each = jnp.where(both, away - together[None], 0.0)
    return mean_of(each, jnp.broadcast_to(counted[None], each.shape))


def _exponentials(
    rows: jax.Array, anomalous: jax.Array, counted: jax.Array, temperature: float
) -> jax.Array:
    """Σ exp(s / t) over the counted cells of the other label, (2, n), for unit ``rows``.

    Pairs of a normal and an anomalous cell are all that counts, and anomalous ones are few: they
    are put in front, and blocks of columns without any are skipped. A block gives what its
    anomalous cells add to the normal rows, and, by its columns, what normal cells add to them.
    Each device sums over its own rows, and devices are summed once after all blocks: a sum over
    devices in a branch costs a message for every block, and hangs on CPUs, where XLA gives it no
    order among those outside.
    """
    _, n, d = rows.shape
    blocks = -(-2 * n // BLOCK)
    short = blocks * BLOCK - 2 * n
    devices = devices_holding(n) or 1
    bad = placed(jnp.tile(anomalous & counted, 2), PartitionSpec())
    order = jnp.argsort(~bad, stable=True)
    columns = placed(rows, PartitionSpec()).reshape(2 * n, d)[order]
    columns = jnp.pad(columns, ((0, short), (0, 0))).reshape(blocks, BLOCK, d)
    columns = split_samples(jnp.broadcast_to(columns[None], (devices, *columns.shape)))
    bad_columns = jnp.pad(bad[order], (0, short)).reshape(blocks, BLOCK)
    rows = split_samples(jnp.moveaxis(rows.reshape(2, devices, -1, d), 0, 1))
    good_rows = split_samples((~anomalous & counted).reshape(devices, 1, -1, 1))

    def compared(part: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
        alike = jnp.einsum("gand,gmd->ganm", rows, part, precision="highest") / temperature
        powers = jnp.where(good_rows & bad[None, None, None], jnp.exp(alike), 0.0)
        return jnp.sum(powers, axis=3), jnp.sum(powers, axis=(1, 2))

    def skipped(part: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
        del part, bad
        return jnp.zeros(rows.shape[:3], jnp.float32), jnp.zeros((devices, BLOCK), jnp.float32)

    @jax.checkpoint
    def block(total: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        more, of_columns = jax.lax.cond(jnp.any(inputs[1]), compared, skipped, *inputs)
        return total + more, of_columns

    start = split_samples(jnp.zeros(rows.shape[:3], jnp.float32))
    inputs = (jnp.moveaxis(columns, 1, 0), bad_columns)
    of_rows, of_columns = jax.lax.scan(block, start, inputs)
    back = jnp.sum(of_columns, axis=1).reshape(-1)[jnp.argsort(order)].reshape(2, n)
    return jnp.moveaxis(of_rows, 0, 1).reshape(2, n) + back


def mean_of(values: jax.Array, of: jax.Array) -> jax.Array:
    """Mean of the values where ``of`` is True, 0 without any."""
    count = jnp.sum(of, dtype=jnp.float32)
    return jnp.sum(jnp.where(of, values, 0.0)) / jnp.maximum(count, 1.0)
