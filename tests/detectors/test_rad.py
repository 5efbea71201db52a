"""RAD's windows, retrieval and bank; the contract has the oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.core.detection import Scores
from dsad.core.errors import ConfigError
from dsad.detectors import rad
from dsad.detectors._features import pixel_maps
from dsad.evaluation.compiled import finished
from dsad.evaluation.extract import check_maps
from dsad.models import backbone
from dsad.ops import resize
from tests.contracts.detectors.common import ALONE, Batches, made, upsampled
from tests.contracts.detectors.rad import directions, maps_of, similarity

BOTH = {"layers": ("layer2", "layer3")}


def fitted(count=6, **config):
    detector = made("rad", **BOTH, **config)
    return detector, detector.fit(Batches(maps_of(0, count)), **ALONE)


def maps(count=6, test=None, **config):
    detector, state = fitted(count, **config)
    return np.asarray(jax.jit(detector.score)(state, test or maps_of(1, 8)).map)


def test_a_window_of_the_whole_grid_is_a_search_in_all_cells():
    normal, test, layers = maps_of(0, 6), maps_of(1, 8), []
    for name in BOTH["layers"]:
        cells, bank = (directions(m[name]) for m in (test, normal))
        bank = bank.reshape(-1, bank.shape[3])
        layers.append(upsampled(1 - np.max(cells @ bank.T, axis=3)))
    found = maps(neighbours=6, radius=27)
    np.testing.assert_allclose(found, np.mean(layers, axis=0), rtol=1e-5, atol=1e-6)


def test_wider_windows_and_more_images_never_raise_a_distance():
    by_radius = [maps(neighbours=4, radius=r) for r in (0, 1, 2, 5)]
    by_count = [maps(neighbours=k) for k in (1, 3, 6)]
    for found in (by_radius, by_count):
        for less, more in itertools.pairwise(found):
            assert (more <= less + 1e-6).all()
            assert (more < less - 1e-4).any()


def test_an_image_of_the_bank_scores_zero():
    normal = maps_of(0, 6)
    for radius in (0, 1):
        found = maps(test=normal, neighbours=1, radius=radius)
        np.testing.assert_allclose(found, 0, atol=1e-6)


def test_radius_zero_is_a_maximum_per_position():
    detector = made("rad", layers=("layer2",), radius=0)
    normal, test = maps_of(0, 6), maps_of(1, 8)
    state = detector.fit(Batches(normal), **ALONE)
    bank, cells = (directions(m["layer2"]) for m in (normal, test))
    expected = 1 - np.einsum("bhwd,khwd->bkhw", cells, bank).max(axis=1)
    found = jax.jit(detector.score)(state, test).map
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equals_brute_force_on_a_small_grid():
    rng = np.random.default_rng(0)
    image, bank = (directions(rng.standard_normal((*n, 3, 4, 8))) for n in ((), (5,)))
    for radius in (0, 1, 2, 3, 9):
        found = rad._distances(*(jnp.asarray(x, jnp.float32) for x in (image, bank)), radius)
        np.testing.assert_allclose(found, 1 - similarity(image, bank, radius), rtol=1e-5)


def test_the_blur_does_not_dim_the_borders():
    """Against RAD's own, which pads with zeros: the same taps, and .492 in the corner."""
    point = np.zeros((1, 9, 9), np.float32)
    point[0, 4, 4] = 1
    taps = np.asarray(resize.gaussian_smooth(point, 1.0, truncate=2.0))[0].sum(axis=0)[2:7]
    np.testing.assert_allclose(taps, [0.0545, 0.2442, 0.4026, 0.2442, 0.0545], atol=5e-5)
    padded = ndimage.correlate(np.ones((9, 9)), np.outer(taps, taps), mode="constant")
    assert padded[0, 0] == pytest.approx(0.492, abs=5e-4)
    traits = made("rad").traits
    scores = Scores(map=jnp.ones((1, 4, 4)), image=jnp.zeros(1))
    blurred = finished(traits, (32, 32), False, scores)
    np.testing.assert_allclose(blurred.map, 1, rtol=1e-5)
    assert blurred.image[0] == pytest.approx(1, rel=1e-5)


