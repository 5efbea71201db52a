"""MuSc's own options, what it refuses, and a defect among normal images; the contract has more."""

import dataclasses

import jax
import numpy as np
import pytest

from dsad.core.detection import FeatureBatch
from dsad.core.errors import ConfigError, DataError
from dsad.detectors import musc
from tests.contracts.detectors import common
from tests.contracts.detectors import musc as case
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, made

BOTH = {"layers": ("layer2", "layer3")}


def maps_of(count, seed=0):
    token = np.random.default_rng(50).standard_normal((count, 5)).astype(np.float32)
    return {**common.maps_of(seed, count), "cls": token}


def fitted(maps, order=None, size=4, key=KEY, **config):
    detector = made("musc", **{**BOTH, **config})
    return detector, detector.fit(Batches(maps, order, size), **ALONE | {"key": key})


def test_traits_say_what_it_is_fitted_on_and_reads():
    for similar, tokens in (("cls", ("cls",)), ("mean", ()), ("none", ())):
        traits = made("musc", similar=similar).traits
        assert (traits.fits_on, traits.tokens, traits.sigma) == ("test", tokens, 0.0)


def test_a_defect_of_one_image_stands_out():
    maps = {n: (m[:1] + 0.1 * (m - 8)).astype(np.float32) for n, m in maps_of(9).items()}
    maps["layer2"][4] = common.corrupted({"layer2": maps["layer2"][4:5]})["layer2"][0]
    detector, state = fitted(maps, neighbourhoods=(1,), layers=("layer2",), similar="none")
    scores = jax.jit(detector.score)(state, maps)
    assert np.argmax(scores.image) == 4
    row, column = np.unravel_index(np.argmax(scores.map[4]), (6, 5))
    assert 2 <= row <= 3
    assert 1 <= column <= 2


def test_permuting_images_permutes_scores():
    maps, order = maps_of(7), np.random.default_rng(2).permutation(7)
    detector, state = fitted(maps)
    _, other = fitted({n: m[order] for n, m in maps.items()})
    for name in ("maps", "images"):
        np.testing.assert_allclose(other[name], np.asarray(state[name])[order], rtol=1e-5)
    close(detector.score(other, maps), detector.score(state, maps), 1e-5)


def test_copies_of_an_image_leave_it_without_a_score():
    """One third of 6 others is 2: an image with two copies has nothing of its own."""
    maps = maps_of(7)
    for values in maps.values():
        values[[2, 5]] = values[0]
    _, state = fitted(maps, share=0.34)
    np.testing.assert_allclose(np.asarray(state["maps"])[[0, 2, 5]], 0, atol=1e-3)
    assert np.asarray(state["maps"])[[1, 3, 4, 6]].min() > 0.05


def test_few_images_have_one_nearest():
    """MU1: 0.3 of 3 others is none; the published mean of none is NaN."""
    maps = maps_of(4)
    _, state = fitted(maps, layers=("layer2",), neighbourhoods=(1,), similar="none")
    expected = case.scores_of(case.tokens_of(maps["layer2"], 1), 1 / 3)
    np.testing.assert_allclose(np.asarray(state["maps"]).reshape(4, -1), expected, rtol=1e-5)


def test_an_image_that_was_not_there_has_no_score():
    maps = maps_of(6)
    detector, state = fitted(maps)
    scores = detector.score(state, maps_of(6, seed=1))
    assert np.isnan(scores.image).all()
    assert np.isnan(scores.map).all()
    # Rounding of features, as of another batch size, does not make another image.
    near = {n: (m * (1 + 1e-5)).astype(np.float32) for n, m in maps.items()}
    close(detector.score(state, near), detector.score(state, maps))


def test_smoothing_by_hand():
    scores, vectors = np.array([0.0, 1.0, 4.0]), np.array([[3.0, 0.0], [0.6, 0.8], [0.0, 2.0]])
    found = musc.smoothed(scores, vectors, (2,))
    np.testing.assert_allclose(found, [0.6 / 1.6, (1 + 4 * 0.8) / 1.8, (4 + 0.8) / 1.8])
    np.testing.assert_allclose(musc.scaled(scores), [0, 0.25, 1])
    np.testing.assert_array_equal(musc.scaled(np.full(3, 2.0)), 0)  # MU4: 0/0 if published


