"""Exact neighbour search against a float64 brute force."""

import dataclasses

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


# Most tests share these shapes, and so one compiled search.
QUERIES, BANK, K = features(0, 80), features(1, 700), 4


@pytest.mark.parametrize(("rows", "depth", "k"), [(9, 1, 9), (131, 5, 1), (700, 24, 4)])
def test_equals_brute_force(rows, depth, k):
    queries, bank = features(0, 80, depth), features(1, rows, depth)
    check(nearest(queries, bank, k), queries, bank, k, 3e-5)


def test_the_whole_bank_and_a_bank_of_one():
    queries, bank = features(0, 5), features(1, 40)
    check(nearest(queries, bank, 40), queries, bank, 40)
    check(nearest(queries, bank[:1]), queries, bank[:1], 1)


@pytest.mark.parametrize("mean", [30.0, -1000.0])
def test_accurate_far_from_the_origin(mean):
    queries, bank = features(0, 60, 384, mean), features(1, 500, 384, mean)
    check(nearest(queries, bank, 3), queries, bank, 3)


def test_distances_near_zero_are_accurate():
    bank = features(0, 300, 64, 30.0)
    # Each row has a twin, closer than the rounding of |b|² - 2 q·b: the nearer one is found.
    twins = np.concatenate([bank + np.float32(2**-12), bank])
    distances, indices = nearest(bank, twins)
    np.testing.assert_array_equal(distances, 0.0)
    np.testing.assert_array_equal(indices[:, 0], np.arange(300, 600))
    queries = bank.copy()
    queries[:, 0] -= np.float32(2**-10)
    check(nearest(queries, twins), queries, twins, 1)


def test_ties_go_to_the_lowest_index():
    rng = np.random.default_rng(0)
    lattice = rng.integers(-2, 3, (400, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (50, 3)).astype(np.float32)
    check(nearest(queries, lattice, 20), queries, lattice, 20)
    same = np.repeat(BANK[:1] + 3, 700, axis=0)
    distances, indices = nearest(QUERIES, same, K)
    np.testing.assert_array_equal(indices, np.tile(np.arange(K), (80, 1)))
    assert (np.ptp(distances, axis=1) == 0).all()


def test_tile_and_chunk_sizes_change_nothing():
    bank = BANK.copy()
    bank[600:650] = bank[:50]
    expected = nearest(QUERIES, bank, K)
    agree(nearest(QUERIES, bank, K, tile=13), expected)
    # Small chunks reach the merge over several chunks.
    plan = neighbors._plan(80, 250, None, 64, "exact", None)
    plan = dataclasses.replace(plan, chunk=200)
    check(neighbors._nearest(QUERIES, bank, np.int32(700), 80, None, plan)[:2], QUERIES, bank, 250)


def test_permuted_bank_gives_the_same_distances():
    order = np.random.default_rng(2).permutation(700)
    distances, indices = nearest(QUERIES, BANK, K)
    shuffled, where = nearest(QUERIES, BANK[order], K)
    np.testing.assert_allclose(shuffled, distances, rtol=1e-6)
    np.testing.assert_array_equal(order[where], indices)


def test_same_on_any_mesh(devices):
    mesh = make_mesh(MeshConfig(fsdp=2 if len(devices) > 1 else 1), devices)
    expected = nearest(QUERIES, BANK, K)
    # 77 queries do not divide by 8; arrays on the host, split over the mesh, and on one device.
    agree(nearest(QUERIES[:77], BANK, K, mesh=mesh), jax.tree.map(lambda x: x[:77], expected))
    queries = jax.device_put(QUERIES, batch_sharding(mesh))
    inside = jax.jit(lambda q, b: nearest(q, b, K, mesh=mesh))(queries, BANK)
    for result in (inside, nearest(queries, jax.device_put(BANK, devices[0]), K, mesh=mesh)):
        assert result[0].sharding.device_set == set(devices)
        agree(result, expected)


def test_compiles_once_per_shape_and_works_inside_jit():
    first = nearest(QUERIES, BANK, K)
    with jax.no_tracing():
        assert nearest(QUERIES + 1, BANK, K)[0].shape == (80, K)
    agree(jax.jit(lambda q, b: nearest(q, b, K))(QUERIES, BANK), first)


def test_memory_is_bounded():
    """Beyond the bank's copy: two tile × chunk arrays at most, however long the bank is."""
    shapes = [jax.ShapeDtypeStruct((n, 16), jnp.float32) for n in (20_000, 1_000_000)]
    plan = neighbors._plan(20_000, 9, None, None, "exact", None)
    compiled = neighbors._nearest.lower(*shapes, np.int32(1_000_000), 20_000, None, plan).compile()
    inputs = 4 * 16 * 1_020_000
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 1.1 * inputs + 2 * 4 * neighbors.AREA


def test_not_a_number_is_never_hidden():
    broken = QUERIES.copy()
    broken[3, 5] = np.nan
    distances, indices = nearest(broken, BANK, K)
    assert np.isnan(distances[3]).all()
    assert np.isfinite(np.delete(distances, 3, axis=0)).all()
    assert ((indices >= 0) & (indices < 700)).all()
    for bad in (np.nan, np.inf):
        spoilt = BANK.copy()
        spoilt[7, 0] = bad
        assert np.isnan(nearest(QUERIES, spoilt, K)[0]).all()


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
