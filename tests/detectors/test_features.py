"""Random subsets of rows, as the detectors share them."""

import jax
import numpy as np
import pytest

from dsad.core import rng
from dsad.core.errors import ConfigError
from dsad.core.types import silent
from dsad.detectors._features import DetectorConfig, FeatureDetector, Subset

KEY = jax.random.key(5)


def test_priorities_follow_key_and_index_alone():
    index = np.arange(40)
    found = rng.priorities(KEY, index, (3,))
    assert (found.shape, found.dtype) == ((40, 3), np.uint32)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(rng.priorities(KEY, order, (3,)), found[order])
    assert len(np.unique(found)) == 120
    assert not np.isin(rng.priorities(jax.random.key(6), index, (3,)), found).any()
    own = jax.random.bits(jax.random.fold_in(KEY, 7), (3,))
    np.testing.assert_array_equal(found[7], own)


def test_equal_priorities_are_settled_by_what_follows():
    places = np.array([[5, 1, 5, 5, 0], [2, 9, 1, 2, 9], [1, 0, 0, 0, 0]])
    # Ranked: (0, 9, 0), (1, 9, 0), (5, 1, 0), (5, 2, 0), (5, 2, 1).
    for most, expected in ((1, [4]), (3, [1, 2, 4]), (4, [1, 2, 3, 4]), (9, range(5))):
        np.testing.assert_array_equal(rng.lowest(places, most), list(expected))


def test_a_subset_is_that_of_all_rows_in_their_order():
    draw = np.random.default_rng(1)
    ranks = draw.integers(0, 9, 60)  # with ties
    rows = draw.standard_normal((60, 2))
    for most in (0, 7, 60, 80):
        subset = Subset(most)
        assert not len(subset)
        for at in range(0, 60, 5):
            places = np.stack([ranks, np.arange(60)])[:, at : at + 5]
            subset.add({"rows": rows[at : at + 5]}, places)
            assert not most or len(subset) < 2 * most
        values, places = subset.found()
        kept = sorted(sorted(range(60), key=lambda i: (ranks[i], i))[: most or 60])
        np.testing.assert_array_equal(places[1], kept)
        np.testing.assert_array_equal(values["rows"], rows[kept])


def test_one_that_trains_asks_for_what_was_trained():
    class Trained(FeatureDetector[DetectorConfig]):
        pass

    with pytest.raises(ConfigError, match="trains: expected trained parameters, found None"):
        Trained(DetectorConfig()).fit(None, mesh=None, key=KEY, progress=silent)
