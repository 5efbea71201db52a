"""What every registered metric must satisfy as a mergeable state."""

import itertools

import jax
import numpy as np
import pytest
from sklearn import metrics as sk

from dsad.core.errors import MetricError
from dsad.evaluation.metrics import METRICS
from tests.evaluation.test_metrics import blobs, brute_aupro

#: Independent oracles; a metric without one cannot be registered.
ORACLES = {
    "image_auroc": lambda s, y: sk.roc_auc_score(y, s),
    "image_ap": lambda s, y: sk.average_precision_score(y, s),
    "pixel_auroc": lambda s, y: sk.roc_auc_score(y.ravel(), s.ravel()),
    "pixel_ap": lambda s, y: sk.average_precision_score(y.ravel(), s.ravel()),
    "aupro_30": lambda s, y: brute_aupro(s, y, 0.3),
}


@pytest.fixture(params=sorted(METRICS))
def name(request):
    return request.param


def inputs(name, seed=0, count=8):
    """Scores and truth of ``count`` images, with ties within and between the classes."""
    rng = np.random.default_rng(seed)
    if name.startswith("image"):
        truth = np.arange(count) % 3 == 0
        scores = rng.standard_normal(count) + truth
    else:
        truth = blobs(rng, count, 12, 10)
        scores = rng.standard_normal(truth.shape) + truth
    return (np.round(4 * scores) / 4).astype(np.float32), truth


def test_equals_its_oracle(name):
    metric = METRICS[name]
    for seed in range(3):
        scores, truth = inputs(name, seed)
        value = metric.compute(metric.update(metric.empty(), scores, truth))
        assert isinstance(value, float)
        assert value == pytest.approx(ORACLES[name](scores, truth), abs=1e-9)


def test_any_grouping_and_order_gives_the_same(name):
    metric = METRICS[name]
    scores, truth = inputs(name)
    whole = metric.compute(metric.update(metric.empty(), scores, truth))
    parts = [slice(0, 3), slice(3, 4), slice(4, 8)]
    states = [metric.update(metric.empty(), scores[p], truth[p]) for p in parts]
    for a, b, c in itertools.permutations(states):
        left = metric.merge(metric.merge(a, b), c)
        right = metric.merge(a, metric.merge(b, c))
        assert metric.compute(left) == pytest.approx(whole, abs=1e-12)
        assert metric.compute(right) == pytest.approx(whole, abs=1e-12)
    growing = metric.empty()
    for p in parts:
        growing = metric.update(growing, scores[p], truth[p])
    assert metric.compute(growing) == whole
    assert metric.compute(metric.merge(metric.empty(), growing)) == whole


def test_states_are_arrays_and_survive_a_file(name, tmp_path):
    metric = METRICS[name]
    scores, truth = inputs(name)
    state = metric.update(metric.empty(), scores, truth)
    assert jax.tree.structure(state) == jax.tree.structure(metric.empty())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        assert metric.compute(dict(file)) == metric.compute(state)


def test_increasing_transforms_change_nothing(name):
    metric = METRICS[name]
    scores, truth = inputs(name)
    expected = metric.compute(metric.update(metric.empty(), scores, truth))
    for transform in (np.exp, np.arctan, lambda x: 3 * x - 100):
        state = metric.update(metric.empty(), transform(scores), truth)
        assert metric.compute(state) == pytest.approx(expected, abs=1e-12)


def test_undefined_is_an_error_not_a_number(name):
    metric = METRICS[name]
    scores, truth = inputs(name)
    with pytest.raises(MetricError, match="needs"):
        metric.compute(metric.empty())
    for one_class in (np.zeros_like(truth), np.ones_like(truth)):
        state = metric.update(metric.empty(), scores, one_class)
        with pytest.raises(MetricError, match="needs"):
            metric.compute(state)
