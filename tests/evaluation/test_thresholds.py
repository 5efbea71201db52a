"""Thresholds: the quantiles, their guarantee, the rates they achieve, and that no test image
enters."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from dsad.core.errors import ConfigError
from dsad.data.combined import selected
from dsad.evaluation import extract, thresholds
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.scored import Scored
from tests.evaluation.test_localize import Planted
from tests.evaluation.test_support import run


def test_image_threshold_is_the_conformal_quantile():
    scores = np.arange(1.0, 20.0)  # n = 19: the 19th smallest at a rate of 0.05
    assert thresholds.image_threshold(scores, 0.05) == (19.0, pytest.approx(0.05))
    assert thresholds.image_threshold(scores, 0.1) == (18.0, pytest.approx(0.1))
    assert thresholds.image_threshold(scores[:4], 0.05) == (4.0, pytest.approx(0.2))
    assert thresholds.image_threshold(scores[:1], 0.5) == (1.0, pytest.approx(0.5))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_bound_holds_for_exchangeable_images(rate):
    rng = np.random.default_rng(0)
    alarms, bounds = [], []
    for _ in range(4000):
        scores = rng.lognormal(size=50)
        threshold, bound = thresholds.image_threshold(scores[:49], rate)
        alarms.append(scores[49] > threshold)
        bounds.append(bound)
    error = np.sqrt(rate * (1 - rate) / 4000)
    assert max(bounds) <= rate + 1e-12
    assert abs(np.mean(alarms) - bounds[0]) < 4 * error  # without ties the bound is met exactly


@pytest.mark.parametrize(("held", "rate"), [(19, 0.05), (49, 0.1), (7, 0.05), (100, 0.3)])
def test_false_alarms_of_one_model_spread_as_order_statistics_do(held, rate):
    """Of uniform scores the share above the k-th smallest of n is Beta(n + 1 - k, k)."""
    k = min(math.ceil((held + 1) * (1 - rate) - 1e-9), held)
    law = scipy.stats.beta(held + 1 - k, k)
    rng = np.random.default_rng(1)
    drawn = [thresholds.image_threshold(rng.uniform(size=held), rate) for _ in range(2000)]
    assert {round(bound, 12) for _, bound in drawn} == {round(float(law.mean()), 12)}
    shares = 1 - np.array([value for value, _ in drawn])
    assert scipy.stats.kstest(shares, law.cdf).pvalue > 1e-3
    next_one = scipy.stats.beta(held + 2 - k, k - 1)  # one place off is told apart
    assert scipy.stats.kstest(shares, next_one.cdf).pvalue < 1e-6


@pytest.mark.parametrize("held", [thresholds.HELD, 0])
def test_pixel_threshold_flags_at_most_its_share(held, monkeypatch):
    monkeypatch.setattr(thresholds, "HELD", held)  # sorted, and counted
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=s).astype(np.float32) for s in ((20, 30), (7, 9))]
    values = np.sort(np.concatenate([m.ravel() for m in maps]))
    for rate in (0.001, 0.01, 0.25):
        found = thresholds.pixel_threshold(maps, rate)
        assert (values > found).mean() <= rate
        below = values[values < found][-1]
        assert (values > below).mean() > rate  # no lower value would do
    assert thresholds.pixel_threshold([np.ones((3, 3), np.float32)], 0.1) == 1.0


def test_rates_are_counted_on_the_test_images():
    mask = np.array([[True, True], [False, False]])
    scored = Scored(
        [np.array([[1, 5], [2, 9]]), np.array([[9, 1], [9, 1]]), np.full((2, 2), 9.0)],
        [np.zeros((2, 2), bool), mask, None],
        np.array([1.0, 5.0, 2.0]),
        np.array([0, 1, 1]),
        ["good", "hole", "dent"],
    )
    normal = Scored([np.array([[3.0, 4.0]])], [None], np.array([3.0]), np.array([0]), ["good"])
    found = thresholds.measure(scored, normal, 0.5)
    assert (found["image"], found["pixel"], found["held_out"]) == (3.0, 3.0, 1)
    assert (found["image_false_alarms"], found["image_recall"]) == (0.0, 0.5)
    assert found["recall_by_kind"] == {"dent": 0.0, "hole": 1.0}
    assert (found["pixel_false_alarms"], found["pixel_recall"]) == (0.5, 0.5)
    assert found["image_bound"] == 0.5
    assert found["decision"] == "1 of 2 defects found, 0 of 1 false alarms at 50 %"
    assert (found["scores"], found["maxima"], found["weights"]) == ([3.0], [4.0], [1.0])
    few = thresholds.measure(scored, normal, 0.05)["decision"]
    assert few.endswith("at 50 % (5 % needs 19 held-out images or groups, there are 1)")
    unmarked = dataclasses.replace(scored, masks=[~mask & mask] * 3)
    assert thresholds.measure(unmarked, normal, 0.5) == {**found, "pixel_recall": None}
    none = thresholds.measure(scored.part([]), normal, 0.5)
    assert (none["image"], none["pixel"]) == (3.0, 3.0)
    rates = ("image_false_alarms", "image_recall", "pixel_false_alarms", "pixel_recall")
    assert [none[rate] for rate in rates] == [None] * 4
    assert thresholds.mean([found, none])["pixel_recall"] is None


def test_thresholds_come_from_held_out_training_images_alone():
    given = {"false_alarm_rate": 0.2, "holdout": 3}
    plain, louder = run(Planted(strength=9), **given), run(Planted(strength=40, good=2), **given)
    for name in ("image", "pixel", "held_out", "image_bound"):
        assert plain.thresholds["disc"]["0"][name] == louder.thresholds["disc"]["0"][name]
    row = louder.thresholds["disc"]["0"]
    assert row["image_recall"] == 1.0
    assert row["pixel_recall"] > 0.9
    assert row["held_out"] == 3  # half of seven; a rate of 0.2 needs four
    assert row["image_bound"] == 0.25
    assert plain.stamp["thresholds"]["false_alarm_rate"] == 0.2
    flagged = np.array([x["score"] > row["image"] for x in louder.images["disc"]])
    labels = np.array([x["label"] for x in louder.images["disc"]])
    found = f"{flagged[labels == 1].sum()} of 6 defects found, {flagged[labels == 0].sum()} of 2"
    assert row["decision"].startswith(f"{found} false alarms at 25 % (20 % needs 4 ")


def test_numbers_are_of_all_normals_and_thresholds_of_a_fit_without_the_held_out():
    """The split fit is an evaluation that never had the held-out images."""
    with_rate, without = run(false_alarm_rate=0.2), run()
    assert with_rate.mean == without.mean
    assert with_rate.images == without.images
    row, held = with_rate.thresholds["disc"]["0"], with_rate.support["disc"]["0"]["held_out"]

    class Split(Planted):
        """The held-out images are test images, the others training images."""

        def source(self, split, category=None):
            every = super().source("train", category)
            kept = [
                (i, r)
                for i, r in enumerate(every.records)
                if (r.path in held) != (split == "train")
            ]
            return selected(every, [i for i, _ in kept])

    alone = run(Split(strength=9))
    assert row["scores"] == [x["score"] for x in alone.images["disc"]]
    assert row["maxima"] == [x["max"] for x in alone.images["disc"]]
    assert len(held) == 3


def test_the_split_fit_reads_what_was_computed(monkeypatch):
    """Features of the training images are computed once for both fits; held-out ones once more."""
    calls = []
    features = extract.Extractor.__call__
    monkeypatch.setattr(
        extract.Extractor, "__call__",
        lambda self, images: calls.append(1) or features(self, images),
    )  # fmt: skip
    ticks = []
    run(false_alarm_rate=0.2, progress=lambda *told: ticks.append(told))
    assert len(calls) == 2 + 1 + 3  # batches of 4: 7 training, 3 held-out, 11 test images
    assert ticks[0][1] == 7 + 4 + 3 + 11 == ticks[-1][0]
    assert any("split fit" in text for _, _, text in ticks)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_bound_holds_where_images_of_a_group_are_alike(rate):
    """New images of new groups, over many draws of held-out normals with unequal groups."""
    rng = np.random.default_rng(0)
    alarms, bounds = [], []
    for _ in range(3000):
        sizes = rng.integers(1, 9, 31)
        level = np.repeat(rng.lognormal(size=31), sizes)
        groups = np.repeat(np.arange(31), sizes).astype(str)
        scores = level + 0.01 * rng.normal(size=level.size)
        new = groups == "30"
        weights = thresholds.group_weights(groups[~new].tolist())
        threshold, bound = thresholds.image_threshold(scores[~new], rate, weights)
        alarms.append(np.mean(scores[new] > threshold))
        bounds.append(bound)
    assert max(bounds) <= rate + 1e-12
    error = 4 * np.std(alarms) / np.sqrt(3000)
    assert np.mean(alarms) < rate + error
    assert np.mean(alarms) > rate - 1 / 31 - error  # and is not far from it


def test_percentile_and_exceeding_share():
    scores, weights = [3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 0.5, 0.5]
    assert [thresholds.percentile(scores, x, weights) for x in (1, 2, 2.5, 9)] == pytest.approx(
        [0, 100 / 3, 200 / 3, 100]
    )
    assert [thresholds.exceeding(scores, x, weights) for x in (0, 1, 2, 3)] == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )
    assert [thresholds.needed(r) for r in (0.05, 0.1, 0.01, 0.3, 0.5)] == [19, 9, 99, 3, 1]


def test_off_by_default_and_refused_out_of_range():
    results = run()
    assert results.thresholds == {}
    assert results.stamp["thresholds"] == "none"
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        EvalConfig(false_alarm_rate=1.0)
    with pytest.raises(ConfigError, match="holdout"):
        EvalConfig(holdout=1)
    for field in ("method", "save_maps"):
        with pytest.raises(ConfigError, match=rf"evaluation\.{field}: expected one of .*'jpg'"):
            EvalConfig(**{field: "jpg"})