def test_one_neighbour_is_the_image_itself():
    scores = np.random.default_rng(0).uniform(size=9)
    vectors = np.random.default_rng(1).standard_normal((9, 4))
    vectors[3] = vectors[7]
    np.testing.assert_allclose(musc.smoothed(scores, vectors, (1,)), scores, rtol=1e-12)


def test_smoothed_scores_lie_within_the_scores():
    """MU3: with vectors of any length, as published, they need not."""
    random = np.random.default_rng(0)
    scores, vectors = random.uniform(size=12), random.standard_normal((12, 3))
    for k in (1, 2, 5, 12, 50):
        found = musc.smoothed(scores, vectors * random.uniform(1, 9, (12, 1)), (k,))
        assert scores.min() - 1e-12 <= found.min() <= found.max() <= scores.max() + 1e-12
        np.testing.assert_allclose(found, musc.smoothed(scores, vectors, (k,)))
        ones = musc.smoothed(np.ones(12), vectors, (k,))  # as the weights of a row sum to 1
        np.testing.assert_allclose(ones, 1, rtol=1e-12)
    raw = musc.smoothed(scores, vectors * random.uniform(1, 9, (12, 1)), (12,), raw=True)
    assert raw.min() < scores.min() or raw.max() > scores.max()


def test_subsets_score_their_own_and_depend_on_no_order():
    maps, order = maps_of(9), np.random.default_rng(3).permutation(9)
    given = {"layers": ("layer2",), "neighbourhoods": (1,), "similar": "none", "subsets": 3}
    _, state = fitted(maps, **given)
    _, other = fitted(maps, order=order, size=3, **given)
    np.testing.assert_allclose(other["maps"], state["maps"], rtol=1e-5)
    tokens, found = case.tokens_of(maps["layer2"], 1), np.asarray(state["maps"]).reshape(9, -1)
    gaps = np.linalg.norm(tokens[:, :, None, None] - tokens[None, None], axis=-1).min(-1)
    mates = []
    for image in range(9):
        # Of an image's set are the two whose nearest tokens explain every score.
        others = np.sort([j for j in range(9) if j != image])
        pairs = [(j, k) for j in others for k in others if j < k]
        wrong = [
            np.abs(np.minimum(gaps[image, :, j], gaps[image, :, k]) - found[image]).max()
            for j, k in pairs
        ]
        assert min(wrong) < 1e-5
        mates.append({image, *pairs[int(np.argmin(wrong))]})
    assert len({frozenset(m) for m in mates}) == 3
    _, drawn = fitted(maps, key=jax.random.key(9), **given)
    assert not np.allclose(drawn["maps"], state["maps"])


@dataclasses.dataclass
class Inside:
    """A source whose images fill the upper part of the input."""

    source: Batches
    share: float
    categories = ("tiles",)

    def __iter__(self):
        for batch in self.source:
            inside = np.tile(
                np.asarray([[0, self.share], [0, 1]], np.float32), (len(batch.valid), 1, 1)
            )
            yield FeatureBatch(*batch[:4], inside)


def test_what_is_beyond_the_image_has_no_part():
    """Of 6 rows 4 count: as maps of 4 rows are scored."""
    maps = maps_of(6)
    small = {n: m[:, :4] if n == "layer2" else m for n, m in maps.items()}
    maps["layer2"][:, 4:] = 1e3
    given = {"layers": ("layer2",), "similar": "none"}
    detector = made("musc", **given)
    state = detector.fit(Inside(Batches(maps), 4 / 6), **ALONE)
    _, expected = fitted(small, **given)
    np.testing.assert_allclose(
        np.asarray(state["maps"])[:, :4], np.asarray(expected["maps"]), rtol=1e-4
    )
    np.testing.assert_allclose(state["images"], expected["images"], rtol=1e-4)


def test_progress_and_refusals():
    said = []
    detector = made("musc", **BOTH, subsets=2)
    tell = lambda *x: said.append(x)  # noqa: E731
    detector.fit(Batches(maps_of(6)), **ALONE | {"progress": tell})
    shares = [done / total for done, total, _ in said]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(DataError, match=r"at least 4 test images, two for each .* found 3"):
        detector.fit(Batches(maps_of(3)), **ALONE)
    with pytest.raises(DataError, match="expected at least 2 test images.*found 1"):
        fitted(maps_of(1))
    with pytest.raises(ConfigError, match=r"detector\.neighbourhoods"):
        made("musc", neighbourhoods=(2,))
