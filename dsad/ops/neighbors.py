"""Nearest neighbours on one device or a mesh, in bounded memory: exact, certified, approximate."""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core import hosts
from dsad.core.config import listed
from dsad.core.errors import ConfigError
from dsad.core.platform import has_matrix_units
from dsad.ops import _neighbors_search
from dsad.ops._neighbors_search import GROUP, Plan, Prepared

#: Queries × bank rows compared at once on a device, at most.
AREA = 448 * 32768
#: Queries compared at once by default: what fits a CPU's caches, and what fills an accelerator.
CPU_TILE, TILE = 448, 2048

Precision = Literal["auto", "exact", "certified"]


def nearest(
    queries: Any,
    bank: Any,
    k: int = 1,
    *,
    mesh: Mesh | None = None,
    tile: int | None = None,
    valid: Any = None,
    precision: Precision = "exact",
    recall_target: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k nearest rows of ``bank`` (M, d) of each of ``queries`` (Q, d), Euclidean.

    Returns distances (Q, k) float32, ascending, and row indices (Q, k) int32; equal distances are
    listed by ascending index. Features (numpy or jax arrays, taken as float32) are compared after
    subtracting the bank's mean; returned distances come from differences of the original features.
    Of more than k + 3 + k // 8 rows that differ but lie within float32 rounding (about 1e-6 of the
    centred norm squared) of the k-th distance squared, the listed ones may not be the closest;
    distances are right within that rounding. A NaN or infinity in the bank makes every distance
    NaN; in a query, those of that query.

    ``valid``: how many leading rows of the bank count (an integer or an int32 scalar array, which
    may be traced); the others are padding of any content and are never found, so that banks of
    different sizes share one compiled program (``pad_bank``). ``k`` is 1 to M and to ``valid``;
    where a traced ``valid`` is smaller, what is missing has distance inf and index -1.

    A bank that ``prepare`` made spares every call what needs no query; with it, on one device,
    ``valid`` and ``precision`` are those that it was prepared with, and ``k`` at most that.

    ``precision``: "exact" multiplies in float32. "certified" searches in bfloat16 first, at the
    speed of matrix units (and of CPUs with bfloat16 instructions), recomputes the candidates in
    float32, proves by a bound on the rounding which queries cannot have lost a neighbour, and
    repeats the others exactly: the result is that of "exact". "auto" takes it on CPUs with units
    for bfloat16 matrices (measured; not on others). ``recall_target``, in (0, 1), asks
    for the accelerator's approximate selection instead (``jax.lax.approx_min_k``; CPUs have none
    and select exactly): distances stay exact for the rows found, of which ``recall`` tells how
    many are the right ones.

    ``mesh`` splits queries and bank over all its devices; queries and k candidates per device are
    exchanged, never the bank. The result is the same for every device count, distances up to one
    rounding. Over several processes, arrays that are not on the mesh yet must be the same on all of
    them, and results are split over the devices (``core.hosts.whole``). ``tile``: queries of a
    device compared at once (448 on CPUs, 2,048 elsewhere). Beyond inputs and outputs each device
    holds one copy of its part of the bank (two and a half if certified) and at most two float32
    arrays of 448 × 32,768 (118 MB).

    Usable inside ``jit``; compiled once per combination of shapes. Raises ConfigError.
    """
    distances, indices, _ = _run(
        queries, bank, k, mesh, tile, valid, precision=precision, recall=recall_target
    )
    return distances, indices


def prepare(bank: Any, k: int = 1, *, valid: Any = None, precision: Precision = "auto") -> Prepared:
    """A bank (M, d) as ``nearest`` takes it for many calls on one device, for up to ``k`` rows.

    It holds the bank, not a copy, and beside it one in float32 (one and a half if certified).
    """
    _check(bank[:0], bank, k, None, precision, None)
    plan = _plan(max(CPU_TILE, TILE), k, None, None, precision, None)
    bank = jnp.asarray(bank, jnp.float32)
    ready = _prepared(bank, _counted(valid, len(bank), k), plan)
    return ready._replace(shard=ready.shard._replace(bank=bank))


def without(bank: Prepared, counted: Any) -> Prepared:
    """The bank without those rows that are not ``counted`` (M,) bool, which are never found.

    It takes 4 · M bytes; the rest is that of ``bank``. Where fewer than k rows are left, what is
    missing has distance inf and index -1. Usable inside ``jit``.
    """
    return _neighbors_search.without(bank, jnp.asarray(counted, bool))


def certified_share(
    queries: Any,
    bank: Any,
    k: int = 1,
    *,
    mesh: Mesh | None = None,
    tile: int | None = None,
    valid: Any = None,
) -> float:
    """Share of the queries that ``nearest(..., precision="certified")`` need not repeat."""
    done = _run(queries, bank, k, mesh, tile, valid, precision="certified", recall=None)[2]
    return float(jnp.mean(done.astype(jnp.float32)))


def recall(
    queries: Any,
    bank: Any,
    k: int = 1,
    *,
    recall_target: float,
    sample: int = 1000,
    mesh: Mesh | None = None,
    tile: int | None = None,
    valid: Any = None,
) -> float:
    """Share of the exact k nearest rows that the approximate search finds.

    Measured on ``sample`` evenly spaced queries (all, if there are fewer). A row at the k-th exact
    distance counts as found whichever of equals it is. Raises ConfigError.
    """
    rows = jnp.shape(queries)[0]
    if rows < 1 or sample < 1:
        raise ConfigError(f"recall: expected queries and sample >= 1, found {rows} and {sample}.")
    chosen = np.linspace(0, rows - 1, min(sample, rows)).round().astype(np.int32)
    some = queries[chosen]
    shared = {"mesh": mesh, "tile": tile, "valid": valid}
    exact, _ = nearest(some, bank, k, **shared)
    found, _ = nearest(some, bank, k, recall_target=recall_target, **shared)
    return float(jnp.mean(found <= exact[:, -1:] * (1 + 2.0**-20)))


def bucket(rows: int, least: int = GROUP) -> int:
    """The smallest size that holds ``rows`` on a ladder of eight steps per doubling.

    Sizes are multiples of ``least``, a power of two, and waste less than an eighth of ``rows``, or
    fewer than ``least`` rows. Raises ConfigError for less than one row.
    """
    if rows < 1:
        raise ConfigError(f"bucket: expected at least 1 row, found {rows}.")
    octave = 2 ** max(math.ceil(math.log2(rows)) - 4, 0)
    step = max(least, octave)
    return rows + -rows % step


def pad_bank(bank: Any) -> tuple[Any, np.ndarray]:
    """The bank with zero rows up to its ``bucket``, and how many rows count (int32 scalar array).

    ``nearest(queries, padded, k, valid=rows)`` then compiles once per bucket. Numpy stays numpy.
    """
    rows = np.shape(bank)[0]
    pad = jnp.pad if isinstance(bank, jax.Array) else np.pad
    return pad(bank, ((0, bucket(rows) - rows), (0, 0))), np.asarray(rows, np.int32)


def _run(
    queries: Any,
    bank: Any,
    k: int,
    mesh: Mesh | None,
    tile: int | None,
    valid: Any,
    *,
    precision: str,
    recall: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distances, indices and certificates (Q,), after the checks."""
    ready = None
    if isinstance(bank, Prepared):
        if mesh is not None:
            raise ConfigError("a prepared bank is searched on one device; leave the mesh out.")
        ready, bank, valid = bank, bank.shard.bank, bank.shard.valid
    _check(queries, bank, k, tile, precision, recall)
    rows = jnp.shape(queries)[0]
    valid = _counted(valid, jnp.shape(bank)[0], k)
    plan = _plan(rows, k, mesh, tile, precision, recall)
    if rows == 0:
        return jnp.zeros((0, k)), jnp.zeros((0, k), jnp.int32), jnp.ones(0, bool)
    if mesh is not None:
        queries, bank = _spread(queries, mesh), _spread(bank, mesh)
    return _nearest(queries, bank if ready is None else ready, valid, rows, mesh, plan)


