"""Exact nearest neighbours on the device, in bounded memory.

Squared distances are compared through |b|²/2 - q·b of centred features, one query tile against
one bank chunk at a time. The bank is laid out so that column j · C + c of a chunk holds its row
c · G + j: the minimum over each group of G consecutive rows is then a minimum over a leading axis,
which vectorises where an arg-min does not. The k best elements lie in the k best groups, so only
those groups are looked into. A few candidates more than k are kept and their distances recomputed
from differences of the original features, which settles near ties and distances close to zero.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core.errors import ConfigError
from dsad.ops.coreset import greedy_coreset as greedy_coreset

#: Rows per group; query rows per tile; bank rows per chunk; candidates kept beyond k.
GROUP, TILE, CHUNK, SLACK = 16, 448, 32768, 3


def nearest(
    queries: jax.Array,
    bank: jax.Array,
    k: int = 1,
    *,
    mesh: Mesh | None = None,
    tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k nearest rows of ``bank`` (M, d) of each of ``queries`` (Q, d), Euclidean.

    Returns distances (Q, k) float32, ascending, and row indices (Q, k) int32; equal distances are
    listed by ascending index. Features (numpy or jax arrays, taken as float32) are compared after
    subtracting the bank's mean; returned distances come from differences of the original features.
    Of more than k + 3 rows that differ but lie within float32 rounding (about 1e-6 of the centred
    norm squared) of the k-th distance squared, the listed ones may not be the closest; distances
    are right within that rounding. A NaN or infinity in the bank makes every distance NaN; in a
    query, those of that query.

    ``k`` is 1 to M. ``mesh`` splits the queries over all its devices, with a whole bank on each;
    the result is the same for every device count, distances up to one rounding. ``tile`` is how
    many queries are compared at once (448). Beyond inputs and outputs each device holds one copy
    of the bank and at most two float32 arrays of tile × 32,768 (118 MB).

    Usable inside ``jit``; compiled once per combination of shapes. Raises ConfigError.
    """
    _check(queries, bank, k, tile)
    if mesh is not None:
        queries, bank = _on_mesh(queries, mesh), _on_mesh(bank, mesh)
    return _nearest(queries, bank, k, mesh, tile or TILE)


def _check(queries: jax.Array, bank: jax.Array, k: int, tile: int | None) -> None:
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


def _on_mesh(values: jax.Array, mesh: Mesh) -> jax.Array:
    """Move a concrete array that lives on other devices; arrays on the mesh stay as they are."""
    if isinstance(values, Tracer) or not isinstance(values, jax.Array):
        return values
    if values.sharding.device_set == set(mesh.devices.flat):
        return values
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("k", "mesh", "tile"))
def _nearest(
    queries: jax.Array, bank: jax.Array, k: int, mesh: Mesh | None, tile: int
) -> tuple[jax.Array, jax.Array]:
    queries, bank = jnp.asarray(queries, jnp.float32), jnp.asarray(bank, jnp.float32)
    rows = queries.shape[0]
    if rows == 0:
        return jnp.zeros((0, k), jnp.float32), jnp.zeros((0, k), jnp.int32)
    if mesh is None:
        return _search(queries, bank, k, tile)
    parts = mesh.size
    queries = jnp.pad(queries, ((0, -rows % parts), (0, 0)))
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    distances, indices = jax.shard_map(
        functools.partial(_search, k=k, tile=tile),
        mesh=mesh,
        in_specs=(split, whole),
        out_specs=(split, split),
    )(queries, bank)
    return distances[:rows], indices[:rows]


