"""The passes of the exact greedy k-centre coreset: many picks per pass over the bank.

Greedy k-centre (Gonzalez 1985; PatchCore's coreset) repeats: take the row farthest from all rows
taken so far. One by one, every pick costs a pass over the bank that is bound by memory. Here a pass
serves many picks: among the T rows of largest current distance the greedy picks are replayed on
their T × T distances for as long as the best of them stays above the (T + 1)-th distance. Distances
only fall, so no row outside can overtake and these picks are the ones that a plain run makes; the
whole block of picks then enters the distances of all rows with one matrix product.

Products of centred float32 features are off by about 1e-6 of the largest squared norm, more than
the gap between many consecutive picks. So each row also remembers its nearest pick: whenever rows
lie within that error of the best, their distances are recomputed from differences, in two float32
parts of about 40 bits together, and decide. A block ends where the error could hide a row outside.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

#: Rows replayed at once; picks folded at once; rows per step of a fold; rows refined at once.
CANDIDATES, BLOCK, CHUNK, REFINED = 1024, 256, 2048, 16
#: Error of a squared distance by products, in units of the largest centred squared norm.
ERROR = 16 * 2.0**-24


class Bank(NamedTuple):
    """What a run does not change: rows (L, d) of this device, squared norms (L,), shift (1, d)."""

    rows: jax.Array
    norms: jax.Array
    shift: jax.Array
    error: jax.Array  # of a squared distance, a scalar


class State(NamedTuple):
    """``far`` (L,): squared distance to the nearest pick, -inf for picks; ``near`` (L,): that pick.

    ``picks`` (size + block,) and ``count`` are equal on all devices.
    """

    far: jax.Array
    near: jax.Array
    picks: jax.Array
    count: jax.Array
    passes: jax.Array


class _Block(NamedTuple):
    """Greedy picks among candidates: their values (t,), in-block nearest slot or -1, and picks."""

    values: jax.Array
    near: jax.Array
    slots: jax.Array  # (block,)
    count: jax.Array
    go: jax.Array


class _Pool(NamedTuple):
    """The candidates of a pass, ascending by row: rows (t,), features and those of their pick."""

    rows: jax.Array
    near: jax.Array  # (t,) row of the nearest pick, -1 for none
    values: jax.Array  # (t,)
    here: jax.Array  # (t, d)
    there: jax.Array  # (t, d)
    bound: jax.Array  # the largest value outside
    after: jax.Array  # the lowest row outside that has it


def _squared(x: jax.Array, y: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared distances (n,) of rows (n, d) as high and low part, exact to about 1e-11.

    ``scale`` is a power of two above every distance asked for. The high parts are multiples of
    scale / 2²², so their sums and differences are exact in any order.
    """
    gap = x - y
    back = gap - x
    rest = (x - (gap - back)) - (y + back)  # x - y is gap + rest, exactly
    bits = lax.bitcast_convert_type(gap, jnp.int32) & jnp.int32(-4096)
    head = lax.bitcast_convert_type(bits, jnp.float32)  # 12 bits: its square is exact
    tail = gap - head
    square, step = head * head, scale * 2.0**-22
    high = jnp.round(square / step) * step
    low = (square - high) + (tail * (head + gap) + 2 * gap * rest)
    return jnp.sum(high, axis=1), jnp.sum(low, axis=1)


def _scale(value: jax.Array) -> jax.Array:
    """A power of two of at least twice a positive value."""
    return jnp.ldexp(jnp.float32(1.0), jnp.frexp(jnp.maximum(value, 1e-30))[1] + 1)


def _refine(pool: _Pool, block: _Block, slots: jax.Array, scale: jax.Array):
    """High and low part of the squared distances of candidates ``slots`` (n,)."""
    inside = block.near[slots]
    other = jnp.where(inside[:, None] >= 0, pool.here[inside], pool.there[slots])
    high, low = _squared(pool.here[slots], other, scale)
    given = (inside < 0) & (pool.near[slots] < 0)  # the start rule's value: no pick behind it
    return jnp.where(given, block.values[slots], high), jnp.where(given, 0.0, low)