def _check(
    queries: Any, bank: Any, k: int, tile: int | None, precision: str, recall: float | None
) -> None:
    q, b = jnp.shape(queries), jnp.shape(bank)
    if len(q) != 2 or len(b) != 2 or q[1] != b[1]:
        raise ConfigError(
            f"nearest: expected queries (Q, d) and bank (M, d) of one d, found {q} and {b}."
        )
    if not 1 <= k <= b[0]:
        raise ConfigError(
            f"nearest: expected 1 <= k <= {b[0]}, the rows of the bank, found k = {k}. Lower k or "
            "keep more bank rows."
        )
    if tile is not None and tile < 1:
        raise ConfigError(f"nearest: expected tile >= 1, found {tile}.")
    if precision not in get_args(Precision):
        raise ConfigError(
            f"nearest: expected precision {listed(get_args(Precision))}, found {precision!r}."
        )
    if recall is not None and not 0 < recall < 1:
        raise ConfigError(
            f"nearest: expected recall_target above 0 and below 1, found {recall}. Leave it out "
            "for the exact search."
        )
    if recall is not None and precision == "certified":
        raise ConfigError(
            "nearest: precision='certified' promises the exact result and recall_target an "
            "approximate one; leave one of them out."
        )


def _counted(valid: Any, rows: int, k: int) -> Any:
    """``valid`` as an int32 scalar, checked where it is concrete."""
    if valid is None:
        return np.int32(rows)
    if jnp.shape(valid) != () or not jnp.issubdtype(jnp.result_type(valid), jnp.integer):
        raise ConfigError(
            f"nearest: expected valid to be one integer, found {jnp.result_type(valid)} of shape "
            f"{jnp.shape(valid)}."
        )
    if isinstance(valid, Tracer):
        return valid.astype(jnp.int32)
    if not k <= int(valid) <= rows:
        raise ConfigError(
            f"nearest: expected valid from k = {k} to {rows}, the rows of the bank, found "
            f"{int(valid)}. Lower k or keep more bank rows."
        )
    return np.int32(valid)


