"""What one device does in ``dsad.ops.neighbors``: its shard of the bank against blocks of queries.

Squared distances are compared through |b|²/2 - q·b of centred features, one block of queries
against one bank chunk at a time. The bank is laid out so that column j · C + c of a chunk holds its
row c · G + j: the minimum over each group of G consecutive rows is then a minimum over a leading
axis, which vectorises where an arg-min does not. The k best elements lie in the k best groups, so
only those groups are looked into. A few candidates more than k are kept and their distances
recomputed from differences of the original features, which settles near ties and distances close to
zero.

On a mesh every device holds one shard of the bank and one of the queries. A block is one tile of
queries of every device, gathered; each device finds the k best of its own rows for the whole block
and sends them to the devices the queries came from, which merge them. Nothing of size
queries × bank ever leaves a device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

#: Consecutive bank rows whose minimum is taken first.
GROUP = 16
#: Queries compared again at once: mostly few are, and a whole tile for them would be wasted.
AGAIN = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed when a search is compiled.

    ``tile`` queries of each device form a block; ``chunk`` bank rows are compared at once;
    ``axes`` are the mesh axes and ``parts`` their devices (none: no mesh). ``recall`` is the recall
    target of the approximate mode.
    """

    k: int
    tile: int
    chunk: int
    certified: bool = False
    recall: float | None = None
    axes: tuple[str, ...] = ()
    parts: int = 1

    @property
    def slack(self) -> int:
        """Candidates kept beyond k before distances are recomputed."""
        return 3 + self.k // 8

    @property
    def wide(self) -> int:
        """Candidates of the bf16 pass: its rounding spans more rows than float32's."""
        return self.k + self.slack + max(8, self.k // 2)


class Shard(NamedTuple):
    """One device's part of the bank, prepared.

    ``bank`` (m, d) original rows, ``first`` the index of its first row, ``valid`` how many count.
    ``chunks`` (n, G · C, d) centred float32 rows in group order and ``halves`` (n, G, C) their
    |row|²/2, inf on padding; ``shift`` (1, d) what was subtracted.
    """

    bank: jax.Array
    first: jax.Array
    valid: jax.Array
    chunks: jax.Array
    halves: jax.Array
    shift: jax.Array


class Prepared(NamedTuple):
    """What of a search needs no query; bfloat16 ``chunks`` and ``norms`` where it is certified."""

    shard: Shard
    chunks: jax.Array | None
    norms: "Norms | None"


class Found(NamedTuple):
    """Squared distances (T, k), rows of the whole bank (T, k) and the certificate's bound (T,)."""

    squares: jax.Array
    rows: jax.Array
    bound: jax.Array


def prepared(bank: jax.Array, valid: jax.Array, plan: Plan) -> Prepared:
    """One device's part of the bank; ``valid`` rows of the whole one count."""
    shard = _shard(bank, valid, plan)
    if not plan.certified:
        return Prepared(shard, None, None)
    low, norms = _lowered(shard)
    return Prepared(shard, low.chunks, norms)


def without(bank: Prepared, counted: jax.Array) -> Prepared:
    """The bank without the rows that are not ``counted`` (m,) bool; but for ``halves`` the same."""
    halves = bank.shard.halves
    count, group, groups = halves.shape
    counted = jnp.pad(counted, (0, halves.size - len(counted)))
    there = counted.reshape(count, groups, group).swapaxes(1, 2)
    halves = jnp.where(there, halves, jnp.inf)
    return bank._replace(shard=bank.shard._replace(halves=halves))


def search(
    queries: jax.Array,
    bank: jax.Array | Prepared,
    valid: jax.Array,
    counted: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distances (Q, k), rows (Q, k) and whether each query was certified (Q,), on one device.

    ``valid`` and ``counted``: rows of the whole bank, and queries of all devices, that count.
    """
    rows, depth = queries.shape
    shard, chunks, norms = bank if isinstance(bank, Prepared) else prepared(bank, valid, plan)
    padded = jnp.pad(queries, ((0, -rows % plan.tile), (0, 0)))

    def one_tile(tile: jax.Array) -> Found:
        return _block(tile, shard, plan, exactly)

    def every_tile(method: Callable[[jax.Array], Found]) -> Found:
        blocks = lax.map(method, padded.reshape(-1, plan.tile, depth))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)

    if chunks is not None and norms is not None:
        low, bounded = shard._replace(chunks=chunks), functools.partial(_bounded, norms=norms)
        found = every_tile(lambda tile: _block(tile, low, plan, bounded))
        # NaN anywhere fails the comparison, and is found again by the exact pass.
        certified = found.squares[:, -1] < found.bound
        place = jnp.arange(len(padded)) + _index(plan) * rows
        ignored = (place >= counted) | (jnp.arange(len(padded)) >= rows)
        found = _redone(padded, found, certified | ignored, one_tile, plan)
    else:
        found = every_tile(one_tile)
        certified = jnp.ones(len(padded), bool)
    distances, indices = _finished(found, padded, shard.shift, valid)
    return distances[:rows], indices[:rows], certified[:rows]


def _finished(
    found: Found, queries: jax.Array, shift: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Distances and rows: NaN where features are not finite, (inf, -1) where no row was left."""
    finite = jnp.all(jnp.isfinite(queries), axis=1, keepdims=True) & jnp.all(jnp.isfinite(shift))
    distances = jnp.where(finite, jnp.sqrt(found.squares), jnp.nan)
    present = found.rows < valid
    indices = jnp.where(present, found.rows, jnp.where(finite, -1, 0))
    return distances, indices


def _sum(values: jax.Array, plan: Plan) -> jax.Array:
    return lax.psum(values, plan.axes) if plan.axes else values


def _index(plan: Plan) -> jax.Array:
    return lax.axis_index(plan.axes) if plan.axes else jnp.int32(0)


def _shard(bank: jax.Array, valid: jax.Array, plan: Plan) -> Shard:
    rows = bank.shape[0]
    first = _index(plan) * rows
    own = jnp.clip(valid - first, 0, rows)
    counts = jnp.arange(rows)[:, None] < own
    shift = _shift(jnp.where(counts, bank, 0.0), counts, valid, plan)
    centred = jnp.where(counts, bank - shift, 0.0)
    chunks, halves = _grouped(centred, counts[:, 0], plan)
    return Shard(bank, first, own, chunks, halves, shift)


def _shift(bank: jax.Array, counts: jax.Array, valid: jax.Array, plan: Plan) -> jax.Array:
    """The bank's mean (1, d), rounded to a power of two near the features' spread.

    Any shift leaves distances unchanged; this one is as good as the mean against cancellation, and
    subtracting it is exact for features on a grid (integers, say), so that their ties stay ties.
    """
    number = jnp.maximum(valid, 1).astype(jnp.float32)
    mean = _sum(jnp.sum(bank, axis=0, keepdims=True), plan) / number
    squares = jnp.sum(jnp.where(counts, jnp.square(bank - mean), 0.0))
    spread = jnp.sqrt(_sum(squares, plan) / (number * bank.shape[1]))
    step = jnp.ldexp(jnp.float32(1.0), jnp.frexp(spread)[1])
    return jnp.where(spread > 0, jnp.round(mean / step) * step, mean)


def _grouped(bank: jax.Array, counts: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The bank as chunks (n, G · C, d) in group order, and |row|²/2 (n, G, C), inf on padding."""
    rows, depth = bank.shape
    # Every chunk holds as many rows as candidates are kept.
    count = min(math.ceil(rows / plan.chunk), max(rows // plan.wide, 1))
    groups = math.ceil(rows / (count * GROUP))
    groups += -groups % 8  # whole vector registers along C
    missing = count * groups * GROUP - rows
    chunks = jnp.pad(bank, ((0, missing), (0, 0))).reshape(count, groups, GROUP, depth)
    # From the chunks, not from the rows: one copy of the bank instead of two.
    chunks = lax.optimization_barrier(chunks.swapaxes(1, 2).reshape(count, -1, depth))
    counts = jnp.pad(counts, (0, missing)).reshape(count, groups, GROUP).swapaxes(1, 2)
    squares = lax.map(lambda chunk: jnp.sum(chunk * chunk, axis=1), chunks)
    return chunks, jnp.where(counts, 0.5 * squares.reshape(counts.shape), jnp.inf)


def _block(tile: jax.Array, shard: Shard, plan: Plan, method: Callable[..., Found]) -> Found:
    """The k best rows of the whole bank for one tile of this device's queries."""
    block = lax.all_gather(tile, plan.axes, tiled=True) if plan.axes else tile
    found = method(block, shard, plan)
    if not plan.axes:
        return found

    def home(values: jax.Array) -> jax.Array:
        """(parts · T, n) on every device to what all of them found for the own tile."""
        values = values.reshape(plan.parts, len(tile), -1)
        values = lax.all_to_all(values, plan.axes, 0, 0, tiled=True)
        return values.swapaxes(0, 1).reshape(len(tile), -1)

    squares, rows = lax.sort((home(found.squares), home(found.rows)), dimension=1, num_keys=2)
    bound = jnp.min(home(found.bound[:, None]), axis=1)
    return Found(squares[:, : plan.k], rows[:, : plan.k], bound)


def exactly(queries: jax.Array, shard: Shard, plan: Plan) -> Found:
    """The k best rows of this device's shard in float32, or by the accelerator's approximation."""
    keep = min(plan.k + plan.slack, shard.bank.shape[0])
    values, found = _candidates(queries - shard.shift, shard, keep, plan)
    squares, rows = _reranked(queries, values, found, shard)
    kept = min(plan.k, shard.bank.shape[0])
    return Found(squares[:, :kept], rows[:, :kept], jnp.full(len(queries), jnp.inf))


def _candidates(
    queries: jax.Array, shard: Shard, keep: int, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """The ``keep`` smallest |b|²/2 - q·b (T, keep), ascending, and their rows in the shard."""
    size = shard.chunks.shape[1]

    def one_chunk(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk, half, number = part
        single = chunk.dtype == jnp.float32
        products = lax.dot_general(
            queries.astype(chunk.dtype), chunk, (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if single else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        ).reshape(-1, *half.shape)  # fmt: skip
        if plan.recall is None:
            values, rows = _best(products, half, keep)
        else:
            values, rows = _nearly_best(products, half, keep, plan.recall)
        return values, rows + number * size

    if len(shard.chunks) == 1:
        return one_chunk((shard.chunks[0], shard.halves[0], jnp.int32(0)))
    numbers = jnp.arange(len(shard.chunks), dtype=jnp.int32)
    values, rows = lax.map(one_chunk, (shard.chunks, shard.halves, numbers))
    values = values.swapaxes(0, 1).reshape(len(queries), -1)
    rows = rows.swapaxes(0, 1).reshape(len(queries), -1)
    best, place = lax.top_k(-values, keep)
    return -best, jnp.take_along_axis(rows, place, axis=1)


def _best(products: jax.Array, halves: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
    """Values and rows of the ``keep`` smallest of a chunk, (T, keep), ties by ascending row."""
    group, groups = halves.shape
    lowest = jnp.min(halves[None] - products, axis=1)
    # Groups in row order, so that the stable top_k below lists ties by ascending row.
    picked = jnp.sort(lax.top_k(-lowest, min(keep, groups))[1], axis=1)
    inside = jnp.take_along_axis(products, picked[:, None, :], axis=2)
    values = halves[:, picked].swapaxes(0, 1) - inside
    values = values.swapaxes(1, 2).reshape(picked.shape[0], -1)
    best, place = lax.top_k(-values, keep)
    row = jnp.take_along_axis(picked, place // group, axis=1) * group + place % group
    return -best, row.astype(jnp.int32)


def _nearly_best(
    products: jax.Array, halves: jax.Array, keep: int, recall: float
) -> tuple[jax.Array, jax.Array]:
    """As ``_best``, by the approximate selection of accelerators.

    CPUs have none: there ``approx_min_k`` sorts, 18 times slower than ``_best`` for equal rows.
    """
    approximate = functools.partial(_approximately, keep=keep, recall=recall)
    exact = functools.partial(_best, keep=keep)
    return lax.platform_dependent(products, halves, cpu=exact, default=approximate)


def _approximately(
    products: jax.Array, halves: jax.Array, keep: int, recall: float
) -> tuple[jax.Array, jax.Array]:
    group, groups = halves.shape
    values = (halves[None] - products).reshape(products.shape[0], -1)
    best, place = lax.approx_min_k(values, keep, recall_target=recall)
    return best, ((place % groups) * group + place // groups).astype(jnp.int32)


def _reranked(
    queries: jax.Array, values: jax.Array, found: jax.Array, shard: Shard
) -> tuple[jax.Array, jax.Array]:
    """Squared distances from differences, ascending, and rows of the whole bank, (T, keep).

    Rows whose ``values`` (T, keep) are inf do not count.
    """
    padding = (found >= shard.valid) | (values == jnp.inf)
    gaps = queries[:, None, :] - shard.bank[jnp.minimum(found, len(shard.bank) - 1)]
    squares = jnp.where(padding, jnp.inf, jnp.sum(gaps * gaps, axis=2))
    rows = jnp.where(padding, jnp.iinfo(jnp.int32).max, found + shard.first)
    squares, rows = lax.sort((squares, rows), dimension=1, num_keys=2)
    return squares, rows


class Norms(NamedTuple):
    """Largest norm of a centred row of the shard, and of what bfloat16 rounds away from one."""

    largest: jax.Array
    lost: jax.Array


def _rounded(values: jax.Array) -> jax.Array:
    """Values of bfloat16 in float32. XLA may drop a conversion there and back, but never this."""
    return lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


def _lowered(shard: Shard) -> tuple[Shard, Norms]:
    """The shard with chunks in bfloat16, and its norms; a chunk at a time, to save memory."""

    def lower(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounded = _rounded(chunk)
        lost = jnp.max(jnp.sum(jnp.square(chunk - rounded), axis=1))
        return rounded.astype(jnp.bfloat16), lost

    chunks, lost = lax.map(lower, shard.chunks)
    largest = jnp.max(jnp.where(shard.halves == jnp.inf, 0.0, 2 * shard.halves))
    return shard._replace(chunks=chunks), Norms(jnp.sqrt(largest), jnp.sqrt(jnp.max(lost)))


def _bounded(queries: jax.Array, shard: Shard, plan: Plan, norms: Norms) -> Found:
    """The best candidates of a bfloat16 pass, and a bound that certifies them.

    With centred q and b, their bfloat16 roundings Q and B, and v = |b|²/2 - q·b: by
    Cauchy-Schwarz |q·b - Q·B| <= |Q| |b - B| + |q - Q| |b|, whose norms are measured, not
    estimated. All that float32 itself rounds (centring, |q|², |b|²/2, sums of d products in any
    order, differences of the original features) moves a squared distance by less than
    F = 4 (d + 16) 2⁻²³ (|q| + max |b|)²; 2⁻²³ is twice the unit roundoff, for units that truncate.
    With t the largest value kept, every row left out is then at a squared distance of at least
    |q|² + 2 (t - |Q| max|b - B| - |q - Q| max|b|) - F.

    The exact pass may lose one of the k best only where more than k + slack rows lie within 2 F of
    the k-th. Where the k-th distance squared stays below both, less 2 F, the two agree.
    """
    rows, depth = shard.bank.shape
    keep, kept = min(plan.wide, rows), min(plan.k, rows)
    centred = queries - shard.shift
    values, found = _candidates(centred, shard, keep, plan)
    squares, where = _reranked(queries, values, found, shard)
    rounded = _rounded(centred)
    own, low, lost = (
        jnp.sqrt(jnp.sum(x * x, axis=1)) for x in (centred, rounded, centred - rounded)
    )
    slip = 4.0 * (depth + 16) * 2.0**-23 * jnp.square(own + norms.largest)
    error = low * norms.lost + lost * norms.largest
    bound = jnp.full(len(queries), jnp.inf)
    if keep < rows:
        bound = own * own + 2.0 * (values[:, -1] - error) - slip
    if plan.k + plan.slack < rows:
        bound = jnp.minimum(bound, squares[:, plan.k + plan.slack])
    return Found(squares[:, :kept], where[:, :kept], bound - 2.0 * slip)


def _redone(
    queries: jax.Array,
    found: Found,
    done: jax.Array,
    one_tile: Callable[[jax.Array], Found],
    plan: Plan,
) -> Found:
    """Exact results in place of those not ``done``, a few at a time, as many as are needed."""
    order, size = jnp.argsort(done), min(AGAIN, plan.tile)
    missing = jnp.sum(~done)
    if plan.axes:
        missing = lax.pmax(missing, plan.axes)  # every device takes part in every block

    def redo(state: tuple[jax.Array, Found]) -> tuple[jax.Array, Found]:
        number, found = state
        which = lax.dynamic_slice(order, (number * size,), (size,))
        return number + 1, jax.tree.map(
            lambda old, new: old.at[which].set(new), found, one_tile(queries[which])
        )

    return lax.while_loop(lambda state: state[0] * size < missing, redo, (jnp.int32(0), found))[1]
