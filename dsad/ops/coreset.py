"""Which rows of a bank to keep: exact greedy k-centre, random rows, k-means centres.

Greedy k-centre (Gonzalez 1985; PatchCore, Roth et al. 2022, algorithm 1) repeats: take the row
farthest from all rows taken so far. The picks here are those of a plain run one by one, made many
at a time (``_kcentre``).
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core import distributed, hosts, rng
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import Progress, silent
from dsad.ops import _kcentre
from dsad.ops.neighbors import nearest

#: Seconds of work between two reports of progress; starting points of the published start rule.
REPORT_EVERY, STARTS = 0.5, 10


def greedy_coreset(
    bank: Any,
    size: int,
    *,
    start: int | Literal["published"] = 0,
    projection_dim: int | None = None,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    memory_limit: int | None = None,
    candidates: int = _kcentre.CANDIDATES,
    block: int = _kcentre.BLOCK,
) -> jax.Array:
    """Rows (size,) int32 of ``bank`` (N, d), in the order in which farthest-first takes them.

    The same picks as a plain run, equal distances settled by the lowest row; distances are told
    apart well below float32 rounding, except between rows closer than about 1e-3 of the largest
    centred norm. ``start`` is the first row, or "published" for the rule of the public code: the
    distance starts as the mean over 10 random rows (fewer in a smaller bank), which are not taken
    themselves, and so caps far rows. ``projection_dim`` compares rows after a random linear map
    with entries U(-1/√d, 1/√d), skipped if it equals d. Both draw from ``key``.

    ``mesh`` splits the rows over its devices, which exchange candidates only; the picks are the
    same. Over several processes all must pass the same bank, and each places its part of it.
    ``memory_limit``, in bytes, refuses a run that ``coreset_memory`` puts above it. ``progress`` is
    called with picks done, picks in all and a text with the time left. Runs on the host's clock, so
    it cannot be traced. Raises ConfigError, and DataError for NaN or infinity.
    """
    rows, depth = _checked(bank, size, start)
    projected = projection_dim is not None and projection_dim != depth
    if (projected or start == "published") and key is None:
        raise ConfigError("greedy_coreset.key: a projection or start='published' needs a key.")
    _check_memory(rows, depth, size, projection_dim, memory_limit)
    values = bank
    if projected:
        assert key is not None
        assert projection_dim is not None
        values = _projected(bank, projection_dim, rng.named(key, "coreset projection"))
    made, state = _begin(values, size, start, key, mesh, block)
    state = _finish(made, state, size, (candidates, block), mesh, progress)
    return (state.picks if mesh is None else jnp.asarray(np.asarray(state.picks)))[:size]


def coreset_memory(
    rows: int, dim: int, size: int, projection_dim: int | None = None, *, copied: bool = True
) -> int:
    """Bytes that ``greedy_coreset`` takes beyond the bank (rows, dim), all devices together.

    ``copied``: the bank is on the host or split over a mesh, so that a float32 copy of the rows is
    placed on the devices; with a projection only the projected rows are, in any case. Arrays only:
    compiling the program takes another 100 MB or so of host memory, once.
    """
    width = dim if projection_dim in (None, dim) else projection_dim
    assert width is not None
    placed = rows * width * 4 if copied or width != dim else 0
    placed *= 1 if _ladder(rows) == rows else 2  # rows are padded on their way to the device
    per_row = 7 * 4  # norms, distances, nearest picks, old and new
    many, block, chunk = _kcentre.CANDIDATES, _kcentre.BLOCK, _kcentre.CHUNK
    work = 4 * (4 * many * many + 4 * many * width + 3 * block * chunk + 2 * chunk * width)
    mapped = 8 * 8192 * dim if width != dim else 0
    return placed + rows * per_row + 4 * size + work + mapped


def budget_rows(
    rows: int,
    dim: int,
    *,
    fraction: float | None = None,
    count: int | None = None,
    bytes: int | None = None,
) -> int:
    """Rows to keep of a bank (rows, dim) for exactly one of three budgets, between 1 and ``rows``.

    ``fraction`` keeps floor(fraction · rows), as published; ``count`` that many; ``bytes`` what
    fits as float32. Raises ConfigError for none, several or a budget below one row.
    """
    given = {"fraction": fraction, "count": count, "bytes": bytes}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(
            f"bank budget: expected one of fraction, count and bytes, found {given or 'none'}."
        )
    ((name, value),) = given.items()
    if name == "fraction" and not 0 < value <= 1:
        raise ConfigError(f"bank budget: expected 0 < fraction <= 1, found {value}.")
    kept = {
        "fraction": lambda: math.floor(value * rows + 1e-9),
        "count": lambda: int(value),
        "bytes": lambda: int(value) // (4 * dim),
    }[name]()
    if kept < 1:
        raise ConfigError(
            f"bank budget: {name} = {value} keeps no row of {rows} × {dim} float32 ({4 * dim} "
            "bytes a row); raise it."
        )
    return min(kept, rows)


def random_rows(key: jax.Array, rows: int, size: int) -> jax.Array:
    """``size`` distinct rows of ``rows``, uniformly, ascending: (size,) int32."""
    if not 1 <= size <= rows:
        raise ConfigError(f"random_rows: expected 1 <= size <= {rows}, found {size}.")
    key = rng.named(key, "random bank")
    return jnp.sort(jax.random.permutation(key, rows)[:size]).astype(jnp.int32)


def kmeans_rows(
    key: jax.Array,
    bank: Any,
    size: int,
    *,
    steps: int = 20,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> jax.Array:
    """Centres (size, d) of Lloyd's k-means on ``bank`` (N, d), from random rows.

    At most ``steps`` rounds, fewer if no row changes its centre. A centre that loses all its rows
    stays where it was. Centres are means, not rows of the bank.
    """
    rows, _ = _checked(bank, size, 0)
    values = jnp.asarray(bank, jnp.float32)
    centres = values[random_rows(rng.named(key, "k-means start"), rows, size)]
    before: jax.Array | None = None
    for step in range(steps):
        assigned = nearest(values, centres, 1, mesh=mesh)[1][:, 0]
        if hosts.spans(mesh):
            assigned = jnp.asarray(hosts.whole(assigned))
        elif mesh is not None:
            assigned = jax.device_put(assigned, next(iter(values.devices())))
        if before is not None and bool(jnp.array_equal(assigned, before)):
            break
        before, centres = assigned, _means(values, assigned, centres)
        if progress:
            progress(step + 1, steps, "rounds of k-means")
    return centres


@jax.jit
def _means(values: jax.Array, assigned: jax.Array, centres: jax.Array) -> jax.Array:
    """Mean of the rows of each centre, as a change from it: accurate far from the origin."""
    size = centres.shape[0]
    total = jax.ops.segment_sum(values - centres[assigned], assigned, size)
    count = jax.ops.segment_sum(jnp.ones_like(assigned, jnp.float32), assigned, size)
    return centres + total / jnp.maximum(count, 1.0)[:, None]


def _checked(bank: Any, size: int, start: Any) -> tuple[int, int]:
    shape = np.shape(bank)
    if len(shape) != 2 or 0 in shape:
        raise ConfigError(f"coreset: expected a non-empty bank (N, d), found {shape}.")
    if not 1 <= size <= shape[0]:
        raise ConfigError(f"coreset: expected 1 <= size <= {shape[0]} rows, found {size}.")
    number = isinstance(start, int | np.integer) and 0 <= start < shape[0]
    if start != "published" and not number:
        raise ConfigError(
            f"coreset.start: expected a row from 0 to {shape[0] - 1} or 'published', "
            f"found {start!r}."
        )
    return shape[0], shape[1]


def _check_memory(
    rows: int, dim: int, size: int, projection_dim: int | None, limit: int | None
) -> None:
    needed = coreset_memory(rows, dim, size, projection_dim)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"greedy_coreset.memory_limit: {rows} rows × {dim} need {needed / 2**20:.0f} MiB "
            f"beyond the bank, more than the {limit / 2**20:.0f} MiB allowed. Use projection_dim, "
            "keep fewer rows, or raise the limit."
        )


@functools.partial(jax.jit, static_argnames="dim")
def _map(key: jax.Array, depth: jax.Array, dim: int) -> jax.Array:
    """Random linear map (d, dim); ``depth`` is an array of that length."""
    bound = depth.size**-0.5
    return jax.random.uniform(key, (depth.size, dim), jnp.float32, -bound, bound)


@jax.jit
def _mapped(rows: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(rows, weights, precision="highest")


def _projected(bank: Any, dim: int, key: jax.Array) -> np.ndarray:
    """Projected rows (N, dim), in pieces: the device never holds the whole bank for it."""
    if dim < 1:
        raise ConfigError(f"greedy_coreset.projection_dim: expected at least 1, found {dim}.")
    rows, depth = np.shape(bank)
    weights = _map(key, jnp.zeros((depth,)), dim)
    out, step = np.empty((rows, dim), np.float32), min(8192, rows)
    for at in range(0, rows, step):
        at = min(at, rows - step)  # whole pieces, so that one program serves
        out[at : at + step] = _mapped(jnp.asarray(bank[at : at + step], jnp.float32), weights)
    return out


def _begin(
    values: Any, size: int, start: Any, key: jax.Array | None, mesh: Mesh | None, block: int
) -> tuple[_kcentre.Bank, _kcentre.State]:
    rows = values.shape[0]
    shift = _shift(np.asarray(values[:: max(1, rows // 4096)], np.float32))
    if start == "published":
        assert key is not None
        draw = jax.random.permutation(rng.named(key, "coreset start"), rows)
        first = np.asarray(draw[: min(STARTS, rows)])
    else:
        first = np.asarray([start])
    points = np.asarray(values[first], np.float32)
    placed = _placed(values, mesh)
    norms, far, near = _distances(
        placed, *(_spread(x, mesh) for x in (shift, points, np.asarray(first, np.int32))),
        np.int32(rows), mesh,
    )  # fmt: skip
    top = jnp.max(norms)
    if not bool(jnp.isfinite(top)):
        raise DataError("coreset: the bank has NaN or infinite values; expected finite ones.")
    taken = 0 if start == "published" else 1
    picks = np.full(_ladder(size) + block, first[0], np.int32)
    made = _kcentre.Bank(placed, norms, _spread(shift, mesh), _spread(_kcentre.ERROR * top, mesh))
    state = _kcentre.State(
        far, near, *(_spread(x, mesh) for x in (picks, np.int32(taken), np.int32(0)))
    )
    return made, state


def _shift(sample: np.ndarray) -> np.ndarray:
    """A point (1, d) near the mean, on a grid coarse enough that integers stay integers."""
    mean = np.float64(sample).mean(axis=0, keepdims=True)
    spread = float(np.sqrt(np.mean((sample - mean) ** 2)))
    if not np.isfinite(spread) or spread == 0:
        return mean.astype(np.float32)
    step = 2.0 ** np.frexp(spread)[1]
    return (np.round(mean / step) * step).astype(np.float32)


def _spread(value: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(value)
    if hosts.spans(mesh) and not isinstance(value, jax.Array):
        return hosts.put(value, NamedSharding(mesh, PartitionSpec()))
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec()))


def _ladder(rows: int) -> int:
    """The smallest size that holds ``rows`` on a ladder with 32 steps per doubling.

    Banks of nearly the same size share compiled programs, for at most a 32nd more work.
    """
    step = 2 ** max(math.ceil(math.log2(rows)) - 6, 0)
    return rows + -rows % step


def _placed(values: Any, mesh: Mesh | None) -> jax.Array:
    """Float32 rows on the device, or split over the mesh, with zero rows as padding."""
    rows, depth = values.shape
    padded = _ladder(rows)
    if mesh is None:
        pad = jnp.pad if isinstance(values, jax.Array) else np.pad
        return jnp.asarray(pad(values, ((0, padded - rows), (0, 0))), jnp.float32)
    padded += -padded % mesh.size

    def part(index: Any) -> np.ndarray:
        low, high, _ = index[0].indices(padded)
        piece = np.asarray(values[low : min(high, rows)], np.float32)
        return np.pad(piece, ((0, high - low - len(piece)), (0, 0)))

    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((padded, depth), sharding, part)


@functools.partial(jax.jit, static_argnames="mesh")
def _distances(
    rows: jax.Array,
    shift: jax.Array,
    points: jax.Array,
    first: jax.Array,
    count: jax.Array,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared norms, first squared distances (the mean distance, squared) and nearest picks."""
    number = jnp.arange(rows.shape[0], dtype=jnp.int32)
    norms = jnp.sum(jnp.square(rows - shift), axis=1)

    def squares(point: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(rows - point[None]), axis=1)

    if first.size == 1:
        far = jnp.where(number == first[0], -jnp.inf, squares(points[0]))
        near = jnp.full(number.shape, first[0])
    else:
        total = lax.fori_loop(
            0, first.size, lambda i, t: t + jnp.sqrt(squares(points[i])), jnp.zeros_like(norms)
        )
        far, near = jnp.square(total / first.size), jnp.full(number.shape, -1, jnp.int32)
    far = jnp.where(number < count, far, -jnp.inf)
    norms = jnp.where(number < count, norms, 0.0)
    if mesh is not None:
        split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        norms, far, near = (lax.with_sharding_constraint(x, split) for x in (norms, far, near))
    return norms, far, near