def _best(pool: _Pool, block: _Block, error: jax.Array) -> jax.Array:
    """Slot of the farthest candidate; equal distances give the lowest."""
    top = jnp.max(block.values)
    close = block.values >= top - 2 * error
    scale = _scale(top + 2 * error)

    def decided(slots: jax.Array) -> jax.Array:
        high, low = _refine(pool, block, slots, scale)
        high = jnp.where(close[slots], high, -jnp.inf)
        return slots[jnp.argmax((high - jnp.max(high)) + low)]

    def few() -> jax.Array:
        found = lax.top_k(jnp.where(close, block.values, -jnp.inf), min(REFINED, close.size))[1]
        return decided(jnp.sort(found).astype(jnp.int32))

    count = jnp.sum(close.astype(jnp.int32))
    return lax.switch(
        (count > 1).astype(jnp.int32) + (count > REFINED).astype(jnp.int32),
        (
            lambda: jnp.argmax(block.values).astype(jnp.int32),
            few,
            lambda: decided(jnp.arange(close.size, dtype=jnp.int32)),
        ),
    )


def _replay(pool: _Pool, bank: Bank, most: jax.Array, block: int, settled: jax.Array) -> _Block:
    """Greedy picks among the candidates for as long as no row outside can be farther.

    ``settled``: whether the first pick is allowed in any case, as nothing is left to refine.
    """
    error, centred = bank.error, pool.here - bank.shift
    norms = jnp.sum(centred * centred, axis=1)
    products = lax.dot_general(
        centred, centred, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    between = jnp.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)

    def step(state: _Block) -> _Block:
        slot = _best(pool, state, error)
        value = state.values[slot]
        certain = value - 2 * error > pool.bound
        # Only copies of picks are left: they go in the order of their rows.
        floor = (value <= 0) & (pool.bound <= 0) & (pool.rows[slot] < pool.after)
        go = (state.count < most) & (certain | floor | ((state.count == 0) & settled))
        gaps = between[slot]
        closer = gaps < state.values
        taken = jnp.arange(gaps.size, dtype=jnp.int32) == slot
        moved = _Block(
            values=jnp.where(taken, -jnp.inf, jnp.minimum(state.values, gaps)),
            near=jnp.where(closer, slot, state.near),
            slots=state.slots.at[state.count].set(slot),
            count=state.count + 1,
            go=go,
        )
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), moved, state._replace(go=go))

    start = _Block(
        values=pool.values,
        near=jnp.full(pool.rows.shape, -1, jnp.int32),
        slots=jnp.zeros((block,), jnp.int32),
        count=jnp.int32(0),
        go=jnp.bool_(True),
    )
    return lax.while_loop(lambda s: s.go & (s.count < most), step, start)


