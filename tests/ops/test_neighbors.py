"""Exact neighbour search against a float64 brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.ops import neighbors
from dsad.ops.neighbors import nearest


def brute(queries, bank, k):
    """Distances and indices in float64; equal distances by ascending index."""
    q, b = np.float64(queries), np.float64(bank)
    distances = np.sqrt(np.sum((q[:, None] - b[None]) ** 2, axis=2))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


def features(seed, rows, depth=24, mean=0.0):
    rng = np.random.default_rng(seed)
    return (mean + rng.standard_normal((rows, depth))).astype(np.float32)


def check(found, queries, bank, k, rtol=1e-5):
    distances, indices = found
    expected, order = brute(queries, bank, k)
    assert (distances.dtype, indices.dtype) == (jnp.float32, jnp.int32)
    assert distances.shape == indices.shape == (len(queries), k)
    np.testing.assert_allclose(distances, expected, rtol=rtol, atol=1e-7)
    np.testing.assert_array_equal(indices, order)


def agree(found, expected):
    """Equal rows; distances may differ by the order of a sum."""
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=5e-7)


@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize(("rows", "depth"), [(9, 1), (131, 24), (700, 5)])
def test_equals_brute_force(rows, depth, k):
    queries, bank = features(0, 53, depth), features(1, rows, depth)
    check(nearest(queries, bank, k), queries, bank, k, 3e-5)


def test_more_neighbours_than_groups_and_the_whole_bank():
    queries, bank = features(0, 5), features(1, 40)
    for k in (12, 40):
        check(nearest(queries, bank, k), queries, bank, k)
    check(nearest(queries, bank[:1]), queries, bank[:1], 1)


@pytest.mark.parametrize("mean", [30.0, -1000.0])
def test_accurate_far_from_the_origin(mean):
    queries, bank = features(0, 60, 384, mean), features(1, 500, 384, mean)
    check(nearest(queries, bank, 3), queries, bank, 3)


def test_distances_near_zero_are_accurate():
    bank = features(0, 300, 64, 30.0)
    queries = bank[:100].copy()
    np.testing.assert_array_equal(nearest(queries, bank)[0], 0.0)
    queries[:, 0] += np.float32(2**-10)
    check(nearest(queries, bank), queries, bank, 1)
    # Two rows closer to each other than the rounding of |b|² - 2 q·b: the nearer one is found.
    twins = np.concatenate([bank + np.float32(2**-12), bank])
    distances, indices = nearest(bank, twins)
    np.testing.assert_array_equal(distances, 0.0)
    np.testing.assert_array_equal(indices[:, 0], np.arange(300, 600))


def test_ties_go_to_the_lowest_index():
    rng = np.random.default_rng(0)
    lattice = rng.integers(-2, 3, (400, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (50, 3)).astype(np.float32)
    for k in (1, 40):
        check(nearest(queries, lattice, k), queries, lattice, k)
    same = np.repeat(features(1, 1, 48, 3.0), 333, axis=0)
    distances, indices = nearest(features(2, 20, 48), same, 5)
    np.testing.assert_array_equal(indices, np.tile(np.arange(5), (20, 1)))
    assert (np.ptp(distances, axis=1) == 0).all()


def test_tile_and_chunk_sizes_change_nothing(monkeypatch):
    queries, bank = features(0, 150), features(1, 900)
    bank[800:850] = bank[:50]
    expected = nearest(queries, bank, 4)
    for tile in (7, 64):
        agree(nearest(queries, bank, 4, tile=tile), expected)
    # Small chunks reach the merge over several chunks.
    monkeypatch.setattr(neighbors, "CHUNK", 200)
    queries, bank = jnp.asarray(queries), jnp.asarray(bank)
    check(neighbors._search(queries, bank, 250, 64), queries, bank, 250)


def test_permuted_bank_gives_the_same_distances():
    queries, bank = features(0, 40), features(1, 500)
    order = np.random.default_rng(2).permutation(500)
    distances, indices = nearest(queries, bank, 3)
    shuffled, where = nearest(queries, bank[order], 3)
    np.testing.assert_allclose(shuffled, distances, rtol=1e-6)
    np.testing.assert_array_equal(order[where], indices)


def test_same_on_any_mesh(devices):
    mesh = make_mesh(MeshConfig(fsdp=2 if len(devices) > 1 else 1), devices)
    queries, bank = features(0, 83), features(1, 700)
    expected = nearest(queries, bank, 4)
    found = nearest(queries, bank, 4, mesh=mesh)
    check(found, queries, bank, 4)
    agree(found, expected)
    placed = jax.device_put(queries[:80], batch_sharding(mesh)), jax.device_put(bank, devices[0])
    inside = jax.jit(lambda q, b: nearest(q, b, 4, mesh=mesh))(placed[0], bank)
    for result in (inside, nearest(*placed, 4, mesh=mesh)):
        assert result[0].sharding.device_set == set(devices)
        agree(result, jax.tree.map(lambda x: x[:80], expected))


def test_compiles_once_per_shape_and_works_inside_jit():
    queries, bank = features(0, 31), features(1, 77)
    first = nearest(queries, bank, 2)
    with jax.no_tracing():
        assert nearest(queries + 1, bank, 2)[0].shape == (31, 2)
    agree(jax.jit(lambda q, b: nearest(q, b, 2))(queries, bank), first)


def test_memory_is_bounded():
    """Beyond the bank's copy: two tile × chunk arrays at most, however long the bank is."""
    for rows in (30_000, 300_000):
        shapes = [jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (20_000, rows)]
        compiled = neighbors._nearest.lower(*shapes, 9, None, 448).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        inputs = 4 * 64 * (20_000 + rows)
        assert used < 1.5 * inputs + 2 * 4 * 448 * neighbors.CHUNK


def test_not_a_number_is_never_hidden():
    queries, bank = features(0, 10), features(1, 50)
    broken = queries.copy()
    broken[3, 5] = np.nan
    distances, indices = nearest(broken, bank, 2)
    assert np.isnan(distances[3]).all()
    assert np.isfinite(np.delete(distances, 3, axis=0)).all()
    assert ((indices >= 0) & (indices < 50)).all()
    for bad in (np.nan, np.inf):
        spoilt = bank.copy()
        spoilt[7, 0] = bad
        assert np.isnan(nearest(queries, spoilt)[0]).all()


def test_no_queries():
    distances, indices = nearest(features(0, 0), features(1, 5), 2)
    assert distances.shape == indices.shape == (0, 2)


def test_bad_input():
    queries, bank = features(0, 4), features(1, 6)
    for k in (0, 7):
        with pytest.raises(ConfigError, match=f"1 <= k <= 6.*found k = {k}"):
            nearest(queries, bank, k)
    with pytest.raises(ConfigError, match=r"one d, found \(4, 24\) and \(6, 23\)"):
        nearest(queries, bank[:, 1:])
    with pytest.raises(ConfigError, match="tile >= 1"):
        nearest(queries, bank, tile=0)
