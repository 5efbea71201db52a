"""FRE: properties of the subspace and of the score; the contract has the oracle."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from dsad.core.errors import ConfigError, DataError
from dsad.detectors import _subspace, fre
from tests.contracts.detectors.common import ALONE, Batches, made, maps_of

ONE = {"layers": ("layer2",), "pool": 1}


def fitted(images=6, **config):
    detector = made("fre", **{**ONE, **config})
    return detector, detector.fit(Batches(maps_of(0, images)), **ALONE)


def axes_of(state, name="layer2"):
    """The axes that are not padding, (r, D)."""
    axes = np.asarray(state[name]["axes"], np.float64)
    axes = axes.reshape(len(axes), -1)
    return axes[axes.any(axis=1)]


@pytest.mark.parametrize("mode", ["image", "patch"])
def test_inside_is_zero_and_an_orthogonal_part_counts_its_square(mode):
    detector, state = fitted(mode=mode, components=3)
    rng = np.random.default_rng(0)
    axes, mean = axes_of(state), np.asarray(state["layer2"]["mean"], np.float64)
    assert len(axes) == 3
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    rows = (8, 1) if mode == "image" else (8, 30)
    inside = rng.standard_normal((*rows, 3)) @ axes
    outside = rng.standard_normal(inside.shape)
    outside -= outside @ axes.T @ axes
    outside /= np.linalg.norm(outside, axis=2, keepdims=True)
    sizes = rng.uniform(1, 3, (*rows, 1))
    score = jax.jit(detector.score)
    at = lambda x: {"layer2": (mean + x.reshape(8, 6, 5, 7)).astype(np.float32)}  # noqa: E731
    np.testing.assert_allclose(score(state, at(inside)).image, 0.0, atol=1e-8)
    scores = score(state, at(inside + sizes * outside))
    np.testing.assert_allclose(scores.image, np.sum(sizes**2, axis=(1, 2)), rtol=1e-5)
    if mode == "patch":
        np.testing.assert_allclose(scores.map.reshape(8, 30, 1), sizes**2, rtol=1e-5)


@pytest.mark.parametrize("mode", ["image", "patch"])
@pytest.mark.parametrize("pool", [1, 2])
def test_map_sums_to_the_image_score(mode, pool):
    detector, state = fitted(mode=mode, pool=pool)
    scores = jax.jit(detector.score)(state, maps_of(1, 8))
    assert scores.map.shape == (8, 6 // pool, 5 // pool)
    np.testing.assert_allclose(scores.map.sum(axis=(1, 2)), scores.image, rtol=1e-6)


def test_layers_add_up_where_grids_divide():
    """Grids 6 × 6 and 3 × 3: the map still sums to the score; weights are inverse variances."""
    detector = made("fre", layers=("layer2", "layer3"), pool=1)
    wide = {
        n: m[:, :, [0, 1, 2, 3, 4, 0]] if n == "layer2" else m for n, m in maps_of(0, 6).items()
    }
    state = detector.fit(Batches(wide), **ALONE)
    test = {
        n: m[:, :, [0, 1, 2, 3, 4, 0]] if n == "layer2" else m for n, m in maps_of(1, 8).items()
    }
    scores = jax.jit(detector.score)(state, test)
    np.testing.assert_allclose(scores.map.sum(axis=(1, 2)), scores.image, rtol=1e-6)
    for name, part in state.items():
        total = wide[name].reshape(6, -1).var(axis=0, dtype=np.float64).sum()
        assert part["weight"] == pytest.approx(1 / total, rel=1e-6)
    plain = made("fre", layers=("layer2", "layer3"), pool=1, balance=False)
    assert plain.fit(Batches(wide), **ALONE)["layer3"]["weight"] == 1.0


def test_full_rank_reconstructs_the_training_images():
    normal = maps_of(0, 6)
    eight = {n: np.concatenate([m, m[:2]]) for n, m in normal.items()}
    detector, state = fitted(variance=1.0)
    assert len(axes_of(state)) == 5
    np.testing.assert_allclose(jax.jit(detector.score)(state, eight).image, 0.0, atol=1e-8)
    detector, state = fitted(mode="patch", variance=1.0)
    assert len(axes_of(state)) == 7
    np.testing.assert_allclose(jax.jit(detector.score)(state, eight).map, 0.0, atol=1e-8)


@pytest.mark.parametrize(("n", "depth"), [(20, 300), (300, 20), (20, 20_000)])
def test_gram_and_covariance_agree_with_singular_vectors(n, depth):
    rng = np.random.default_rng(0)
    scale = np.geomspace(10, 0.1, n)[:, None] * rng.standard_normal((n, depth))
    rows = np.float32(30 + rng.standard_normal((n, n)) @ scale)
    found = _subspace.subspace(rows, lambda v: _subspace.leading(v, 0.97))
    oracle = PCA(0.97, svd_solver="full").fit(np.float64(rows))
    assert len(found.axes) == oracle.n_components_
    signs = np.sign(np.sum(found.axes * oracle.components_, axis=1, keepdims=True))
    np.testing.assert_allclose(found.axes, signs * oracle.components_, atol=1e-5)
    np.testing.assert_allclose(found.mean, oracle.mean_, rtol=1e-6)
    total = rows.var(axis=0, dtype=np.float64).sum()
    assert found.total == pytest.approx(total, rel=1e-9)


def test_streamed_covariance_keeps_its_digits():
    rows = np.float32(3000 + np.random.default_rng(0).standard_normal((500, 6)) * np.arange(1, 7))
    moments = _subspace.Moments(rows[:10])
    for at in range(0, 500, 70):
        moments.add(rows[at : at + 70])
    found = moments.subspace(len)
    values = np.linalg.eigvalsh(np.cov(rows.T, dtype=np.float64, bias=True))
    spread = np.var((np.float64(rows) - found.mean) @ found.axes.T, axis=0)
    np.testing.assert_allclose(spread, values[::-1], rtol=1e-5)


def test_axes_grow_with_the_variance():
    values = np.geomspace(1, 1e-4, 30)
    counts = [_subspace.leading(values, v) for v in np.linspace(0.05, 1.0, 40)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 30
    assert _subspace.leading(values, 0.97, 5) == 5
    assert _subspace.leading(values, 0.97, 99) == 30
    assert _subspace.leading(np.array([1.0, 1e-14, 0.0]), 1.0) == 1
    assert _subspace.leading(np.zeros(4), 0.97) == 0


def test_padding_changes_nothing_and_shapes_are_shared():
    test, scores = maps_of(1, 8), []
    detector, state = fitted(components=3)
    assert state["layer2"]["axes"].shape == (32, 6, 5, 7)
    short = {"layer2": {**state["layer2"], "axes": state["layer2"]["axes"][:3]}}
    scores = [jax.jit(detector.score)(s, test) for s in (state, short)]
    np.testing.assert_allclose(scores[0].map, scores[1].map, rtol=1e-6)
    assert fitted(40, variance=1.0)[1]["layer2"]["axes"].shape == (64, 6, 5, 7)


def test_pooled_means():
    maps = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
    found = np.asarray(fre.pooled(maps, 2))
    assert found.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(found[1, 2, 1], maps[1, 4:6, 2:4].mean(axis=(0, 1)), rtol=1e-6)
    with pytest.raises(ConfigError, match=r"detector\.pool: 6 exceeds the grid \(6, 5\)"):
        fre.pooled(maps, 6)


def test_identical_images_are_their_own_mean():
    detector = made("fre", **ONE)
    same = {n: np.repeat(m, 4, axis=0) for n, m in maps_of(0, 1).items()}
    state = detector.fit(Batches(same), **ALONE)
    eight = {n: np.repeat(m[:1], 8, axis=0) for n, m in same.items()}
    np.testing.assert_allclose(jax.jit(detector.score)(state, eight).map, 0.0, atol=1e-10)


def test_refuses_bad_configurations():
    for config, message in [
        ({"layers": ()}, "layers"),
        ({"mode": "cells"}, "one of 'image', 'patch'"),
        ({"pool": 0}, "pool"),
        ({"variance": 0.0}, "variance"),
        ({"variance": 1.5}, "variance"),
        ({"components": -1}, "components"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made("fre", **config)
    with pytest.raises(DataError, match=r"at least 2 normal images, found 1"):
        fitted(1)
    with pytest.raises(ConfigError, match="nothing to train"):
        made("fre").fit(Batches(maps_of(0, 2)), **ALONE, trained={})
