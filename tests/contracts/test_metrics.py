"""What every metric of a run must satisfy, by sorting and by counting."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from dsad.core.errors import MetricError
from dsad.evaluation import metrics
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.metrics import streaming
from dsad.evaluation.metrics.streaming import TOLERANCE
from tests.evaluation.test_hosts import Threads
from tests.evaluation.test_metrics import blobs, brute_aupro, brute_f1, brute_spro

#: Independent oracles; no number of a run goes without one.
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
#: What a run measures of the images, of maps and masks, and of maps and channels.
WANTED = {
    "images": {"image_auroc": "auroc", "image_ap": "ap", "image_f1_max": "f1_max"},
    "regions": {
        "pixel_auroc": "auroc", "pixel_ap": "ap", "pixel_f1_max": "f1_max",
        "aupro_30": 0.3, "aupro_05": 0.05,
    },
    "channels": {"spro_05": 0.05},
}  # fmt: skip
OF_IMAGES = {
    "image_auroc": metrics.image_auroc,
    "image_ap": metrics.average_precision,
    "image_f1_max": metrics.f1_max,
}


@pytest.fixture(params=sorted(ORACLES))
def name(request):
    return request.param


@pytest.fixture(params=["exact", "streaming"])
def method(request):
    return request.param


@pytest.fixture(params=sorted(WANTED))
def unit(request):
    return request.param


#: Numbers of pixels by method and input: a run gets all of them at once.
ROWS = {}


def compute(name, method, scores, truth):
    """A number as a run gets it."""
    if name in OF_IMAGES:
        return OF_IMAGES[name](scores, truth, method=method)
    if name == "spro_05":
        return metrics.spro(scores, truth, method=method)
    key = method, scores.tobytes(), truth.tobytes()
    if key not in ROWS:
        ROWS[key] = metrics.pixel_metrics(scores, truth, (0.3, 0.05), method=method)
    return ROWS[key][name]


def count(unit, scores, truth, state=None):
    """(counts, state) of one pass over the images, into ``state`` if it is given."""
    counts = streaming.Counts(unit)
    state = counts.empty() if state is None else state
    return counts, counts.add(state, *streaming.truths(unit, scores, truth))


def bounded(counts, state):
    """(value, bound) by name."""
    found = counts.measure(state, WANTED[counts.unit])
    return {name: (value, bound) for name, (value, bound, _) in found.items()}


def tolerance(method):
    """How far a value may be from the exact one."""
    return TOLERANCE if method == "streaming" else 1e-9


def inputs(what, seed=0, count=8):
    """Scores and truth of ``count`` images, with ties within and between the classes."""
    rng = np.random.default_rng(seed)
    if what.startswith("image"):
        truth = np.arange(count) % 3 == 0
        scores = rng.standard_normal(count) + truth
    else:
        truth = blobs(rng, count, 12, 10)
        scores = rng.standard_normal(truth.shape) + truth
        if what in ("spro_05", "channels"):
            truth = np.stack([truth, np.roll(truth, 2, 2)], 1)
    return (np.round(4 * scores) / 4).astype(np.float32), truth


# --- the numbers of a run -------------------------------------------------------------------


def test_every_number_of_a_run_has_an_oracle():
    assert set(EvalConfig().metric_names) <= set(ORACLES)
    assert {name for wanted in WANTED.values() for name in wanted} == set(ORACLES)


def test_equals_its_oracle(name, method):
    for seed in range(3):
        scores, truth = inputs(name, seed)
        value = compute(name, method, scores, truth)
        assert isinstance(value, float)
        assert value == pytest.approx(ORACLES[name](scores, truth), abs=tolerance(method))


def test_any_order_of_the_images_gives_the_same(name, method):
    scores, truth = inputs(name)
    whole = compute(name, method, scores, truth)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(scores))
        assert compute(name, method, scores[order], truth[order]) == pytest.approx(whole, abs=1e-12)


def test_increasing_transforms_change_nothing(name, method):
    scores, truth = inputs(name)
    expected = compute(name, method, scores, truth)
    error = 2 * TOLERANCE if method == "streaming" else 1e-12
    for transform in (np.exp, np.arctan, lambda x: 3 * x - 100):
        value = compute(name, method, transform(scores), truth)
        assert value == pytest.approx(expected, abs=error)


def test_undefined_is_an_error_not_a_number(name, method):
    scores, truth = inputs(name)
    for some in (slice(0), slice(None)):
        for one_class in (np.zeros_like(truth), np.ones_like(truth)):
            with pytest.raises(MetricError, match="needs"):
                compute(name, method, scores[some], one_class[some])


# --- counts ---------------------------------------------------------------------------------


def test_one_pass_is_within_its_bound(unit):
    for seed in range(3):
        scores, truth = inputs(unit, seed)
        for name, (value, bound) in bounded(*count(unit, scores, truth)).items():
            assert value == pytest.approx(ORACLES[name](scores, truth), abs=bound)


def test_counting_again_in_finer_bins_reaches_the_tolerance(unit):
    scores, truth = inputs(unit)
    scores = np.float32(100) + np.float32(1e-3) * scores
    counts, state = count(unit, scores, truth)
    assert min(bound for _, bound in bounded(counts, state).values()) > TOLERANCE
    while (finer := counts.refined(state, WANTED[unit])) is not None:
        _, state = count(unit, scores, truth, finer)
    for name, (value, bound) in bounded(counts, state).items():
        assert bound <= TOLERANCE
        assert value == pytest.approx(ORACLES[name](scores, truth), abs=bound)
        again = compute(name, "streaming", scores, truth)
        assert again == pytest.approx(value, abs=2 * TOLERANCE)


def test_any_grouping_and_order_of_the_parts_gives_the_same(unit):
    scores, truth = inputs(unit)
    whole = bounded(*count(unit, scores, truth))
    for order in itertools.permutations([slice(0, 3), slice(3, 4), slice(4, 8)]):
        state = None
        for part in order:
            counts, state = count(unit, scores[part], truth[part], state)
        for name, found in bounded(counts, state).items():
            assert found == pytest.approx(whole[name], abs=1e-12)


def test_parts_of_several_processes_give_the_same(unit, monkeypatch):
    scores, truth = inputs(unit)
    scores = np.float32(100) + np.float32(0.1) * scores  # counted in several passes
    whole = streaming.measure(unit, WANTED[unit], scores, truth)
    parts = [slice(3, 4), slice(0, 3), slice(4, 8)]

    def measured(index, hosts):
        part = parts[index]
        return streaming.measure(unit, WANTED[unit], scores[part], truth[part], hosts=hosts)

    for result in Threads(monkeypatch, 3)(measured):
        assert result.passes == whole.passes > 1
        for name, found in result.found.items():
            assert found[:2] == pytest.approx(whole.found[name][:2], abs=1e-12)


def test_states_are_arrays_and_survive_a_file(unit, tmp_path):
    counts, state = count(unit, *inputs(unit))
    shapes = {n: a.shape for n, a in counts.empty().items()}
    assert {n: a.shape for n, a in state.items()} == shapes
    assert all(isinstance(array, np.ndarray) for array in state.values())
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        assert bounded(counts, dict(file)) == bounded(counts, state)


def test_counts_of_nothing_are_an_error(unit):
    counts = streaming.Counts(unit)
    with pytest.raises(MetricError, match="needs"):
        bounded(counts, counts.empty())
