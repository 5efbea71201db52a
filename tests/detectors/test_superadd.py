"""SuperADD's banks, units and decisions; the contract has the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.core.config import resolve
from dsad.core.errors import ConfigError
from dsad.core.types import Record
from dsad.detectors.superadd import usual_distance
from dsad.evaluation import rules
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.fitting import supports
from dsad.evaluation.hosts import ALONE as ONE_PROCESS
from dsad.evaluation.morphology import Morphology
from dsad.evaluation.scored import Scored
from dsad.evaluation.support import Sampling
from tests.contracts.detectors.common import ALONE, Batches, made, maps_of
from tests.contracts.detectors.superadd import distances

BOTH = {"layers": ("layer2", "layer3")}
#: As published, on maps of a quarter of the sides.
MASKS = Morphology(lines=26, gate=0.8, fill_holes=True, erosion=1)


def fitted(normal, order=None, size=4, **config):
    detector = made("superadd", **{**BOTH, **config})
    return detector, detector.fit(Batches(normal, order, size), **ALONE)


def maps(normal, test, **config):
    detector, state = fitted(normal, **config)
    return np.asarray(jax.jit(detector.score)(state, test).map)


def scaled(features, by):
    return {name: by * values for name, values in features.items()}


def threshold(found):
    """Of the rule "superadd", from the pixels of all maps."""
    normal = Scored(
        scores=found.max(axis=(1, 2)), labels=np.zeros(len(found), np.int32),
        kinds=["good"] * len(found), maps=list(found), masks=[None] * len(found),
    )  # fmt: skip
    assert normal.hosts == ONE_PROCESS
    return rules.limits(["superadd"], normal, {}, 3.0)["superadd"]


@pytest.mark.parametrize("unit", ["channels", "usual"])
def test_the_threshold_scales_with_the_features_and_masks_stay(unit):
    """And both stay as they are in units of usual distances."""
    normal, held, test = (maps_of(seed, n) for seed, n in ((0, 6), (2, 4), (1, 8)))
    test["layer2"][:, 2:4, 1:3] += 4
    found = []
    for by in (1.0, 4.0):
        own = [maps(scaled(normal, by), scaled(x, by), unit=unit) for x in (held, test)]
        limit = threshold(own[0])
        found.append((limit, [MASKS.decided(m, limit) for m in np.kron(own[1], np.ones((8, 8)))]))
    (plain, masks), (other, same) = found
    factor = 4.0 if unit == "channels" else 1.0
    assert other == pytest.approx(factor * plain, rel=1e-5)
    np.testing.assert_array_equal(masks, same)
    assert 0 < np.mean(masks) < 1


def test_the_threshold_is_a_percentile_of_all_pixels():
    found = np.random.default_rng(0).random((4, 30, 50)).astype(np.float32)
    expected = 1.421 * np.percentile(np.float64(found), 95)
    assert threshold(found) == pytest.approx(expected, rel=1e-3)


def test_a_row_of_the_bank_has_no_distance():
    normal = maps_of(0, 6)
    np.testing.assert_array_equal(maps(normal, normal, layers=("layer2",)), 0)
    detector, state = fitted(normal, layers=("layer2",), bank_rows=20)
    bank = np.asarray(state["layer2"]["bank"])[:20].reshape(1, 4, 5, 7)
    scores = jax.jit(detector.score)(state, {"layer2": jnp.asarray(bank)})
    np.testing.assert_array_equal(scores.map, 0)
    np.testing.assert_array_equal(scores.image, 0)


def test_no_block_dominates_by_its_length():
    """A layer of features a thousand times as long decides alone, unless in its own unit."""
    normal, test = maps_of(0, 6), maps_of(1, 8)
    longer = [{**m, "layer3": 1000 * m["layer3"]} for m in (normal, test)]
    np.testing.assert_allclose(maps(*longer), maps(normal, test), rtol=1e-5)
    both, without = (
        maps(*longer, unit="channels"),
        {**longer[1], "layer2": normal["layer2"][[0] * 8]},
    )
    np.testing.assert_allclose(both, maps(longer[0], without, unit="channels"), rtol=0.1)


def test_banks_are_rows_of_their_layer_for_any_order_of_images():
    normal = maps_of(0, 6)
    state = fitted(normal, bank_rows=30)[1]
    other = fitted(normal, np.random.default_rng(0).permutation(6), 3, bank_rows=30)[1]
    for name in BOTH["layers"]:
        assert int(state[name]["rows"]) == 30
        bank = np.asarray(state[name]["bank"])[:30]
        every = {tuple(row) for row in normal[name].reshape(-1, bank.shape[1])}
        assert len({tuple(row) for row in bank} & every) == 30
    jax.tree.map(np.testing.assert_array_equal, state, other)


def test_usual_distances_are_those_of_every_eighth_image():
    rng = np.random.default_rng(0)
    rows, images = np.float32(rng.standard_normal((400, 5))), np.repeat(3 * np.arange(20), 20)
    held = np.isin(images, (0, 24, 48))
    gaps = distances(np.float64(rows[held]), np.float64(rows[~held])).min(axis=1)
    assert usual_distance(rows, images) == pytest.approx(np.median(gaps), rel=1e-5)
    # Of a single image it is that to another row.
    gaps = np.sort(distances(np.float64(rows), np.float64(rows)), axis=1)[:, 1]
    assert usual_distance(rows, np.zeros(400)) == pytest.approx(np.median(gaps), rel=1e-5)


def test_windows_and_rotations_of_an_image_are_held_out_together():
    """Every eighth of 16 inputs are two; the 4 images of 4 inputs each have one held out."""
    normal, whose = maps_of(0, 16), np.arange(16) // 4
    parts = [b._replace(image=whose[b.index]) for b in Batches(normal)]
    detector = made("superadd", layers=("layer2",), bank_rows=0)
    state = detector.fit(parts, **ALONE)
    rows = normal["layer2"].reshape(-1, normal["layer2"].shape[3])
    expected = usual_distance(rows, np.repeat(whose, len(rows) // 16))
    assert state["layer2"]["unit"] == pytest.approx(expected, rel=1e-6)
    apart = usual_distance(rows, np.repeat(np.arange(16), len(rows) // 16))
    assert expected != pytest.approx(apart, rel=1e-3)


class Counted:
    """A data set of one category, of whose pictures nothing but the paths is known."""

    name, categories = "counted", ("can",)

    def __init__(self, count):
        self.records = [
            Record(path=f"can/train/good/{i:03d}.png", category="can", label=0, kind="good")
            for i in range(count)
        ]

    def source(self, split, category=None):
        return self

    def __len__(self):
        return len(self.records)


@pytest.mark.parametrize("count", [160, 161, 168, 412])
def test_as_many_images_are_held_out_as_are_every_eighth(count):
    """Drawn by hash where the published code takes i mod 8 = 0, and no part of the bank."""
    config = EvalConfig(false_alarm_rate=0.05, holdout=8)
    detector = made("superadd", **BOTH)
    sets = supports(detector, Counted(count), ("can",), config, Sampling())
    drawn = sets.by_category["can"][0]
    assert len(drawn.held_out) == sum(i % 8 == 0 for i in range(count))
    assert set(drawn.held_out) < set(drawn.bank)
    assert len(drawn.bank) == count


def test_equal_rows_have_no_usual_distance():
    rows = np.ones((6, 2), np.float32)
    assert usual_distance(rows, np.arange(6)) == usual_distance(rows[:1], np.zeros(1)) == 1
    rows[0] = 4  # against equal rows around it, five of which are held out as well
    assert usual_distance(rows, np.array([0, 0, 0, 0, 1, 1])) == pytest.approx(3 * 2**0.5)


def test_masks_contain_what_is_above_until_they_are_eroded():
    rng = np.random.default_rng(2)
    scores = ndimage.gaussian_filter(rng.random((90, 120)), 2) * 10
    limit = float(np.percentile(scores, 93))
    whole = Morphology(lines=26, gate=0.8, fill_holes=True).decided(scores, limit)
    assert whole[scores > limit].all()
    assert (whole & (scores <= limit)).any()
    eroded = MASKS.decided(scores, limit)
    np.testing.assert_array_equal(eroded, ndimage.binary_erosion(whole))
    assert not eroded[scores > limit].all()


@pytest.mark.parametrize(("gap", "regions"), [(0.81, 1), (0.79, 2)])
def test_squares_of_a_row_join_where_the_gap_is_above_the_gate(gap, regions):
    scores = np.full((60, 90), gap)
    scores[29:32, 24:27] = scores[29:32, 64:67] = 1.1  # 40 pixels apart
    found = Morphology(lines=26, gate=0.8, fill_holes=True).decided(scores, 1.0)
    assert ndimage.label(found, np.ones((3, 3)))[1] == regions


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31)), (4, (0, 1, 2, 3))],
)
def test_blocks_are_the_quarters_of_the_depth(depth, blocks):
    assert made("superadd", depth=depth).layers == tuple(f"block{i}" for i in blocks)


def test_refusals():
    for config in ({"depth": 3}, {"bank_rows": -1}):
        with pytest.raises(ConfigError, match=next(iter(config))):
            made("superadd", **config)
    assert resolve("detectors", "superadd").Config().sigma == 0  # there is no Gaussian