def _finish(
    made: _kcentre.Bank,
    state: _kcentre.State,
    size: int,
    sizes: tuple[int, int],
    mesh: Mesh | None,
    progress: Progress | None,
) -> _kcentre.State:
    run: Callable[..., _kcentre.State] = functools.partial(_kcentre.slab, sizes=sizes, mesh=mesh)
    target = _spread(np.int32(size), mesh)
    if progress is None and hosts.spans(mesh):
        progress = silent  # another process may tell, and all must make the same calls
    if progress is None:
        return run(made, state, target, _spread(np.int32(2**31 - 1), mesh))
    progress(0, size, "picks, compiling …")
    state = jax.block_until_ready(run(made, state, target, _spread(np.int32(0), mesh)))
    clock, limit, step, marks = time.monotonic(), 0, 1, [(0.0, int(state.count))]
    while marks[-1][1] < size:
        limit += step
        state = run(made, state, target, _spread(np.int32(limit), mesh))
        done = int(state.count)  # waits for the passes
        now = time.monotonic() - clock
        if hosts.spans(mesh):  # one clock for all, as it decides on the next call
            now = float(distributed.gather(np.float64(now))[0])
        lasted = now - marks[-1][0]
        marks.append((now, done))
        step = max(1, min(2 * step, int(step * REPORT_EVERY / max(lasted, 1e-6))))
        progress(done, size, f"picks, about {_left(marks, size):.0f} s left")
    return state


def _left(marks: list[tuple[float, int]], size: int) -> float:
    """Seconds left, from (seconds, picks) so far: the pace of the later half of the time."""
    now, done = marks[-1]
    since = next(m for m in marks if m[0] >= now / 2 or m is marks[-1])
    if since is marks[-1]:
        since = marks[-2]
    return (now - since[0]) / max(done - since[1], 1) * (size - done)
