"""One threshold by several rules and F1 at it: oracles, pooling, morphology, validation images."""

import dataclasses
import math

import jax
import numpy as np
import PIL.Image
import pytest
import tifffile
from scipy import ndimage
from sklearn import metrics as oracle

from dsad.core.config import Refused
from dsad.core.errors import DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.data import base
from dsad.evaluation import morphology, rules, thresholds
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.hosts import ALONE
from dsad.evaluation.localize import localize
from dsad.evaluation.morphology import Morphology
from dsad.evaluation.scored import Scored
from tests.data import published_trees, trees
from tests.evaluation.test_localize import Distance, Pooled

ALL = ("bound", "sigma", "superadd")
AS_IT_IS = Morphology()


def scored(maps, masks=None, labels=None):
    masks = [None] * len(maps) if masks is None else masks
    labels = np.zeros(len(maps), int) if labels is None else np.asarray(labels)
    maps = [np.asarray(m, np.float32) for m in maps]
    return Scored(maps, masks, np.array([m.max() for m in maps]), labels, ["x"] * len(maps))


def noise(count=9, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.gamma(2.0, size=s).astype(np.float32) for s in [(20, 30), (7, 9), (11, 4)] * count]


def limits(maps, rate=0.1, sigmas=3.0):
    normal = scored(maps)
    return rules.limits(ALL, normal, thresholds.measure(None, normal, rate), sigmas)


def test_rules_equal_float64_oracles():
    maps = noise()
    pixels = np.concatenate([m.ravel() for m in maps]).astype(np.float64)
    found = limits(maps, sigmas=2.5)
    assert found["sigma"] == pytest.approx(pixels.mean() + 2.5 * pixels.std(), rel=1e-12)
    tail = np.percentile(pixels, 95, method="inverted_cdf")
    assert found["superadd"] == pytest.approx(1.421 * tail, rel=1e-12)
    highest = np.sort([m.max() for m in maps])  # 27 images: the ceil(28 * 0.9)-th smallest
    assert found["bound"] == highest[25]


def test_moments_of_distant_maps_are_not_rounded_away():
    maps = [np.full((50, 50), 1000, np.float32), np.full((10, 10), 1001, np.float32)]
    pixels = np.concatenate([m.ravel() for m in maps]).astype(np.float64)
    assert rules.moments(maps, ALONE) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)


def test_thresholds_follow_the_scale_of_the_scores():
    maps = noise()
    once, twice = limits(maps), limits([2 * m for m in maps])
    assert twice == {rule: pytest.approx(2 * value, rel=1e-6) for rule, value in once.items()}


def test_scores_below_zero_have_no_threshold_by_a_factor():
    found = limits([m - 100 for m in noise()])
    assert found["superadd"] is None
    assert found["sigma"] is not None
    row = rules.f1(found, rules.counts(scored(noise()), found, AS_IT_IS), np.zeros(27, int))
    assert row["pixel_f1_superadd"] is None


def test_f1_pools_all_pixels_and_equals_scikit_learn():
    rng = np.random.default_rng(1)
    maps, masks, labels = [], [], []
    for size, label, share in (((30, 40), 1, 0.2), ((8, 9), 1, 0.5), ((12, 5), 0, 0.0)):
        mask = rng.random(size) < share
        masks.append(mask)
        maps.append((rng.random(size) + 0.4 * mask).astype(np.float32))
        labels.append(label)
    given = {"sigma": 0.8, "bound": 1.35}
    test = scored(maps, masks, labels)
    found = rules.f1(given, rules.counts(test, given, AS_IT_IS), test.labels)
    flat, truth = (
        np.concatenate([m.ravel() for m in maps]),
        np.concatenate([m.ravel() for m in masks]),
    )
    means = []
    for rule, limit in given.items():
        assert found[f"pixel_f1_{rule}"] == pytest.approx(oracle.f1_score(truth, flat > limit))
        flagged = [m.max() > limit for m in maps]
        assert found[f"image_f1_{rule}"] == pytest.approx(oracle.f1_score(labels, flagged))
        each = zip(masks[:2], maps[:2], strict=True)
        means.append(np.mean([oracle.f1_score(t.ravel(), m.ravel() > limit) for t, m in each]))
    assert found["pixel_f1_sigma"] != pytest.approx(means[0], abs=0.01)  # no mean over images


def test_images_without_annotation_count_as_images_alone():
    given = {"sigma": 0.5}
    test = scored([np.ones((2, 2)), np.eye(2)], [None, np.eye(2, dtype=bool)], [1, 1])
    found = rules.f1(given, rules.counts(test, given, AS_IT_IS), test.labels)
    assert found == {"pixel_f1_sigma": 1.0, "image_f1_sigma": 1.0}
    normal = scored([np.ones((2, 2))], [np.zeros((2, 2), bool)], [0])
    counted = rules.counts(normal, given, AS_IT_IS)
    assert rules.f1(given, counted, normal.labels) == dict.fromkeys(found)  # nothing to be found


