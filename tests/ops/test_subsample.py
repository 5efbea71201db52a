"""Thinning by density against the published rule, and where that one fails."""

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.ops.subsample import density_rows, sparse

KEY = jax.random.key(3)


def rows_of(count, depth=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, depth)).astype(np.float32)


def neighbours(rows, k):
    gaps = np.linalg.norm(np.float64(rows)[:, None] - rows[None], axis=2)
    return np.sort(gaps, axis=1)[:, :k]


def published(gaps, chances, most):
    """The rule as it is written, radius by radius."""
    radius = gaps.mean() / 10
    while True:
        company = (gaps < radius).sum(axis=1)
        kept = np.flatnonzero(chances < 1 / (1 + company))
        if len(kept) <= most:
            return kept
        radius *= 1.1


@pytest.mark.parametrize("most", [1, 5, 40])
def test_a_round_keeps_what_the_published_rule_keeps(most):
    for seed in range(10):
        gaps = neighbours(rows_of(150, seed=seed), 100)
        chances = np.random.default_rng(seed + 50).random(150)
        # Rows that no radius drops, of which the published rule never ends with more than most.
        chances = np.maximum(chances, 1 / 100)
        np.testing.assert_array_equal(sparse(gaps, chances, most), published(gaps, chances, most))


def test_a_round_ends_where_no_radius_drops_enough():
    """c is 100 at most, so that u < 1/101 always stays; and equal rows have no distance at all."""
    gaps, chances = neighbours(rows_of(150), 100), np.linspace(0, 1 / 102, 150)[::-1]
    np.testing.assert_array_equal(np.sort(sparse(gaps, chances, 7)), np.arange(143, 150))
    same = np.zeros((150, 100))
    drawn = np.random.default_rng(0).random(150)
    kept = sparse(same, drawn, 20)
    assert len(kept) <= 20
    np.testing.assert_array_equal(kept, np.flatnonzero(drawn < 1 / 101))


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 1), (7, 1), (7, 3), (60, 60), (300, 100), (300, 299), (1000, 4), (10_100, 90)],
)
def test_exactly_so_many_rows_none_twice_the_same_for_a_key(count, size):
    """Also with fewer than 100 rows in a part, and with more than 101 for each that stays."""
    bank = rows_of(count)
    kept = density_rows(KEY, bank, size)
    assert len(kept) == len(set(kept.tolist())) == size
    assert set(kept.tolist()) <= set(range(count))
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(kept, density_rows(KEY, bank, size))
    if 1 < size < count - 1:
        assert not np.array_equal(kept, density_rows(jax.random.key(4), bank, size))


def test_equal_rows_end():
    assert len(density_rows(KEY, np.ones((400, 2), np.float32), 50)) == 50


def test_crowded_places_are_thinned():
    """A tenth of the rows lies far apart; of a random subset they would be a tenth, too."""
    crowd, alone = rows_of(1800) * 0.01, rows_of(200, seed=1) * 50
    kept = density_rows(KEY, np.concatenate([crowd, alone]), 200)
    assert np.mean(kept >= 1800) > 0.3
    assert np.sum(kept >= 1800) < 190  # one that is alone stays with one half in a round


@pytest.mark.parametrize("size", [0, 8])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match=rf"1 <= size <= 7 rows, found {size}"):
        density_rows(KEY, rows_of(7), size)
