"""The greedy coreset against plain farthest-first runs in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core import rng
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.ops import _kcentre, coreset
from dsad.ops.coreset import (
    budget_rows,
    coreset_memory,
    greedy_coreset,
    kmeans_rows,
    random_rows,
)

KEY = jax.random.key(3)


def plain(bank, size, start=0, far=None):
    """Farthest-first in float64, one by one; equal distances give the lowest row."""
    bank = np.float64(bank)
    far = np.full(len(bank), np.inf) if far is None else np.float64(far)
    picks = [int(np.argmax(far)) if start is None else start]
    while True:
        last = picks[-1]
        far = np.minimum(far, np.sum((bank - bank[last]) ** 2, axis=1))
        far[picks] = -1
        if len(picks) == size:
            return np.array(picks)
        picks.append(int(np.argmax(far)))


def gaussian(seed, rows, depth=24, mean=0.0):
    draw = np.random.default_rng(seed)
    return (mean + draw.standard_normal((rows, depth))).astype(np.float32)


def clustered(seed, rows, depth=24, mean=0.0):
    draw = np.random.default_rng(seed)
    centres = 5 * draw.standard_normal((20, depth))
    spread = draw.uniform(0.05, 1.0, (20, 1))
    which = draw.integers(0, 20, rows)
    points = centres[which] + spread[which] * draw.standard_normal((rows, depth))
    return (mean + points).astype(np.float32)


# The tests share these shapes, and so one compiled run per device count.
ROWS, SIZE = 3001, 400
MAKERS = {"gaussian": gaussian, "clustered": clustered}


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("data", MAKERS)
def test_same_picks_as_a_plain_run(data, mean):
    for seed in range(3):
        bank = MAKERS[data](seed, ROWS, mean=mean)
        found = greedy_coreset(bank, SIZE, start=seed)
        assert (found.shape, found.dtype) == ((SIZE,), jnp.int32)
        np.testing.assert_array_equal(found, plain(bank, SIZE, seed))


@pytest.mark.slow
def test_same_picks_on_any_number_of_devices():
    bank = clustered(0, ROWS)
    expected = plain(bank, SIZE)
    for count in (1, 2, 8):
        mesh = make_mesh(MeshConfig(), jax.devices()[:count])
        np.testing.assert_array_equal(greedy_coreset(bank, SIZE, mesh=mesh), expected)


@pytest.mark.parametrize(("rows", "depth", "size"), [(1, 3, 1), (9, 1, 9), (130, 5, 130)])
def test_down_to_the_last_row(rows, depth, size):
    bank = gaussian(1, rows, depth)
    np.testing.assert_array_equal(greedy_coreset(bank, size), plain(bank, size))


def test_copies_come_last_and_in_order():
    bank = gaussian(2, 300)
    bank = np.concatenate([bank] * 10 + [bank[:1]])
    bank = bank[np.random.default_rng(0).permutation(ROWS)]
    found = np.asarray(greedy_coreset(bank, SIZE, start=7))
    np.testing.assert_array_equal(found, plain(bank, SIZE, 7))
    assert len(np.unique(bank[found[:300]], axis=0)) == 300
    assert len(np.unique(found)) == SIZE


def test_equal_distances_give_the_lowest_row():
    # A lattice: nearly all distances occur many times.
    bank = np.random.default_rng(0).integers(0, 3, (ROWS, 24)).astype(np.float32)
    np.testing.assert_array_equal(greedy_coreset(bank, SIZE), plain(bank, SIZE))
    line = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(greedy_coreset(line, 3), [0, 4, 2])


def test_gaps_below_float32_rounding_decide():
    # Row 499 is the farthest from row 0, by less than half a unit of float32 squares.
    bank = np.zeros((ROWS, 24), np.float32)
    bank[1:500, 0] = 1.0
    bank[1:500, 1] = np.arange(499, dtype=np.float32) * 2.0**-17
    assert len(np.unique(np.sum(bank * bank, axis=1))) < 400
    assert greedy_coreset(bank, SIZE)[1] == 499


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (64, 32), (5000, 300)])
def test_any_number_of_candidates_and_any_block(sizes):
    bank = clustered(4, 331)
    candidates, block = sizes
    found = greedy_coreset(bank, 60, candidates=candidates, block=block)
    np.testing.assert_array_equal(found, plain(bank, 60))


def test_published_start_is_the_mean_distance_to_ten_random_rows():
    bank = gaussian(5, ROWS)
    found = greedy_coreset(bank, SIZE, start="published", key=KEY)
    starts = np.asarray(jax.random.permutation(rng.named(KEY, "coreset start"), ROWS)[:10])
    gaps = np.linalg.norm(np.float64(bank)[:, None] - np.float64(bank)[starts][None], axis=2)
    np.testing.assert_array_equal(found, plain(bank, SIZE, None, gaps.mean(axis=1) ** 2))
    other = greedy_coreset(bank, SIZE, start="published", key=jax.random.key(4))
    assert not np.array_equal(found, other)
    # Five points on a line, all of them starts: 0, 4, 2 (mean distances 2, 1.4, 1.2, 1.4, 2).
    line = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(greedy_coreset(line, 3, start="published", key=KEY), [0, 4, 2])


def test_projection_selects_by_projected_distances():
    bank = gaussian(6, ROWS, 40)
    found = np.asarray(greedy_coreset(bank, SIZE, projection_dim=24, key=KEY))
    weights = np.asarray(coreset._map(rng.named(KEY, "coreset projection"), bank[0], 24))
    assert weights.shape == (40, 24)
    assert np.abs(weights).max() <= 40**-0.5
    np.testing.assert_allclose(weights.std(), 40**-0.5 / 3**0.5, rtol=0.05)
    projected = np.float64(bank) @ np.float64(weights)
    # Projected rows are rounded to float32: every pick is the farthest within that rounding.
    far = np.sum((projected - projected[0]) ** 2, axis=1)
    for pick in found[1:]:
        assert far[pick] >= far.max() * (1 - 1e-5)
        far = np.minimum(far, np.sum((projected - projected[pick]) ** 2, axis=1))
    narrow = gaussian(6, ROWS)  # not wider than the projection: compared as it is
    same = greedy_coreset(narrow, SIZE, projection_dim=24, key=KEY)
    np.testing.assert_array_equal(same, plain(narrow, SIZE))


def test_covering_radius_never_grows():
    bank = clustered(7, ROWS)
    found = np.asarray(greedy_coreset(bank, SIZE))
    far, radii = np.full(ROWS, np.inf), []
    for pick in found:
        far = np.minimum(far, np.linalg.norm(bank - bank[pick], axis=1))
        radii.append(far.max())
    assert (np.diff(radii) <= 0).all()
    assert radii[-1] < 0.3 * radii[0]


def test_progress_counts_picks_and_tells_the_time_left():
    calls = []
    bank = gaussian(0, ROWS)
    found = greedy_coreset(bank, SIZE, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(found, greedy_coreset(bank, SIZE))
    done = [c[0] for c in calls]
    assert done == sorted(done)
    assert calls[0][:2] == (0, SIZE)
    assert calls[-1] == (SIZE, SIZE, "picks, about 0 s left")
    assert len(calls) >= 3


def test_time_left_follows_the_pace_of_the_later_half():
    # 100 picks in the first 10 s, then 10 a second: 800 left take 80 s.
    marks = [(0.0, 0), (10.0, 100), (15.0, 150), (20.0, 200)]
    assert coreset._left(marks, 1000) == pytest.approx(80.0)
    assert coreset._left(marks[:2], 200) == pytest.approx(10.0)


def test_budgets():
    assert budget_rows(53504, 1024, fraction=0.1) == 5350
    assert budget_rows(1000, 8, fraction=0.29) == 290  # 0.29 · 1000 is below 290 in float64
    assert budget_rows(1000, 8, count=7) == 7
    assert budget_rows(1000, 8, count=2000) == 1000
    assert budget_rows(1000, 8, bytes=320) == 10
    for wrong in ({}, {"count": 0}, {"bytes": 31}, {"fraction": 1.5}, {"count": 1, "bytes": 99}):
        with pytest.raises(ConfigError, match="bank budget"):
            budget_rows(1000, 8, **wrong)


def test_memory_is_stated_before_the_start():
    small = coreset_memory(300_000, 1024, 30_000, 128)
    assert small < 2e9
    assert 300_000 * 128 * 4 < small < coreset_memory(300_000, 1024, 30_000)
    with pytest.raises(ConfigError, match=r"memory_limit: 10 rows × 2 need .*more than the 1 MiB"):
        greedy_coreset(gaussian(0, 10, 2), 3, memory_limit=2**20)


def test_refuses_bad_arguments():
    bank = gaussian(0, 10, 2)
    for arguments, message in [
        ({"size": 0}, "1 <= size <= 10"),
        ({"size": 11}, "1 <= size <= 10"),
        ({"size": 2, "start": 10}, "start: expected a row from 0 to 9"),
        ({"size": 2, "start": "first"}, "start: expected"),
        ({"size": 2, "start": "published"}, "needs a key"),
        ({"size": 2, "projection_dim": 1}, "needs a key"),
        ({"size": 2, "projection_dim": 0, "key": KEY}, "projection_dim: expected at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            greedy_coreset(bank, **arguments)
    bank[3, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        greedy_coreset(bank, 2)


def test_random_rows_are_distinct_and_uniform():
    drawn = np.stack([random_rows(jax.random.key(s), 40, 10) for s in range(200)])
    assert (np.diff(drawn, axis=1) > 0).all()
    # 200 draws of 10 of 40: 50 ± 6.1 per row.
    hits = np.bincount(drawn.ravel(), minlength=40)
    assert hits.min() > 50 - 5 * 6.1
    assert hits.max() < 50 + 5 * 6.1


def test_kmeans_is_a_fixed_point_and_splits_clusters(devices):
    draw = np.random.default_rng(0)
    which = np.arange(600) % 6
    bank = (30 + 9 * np.eye(6, 5, dtype=np.float32)[which]).astype(np.float32)
    bank += 0.1 * draw.standard_normal(bank.shape).astype(np.float32)
    mesh = make_mesh(MeshConfig(), devices)
    centres = np.float64(kmeans_rows(KEY, bank, 24, mesh=mesh, steps=100))
    gaps = np.linalg.norm(np.float64(bank)[:, None] - centres[None], axis=2)
    nearest = gaps.argmin(axis=1)
    assert len(np.unique(nearest)) == 24
    means = np.stack([np.float64(bank)[nearest == c].mean(axis=0) for c in range(24)])
    np.testing.assert_allclose(centres, means, rtol=1e-6)


def test_banks_of_nearly_one_size_share_programs():
    bank = gaussian(5, 1001)
    programs = (coreset._distances, _kcentre.slab)
    for number, (rows, size) in enumerate([(1001, 100), (997, 99)]):
        before = [f._cache_size() for f in programs]
        picks = np.asarray(coreset.greedy_coreset(bank[:rows], size))
        np.testing.assert_array_equal(picks, plain(bank[:rows], size))
        assert picks.max() < rows  # padding is never taken
        assert number == 0 or [f._cache_size() for f in programs] == before
