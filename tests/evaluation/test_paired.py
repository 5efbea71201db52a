"""Spreads, paired differences and leaders against scipy and numbers made by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dsad.evaluation import paired

RNG = np.random.default_rng(0)


def by_seed(values):
    return {str(seed): value for seed, value in enumerate(values)}


@pytest.mark.parametrize("count", [2, 3, 7])
def test_differences_are_those_of_a_paired_t_test(count):
    left, right = RNG.normal(0.7, 0.1, count), RNG.normal(0.6, 0.1, count)
    gap = paired.difference(by_seed(left), by_seed(right))
    test = stats.ttest_rel(left, right)
    assert gap.mean / (gap.std / math.sqrt(count)) == pytest.approx(test.statistic, rel=1e-12)
    assert gap.mean == pytest.approx(np.mean(left) - np.mean(right), rel=1e-9)
    np.testing.assert_allclose(list(gap.values.values()), left - right, rtol=1e-12)
    own = paired.spread(by_seed(left))
    assert own.std == pytest.approx(stats.tstd(left), rel=1e-12)


def test_seeds_are_paired_by_name_and_others_are_left_out():
    gap = paired.difference({"0": 0.5, "1": 0.7, "5": 9.0}, {"1": 0.6, "0": 0.1, "2": 0.0})
    assert gap.values == pytest.approx({"0": 0.4, "1": 0.1})
    assert gap.mean == pytest.approx(0.25)
    assert gap.std == pytest.approx(0.3 / math.sqrt(2))


def test_what_is_not_defined():
    assert paired.spread({}) == (None, None, {})
    assert paired.spread({"0": 0.5}) == (0.5, None, {"0": 0.5})
    assert paired.spread({"0": 0.5, "1": None}).mean is None
    assert paired.difference({"0": 0.5, "1": None}, {"0": 0.1, "1": 0.1}).mean is None
    assert paired.difference({"0": 0.5}, {"1": 0.5}).mean is None


def test_a_row_leads_only_beyond_the_spread_of_every_paired_difference():
    far, near = by_seed([0.5, 0.7, 0.6]), by_seed([0.49, 0.69, 0.59])
    assert paired.leader([near, far]) == 1  # means overlap, differences do not
    crossing = by_seed([0.52, 0.66, 0.60])
    assert paired.leader([near, far, crossing]) is None
    assert paired.leader([{"0": 0.9}, {"0": 0.1}]) is None  # no spread is known
    assert paired.leader([far]) is None
    assert paired.leader([by_seed([None, 0.1, 0.1]), near, far]) == 2
    assert paired.leader([far, far]) is None
    still, above = by_seed([0.1] * 3), by_seed([0.9] * 3)
    assert paired.leader([still, above]) is None  # the seeds changed nothing: as with one
    assert paired.leader([still, far]) == 1
