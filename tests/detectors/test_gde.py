"""The patch density's own options; the contract has the rest."""

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.detectors import gde
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, made, maps_of
from tests.contracts.detectors.gde import SMALL

ONE = {**SMALL, "per_position": False, "components": 6}
EACH = {**SMALL, "components": 3}


def fit(normal, key=KEY, order=None, size=4, **config):
    return made("gde", **config).fit(Batches(normal, order, size), **ALONE | {"key": key})


@pytest.mark.parametrize("config", [ONE, {**ONE, "cache_gb": 0.0}, EACH])
def test_gde_subset_is_random_and_independent_of_the_order(config):
    normal, test = maps_of(0, 9), maps_of(1, 8)
    score = jax.jit(made("gde", **config).score)
    subset = score(fit(normal, images=5, **config), test)
    again = fit(normal, order=np.arange(9)[::-1], size=3, images=5, **config)
    close(score(again, test), subset, 1e-5)
    other = score(fit(normal, key=jax.random.key(1), images=5, **config), test)
    assert np.abs(other.image / subset.image - 1).max() > 1e-3
    # It is a fit to five of the nine images, and to nothing else.
    every = [
        score(fit({n: m[list(rows)] for n, m in normal.items()}, images=0, **config), test)
        for rows in _fives()
    ]
    gaps = [np.abs(e.image / subset.image - 1).max() for e in every]
    assert sorted(gaps)[0] < 1e-5 < sorted(gaps)[1]


def _fives():
    import itertools

    return itertools.combinations(range(9), 5)


def test_gde_passes_over_the_source_as_rarely_as_it_can():
    class Counted(Batches):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    for config, expected in [
        ({**EACH}, 1),
        ({**ONE}, 1),
        ({**ONE, "cache_gb": 0.0}, 2),
        ({**ONE, "cache_gb": 0.0, "images": 5}, 3),
    ]:
        source = Counted(maps_of(0, 6))
        made("gde", **config).fit(source, **ALONE)
        assert source.passes == expected


def test_gde_image_score_is_the_largest_patch_score():
    """A single hot patch: the map's peak lies on its pixels, the image score is not smoothed."""
    normal, test = maps_of(0, 6), maps_of(1, 8)
    test["layer2"][:, 4, 1, ::2] += 6
    detector = made("gde", **{**SMALL, "components": 0})
    state = detector.fit(Batches(normal), **ALONE)
    scores = jax.jit(detector.score)(state, test)
    assert (scores.image > scores.map.max(axis=(1, 2))).all()
    rows, columns = np.unravel_index(
        np.asarray(scores.map).reshape(8, -1).argmax(axis=1), scores.map.shape[1:]
    )
    assert ((rows >= 8) & (rows < 12) & (columns >= 2) & (columns < 6)).all()


def test_gde_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"components": -1}, r"detector\.components"),
        ({"images": -1}, r"detector\.images"),
        ({"patch": 31}, "even number"),
        ({"stride": 0}, r"detector\.stride"),
        ({"stride": 33}, r"stride: expected at most detector\.patch = 32, found 33"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("gde", **config)
    with pytest.raises(DataError, match="at most 5 dimensions.*components=5 or lower"):
        fit(maps_of(0, 6), **{**EACH, "components": 6})
    for config in (EACH, ONE):
        with pytest.raises(DataError, match="at least 2 normal"):
            fit({n: m[:0] for n, m in maps_of(0, 1).items()}, **config)


def test_gde_of_constant_patches():
    """Saturated background: refused as published, or scored with the floor's variance."""
    normal, test = maps_of(0, 6), maps_of(1, 8)
    for m in normal.values():
        m[:, :2, :2] = m[:1, :2, :2]
    one = {**EACH, "layers": ("layer2",)}
    with pytest.raises(DataError, match=r"of 4 of 30 positions do not vary.*floor"):
        fit(normal, **{**one, "floor": 0.0})
    detector = made("gde", **{**one, "components": 0})
    of = lambda state, maps: np.asarray(gde.patch_scores(state, detector.embed(maps)))  # noqa: E731
    scores = of(fit(normal, **{**one, "components": 0}), test)
    rows = normal["layer2"] / np.linalg.norm(normal["layer2"], axis=3, keepdims=True)
    mean = rows.mean(axis=0, dtype=np.float64)
    variance = 0.01 * np.mean(np.sum((rows - mean) ** 2, axis=(0, 3)) / 6 / 7)
    gap = test["layer2"] / np.linalg.norm(test["layer2"], axis=3, keepdims=True) - mean
    expected = np.linalg.norm(gap, axis=3) / np.sqrt(variance)
    np.testing.assert_allclose(scores[:, :2, :2], expected[:, :2, :2], rtol=1e-5)
    own = fit({n: m[:, 2:] for n, m in normal.items()}, **{**one, "components": 0})
    rest = {n: m[:, 2:] for n, m in test.items()}
    np.testing.assert_allclose(scores[:, 2:], of(own, rest), rtol=1e-5)
    # With PCA those positions borrow the axes of the others: part of the distance.
    some = of(fit(normal, **one), test)[:, :2, :2]
    assert (some > 0).all()
    assert (some <= expected[:, :2, :2]).all()