def _plan(
    rows: int, k: int, mesh: Mesh | None, tile: int | None, precision: str, recall: float | None
) -> Plan:
    """Sizes: a block of one tile per device and a chunk of the bank cover at most ``AREA``."""
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    parts = mesh.size if mesh is not None else 1
    tile = tile or (CPU_TILE if platform == "cpu" else TILE)
    chunk = max(AREA // (tile * parts), GROUP * 64)
    # Tiles of equal size, so that none is mostly padding. A multiple of 8 rows: products of partial
    # register blocks are slow and may round differently.
    own = math.ceil(rows / parts)
    even = math.ceil(own / max(math.ceil(own / tile), 1))
    tile = max(min(tile, even + -even % 8), 1)
    if precision == "auto":
        precision = "certified" if platform == "cpu" and has_matrix_units() else "exact"
    axes = tuple(mesh.axis_names) if mesh is not None else ()
    return Plan(
        k=k, tile=tile, chunk=chunk, certified=precision == "certified", recall=recall,
        axes=axes, parts=parts,
    )  # fmt: skip


def _spread(values: Any, mesh: Mesh) -> Any:
    """Split concrete rows over the mesh, padded to its size; arrays on the mesh stay there."""
    if isinstance(values, Tracer):
        return values
    if isinstance(values, jax.Array) and values.sharding.device_set == set(mesh.devices.flat):
        return values
    missing = -len(values) % mesh.size
    if hosts.spans(mesh):
        return hosts.split(np.pad(np.asarray(values), ((0, missing), (0, 0))), mesh)
    pad = jnp.pad if isinstance(values, jax.Array) else np.pad
    values = pad(values, ((0, missing), (0, 0)))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


_prepared = jax.jit(_neighbors_search.prepared, static_argnames="plan")


@functools.partial(jax.jit, static_argnames=("rows", "mesh", "plan"))
def _nearest(
    queries: jax.Array,
    bank: jax.Array | Prepared,
    valid: jax.Array,
    rows: int,
    mesh: Mesh | None,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    queries = jnp.asarray(queries, jnp.float32)
    bank = bank if isinstance(bank, Prepared) else jnp.asarray(bank, jnp.float32)
    search = functools.partial(_neighbors_search.search, plan=plan)
    counted = jnp.int32(rows)
    if mesh is None or isinstance(bank, Prepared):
        return search(queries, bank, valid, counted)
    queries, bank = (jnp.pad(x, ((0, -len(x) % plan.parts), (0, 0))) for x in (queries, bank))
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    distances, indices, certified = jax.shard_map(
        search, mesh=mesh, in_specs=(split, split, whole, whole), out_specs=(split, split, split)
    )(queries, bank, valid, counted)
    return distances[:rows], indices[:rows], certified[:rows]
