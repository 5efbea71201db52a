"""Counts by leading bits against the exact metrics, within their printed bounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import MetricError
from dsad.evaluation import metrics
from dsad.evaluation.metrics import bins, streaming
from dsad.evaluation.metrics.spro import Saturation
from tests.evaluation.test_hosts import Threads
from tests.evaluation.test_metrics import blobs, score_kinds

PIXELS = {"auroc": "auroc", "ap": "ap", "f1": "f1_max", "pro30": 0.3, "pro05": 0.05}
TRANSFORMS = {
    "plain": lambda s: s,
    "exp": lambda s: np.exp(3 * s),
    "offset": lambda s: 100 + 0.1 * s,
    "sigmoid": lambda s: 1 / (1 + np.exp(-(8 + s))),
}


def test_slots_keep_the_order_and_settle():
    rng = np.random.default_rng(0)
    scores = np.concatenate(
        [rng.standard_normal(500), 1e30 * rng.standard_normal(50), 1e-40 * rng.standard_normal(50)]
    ).astype(np.float32)
    extra = np.zeros(1 << 18, np.uint8)
    extra[rng.choice(1 << 18, 5000, replace=False)] = 3
    first = bins.Layout.of(np.zeros(1 << 18, np.uint8))
    extra[first.slot(scores[:200])] = 14
    order = np.argsort(scores, kind="stable")
    for layout in (first, bins.Layout.of(extra)):
        place = np.empty(layout.slots, np.int64)
        place[layout.ascending(np.arange(layout.slots))] = np.arange(layout.slots)
        assert (np.diff(place[layout.slot(scores)[order]]) >= 0).all()
    # A bin split by all bits holds one value each.
    settled = np.unique(scores[:200])
    assert np.unique(bins.Layout.of(extra).slot(settled)).size == settled.size


def test_both_zeros_are_one_score():
    layout = bins.Layout.of(np.zeros(1 << 18, np.uint8))
    zeros = np.array([0.0, -0.0], np.float32)
    assert np.unique(layout.slot(zeros)).size == 1
    assert bins.count_device([zeros], layout).max() == 2


@pytest.mark.parametrize("split", [0, 5])
def test_host_and_device_count_the_same(split, monkeypatch):
    rng = np.random.default_rng(1)
    scores = (rng.standard_normal(bins.CHUNK + 12345) ** 3).astype(np.float32)
    scores[:3000] *= np.float32(1e-41)  # below the normal range, where devices flush to zero
    extra = np.zeros(1 << 18, np.uint8)
    first = bins.Layout.of(extra)
    if split:
        extra[bins.count_host([scores], first) > 300] = split
    layout = bins.Layout.of(extra)
    expected = bins.count_host([scores], layout)
    assert expected.sum() == scores.size
    np.testing.assert_array_equal(bins.count_device([scores], layout), expected)
    halves = [jnp.asarray(scores[:70000]), scores[70000:]]
    np.testing.assert_array_equal(bins.count_device(halves, layout), expected)
    assert bins.count_device([], layout).sum() == 0
    # Long before int32 wraps the sums go to the host.
    monkeypatch.setattr(bins, "_FETCH", bins.CHUNK)
    np.testing.assert_array_equal(bins.count_device([scores] * 3, layout), 3 * expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_passes_reach_the_tolerance_under_increasing_transforms(transform):
    rng = np.random.default_rng(2)
    masks = blobs(rng, 8, 96, 96)
    plain = (rng.standard_normal(masks.shape) ** 3 + 1.5 * masks).astype(np.float32)
    maps = TRANSFORMS[transform](np.clip(plain, -12, 12)).astype(np.float32)
    measured = streaming.measure("regions", PIXELS, maps, masks)
    assert measured.passes <= 4
    exact = dict(zip(PIXELS, metrics.pixel_metrics(maps, masks, (0.3, 0.05)).values(), strict=True))
    for key, found in measured.found.items():
        assert found.bound <= streaming.TOLERANCE
        assert abs(found.value - exact[key]) <= found.bound, key
    one = streaming.Counts("regions")
    state = one.add(one.empty(), *streaming.truths("regions", maps, masks))
    for key, found in one.measure(state, PIXELS).items():
        assert abs(found.value - exact[key]) <= found.bound, key
    assert one.refined(state, PIXELS) is not None


def test_every_kind_of_scores_within_its_bound():
    rng = np.random.default_rng(3)
    masks = blobs(rng, 6, 14, 12)
    for leading, kinds in ((12, ["random"]), (18, None)):
        counts = streaming.Counts("regions", leading)
        made = score_kinds(rng, masks)
        for kind in kinds or made:
            maps = made[kind]
            single = maps.astype(np.float32)
            exact = metrics.pixel_metrics(single, masks, (0.3, 0.05))
            wanted = dict(zip(exact, ["auroc", "ap", "f1_max", 0.3, 0.05], strict=True))
            state = counts.add(counts.empty(), *streaming.truths("regions", single, masks))
            for key, found in counts.measure(state, wanted).items():
                assert abs(found.value - exact[key]) <= found.bound, (kind, key)
            again = streaming.measure("regions", wanted, single, masks, leading=leading)
            for key, found in again.found.items():
                assert found.bound <= streaming.TOLERANCE, (kind, key)
                assert found.value == pytest.approx(exact[key], abs=found.bound)


def test_public_functions_take_the_method():
    rng = np.random.default_rng(4)
    masks = blobs(rng, 6, 20, 16)
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    labels[3:5] = False
    for function in (metrics.image_auroc, metrics.average_precision, metrics.f1_max):
        assert function(scores, labels, method="streaming") == pytest.approx(
            function(scores, labels), abs=1e-5
        )
    functions = (metrics.pixel_auroc, metrics.average_precision, metrics.f1_max, metrics.aupro)
    for function in functions:
        exact = function(maps, masks)
        assert function(maps, masks, method="streaming") == pytest.approx(exact, abs=1e-5)
        unequal = [*np.split(maps[0], 2), *maps[1:]], [*np.split(masks[0], 2), *masks[1:]]
        assert function(*unequal, method="streaming") == pytest.approx(exact, abs=1e-5)
        on_device = function(jnp.asarray(maps), masks, method="streaming")
        assert on_device == function(maps, masks, method="streaming")
    found = metrics.pixel_metrics(maps, masks, (0.3, 0.05), method="streaming", curve_points=100)
    exact = metrics.pixel_metrics(maps, masks, (0.3, 0.05))
    assert found["error_bound"] <= streaming.TOLERANCE
    for key, value in exact.items():
        assert found[key] == pytest.approx(value, abs=found["error_bound"])
    assert found["curves"]["pro"]["fpr"][-1] == pytest.approx(0.3)
    with pytest.raises(MetricError, match='"exact" or "streaming"'):
        metrics.aupro(maps, masks, method="fast")  # type: ignore[arg-type]


def test_sheet_values_by_counting():
    mask = np.zeros((2, 10, 10), bool)
    mask[0, 2:5, 2:5] = True
    flat = np.ones(mask.shape, np.float32)
    assert metrics.aupro(flat, mask, method="streaming") == pytest.approx(0.15)
    assert metrics.aupro(flat, mask, 0.05, method="streaming") == pytest.approx(0.025)
    assert metrics.aupro(mask.astype(np.float32), mask, method="streaming") == pytest.approx(1.0)
    assert metrics.pixel_auroc(flat, mask, method="streaming") == pytest.approx(0.5)
    assert metrics.f1_max(flat, mask, method="streaming") == pytest.approx(18 / 209)


def test_hosts_refine_together(monkeypatch):
    rng = np.random.default_rng(5)
    masks = blobs(rng, 6, 24, 24)
    maps = (100 + 0.1 * (rng.standard_normal(masks.shape) + masks)).astype(np.float32)
    halves = [(maps[::2], masks[::2]), (maps[1::2], masks[1::2])]

    def measured(index, hosts):
        return streaming.measure("regions", {"value": 0.3}, *halves[index], hosts=hosts)

    for result in Threads(monkeypatch, 2)(measured):
        value, bound, _ = result.found["value"]
        assert result.passes == 2
        assert bound <= streaming.TOLERANCE
        assert value == pytest.approx(metrics.aupro(maps, masks), abs=bound)


@pytest.mark.parametrize("unit", ["channels", "regions"])
def test_memory_does_not_depend_on_the_images(unit):
    rng = np.random.default_rng(6)
    counts = streaming.Counts(unit)
    masks = blobs(rng, 4, 16, 16)
    maps = rng.standard_normal(masks.shape).astype(np.float32)
    images = streaming.truths(unit, maps, masks[:, None] if unit == "channels" else masks)
    state = counts.add(counts.empty(), *images)
    size = sum(a.nbytes for a in state.values())
    for _ in range(5):
        state = counts.add(state, *images)
    assert sum(a.nbytes for a in state.values()) == size
    assert state["normal"].sum() + state["defect"].sum() == 6 * maps.size


def test_saturation_counts():
    rng = np.random.default_rng(7)
    masks = blobs(rng, 6, 24, 24)
    channels = np.stack([masks, np.roll(masks, 3, 1)], 1)
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)
    for rule in (Saturation(threshold=4, relative=False), Saturation(threshold=0.3, relative=True)):
        exact = metrics.spro(maps, channels, rule)
        found = metrics.spro(maps, channels, rule, method="streaming")
        assert found == pytest.approx(exact, abs=1e-5)


def test_unusable_scores_are_errors():
    masks = np.zeros((2, 4, 4), bool)
    masks[1, 0, 0] = True
    maps = np.zeros((2, 4, 4), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        broken = maps.copy()
        broken[1, 2, 3] = bad
        with pytest.raises(MetricError, match=r"maps\[1\].*found 1 NaN or infinite"):
            metrics.aupro(broken, masks, method="streaming")
    with pytest.raises(MetricError, match=r"maps\[0\].*float64 that float32 rounds"):
        metrics.aupro(np.full((2, 4, 4), 0.1), masks, method="streaming")
    with pytest.raises(MetricError, match="needs defect pixels"):
        metrics.aupro(maps, ~masks & masks, method="streaming")
    with pytest.raises(MetricError, match="needs normal and anomalous"):
        metrics.image_auroc([0.5, 0.25], [1, 1], method="streaming")
    with pytest.raises(MetricError, match="12 to 20 bits"):
        streaming.Counts("pixels", 24)