def test_published_maps_have_256_pixels_and_dim_borders():
    """Zeros beyond them; the image score is of the 655 highest pixels."""
    taps = np.exp(-0.5 * np.arange(-2.0, 3.0) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    detector, state = fitted(map_rule="published", sigma=0.0)
    found = jax.jit(detector.score)(state, maps_of(1, 8))
    large = upsampled(np.float64(maps()), (256, 256))
    expected = np.stack([ndimage.correlate(m, kernel, mode="constant") for m in large])
    np.testing.assert_allclose(found.map, expected, rtol=1e-5)
    highest = np.sort(expected.reshape(8, -1), axis=1)[:, -655:]
    np.testing.assert_allclose(found.image, highest.mean(axis=1), rtol=1e-5)
    flat = pixel_maps(jnp.ones((1, 28, 28)), 256, 1.0, 2, "constant")[0]
    assert flat[0, 0] == pytest.approx(0.492, abs=5e-4)
    assert flat[0, 0] == flat[-1, -1] == pytest.approx(0.7013**2, abs=1e-4)
    np.testing.assert_allclose(flat[2:-2, 2:-2], 1, rtol=1e-6)
    with pytest.raises(ConfigError, match=r'sigma: expected 0 with map_rule = "published"'):
        made("rad", map_rule="published")


def test_images_are_found_by_their_class_tokens():
    """Those of most alike tokens have other maps: whatever these are, they are used."""
    normal, test = maps_of(0, 6), maps_of(1, 8)
    test["cls"] = np.concatenate([3 * normal["cls"], 0.1 * normal["cls"][:2]])
    bank, cells = (directions(m["layer2"]) for m in (normal, test))
    expected = 1 - (cells * bank[[0, 1, 2, 3, 4, 5, 0, 1]]).sum(axis=3)
    only = made("rad", layers=("layer2",), neighbours=1, radius=0)
    state = only.fit(Batches(normal), **ALONE)
    np.testing.assert_allclose(jax.jit(only.score)(state, test).map, expected, rtol=1e-4)


def test_more_images_than_there_are_and_padding():
    np.testing.assert_allclose(maps(neighbours=6), maps(neighbours=900), rtol=1e-6)
    detector, state = fitted(70, neighbours=70)
    assert state["pooled"].shape == (128, 5)
    score, test = jax.jit(detector.score), maps_of(1, 8)
    plain = jax.tree.map(lambda x: x[:70], state)
    np.testing.assert_allclose(score(state, test).map, score(plain, test).map, rtol=1e-6)


def test_the_bank_can_be_bounded_and_halved():
    state = fitted(9, gallery_images=4, neighbours=3)[1]
    assert state["pooled"].shape[0] == 4
    full, half = fitted()[1]["gallery"], fitted(storage="bfloat16")[1]["gallery"]
    assert half["layer2"].dtype == jnp.bfloat16
    assert 2 * half["layer2"].nbytes == full["layer2"].nbytes
    np.testing.assert_allclose(maps(storage="bfloat16"), maps(), atol=5e-3)


def test_cells_outside_are_similar_to_nothing():
    half = np.broadcast_to(np.float32([[0.0, 0.5], [0.0, 1.0]]), (4, 2, 2))
    cut = [b._replace(inside=half) for b in Batches(maps_of(0, 4))]
    state = made("rad", **BOTH).fit(cut, **ALONE)
    gallery = np.asarray(state["gallery"]["layer2"])
    assert not gallery[:, 3:].any()
    np.testing.assert_allclose(np.linalg.norm(gallery[:, :3], axis=3), 1, rtol=1e-5)


def test_networks_without_class_token():
    size, network = (64, 64), backbone("resnet18", None, seed=0)
    detector = made("rad")
    assert detector.traits.tokens == ("cls",)
    with pytest.raises(ConfigError, match="class token cls.*resnet18 has none"):
        check_maps(network, size, detector.layers, detector.traits.tokens)
    other = made("rad", **BOTH, retrieval="layer4")
    assert other.traits.tokens == ()
    assert other.layers == ("layer2", "layer3", "layer4")
    check_maps(network, size, other.layers, other.traits.tokens)


def test_refusals():
    for config in ({"radius": -1}, {"neighbours": 0}, {"gallery_images": -1}, {"tail": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(config))):
            made("rad", **config)