# --- morphology -----------------------------------------------------------------------------


def disc(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_discs_close_and_open_as_scipy_does_on_a_wide_canvas(radius):
    mask = np.random.default_rng(radius).random((31, 22)) < 0.2
    wide, inner = np.pad(mask, 2 * radius), slice(2 * radius, -2 * radius)
    closed = ndimage.binary_closing(wide, disc(radius))[inner, inner]
    np.testing.assert_array_equal(Morphology(closing=radius).applied(mask), closed)
    assert (closed >= mask).all()
    opened = ndimage.binary_opening(wide, disc(radius))[inner, inner]
    np.testing.assert_array_equal(Morphology(opening=radius).applied(mask), opened)


def test_squares_join_when_the_closing_spans_their_gap():
    mask = np.zeros((20, 30), bool)
    mask[8:11, 5:8] = mask[8:11, 12:15] = True
    for radius, regions in ((1, 2), (2, 2), (3, 1)):
        assert ndimage.label(Morphology(closing=radius).applied(mask))[1] == regions


DIRECTIONS = [math.pi * i / 16 for i in range(16)]


@pytest.mark.parametrize("angle", DIRECTIONS)
def test_gaps_along_a_line_are_filled(angle):
    mask = np.random.default_rng(1).random((23, 31)) < 0.04
    steep = math.pi / 4 < angle < 3 * math.pi / 4
    grid = (mask.T if steep else mask).copy()
    slope = 1 / math.tan(angle) if steep else math.tan(angle)
    reach = 2 * round(4 * max(abs(math.cos(angle)), abs(math.sin(angle)))) + 1
    expected = grid.copy()
    for y, x in zip(*np.nonzero(grid), strict=True):
        row = y - round(x * slope)
        steps = [(row + round(k * slope), k) for k in range(x + 1, x + reach + 1)]
        hits = [i for i, (v, u) in enumerate(steps)
                if 0 <= v < grid.shape[0] and u < grid.shape[1] and grid[v, u]]  # fmt: skip
        for step in steps[: hits[0]] if hits else ():
            expected[step] = True
    assert expected.sum() > grid.sum()
    found = morphology.closed_along(mask, 4, angle)
    np.testing.assert_array_equal(found, expected.T if steep else expected)


@pytest.mark.parametrize("angle", DIRECTIONS)
def test_squares_join_along_a_line_where_the_gap_is_above_the_gate(angle):
    scores = np.zeros((90, 90))
    ends = [(45 - round(s * 20 * math.sin(angle)), 45 + round(s * 20 * math.cos(angle)))
            for s in (-1, 1)]  # fmt: skip
    for mirrored in (False, True):
        for value, regions in ((0.81, 1), (0.79, 2)):
            scores[:] = value
            for y, x in ends:
                scores[y - 1 : y + 2, x - 1 : x + 2] = 1.1
            given = scores[:, ::-1] if mirrored else scores
            rule = Morphology(lines=26, gate=0.8)
            found = rule.decided(given, 1.0)
            assert ndimage.label(found, np.ones((3, 3)))[1] == regions
            assert found[given > 1].all()
            assert found.sum() < (300 if regions == 1 else 19)
            assert ndimage.label(Morphology(lines=15).decided(given, 1.0))[1] == 2
            eroded = Morphology(lines=26, gate=0.8, erosion=1).decided(given, 1.0)
            np.testing.assert_array_equal(eroded, ndimage.binary_erosion(found))


def test_a_gate_removes_nothing_that_is_above_a_threshold_below_zero():
    scores = np.array([[-3.0, -0.9, -3.0, -0.9, -3.0]])
    assert Morphology(closing=1, gate=0.8).decided(scores, -1.0)[0, [1, 3]].all()


def test_holes_are_filled_and_small_regions_go():
    mask = np.zeros((9, 9), bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False
    mask[7, 7] = mask[8, 8] = True  # they touch at a corner: one region of two
    assert Morphology(fill_holes=True).applied(mask)[3, 3]
    assert Morphology(smallest=2).applied(mask)[7, 7]
    np.testing.assert_array_equal(Morphology(smallest=3).applied(mask)[6:], False)
    assert Morphology(smallest=24).applied(mask).sum() == 24
    assert not Morphology(smallest=25).applied(mask).any()
    assert Morphology(smallest=25, fill_holes=True).applied(mask).sum() == 25


@pytest.mark.parametrize("value", [False, True])
def test_nothing_and_everything_stay_so(value):
    whole = Morphology(closing=2, opening=2, fill_holes=True, smallest=2)
    mask = np.full((12, 12), value)
    assert whole.applied(mask).any() == value
    assert not Morphology(opening=9).applied(np.ones((3, 3), bool)).any()


# --- a data set with validation images ------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Distance):
    """Says how often it was fitted."""

    fits: list

    def fit(self, source, **keys):
        self.fits.append(1)
        return super().fit(source, **keys)


def run(config, folder=None, fits=None, **keys):
    settings = {"image_size": 16, "batch_size": 4, "workers": 2, "false_alarm_rate": 0.3} | keys
    detector = Distance() if fits is None else Counting(fits=fits)
    return localize(
        Pooled(), detector, base.load(config), EvalConfig(**settings),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3), folder=folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """MVTec AD 2 in miniature, with all maps of its test."""
    folder = tmp_path_factory.mktemp("ad2")
    config, fits = published_trees.write("mvtec_ad2", folder / "data"), []
    results = run(config, folder / "out", fits, decisions=ALL, save_maps="tiff", morphology=FILLED)
    return folder, config, results, fits


FILLED = Morphology(closing=1, smallest=3)


def test_validation_images_set_the_thresholds_of_the_only_fit(measured):
    _, _, results, fits = measured
    assert len(fits) == 2  # one for each of two objects
    about = results.stamp["thresholds"]
    assert about["held_out"] == "all normal validation images"
    assert "validation images" in about["image"]
    assert all("validation images" in text for text in results.stamp["decisions"].values())
    assert results.stamp["morphology"]["closing"] == 1
    assert {c: rows["0"]["held_out"] for c, rows in results.thresholds.items()} == {
        "can": 2, "vial": 2,
    }  # fmt: skip


def test_f1_of_a_run_equals_that_of_its_saved_maps(measured):
    folder, _, results, _ = measured
    for category, row in results.categories.items():
        maps, masks, labels = [], [], []
        for path in sorted((folder / "out" / "anomaly_maps" / category).rglob("*.tiff")):
            maps.append(tifffile.imread(path))
            truth = folder / "data" / category / "test_public/ground_truth/bad"
            labels.append(int(path.parent.name == "bad"))
            mask = np.zeros((trees.HEIGHT, trees.WIDTH), bool)
            if labels[-1]:
                mask = np.asarray(PIL.Image.open(truth / f"{path.stem}_mask.png")) == 255
            masks.append(mask)
        assert len(maps) == 12
        for rule, limit in results.thresholds[category]["0"]["decisions"].items():
            above = [FILLED.applied(m > limit) for m in maps]
            value = oracle.f1_score(np.ravel(masks), np.ravel(above), zero_division=0)
            assert row[f"pixel_f1_{rule}"] == pytest.approx(value, abs=1e-12)
            flagged = [m.max() > limit for m in maps]
            value = oracle.f1_score(labels, flagged, zero_division=0)
            assert row[f"image_f1_{rule}"] == pytest.approx(value, abs=1e-12)
    for rule in ALL:
        values = [row[f"pixel_f1_{rule}"] for row in results.categories.values()]
        assert results.mean[f"pixel_f1_{rule}"] == pytest.approx(np.mean(values))
        assert set(results.kinds["can"]["bad"]) >= {f"pixel_f1_{rule}", f"image_f1_{rule}"}


def test_no_threshold_ever_sees_a_test_image(measured, tmp_path):
    _, _, results, _ = measured
    tests = {p: 255 - x for p, x in published_trees.mvtec_ad2().items()
             if "/test_p" in p and "ground_truth" not in p}  # fmt: skip
    config = published_trees.write("mvtec_ad2", tmp_path, more=tests)
    other = run(config, decisions=ALL)
    for category, rows in results.thresholds.items():
        was, now = rows["0"], other.thresholds[category]["0"]
        assert now["decisions"] == was["decisions"]
        assert (now["image"], now["pixel"]) == (was["image"], was["pixel"])
    assert other.mean["pixel_auroc"] != results.mean["pixel_auroc"]


def test_an_object_without_validation_images_is_named(tmp_path):
    gone = [p for p in published_trees.mvtec_ad2() if "vial/validation" in p]
    config = published_trees.write("mvtec_ad2", tmp_path, less=gone)
    with pytest.raises(DataError, match="no normal validation image in vial"):
        run(config)
    gone = [p for p in published_trees.mvtec_ad2() if "/validation/" in p]
    none = published_trees.write("mvtec_ad2", tmp_path / "none", less=gone)
    results = run(none, decisions=("sigma",))
    assert "held-out training images" in results.stamp["decisions"]["sigma"]


def test_decisions_need_a_rate():
    with pytest.raises(Refused, match=r"evaluation.false_alarm_rate: expected a share above 0"):
        EvalConfig(decisions=("sigma",))
