"""Exact metrics against a brute-force float64 oracle, scikit-learn and the published examples."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from dsad.core.errors import MetricError
from dsad.evaluation import metrics
from dsad.evaluation.metrics import visa
from dsad.evaluation.metrics.spro import Saturation, units
from dsad.evaluation.report.page import metric_label

LIMITS = (0.05, 0.3, 1.0)


def brute_aupro(maps, masks, limit):
    """From the definition: one threshold per distinct score, regions grown by hand, no sort."""
    regions = []
    for i, mask in enumerate(masks):
        left = {tuple(p) for p in np.argwhere(mask)}
        while left:
            grow, region = [left.pop()], []
            while grow:
                y, x = grow.pop()
                region.append((y, x))
                around = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
                left -= around
                grow += around
            regions.append((i, tuple(np.array(region).T)))
    normal = np.concatenate([np.float64(m[~k]) for m, k in zip(maps, masks, strict=True)])
    inside = [np.float64(maps[i][at]) for i, at in regions]
    return brute_area(maps, normal, inside, [r.size for r in inside], limit)


def brute_spro(maps, channels, pixels, limit):
    """From the definition; ``pixels`` gives S of an area."""
    normal = np.concatenate(
        [np.float64(m[~np.any(c, axis=0)]) for m, c in zip(maps, channels, strict=True)]
    )
    inside = [np.float64(m[k]) for m, c in zip(maps, channels, strict=True) for k in c if k.any()]
    return brute_area(maps, normal, inside, [pixels(r.size) for r in inside], limit)


def brute_area(maps, normal, inside, saturated, limit):
    fpr, pro = [0.0], [0.0]
    for t in np.unique(np.concatenate([np.float64(m).ravel() for m in maps]))[::-1]:
        fpr.append(np.mean(normal >= t))
        hits = [np.sum(r >= t) for r in inside]
        pro.append(np.mean([min(h / s, 1.0) for h, s in zip(hits, saturated, strict=True)]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0) if x0 < limit else y0
            x1 = max(limit, x0) if x0 < limit else x0
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def brute_f1(scores, labels):
    """From the definition, a threshold per distinct score."""
    scores, labels = np.float64(scores), np.asarray(labels, bool)
    found = [0.0]
    for t in np.unique(scores):
        hits = np.sum(labels & (scores >= t))
        precision, recall = hits / np.sum(scores >= t), hits / labels.sum()
        found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return max(found)


def blobs(rng, n, h, w, share=0.06):
    noise = ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, 1.2, 1.2))
    masks = noise > np.quantile(noise, 1 - share)
    masks[: n // 3] = False
    return masks


def score_kinds(rng, masks):
    plain = rng.standard_normal(masks.shape) + masks
    labelled = [ndimage.label(m, np.ones((3, 3)))[0] for m in masks]
    per_region = np.stack([rng.integers(0, 6, m.max() + 1)[m] for m in labelled])
    return {
        "random": plain,
        "tied": np.round(2 * plain) / 2,
        "per region": per_region,
        "heavy tails": np.sign(plain) * np.expm1(np.abs(plain) ** 2.5),
        "crowded": 100 + 0.1 * plain,
        "constant": np.full(masks.shape, 3.0),
        "signed zeros": np.where(plain > 0, 0.0, -0.0),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixel_metrics_equal_the_oracles(dtype):
    rng = np.random.default_rng(0)
    masks = blobs(rng, 6, 14, 12)
    truth = masks.ravel()
    for kind, maps in score_kinds(rng, masks).items():
        maps = maps.astype(dtype)
        flat = maps.ravel().astype(np.float64)
        expected = sk.roc_auc_score(truth, flat), sk.average_precision_score(truth, flat)
        assert metrics.pixel_auroc(maps, masks) == pytest.approx(expected[0], abs=1e-9), kind
        assert metrics.average_precision(maps, masks) == pytest.approx(expected[1], abs=1e-9), kind
        f1 = brute_f1(flat, truth)
        assert metrics.f1_max(maps, masks) == pytest.approx(f1, abs=1e-12), kind
        for limit in LIMITS:
            oracle = brute_aupro(maps, masks, limit)
            assert metrics.aupro(maps, masks, limit) == pytest.approx(oracle, abs=1e-9), kind
        together = metrics.pixel_metrics(maps, masks)
        assert together == {
            "pixel_auroc": metrics.pixel_auroc(maps, masks),
            "pixel_ap": metrics.average_precision(maps, masks),
            "pixel_f1_max": metrics.f1_max(maps, masks),
            "aupro_30": metrics.aupro(maps, masks),
        }


def test_image_metrics_equal_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    for scores in (rng.standard_normal(200), rng.integers(0, 5, 200), np.zeros(200)):
        assert metrics.image_auroc(scores, labels) == pytest.approx(
            sk.roc_auc_score(labels, scores), abs=1e-12
        )
        assert metrics.average_precision(scores, labels) == pytest.approx(
            sk.average_precision_score(labels, scores), abs=1e-12
        )
        assert metrics.f1_max(scores, labels) == pytest.approx(brute_f1(scores, labels), abs=1e-12)
    four = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    assert metrics.image_auroc(*four) == pytest.approx(0.75)
    assert metrics.average_precision(*four) == pytest.approx(0.8333, abs=1e-4)


def test_constant_map_is_half_the_limit():
    mask = np.zeros((2, 10, 10), bool)
    mask[0, 2:5, 2:5] = True
    flat = np.ones(mask.shape)
    assert metrics.aupro(flat, mask) == pytest.approx(0.15)
    assert metrics.aupro(flat, mask, 0.05) == pytest.approx(0.025)
    assert metrics.aupro(mask.astype(np.float32), mask) == pytest.approx(1.0)
    noise = np.random.default_rng(0).random((8, 60, 60))
    blocks = np.kron(np.random.default_rng(1).random((8, 6, 6)) < 0.2, np.ones((10, 10))) > 0
    assert metrics.aupro(noise, blocks) == pytest.approx(0.15, abs=0.01)
    assert metrics.pixel_auroc(flat, mask) == pytest.approx(0.5)
    assert metrics.average_precision(flat, mask) == pytest.approx(mask.mean())


def test_two_by_two_example():
    maps = np.array([[[0.9, 0.8], [0.7, 0.1]], [[0.6, 0.5], [0.4, 0.2]]])
    masks = np.zeros((2, 2, 2), bool)
    masks[0, :, 0] = True
    found = metrics.pixel_metrics(maps, masks)
    assert found["pixel_auroc"] == pytest.approx(0.9167, abs=1e-4)
    assert found["pixel_ap"] == pytest.approx(0.8333, abs=1e-4)
    assert found["aupro_30"] == pytest.approx(0.7222, abs=1e-4)
    assert metrics.pixel_metrics(maps, masks, 0.05)["aupro_05"] == pytest.approx(0.5)


@pytest.mark.parametrize(("hit", "auroc"), [("small", 0.55), ("large", 0.95)])
def test_small_and_large_regions_weigh_the_same(hit, auroc):
    small, large = np.zeros((2, 1, 10, 10), bool)
    small[0, 0, 0] = True
    large[0, 5:8, 5:8] = True
    maps = (small if hit == "small" else large).astype(np.float32)
    assert metrics.aupro(maps, small | large) == pytest.approx(0.575)
    assert metrics.pixel_auroc(maps, small | large) == pytest.approx(auroc)


def test_pixels_touching_at_a_corner_are_one_region():
    mask = np.zeros((5, 5), bool)
    mask[1, 1] = mask[2, 2] = True
    sizes, count = metrics.region_sizes(mask)
    assert count == 1
    np.testing.assert_array_equal(sizes, [2, 2])
    mask[4, 4] = mask[4, 3] = mask[4, 2] = True
    assert metrics.region_sizes(mask)[1] == 2
    np.testing.assert_array_equal(metrics.region_sizes(mask)[0], [2, 2, 3, 3, 3])


def test_increasing_transforms_change_nothing():
    rng = np.random.default_rng(2)
    masks = blobs(rng, 6, 20, 20)
    maps = np.round(1024 * rng.standard_normal(masks.shape)) / 1024 + masks
    expected = metrics.pixel_metrics(maps, masks)
    for transform in (np.exp, np.arcsinh, lambda x: 5 * x - 40, lambda x: -np.exp(-x)):
        assert metrics.pixel_metrics(transform(maps), masks) == expected


def test_lists_of_unequal_sizes_and_kinds_of_input():
    rng = np.random.default_rng(3)
    masks = blobs(rng, 6, 20, 20)
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)
    expected = metrics.pixel_metrics(maps, masks)
    assert metrics.pixel_metrics(jnp.asarray(maps), jnp.asarray(masks)) == expected
    assert metrics.pixel_metrics(maps, masks.astype(np.uint8) * 255) == expected
    # The same pixels as other images: halves of normal images only, so that regions stay whole.
    split = [*np.split(maps[0], 2), *maps[1:]], [*np.split(masks[0], 2), *masks[1:]]
    assert metrics.pixel_metrics(*split) == expected
    half = jnp.asarray(maps, jnp.bfloat16)
    assert metrics.pixel_metrics(half, masks) == metrics.pixel_metrics(np.float32(half), masks)


def test_curves_are_thin_and_keep_the_area():
    rng = np.random.default_rng(4)
    masks = blobs(rng, 6, 60, 60)
    maps = rng.standard_normal(masks.shape) + masks
    found = metrics.pixel_metrics(maps, masks, curve_points=500)
    roc, pr, pro = (found["curves"][name] for name in ("roc", "pr", "pro"))
    for curve in (roc, pr, pro):
        assert all(100 < len(axis) <= 500 for axis in curve.values())
    assert (roc["fpr"][0], roc["tpr"][-1]) == (0, 1)
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(found["pixel_auroc"], abs=1e-3)
    assert pro["fpr"][-1] == pytest.approx(0.3)
    assert np.trapezoid(pro["pro"], pro["fpr"]) / 0.3 == pytest.approx(found["aupro_30"], abs=1e-3)
    assert pr["recall"][-1] == 1
    assert pr["precision"][-1] >= masks.mean()


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.average_precision])
def test_one_class_of_images_is_an_error(metric, labels):
    with pytest.raises(MetricError, match=r"needs normal and anomalous images; found \d normal"):
        metric([0.1, 0.2, 0.3], labels)


@pytest.mark.parametrize(
    "metric",
    [metrics.pixel_auroc, metrics.average_precision, metrics.aupro, metrics.pixel_metrics],
)
def test_unusable_maps_are_errors(metric):
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    with pytest.raises(MetricError, match="needs defect pixels; found none among 32"):
        metric(maps, masks)
    with pytest.raises(MetricError, match="needs normal pixels"):
        metric(maps, ~masks)
    with pytest.raises(MetricError, match="needs defect pixels"):
        metric([np.zeros((2, 2))], [np.zeros((2, 2), bool)])
    masks[1, 0, 0] = True
    with pytest.raises(MetricError, match=r"maps\[0\].*mask \(4, 4\).*found \(3, 4\)"):
        metric(maps[:, :3], masks)
    with pytest.raises(MetricError, match="2 maps, 1 masks"):
        metric(maps, masks[1:])
    with pytest.raises(MetricError, match=r"masks\[0\].*float32"):
        metric(maps, masks.astype(np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        broken = maps.copy()
        broken[1, 2, 3] = bad
        with pytest.raises(MetricError, match=r"maps\[1\].*found 1 NaN or infinite.*\(2, 3\)"):
            metric(broken, masks)


def test_other_bad_input():
    with pytest.raises(MetricError, match="one shape"):
        metrics.image_auroc([0.1, 0.2], [1])
    with pytest.raises(MetricError, match="integers 0"):
        metrics.image_auroc([0.1, 0.2], [1, 2])
    with pytest.raises(MetricError, match="NaN"):
        metrics.image_auroc([0.1, np.nan], [0, 1])
    for limit in (0.0, 1.5, -1, float("nan")):
        with pytest.raises(MetricError, match="fpr_limit"):
            metrics.aupro(np.zeros((1, 2, 2)), np.eye(2, dtype=bool)[None], limit)


def test_saturated_pixels_of_the_sheet():
    absolute = Saturation(threshold=100, relative=False)
    assert (absolute.pixels(400), absolute.pixels(60)) == (100, 60)
    assert Saturation(threshold=0.5, relative=True).pixels(7) == 3
    assert Saturation(threshold=0.1, relative=True).pixels(7) == 1  # the guard: not 0
    for threshold, relative in ((0.0, True), (1.5, True), (0, False), (0.5, False), (2.5, False)):
        with pytest.raises(MetricError, match="saturation"):
            Saturation(threshold=threshold, relative=relative)


@pytest.mark.parametrize(("hits", "credit"), [(50, 0.5), (100, 1.0), (400, 1.0)])
def test_hits_of_a_saturated_channel(hits, credit):
    channel = np.zeros((30, 40), bool)
    channel[:20, :20] = True
    scores = np.zeros(channel.shape)
    scores[np.unravel_index(np.flatnonzero(channel)[:hits], channel.shape)] = 1.0
    rule = Saturation(threshold=100, relative=False)
    # At score 1 the curve rises to the credit, then straight to (1, 1).
    for limit in (0.05, 1.0):
        area = metrics.spro([scores], [[channel]], rule, limit)
        assert area == pytest.approx(credit + (1 - credit) * limit / 2)
    top, sizes = units([scores], [[channel]], rule)[0].positives(scores.ravel())
    assert top.sum() == min(hits, 100)
    assert (sizes == 100).all()


def test_spro_equals_the_oracle():
    rng = np.random.default_rng(6)
    masks = blobs(rng, 6, 14, 12, share=0.15)
    channels = np.stack([masks, np.roll(masks, 2, 2), np.zeros_like(masks)], 1)  # they overlap
    rules = {
        Saturation(threshold=5, relative=False): lambda area: min(5, area),
        Saturation(threshold=0.3, relative=True): lambda area: max(1, int(0.3 * area)),
    }
    for kind, maps in score_kinds(rng, masks).items():
        for rule, pixels in rules.items():
            for limit in LIMITS:
                oracle = brute_spro(maps, channels, pixels, limit)
                found = metrics.spro(maps, channels, rule, limit)
                assert found == pytest.approx(oracle, abs=1e-9), kind
    # A rule per channel of each image.
    one, other = rules
    mixed = metrics.spro(
        maps := score_kinds(rng, masks)["random"], channels, [[one, other, one]] * 6
    )
    fixed = [one, other, one]
    inside = [(m[k], r) for m, c in zip(maps, channels, strict=True)
              for k, r in zip(c, fixed, strict=True) if k.any()]  # fmt: skip
    normal = maps[~channels.any(1)]
    sizes = [rules[r](x.size) for x, r in inside]
    oracle = brute_area(maps, normal, [x for x, _ in inside], sizes, 0.05)
    assert mixed == pytest.approx(oracle, abs=1e-9)


def test_unsaturated_spro_of_connected_channels_is_aupro():
    rng = np.random.default_rng(7)
    masks = np.zeros((5, 16, 16), bool)
    for i in range(1, 5):
        masks[i, 2 : 4 + i, 3 : 5 + 2 * i] = True
    maps = np.round(4 * (rng.standard_normal(masks.shape) + masks)) / 4
    for limit in LIMITS:
        expected = metrics.aupro(maps, masks, limit)
        assert metrics.spro(maps, masks[:, None], fpr_limit=limit) == pytest.approx(expected)
        listed = [[m] if m.any() else [] for m in masks]
        assert metrics.spro(list(maps), listed, fpr_limit=limit) == pytest.approx(expected)


def test_unusable_channels_are_errors():
    maps, channel = np.zeros((2, 4, 4)), np.eye(4, dtype=bool)
    with pytest.raises(MetricError, match=r"2 maps and 1 lists"):
        metrics.spro(maps, [[channel]])
    with pytest.raises(MetricError, match=r"channels\[1\]\[0\].*\(4, 4\), found \(3, 4\)"):
        metrics.spro(maps, [[], [channel[:3]]])
    rule = Saturation(threshold=1, relative=False)
    with pytest.raises(MetricError, match=r"saturation\[1\].*1 channels and 2"):
        metrics.spro(maps, [[], [channel]], [[], [rule, rule]])
    with pytest.raises(MetricError, match=r"found 2 maps and 1 lists"):
        metrics.spro(maps, [[], [channel]], [[rule]])
    with pytest.raises(MetricError, match="needs defect pixels"):
        metrics.spro(maps, [[], []])


def test_every_limit_has_a_key_of_its_own():
    keys = [metrics.aupro_key(x) for x in (0.3, 0.05, 1.0, 0.051, 0.005)]
    assert keys == ["aupro_30", "aupro_05", "aupro_100", "aupro_05.1", "aupro_00.5"]
    assert metric_label("aupro_05.1") == "AUPRO 0.051"
    assert metric_label("aupro_05") == "AUPRO 0.05"
    maps, masks = np.random.default_rng(0).random((2, 20, 20)), np.zeros((2, 20, 20), bool)
    masks[0, 3:9, 3:9] = True
    both = metrics.pixel_metrics(maps, masks, (0.051, 0.05))
    for limit in (0.051, 0.05):
        assert both[metrics.aupro_key(limit)] == metrics.aupro(maps, masks, limit)


def test_trapezoids_between_all_points_of_precision_and_recall():
    """The published example, and scikit-learn on scores with many ties."""
    labels = np.array([0, 0, 1, 1])
    assert metrics.trapezoid(np.array([0.1, 0.4, 0.35, 0.8]), labels) == pytest.approx(0.7916667)
    assert metrics.trapezoid(np.ones(4), labels) == pytest.approx((1 + 0.5) / 2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.concatenate([[0, 1], rng.integers(0, 2, 30)])
        scores = rng.integers(0, 6, 32).astype(np.float32)
        precision, recall, _ = sk.precision_recall_curve(labels, scores)
        assert metrics.trapezoid(scores, labels) == pytest.approx(sk.auc(recall, precision))


def test_partial_auroc_is_standardised():
    """Scikit-learn's with many ties; a perfect map has 1 and one by chance 0.5."""
    rng = np.random.default_rng(0)
    masks = rng.random((4, 20, 30)) < 0.2
    assert metrics.partial_auroc(masks.astype(np.float32), masks) == 1
    assert metrics.partial_auroc(np.ones(masks.shape), masks) == pytest.approx(0.5, abs=1e-12)
    for limit in (0.05, 0.3, 1.0):
        for levels in (6, 40, 10_000):
            maps = (rng.integers(0, levels, masks.shape) + levels // 4 * masks).astype(np.float32)
            expected = sk.roc_auc_score(masks.ravel(), maps.ravel(), max_fpr=limit)
            assert metrics.partial_auroc(maps, masks, limit) == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(metrics.pixel_auroc(maps, masks), abs=1e-12)


def test_areas_of_visas_code():
    """The published example, a perfect map of two values, and the thresholds one by one."""
    maps = np.array([[[0.9, 0.8], [0.7, 0.1]], [[0.6, 0.5], [0.4, 0.2]]])
    masks = np.zeros((2, 2, 2), bool)
    masks[0, :, 0] = True
    assert visa.areas(maps, masks) == {"auroc": 0.7083, "aupr": 0.6875}
    assert visa.areas(masks.astype(np.float32), masks) == {"auroc": 0.5, "aupr": 0.625}
    rng = np.random.default_rng(0)
    maps = np.float64(rng.normal(size=(3, 20, 15)).round(1).astype(np.float32))
    masks = rng.random(maps.shape) < 0.1
    defect, low, high = maps[masks], maps.min() - 1e-8, maps.max() + 1e-8
    cuts = [*np.percentile(defect, np.linspace(0, 100, 100)), low, high]
    cuts = sorted([*cuts, *np.linspace(defect.min(), defect.max(), 100)], reverse=True)
    assert len(cuts) == 202
    marked = [maps > cut for cut in cuts]
    recall = [(m & masks).sum() / masks.sum() for m in marked]
    alarms = [(m & ~masks).sum() / (~masks).sum() for m in marked]
    precision = [(m & masks).sum() / m.sum() if m.any() else 1.0 for m in marked]
    expected = {"auroc": sk.auc(alarms, recall), "aupr": sk.auc(recall, precision)}
    assert visa.areas(maps.astype(np.float32), masks) == pytest.approx(expected, abs=6e-5)