def _take(bank: Bank, rows: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Features (n, d) of rows by their number in the whole bank; -1 gives any."""
    if not axes:
        return bank.rows[jnp.maximum(rows, 0)]
    local, inside = _local(bank, rows, axes)
    return lax.psum(jnp.where(inside[:, None], bank.rows[jnp.where(inside, local, 0)], 0.0), axes)


def _local(bank: Bank, rows: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Position of rows on this device, past its end for rows of others, and whether it is here."""
    length = bank.rows.shape[0]
    local = rows - (lax.axis_index(axes) * length if axes else 0)
    inside = (local >= 0) & (local < length)
    return jnp.where(inside, local, length), inside


def _pool(
    bank: Bank, state: State, candidates: int, axes: tuple[str, ...]
) -> tuple[_Pool, jax.Array]:
    """The farthest rows with distances from differences, and whether any distance changed."""
    length = bank.rows.shape[0]
    values, places = lax.top_k(state.far, min(candidates + 1, length))
    near = state.near[places]
    if axes:
        places = places + lax.axis_index(axes) * length
        values, places, near = (lax.all_gather(x, axes, tiled=True) for x in (values, places, near))
    many = min(candidates, values.size)
    values = jnp.append(values, -jnp.inf)  # stands for the rows outside when there are none
    places = jnp.append(places.astype(jnp.int32), jnp.int32(2**31 - 1))
    values, order = lax.top_k(values, many + 1)
    bound, after = values[many], places[order[many]]
    rows, values, order = lax.sort((places[order[:many]], values[:many], order[:many]), num_keys=1)
    near = near[order]
    pool = _Pool(rows, near, values, _take(bank, rows, axes), _take(bank, near, axes), bound, after)
    high, low = _squared(pool.here, pool.there, _scale(jnp.max(values) + 2 * bank.error))
    exact = jnp.where((near >= 0) & (values > -jnp.inf), high + low, values)
    return pool._replace(values=exact), jnp.any(exact != values)


def _fold(
    bank: Bank, state: State, pool: _Pool, block: _Block, axes: tuple[str, ...], width: int
) -> State:
    """The first ``width`` picks of the block enter the distances of all rows."""
    length, depth = bank.rows.shape
    slots, valid = block.slots[:width], jnp.arange(width) < block.count
    new = pool.rows[slots]
    picked = pool.here[slots] - bank.shift
    halves = jnp.where(valid, 0.5 * jnp.sum(picked * picked, axis=1), jnp.inf)[:, None]
    number = jnp.arange(width, dtype=jnp.int32)[:, None]
    chunk = min(CHUNK, length)

    def one(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        far, near = carry
        at = jnp.minimum(step * chunk, length - chunk)  # the last chunks may overlap
        rows = lax.dynamic_slice(bank.rows, (at, 0), (chunk, depth)) - bank.shift
        products = lax.dot_general(
            picked, rows, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        gaps = halves - products
        lowest = jnp.min(gaps, axis=0)
        slot = jnp.min(jnp.where(gaps <= lowest[None], number, width), axis=0)
        squares = jnp.maximum(lax.dynamic_slice(bank.norms, (at,), (chunk,)) + 2 * lowest, 0.0)
        old = lax.dynamic_slice(far, (at,), (chunk,))
        closer = squares < old
        old_near = lax.dynamic_slice(near, (at,), (chunk,))
        return (
            lax.dynamic_update_slice(far, jnp.where(closer, squares, old), (at,)),
            lax.dynamic_update_slice(near, jnp.where(closer, new[slot], old_near), (at,)),
        )

    far, near = lax.fori_loop(0, -(-length // chunk), one, (state.far, state.near))
    local, _ = _local(bank, jnp.where(valid, new, -1), axes)
    return state._replace(
        # A pick is at distance 0, and never picked again even where all others are, too.
        far=far.at[local].set(-jnp.inf, mode="drop"),
        near=near,
        picks=lax.dynamic_update_slice(state.picks, new, (state.count,)),
        count=state.count + block.count,
    )


def _pass(
    bank: Bank, state: State, size: jax.Array, sizes: tuple[int, int], axes: tuple[str, ...]
) -> State:
    candidates, block = sizes
    pool, changed = _pool(bank, state, candidates, axes)
    local, _ = _local(bank, pool.rows, axes)
    state = state._replace(
        far=state.far.at[local].set(pool.values, mode="drop"), passes=state.passes + 1
    )
    most = jnp.minimum(size - state.count, block)
    made = _replay(pool, bank, most, block, ~changed)
    widths = [block * i // 4 for i in range(1, 5)] if block % 32 == 0 else [block]
    folds = [lambda s, w=w: _fold(bank, s, pool, made, axes, w) for w in widths]
    branch = jnp.where(made.count > 0, 1 + (made.count - 1) * len(widths) // block, 0)
    return lax.switch(branch, [lambda s: s, *folds], state)


@functools.partial(jax.jit, static_argnames=("sizes", "mesh"), donate_argnames=("state",))
def slab(
    bank: Bank,
    state: State,
    size: jax.Array,
    limit: jax.Array,
    sizes: tuple[int, int],
    mesh: Mesh | None,
) -> State:
    """Passes until ``size`` picks are made or ``limit`` passes were done in all."""

    def run(bank: Bank, state: State, size: jax.Array, limit: jax.Array) -> State:
        axes = mesh.axis_names if mesh is not None else ()
        return lax.while_loop(
            lambda s: (s.count < size) & (s.passes < limit),
            lambda s: _pass(bank, s, size, sizes, axes),
            state,
        )

    if mesh is None:
        return run(bank, state, size, limit)
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    banks: Any = Bank(split, split, whole, whole)  # type: ignore[arg-type]
    states: Any = State(split, split, whole, whole, whole)  # type: ignore[arg-type]
    return jax.shard_map(
        run, mesh=mesh, in_specs=(banks, states, whole, whole), out_specs=states, check_vma=False
    )(bank, state, size, limit)
