"""PaDiM's own options; the contract has the rest."""

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.detectors.padim import channel_subset
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, made, maps_of

BOTH = {"layers": ("layer2", "layer3")}


def fitted(normal, size=4, key=KEY, **config):
    detector = made("padim", **BOTH, **config)
    return detector, detector.fit(Batches(normal, size=size), **ALONE | {"key": key})


def test_padim_forms_agree_and_auto_takes_the_smaller():
    test = maps_of(1, 8)
    for images, form in [(6, "low_rank"), (14, "full")]:
        normal = maps_of(0, images)
        found = {f: fitted(normal, channels=0, form=f) for f in ("auto", "full", "low_rank")}
        scores = {f: jax.jit(d.score)(s, test) for f, (d, s) in found.items()}
        close(scores["full"], scores["low_rank"], 1e-5)
        close(scores["auto"], scores[form], 1e-6)
        assert {n: x.shape for n, x in found["auto"][1][0].items()} == {
            n: x.shape for n, x in found[form][1][0].items()
        }
    assert set(found["low_rank"][1][0]) == {"mean", "factor", "inner"}
    assert set(found["full"][1][0]) == {"mean", "factor"}


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_padim_scales_what_training_never_varied_by_ten(form):
    """With identical training vectors everything; else what is orthogonal to them (T1)."""
    one = {n: np.repeat(m[:1], 4, 0) for n, m in maps_of(0, 1).items() if n == "layer2"}
    test = {n: m for n, m in maps_of(1, 4).items() if n == "layer2"}
    kept = {"channels": 0, "form": form, "layers": ("layer2",)}
    detector = made("padim", **kept)
    state = detector.fit(Batches(one), **ALONE)
    far = np.linalg.norm(np.float64(test["layer2"]) - one["layer2"], axis=3)
    np.testing.assert_allclose(detector.score(state, test).map, 10 * far, rtol=1e-4)
    varied = {"layer2": one["layer2"] * np.float32([1, 1, 1, 1, 1, 0, 0])}
    varied["layer2"][..., :5] += np.random.default_rng(2).normal(size=(4, 6, 5, 5))
    state = detector.fit(Batches(varied), **ALONE)
    moved = {"layer2": np.repeat(varied["layer2"].mean(axis=0)[None], 4, 0)}
    moved["layer2"][..., 5] += 3
    np.testing.assert_allclose(detector.score(state, moved).map, 30, rtol=1e-4)


def test_padim_folds_as_it_streams():
    normal, test = maps_of(0, 14), maps_of(1, 8)
    detector, state = fitted(normal, size=14, channels=0)
    for size in (1, 3, 5):
        _, other = fitted(normal, size=size, channels=0)
        close(detector.score(other, test), detector.score(state, test), 1e-6)


def test_padim_subset_is_one_for_all_categories():
    subset = channel_subset(448, 100, 1024)
    assert subset.shape == (100,)
    assert (np.diff(subset) > 0).all()
    assert 0 <= subset.min() <= subset.max() < 448
    np.testing.assert_array_equal(channel_subset(448, 100, 1024), subset)
    assert not np.array_equal(channel_subset(448, 100, 1), subset)
    normal = maps_of(0, 6)
    _, one = fitted(normal, channels=4, key=jax.random.key(1))
    _, two = fitted(normal, channels=4, key=jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_padim_of_the_mean_image_is_zero():
    normal = maps_of(0, 6)
    detector, state = fitted(normal, channels=0)
    mean = {
        n: np.repeat(m.mean(axis=0, dtype=np.float64)[None], 8, 0).astype(np.float32)
        for n, m in normal.items()
    }
    np.testing.assert_allclose(jax.jit(detector.score)(state, mean).map, 0.0, atol=1e-4)


def test_padim_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"channels": -1}, r"detector\.channels"),
        ({"ridge": 0.0}, r"detector\.ridge"),
        ({"joint": False}, "joint = False, found 100"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("padim", **config)
    with pytest.raises(ConfigError, match="at most 11, the channels.*found 12"):
        fitted(maps_of(0, 6), channels=12)
    with pytest.raises(DataError, match="at least 2 normal images, found 1"):
        fitted(maps_of(0, 1), channels=0)