def _search(queries: jax.Array, bank: jax.Array, k: int, tile: int) -> tuple[jax.Array, jax.Array]:
    rows, depth = queries.shape
    keep = min(k + SLACK, bank.shape[0])
    # A multiple of 8 rows: products of partial register blocks are slow and may round differently.
    tile = min(tile, rows + -rows % 8)
    shift = _shift(bank)
    chunks, halves = _grouped(bank - shift, max(CHUNK, keep))

    def one_tile(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        centred = block - shift
        if chunks.shape[0] == 1:
            found = _candidates(centred, chunks[0], halves[0], keep)[1]
        else:
            found = _over_chunks(centred, chunks, halves, keep)
        return _rerank(block, bank, jnp.minimum(found, bank.shape[0] - 1), k)

    padded = jnp.pad(queries, ((0, -rows % tile), (0, 0)))
    distances, indices = lax.map(one_tile, padded.reshape(-1, tile, depth))
    # With NaN everywhere the candidates would be arbitrary rows at plausible distances.
    distances = jnp.where(jnp.all(jnp.isfinite(shift)), distances, jnp.nan)
    return distances.reshape(-1, k)[:rows], indices.reshape(-1, k)[:rows]


def _shift(bank: jax.Array) -> jax.Array:
    """The bank's mean (1, d), rounded to a power of two near the features' spread.

    Any shift leaves distances unchanged; this one is as good as the mean against cancellation, and
    subtracting it is exact for features on a grid (integers, say), so that their ties stay ties.
    """
    mean = jnp.mean(bank, axis=0, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.square(bank - mean)))
    step = jnp.ldexp(jnp.float32(1.0), jnp.frexp(spread)[1])
    return jnp.where(spread > 0, jnp.round(mean / step) * step, mean)


def _grouped(bank: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The bank as chunks (n, G · C, d) in group order, and |row|²/2 (n, G, C), inf on padding."""
    rows, depth = bank.shape
    count = math.ceil(rows / most)
    groups = math.ceil(rows / (count * GROUP))
    groups += -groups % 8  # whole vector registers along C
    missing = count * groups * GROUP - rows
    halves = jnp.pad(0.5 * jnp.sum(bank * bank, axis=1), (0, missing), constant_values=jnp.inf)
    chunks = jnp.pad(bank, ((0, missing), (0, 0))).reshape(count, groups, GROUP, depth)
    return (
        chunks.swapaxes(1, 2).reshape(count, GROUP * groups, depth),
        halves.reshape(count, groups, GROUP).swapaxes(1, 2),
    )


def _candidates(
    queries: jax.Array, chunk: jax.Array, halves: jax.Array, keep: int
) -> tuple[jax.Array, jax.Array]:
    """The ``keep`` smallest |b|²/2 - q·b of a chunk, (T, keep) ascending, and their rows in it."""
    group, groups = halves.shape
    products = lax.dot_general(
        queries, chunk, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    ).reshape(-1, group, groups)
    lowest = jnp.min(halves[None] - products, axis=1)
    # Groups in row order, so that the stable top_k below lists ties by ascending row.
    picked = jnp.sort(lax.top_k(-lowest, min(keep, groups))[1], axis=1)
    inside = jnp.take_along_axis(products, picked[:, None, :], axis=2)
    values = halves[:, picked].swapaxes(0, 1) - inside
    values = values.swapaxes(1, 2).reshape(picked.shape[0], -1)
    best, place = lax.top_k(-values, keep)
    row = jnp.take_along_axis(picked, place // group, axis=1) * group + place % group
    return -best, row.astype(jnp.int32)


def _over_chunks(queries: jax.Array, chunks: jax.Array, halves: jax.Array, keep: int) -> jax.Array:
    """Rows (T, keep) of the smallest values over all chunks: chunk by chunk, then a merge."""
    size = chunks.shape[1]

    def one_chunk(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk, half, number = part
        values, rows = _candidates(queries, chunk, half, keep)
        return values, rows + number * size

    numbers = jnp.arange(chunks.shape[0], dtype=jnp.int32)
    values, rows = lax.map(one_chunk, (chunks, halves, numbers))
    values = values.swapaxes(0, 1).reshape(queries.shape[0], -1)
    rows = rows.swapaxes(0, 1).reshape(queries.shape[0], -1)
    place = lax.top_k(-values, keep)[1]
    return jnp.take_along_axis(rows, place, axis=1)


def _rerank(
    queries: jax.Array, bank: jax.Array, rows: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Distances (T, k) of the best of the candidate ``rows`` (T, keep), from differences."""
    gaps = queries[:, None, :] - bank[rows]
    squares = jnp.sum(gaps * gaps, axis=2)
    squares, rows = lax.sort((squares, rows), dimension=1, num_keys=2)
    return jnp.sqrt(squares[:, :k]), rows[:, :k]
