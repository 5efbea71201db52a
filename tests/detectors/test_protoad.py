"""ProtoAD's own options; the contract has the rest, tests/ops/test_finch.py the clustering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from tests.contracts.detectors.common import ALONE, KEY, Batches, close, joined, made, maps_of

BOTH = {"layers": ("layer2", "layer3")}
EVERY = {**BOTH, "image_levels": 0, "level": 0}


def spread(seed, count):
    """Features in all directions."""
    return maps_of(seed, count, shift=-8.0)


def test_equals_a_convolution_with_the_prototypes():
    detector, test = made("protoad", **BOTH, image_levels=1), spread(1, 8)
    state = detector.fit(Batches(spread(0, 6)), **ALONE)
    kernels = np.asarray(state["prototypes"])
    np.testing.assert_allclose(np.linalg.norm(kernels, axis=1), 1.0, rtol=1e-6)
    cells = joined(test, 1, order=0)
    cells = np.float32(cells / np.linalg.norm(cells, axis=3, keepdims=True))
    similar = lax.conv_general_dilated(
        jnp.asarray(cells), jnp.asarray(kernels.T[None, None]), (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    scores = jax.jit(detector.score)(state, test)
    np.testing.assert_allclose(scores.map, 1 - similar.max(axis=3), atol=1e-5)
    np.testing.assert_array_equal(scores.image, scores.map.max(axis=(1, 2)))


def test_own_prototypes_score_zero_and_scale_changes_nothing():
    detector, normal = made("protoad", **EVERY), spread(0, 6)
    state = detector.fit(Batches(normal), **ALONE)
    eight = {n: np.concatenate([m, m[:2]]) for n, m in normal.items()}
    score = jax.jit(detector.score)
    np.testing.assert_allclose(score(state, eight).map, 0.0, atol=1e-12)
    test = spread(1, 8)
    # A power of two scales float32 exactly.
    larger = score(state, {n: 1024 * m for n, m in test.items()})
    close(larger, score(state, test))
    scaled = detector.fit(Batches({n: 3 * m for n, m in normal.items()}), **ALONE)
    close(score(scaled, test), score(state, test), 1e-5)


def test_cells_of_zeros_have_no_direction():
    detector, normal = made("protoad", **EVERY), spread(0, 6)
    for maps in (normal, test := spread(1, 8)):
        maps["layer2"][0, 0, 0], maps["layer3"][0, 0, 0] = 0, 0
    state = detector.fit(Batches(normal), **ALONE)
    assert len(np.unique(state["prototypes"], axis=0)) == 179
    assert jax.jit(detector.score)(state, test).map[0, 0, 0] == 1.0
    nothing = {n: 0 * m for n, m in normal.items()}
    with pytest.raises(DataError, match="other than zero, found 0"):
        detector.fit(Batches(nothing), **ALONE)


def test_caps_bound_what_is_clustered_and_kept():
    normal = spread(0, 9)
    fit = lambda order=None, size=4, key=KEY, **c: np.unique(  # noqa: E731
        made("protoad", **BOTH, **c).fit(Batches(normal, order, size), **ALONE | {"key": key})[
            "prototypes"
        ],
        axis=0,
    )
    every = fit(image_levels=0, level=0)
    assert len(every) == 9 * 30
    subset = fit(image_levels=0, level=0, rows=50)
    assert len(subset) == 50
    assert {r.tobytes() for r in subset} <= {r.tobytes() for r in every}
    other = fit(np.arange(9)[::-1], 3, image_levels=0, level=0, rows=50)
    np.testing.assert_allclose(other, subset, atol=1e-6)
    assert not np.array_equal(fit(key=jax.random.key(1), image_levels=0, level=0, rows=50), subset)
    assert len(fit(image_levels=0, level=0, prototypes=20)) <= 20
    finest, image = fit(image_levels=0, level=1), fit(image_levels=1, level=0)
    assert 9 * 30 / 8 < len(finest) <= 9 * 15
    assert len(image) <= 9 * 15


def test_states_of_similar_size_share_their_shape():
    detector = made("protoad", **EVERY)
    shapes = {
        detector.fit(Batches(spread(s, 5)), **ALONE)["prototypes"].shape for s in range(2)
    } | {detector.fit(Batches(spread(0, 6)), **ALONE)["prototypes"].shape}
    assert shapes == {(192, 11)}


def test_images_split_over_a_mesh():
    detector, test = made("protoad", **EVERY), spread(1, 6)
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    state = detector.fit(Batches(spread(0, 6)), **ALONE | {"mesh": mesh})
    split = jax.jit(lambda s, f: detector.score(s, f, mesh=mesh))
    close(split(state, test), jax.jit(detector.score)(state, test))


def test_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"neighbourhood": 2}, "neighbourhood: expected an integer >= 1, odd, found 2"),
        ({"image_levels": -1}, "image_levels"),
        ({"rows": -1}, r"detector\.rows"),
        ({"level": -1}, r"detector\.level"),
        ({"prototypes": -1}, r"detector\.prototypes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("protoad", **config)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("protoad").fit(Batches(spread(0, 1)), **ALONE, trained={})


def test_broken_features_reach_the_scores():
    detector = made("protoad", **EVERY)
    state = detector.fit(Batches(spread(0, 6)), **ALONE)
    test = spread(1, 8)
    test["layer2"][0, 0, 0, 1], test["layer2"][1, 2, 2, 1] = np.nan, np.inf
    scores = jax.jit(detector.score)(state, test)
    broken = np.zeros((8, 6, 5), bool)
    broken[0, 0, 0] = broken[1, 2, 2] = True
    np.testing.assert_array_equal(np.isnan(scores.map), broken)
    np.testing.assert_array_equal(np.isnan(scores.image), broken.any(axis=(1, 2)))
