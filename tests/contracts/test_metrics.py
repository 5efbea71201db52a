"""What every registered metric must satisfy as a mergeable state."""

import itertools

import jax
import numpy as np
import pytest
from sklearn import metrics as sk

from dsad.core.errors import MetricError
from dsad.evaluation.metrics import METRICS, STREAMING, Exact
from dsad.evaluation.metrics.streaming import TOLERANCE, Streaming
from tests.evaluation.test_metrics import blobs, brute_aupro, brute_f1, brute_spro

#: Independent oracles; a metric without one cannot be registered.
ORACLES = {
    "image_auroc": lambda s, y: sk.roc_auc_score(y, s),
    "image_ap": lambda s, y: sk.average_precision_score(y, s),
    "pixel_auroc": lambda s, y: sk.roc_auc_score(y.ravel(), s.ravel()),
    "pixel_ap": lambda s, y: sk.average_precision_score(y.ravel(), s.ravel()),
    "image_f1_max": brute_f1,
    "pixel_f1_max": brute_f1,
    "aupro_30": lambda s, y: brute_aupro(s, y, 0.3),
    "aupro_05": lambda s, y: brute_aupro(s, y, 0.05),
    "spro_05": lambda s, y: brute_spro(s, y, lambda area: area, 0.05),
}


@pytest.fixture(params=sorted(METRICS))
def name(request):
    return request.param


@pytest.fixture(params=["exact", "streaming"])
def metric(request, name):
    """The registered metric, and its form that counts."""
    return METRICS[name] if request.param == "exact" else STREAMING[name]


def error_of(metric, state):
    """How far the value may be from the exact one."""
    return metric.bounded(state).bound if isinstance(metric, Streaming) else 1e-9


def inputs(name, seed=0, count=8):
    """Scores and truth of ``count`` images, with ties within and between the classes."""
    rng = np.random.default_rng(seed)
    if name.startswith("image"):
        truth = np.arange(count) % 3 == 0
        scores = rng.standard_normal(count) + truth
    else:
        truth = blobs(rng, count, 12, 10)
        scores = rng.standard_normal(truth.shape) + truth
        if name.startswith("spro"):
            truth = np.stack([truth, np.roll(truth, 2, 2)], 1)
    return (np.round(4 * scores) / 4).astype(np.float32), truth


def test_equals_its_oracle(name, metric):
    for seed in range(3):
        scores, truth = inputs(name, seed)
        state = metric.update(metric.empty(), scores, truth)
        value = metric.compute(state)
        assert isinstance(value, float)
        assert value == pytest.approx(ORACLES[name](scores, truth), abs=error_of(metric, state))


def test_counting_again_in_finer_bins_reaches_the_tolerance(name):
    metric = STREAMING[name]
    scores, truth = inputs(name)
    scores = np.float32(100) + np.float32(1e-3) * scores
    state = metric.update(metric.empty(), scores, truth)
    assert metric.bounded(state).bound > TOLERANCE
    while (finer := metric.refined(state)) is not None:
        state = metric.update(finer, scores, truth)
    value, bound, _ = metric.bounded(state)
    assert bound <= TOLERANCE
    assert value == pytest.approx(ORACLES[name](scores, truth), abs=bound)


def test_any_grouping_and_order_gives_the_same(name, metric):
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
    # Sorting gives the same bits; counts add region weights in another order.
    last = 0.0 if isinstance(metric, Exact) else 1e-12
    assert metric.compute(growing) == pytest.approx(whole, abs=last)
    assert metric.compute(metric.merge(metric.empty(), growing)) == whole


def test_states_are_arrays_and_survive_a_file(name, metric, tmp_path):
    scores, truth = inputs(name)
    state = metric.update(metric.empty(), scores, truth)
    assert jax.tree.structure(state) == jax.tree.structure(metric.empty())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        assert metric.compute(dict(file)) == metric.compute(state)


def test_increasing_transforms_change_nothing(name, metric):
    scores, truth = inputs(name)
    whole = metric.update(metric.empty(), scores, truth)
    expected = metric.compute(whole)
    for transform in (np.exp, np.arctan, lambda x: 3 * x - 100):
        state = metric.update(metric.empty(), transform(scores), truth)
        error = max(error_of(metric, whole) + error_of(metric, state), 1e-12)
        assert metric.compute(state) == pytest.approx(expected, abs=error)


def test_undefined_is_an_error_not_a_number(name, metric):
    scores, truth = inputs(name)
    with pytest.raises(MetricError, match="needs"):
        metric.compute(metric.empty())
    for one_class in (np.zeros_like(truth), np.ones_like(truth)):
        state = metric.update(metric.empty(), scores, one_class)
        with pytest.raises(MetricError, match="needs"):
            metric.compute(state)
