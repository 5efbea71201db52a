"""Sharded banks, padded banks, the certified and the approximate mode against the exact search."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.platform import has_matrix_units
from dsad.ops import _neighbors_search, neighbors
from dsad.ops.neighbors import bucket, certified_share, nearest, pad_bank, prepare, recall, without

from .test_neighbors import BANK, QUERIES, K, agree, brute, check, features

CERTIFIED = jax.jit(lambda q, b, v: nearest(q, b, K, valid=v, precision="certified"))


def mesh_of(count, fsdp=1):
    return make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:count])


def same(found, queries, bank, valid=None):
    """Equal to the exact search of the valid rows, and that to the brute force."""
    rows = len(bank) if valid is None else valid
    agree(found, nearest(queries, bank, K, valid=np.int32(rows)))


# --- the bank split over devices


@pytest.mark.parametrize(
    ("count", "fsdp", "precision"),
    [(1, 1, "exact"), (2, 1, "exact"), (8, 2, "exact"), (2, 2, "certified"), (8, 1, "certified")],
)
def test_same_on_every_device_count(count, fsdp, precision):
    mesh = mesh_of(count, fsdp)
    bank = BANK.copy()
    bank[650:] = bank[:50]  # twins in other shards: the lower index wins
    found = nearest(QUERIES[:77], bank, K, mesh=mesh, precision=precision, tile=8)
    agree(found, nearest(QUERIES[:77], bank, K))
    check(found, QUERIES[:77], bank, K)


def test_ties_across_shards_go_to_the_lowest_index():
    same_rows = np.repeat(BANK[:1] + 3, 700, axis=0)
    _, indices = nearest(QUERIES, same_rows, 100, mesh=mesh_of(8))
    np.testing.assert_array_equal(indices, np.tile(np.arange(100), (80, 1)))


def test_more_neighbours_than_rows_of_a_shard():
    bank = features(3, 20)
    check(nearest(QUERIES, bank, 20, mesh=mesh_of(8)), QUERIES, bank, 20)


def test_a_device_holds_its_part_of_the_bank_only():
    """Collectives carry queries and candidates; neither the bank nor queries × bank."""
    mesh = mesh_of(8)
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shapes = [jax.ShapeDtypeStruct((n, 16), jnp.float32, sharding=split) for n in (4096, 80_000)]
    plan = neighbors._plan(4096, K, mesh, None, "certified", None)
    lowered = neighbors._nearest.lower(*shapes, np.int32(80_000), 4096, mesh, plan)
    compiled = lowered.compile()
    text = compiled.as_text()
    sent = re.findall(r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)", text)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
        for shapes in sent
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes)
    ]
    block = 8 * plan.tile
    assert len(sizes) >= 4
    assert block * 16 in sizes  # the block of queries
    assert max(sizes) <= block * max(16, K)
    # Per device: its rows twice in float32, once in bfloat16, and the products of a block.
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 8 * (2.5 * 4 * 16 * 10_000 + 3 * 4 * block * 10_240)


# --- padded banks


@pytest.mark.parametrize("filler", [0.0, 1e6, np.nan, np.inf])
def test_padding_is_never_found(filler):
    bank = BANK.copy()
    bank[500:] = filler
    check(nearest(QUERIES, bank, K, valid=500), QUERIES, BANK[:500], K)
    same(CERTIFIED(QUERIES, bank, 500), QUERIES, BANK[:500])
    # On eight devices the last shards hold nothing that counts.
    bank[100:] = filler
    check(nearest(QUERIES, bank, K, valid=100, mesh=mesh_of(8)), QUERIES, BANK[:100], K)


def test_banks_of_one_bucket_share_a_program():
    padded, rows = pad_bank(BANK[:690])
    assert (padded.shape, rows.dtype, int(rows)) == ((704, 24), np.int32, 690)
    check(nearest(QUERIES, padded, K, valid=rows), QUERIES, BANK[:690], K)
    other, less = pad_bank(BANK[:650])
    with jax.no_tracing():
        found = nearest(QUERIES, other, K, valid=less)
    check(found, QUERIES, BANK[:650], K)
    on_device, _ = pad_bank(jnp.asarray(BANK))
    assert isinstance(on_device, jax.Array)
    assert on_device.shape == (704, 24)


def test_buckets_waste_less_than_an_eighth():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(b % 16 == 0 and n <= b < n + max(16, n / 8) for n, b in enumerate(sizes, 1))
    assert len(set(sizes)) <= 8 + 8 * 6  # a ladder, not every size
    assert sizes == sorted(sizes)
    assert bucket(163_856) == 163_856 + -163_856 % 16_384
    large = [bucket(n, 64) for n in range(1, 5000)]
    assert all(b % 64 == 0 and n <= b < n + max(64, n / 8) for n, b in enumerate(large, 1))


def test_traced_valid_below_k_leaves_gaps():
    found = jax.jit(lambda v: nearest(QUERIES, BANK, K, valid=v))(2)
    check([x[:, :2] for x in found], QUERIES, BANK[:2], 2)
    assert np.isinf(found[0][:, 2:]).all()
    assert (np.asarray(found[1])[:, 2:] == -1).all()


# --- certified


def two_clusters(seed, wide):
    """Rows far from the mean, near +c and -c in turns: 0.05 apart near +c, ``wide`` near -c.

    What bfloat16 rounds off |c|² = 2,400 is more than the spread near +c.
    """
    rows = features(seed, 700)
    rows[0::2] = 10 + np.float32(0.05) * rows[0::2]
    rows[1::2] = -10 + np.float32(wide) * rows[1::2]
    return rows


def rounded_away():
    """The nearest row of every query loses to rows that bfloat16 holds exactly.

    Queries and their nearest rows lie just below half of a bfloat16 step (1/16) above 10, all
    others on steps: the product of the nearest two loses twice what it loses of the others.
    """
    rng = np.random.default_rng(7)
    bank = np.full((350, 24), 10.0)
    bank[:, 0] -= np.round(16 * np.sqrt(0.8 * np.arange(1, 351))) / 16
    queries = 10.03 + 1e-4 * rng.standard_normal((80, 24))
    bank[100:104] = 10.03 + 1e-4 * rng.standard_normal((4, 24))
    return queries.astype(np.float32), np.concatenate([bank, -bank]).astype(np.float32)


CASES = {
    "gaussian": (QUERIES, BANK),
    "mean 30": (QUERIES + 30, BANK + 30),
    "small": (QUERIES * np.float32(1e-3), BANK * np.float32(1e-3)),
    "large": (QUERIES * np.float32(1e3), BANK * np.float32(1e3)),
    "duplicates": (QUERIES, np.repeat(BANK[:70], 10, axis=0)),
    "all equal": (QUERIES, np.repeat(BANK[:1], 700, axis=0)),
    "an outlier": (QUERIES, np.concatenate([BANK[:699], 1e4 + BANK[:1]])),
    "queries of the bank": (BANK[:80], BANK),
    "near ties": (two_clusters(2, 0.05)[:80], two_clusters(3, 0.05)),
    "nearest ties": (two_clusters(2, 1e-3)[1:161:2], two_clusters(3, 1e-3)),
    "rounded away": rounded_away(),
    "ties in one cluster": (two_clusters(2, 3)[:80], two_clusters(3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_certified_equals_exact(name):
    queries, bank = CASES[name]
    same(CERTIFIED(queries, bank, 700), queries, bank)


@pytest.mark.parametrize("precision", ["exact", "certified", "auto"])
def test_a_prepared_bank_gives_the_same(precision):
    bank = BANK.copy()
    bank[500:] = np.nan
    ready = prepare(bank, K, valid=500, precision=precision)
    assert (ready.chunks is not None) == (
        precision == "certified" or (precision == "auto" and has_matrix_units())
    )
    same(nearest(QUERIES, ready, K), QUERIES, bank, 500)
    found = jax.jit(lambda r: nearest(QUERIES[:9], r, 2))(ready)
    agree(found, nearest(QUERIES[:9], bank, 2, valid=500))
    with pytest.raises(ConfigError, match="searched on one device; leave the mesh out"):
        nearest(QUERIES, ready, K, mesh=mesh_of(2))


@pytest.mark.parametrize("precision", ["exact", "certified"])
@pytest.mark.parametrize("left", [600, 5])
def test_a_prepared_bank_without_some_rows_never_finds_them(precision, left):
    """Also where fewer are left than are looked for."""
    rng = np.random.default_rng(5)
    bank, queries = (rng.standard_normal((n, 6)).astype(np.float32) for n in (700, 40))
    queries[:20] = bank[:20]
    rows = np.sort(rng.permutation(700)[:left])
    ready = prepare(bank, 9, precision=precision)
    found, index = nearest(queries, without(ready, np.isin(np.arange(700), rows)), 9,
                           precision=precision)  # fmt: skip
    gaps = np.linalg.norm(np.float64(queries)[:, None] - bank[rows], axis=2)
    most, order = min(left, 9), np.argsort(gaps, axis=1)
    expected = np.take_along_axis(gaps, order, axis=1)[:, :most]
    np.testing.assert_allclose(found[:, :most], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(index[:, :most], rows[order[:, :most]])
    assert np.isinf(found[:, most:]).all()
    assert (np.asarray(index[:, most:]) == -1).all()


def test_queries_are_spread_evenly_over_tiles():
    """784 cells of an image as two tiles of 392, not as 448 and padding."""
    plan = neighbors._plan(784, 1, None, 448, "exact", None)
    assert (plan.tile, plan.chunk) == (392, neighbors.AREA // 448)
    assert neighbors._plan(6272, 1, None, 448, "exact", None).tile == 448


def test_certified_and_not_in_one_call():
    """Half of the queries have a clear answer: only the others are repeated, all are right."""
    queries, bank = CASES["ties in one cluster"]
    found = nearest(queries, bank, K, precision="certified", tile=16)
    agree(found, nearest(queries, bank, K))
    assert 0.4 < certified_share(queries, bank, K, tile=16) < 0.6


def test_the_certificate_is_needed():
    """Candidates of the bf16 pass alone, however exactly reranked, miss neighbours."""
    queries, bank = CASES["rounded away"]
    plan = neighbors._plan(80, K, None, None, "certified", None)

    @jax.jit
    def without(queries, bank):
        shard = _neighbors_search._shard(bank, jnp.int32(700), plan)
        low, norms = _neighbors_search._lowered(shard)
        return _neighbors_search._bounded(queries, low, plan, norms)

    found = without(queries, bank)
    _, expected = nearest(queries, bank, K)
    wrong = (np.asarray(found.rows) != np.asarray(expected)).any(axis=1)
    assert wrong.all()
    certified = np.asarray(found.squares[:, -1] < found.bound)
    assert not certified.any()


def test_the_bound_holds_against_float64():
    """No row outside the candidates is nearer than promised, in exact arithmetic."""
    plan = neighbors._plan(80, K, None, None, "certified", None)

    @jax.jit
    def first_pass(queries, bank):
        shard = _neighbors_search._shard(bank, jnp.int32(700), plan)
        low, norms = _neighbors_search._lowered(shard)
        centred = queries - shard.shift
        _, rows = _neighbors_search._candidates(centred, low, plan.wide, plan)
        return rows, _neighbors_search._bounded(queries, low, plan, norms).bound

    for name in ("gaussian", "near ties", "mean 30", "an outlier", "rounded away"):
        queries, bank = CASES[name]
        rows, bound = first_pass(queries, bank)
        distances, order = brute(queries, bank, 700)
        squares = np.empty((80, 700))
        np.put_along_axis(squares, order, distances**2, axis=1)
        np.put_along_axis(squares, np.asarray(rows), np.inf, axis=1)
        assert (squares.min(axis=1) >= np.asarray(bound)).all()


def test_what_bfloat16_loses_is_measured():
    """Under jit too, where XLA may drop conversions that only lose precision."""
    plan = neighbors._plan(80, K, None, None, "certified", None)
    shard = _neighbors_search._shard(jnp.asarray(BANK), jnp.int32(700), plan)
    _, norms = jax.jit(_neighbors_search._lowered)(shard)
    rows = np.asarray(shard.chunks)
    lost = rows - rows.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(norms.lost, np.linalg.norm(lost, axis=2).max(), rtol=1e-5)
    np.testing.assert_allclose(norms.largest, np.linalg.norm(rows, axis=2).max(), rtol=1e-5)


def test_most_gaussian_queries_are_certified():
    queries, bank = features(0, 200, 384, 30.0), features(1, 4000, 384, 30.0)
    assert certified_share(queries, bank, 1) > 0.95
    assert certified_share(queries, bank, 9, mesh=mesh_of(2), valid=3500) > 0.95


def test_certified_hides_no_nan():
    broken = QUERIES.copy()
    broken[3, 5] = np.nan
    distances, _ = CERTIFIED(broken, BANK, 700)
    assert np.isnan(distances[3]).all()
    agree([np.delete(x, 3, 0) for x in CERTIFIED(broken, BANK, 700)],
          [np.delete(x, 3, 0) for x in nearest(QUERIES, BANK, K)])  # fmt: skip
    spoilt = BANK.copy()
    spoilt[7, 0] = np.nan
    assert np.isnan(CERTIFIED(QUERIES, spoilt, 700)[0]).all()
    assert np.isnan(nearest(QUERIES, spoilt, K, mesh=mesh_of(8))[0]).all()


# --- approximate


def test_approximate_reports_its_recall():
    found = nearest(QUERIES, BANK, K, recall_target=0.9)
    # What is found is at its exact distance, ascending.
    expected = np.linalg.norm(np.float64(QUERIES)[:, None] - BANK[found[1]], axis=2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert (np.diff(found[0]) >= 0).all()
    assert recall(QUERIES, BANK, K, recall_target=0.9) >= 0.9
    sharded = recall(QUERIES, BANK, K, recall_target=0.9, sample=33, mesh=mesh_of(8), valid=600)
    assert sharded >= 0.9


def test_the_accelerators_selection_names_the_right_rows():
    """On CPUs ``approx_min_k`` is exact, so its rows are those of the exact selection."""
    rng = np.random.default_rng(0)
    products = rng.standard_normal((9, 16, 8)).astype(np.float32)
    halves = rng.standard_normal((16, 8)).astype(np.float32)
    found = _neighbors_search._approximately(products, halves, 5, 0.9)
    expected = _neighbors_search._best(products, halves, 5)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_recall_counts_what_was_missed(monkeypatch):
    """A selection that loses the nearest row of every query: recall (k - 1) / k."""

    def without_the_best(products, halves, keep, target):
        values, rows = _neighbors_search._best(products, halves, keep + 1)
        return values[:, 1:], rows[:, 1:]

    monkeypatch.setattr(_neighbors_search, "_nearly_best", without_the_best)
    assert recall(QUERIES, BANK, K, recall_target=0.77) == pytest.approx((K - 1) / K)


# --- bad input


def test_bad_options():
    for value in (0.0, 1.0, -1):
        with pytest.raises(ConfigError, match="recall_target above 0 and below 1"):
            nearest(QUERIES, BANK, recall_target=value)
    with pytest.raises(ConfigError, match="leave one of them out"):
        nearest(QUERIES, BANK, recall_target=0.9, precision="certified")
    with pytest.raises(
        ConfigError, match="expected precision auto, certified, exact, found 'bf16'"
    ):
        nearest(QUERIES, BANK, precision="bf16")
    for valid in (K - 1, 701):
        with pytest.raises(ConfigError, match=f"from k = {K} to 700.*found {valid}"):
            nearest(QUERIES, BANK, K, valid=valid)
    for valid in (3.0, np.arange(2)):
        with pytest.raises(ConfigError, match="valid to be one integer"):
            nearest(QUERIES, BANK, valid=valid)
    with pytest.raises(ConfigError, match="at least 1 row, found 0"):
        bucket(0)
    with pytest.raises(ConfigError, match="sample >= 1"):
        recall(QUERIES, BANK, recall_target=0.9, sample=0)


@pytest.mark.parametrize("precision", ["exact", "certified"])
def test_more_neighbours_than_a_chunk_would_hold(monkeypatch, precision):
    monkeypatch.setattr(neighbors, "AREA", 1)  # chunks of 1,024 rows, where that suffices
    rng = np.random.default_rng(0)
    queries, bank = (rng.standard_normal((n, 5)).astype(np.float32) for n in (8, 1100))
    found, _ = nearest(queries, bank, 600, precision=precision)
    gaps = np.linalg.norm(np.float64(queries)[:, None] - bank, axis=2)
    np.testing.assert_allclose(found, np.sort(gaps, axis=1)[:, :600], rtol=1e-5)
