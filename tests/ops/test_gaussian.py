"""Gaussians against scikit-learn, whole inverses in float64, and numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from dsad.core.errors import ConfigError
from dsad.ops import gaussian


def rows_of(count, positions, depth, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((positions, depth, depth)) / np.sqrt(depth)
    rows = rng.standard_normal((count, positions, depth))
    return (5 + np.einsum("npd,pde->npe", rows, mixing)).astype(np.float32)


# --- moments


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["global", "per position"])
def test_merged_moments_are_those_of_the_whole(shape):
    rng = np.random.default_rng(0)
    rows = 1e4 + rng.standard_normal((23, *shape))
    parts = [gaussian.moments(p) for p in np.split(rows, [1, 8, 20])]
    forward = functools.reduce(gaussian.merge, parts)
    backward = functools.reduce(gaussian.merge, parts[::-1])
    for found in (forward, backward):
        assert found.count == 23
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-14)
        for at in np.ndindex(*shape[:-1]):
            expected = np.cov(rows[:, *at].T)
            np.testing.assert_allclose(gaussian.covariance(found)[at], expected, rtol=1e-10)


# --- shrinkage and principal axes


def test_shrinkage_of_four_points_by_hand():
    wide = np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]])[:, None, :]
    found = gaussian.principal(wide, 2)
    s, mu = gaussian.ledoit_wolf(found.variances, found.fourth, 4, 2)
    np.testing.assert_allclose(s, 0.9444444, atol=1e-7)
    shrunk = (1 - s)[:, None] * found.variances + (s * mu)[:, None]
    np.testing.assert_allclose(shrunk, [[1.2916667, 1.2083333]], atol=1e-7)
    np.testing.assert_allclose(abs(found.basis[0]), np.eye(2), atol=1e-7)

    even = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[:, None, :]
    found = gaussian.principal(even, 2)
    s, mu = gaussian.ledoit_wolf(found.variances, found.fourth, 4, 2)
    assert s == 0
    factor = found.basis / np.sqrt((1 - s) * found.variances + s * mu)[:, None, :]
    score = gaussian.mahalanobis(
        jnp.array([[[1.0, 0], [0, 0]]]), jnp.asarray(found.mean), jnp.asarray(factor, jnp.float32)
    )
    np.testing.assert_allclose(score, [[np.sqrt(2), 0]], rtol=1e-6)


def test_constant_rows_have_no_shrinkage():
    s, mu = gaussian.ledoit_wolf(np.zeros(3), np.zeros(()), 5, 3)
    assert (s, mu) == (0, 0)


@pytest.mark.parametrize(("count", "depth", "components"), [(12, 40, 6), (50, 9, 5), (9, 40, 8)])
def test_density_equals_scikit_learn(count, depth, components):
    rows = rows_of(count, 3, depth)
    found = gaussian.principal(rows, components)
    s, mu = gaussian.ledoit_wolf(found.variances, found.fourth, count, components)
    scale = np.sqrt((1 - s)[:, None] * found.variances + (s * mu)[:, None])
    factor = jnp.asarray(found.basis / scale[:, None, :], jnp.float32)
    test = np.swapaxes(rows_of(7, 3, depth, seed=1), 0, 1)
    scores = gaussian.mahalanobis(jnp.asarray(test), jnp.asarray(found.mean), factor)
    for p in range(3):
        pca = PCA(components, svd_solver="full").fit(np.float64(rows[:, p]))
        peer = LedoitWolf().fit(pca.transform(np.float64(rows[:, p])))
        np.testing.assert_allclose(s[p], peer.shrinkage_, rtol=1e-9)
        expected = np.sqrt(peer.mahalanobis(pca.transform(np.float64(test[p]))))
        np.testing.assert_allclose(scores[p], expected, rtol=2e-5)


def test_principal_in_chunks_and_without_noise_axes(monkeypatch):
    rows = rows_of(6, 5, 11)
    rows[3] = rows[2]  # two equal images: the rank falls to 4
    whole = gaussian.principal(rows, 6)
    monkeypatch.setattr(gaussian, "CHUNK_BYTES", 6 * 11 * 8 * 2)
    jax.tree.map(np.testing.assert_array_equal, gaussian.principal(rows, 6), whole)
    lengths = np.linalg.norm(whole.basis, axis=1)
    np.testing.assert_allclose(lengths, [[1, 1, 1, 1, 0, 0]] * 5, atol=1e-6)


def test_moments_give_the_axes_of_the_rows():
    rows = rows_of(30, 1, 6)
    found = gaussian.principal(rows, 4)
    basis, variances = gaussian.principal_axes(gaussian.moments(rows[:, 0]), 4)
    np.testing.assert_allclose(variances, found.variances[0], rtol=1e-10)
    np.testing.assert_allclose(abs(basis.T @ found.basis[0]), np.eye(4), atol=1e-6)


# --- ridge covariances


@pytest.mark.parametrize(("count", "spread"), [(5, 1.0), (30, 1.0), (8, 30.0)])
def test_full_and_low_rank_forms_are_one_distance(count, spread):
    rows = spread * rows_of(count, 4, 12)
    test = np.swapaxes(spread * rows_of(6, 4, 12, seed=1), 0, 1)
    test[:, 0] = rows[0]  # inside the span of the rows, where Woodbury's form cancels
    factor = gaussian.whitening(gaussian.covariance(gaussian.moments(rows)), 0.01)
    mean = jnp.asarray(rows.mean(axis=0, dtype=np.float64), jnp.float32)
    full = gaussian.mahalanobis(jnp.asarray(test), mean, jnp.asarray(factor))
    parts = [jnp.asarray(x) for x in gaussian.low_rank(rows, 0.01, 16)]
    assert parts[1].shape == (4, 32 if count == 30 else 16, 12)
    low = gaussian.low_rank_mahalanobis(jnp.asarray(test), *parts, 0.01)
    for p in range(4):
        own = np.float64(rows[:, p])
        inverse = np.linalg.inv(np.cov(own.T) + 0.01 * np.eye(12))
        gap = test[p] - own.mean(axis=0)
        expected = np.sqrt(np.einsum("nc,cd,nd->n", gap, inverse, gap))
        np.testing.assert_allclose(low[p], expected, rtol=2e-5)
        np.testing.assert_allclose(full[p], expected, rtol=2e-4 if spread > 1 else 2e-5)


def test_damped_form_is_the_distance_with_one_variance_outside():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((9, 3)))[0]
    inside, outside = np.array([4.0, 2.0, 0.5]), 0.1
    cov = basis @ np.diag(inside) @ basis.T + outside * (np.eye(9) - basis @ basis.T)
    rows, mean = rng.standard_normal((5, 9)), rng.standard_normal(9)
    found = gaussian.damped_mahalanobis(
        jnp.asarray(rows, jnp.float32),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(basis * np.sqrt(1 - np.sqrt(outside / inside)), jnp.float32),
        jnp.asarray(1 / np.sqrt(outside), jnp.float32),
    )
    gap = rows - mean
    expected = np.sqrt(np.einsum("nc,cd,nd->n", gap, np.linalg.inv(cov), gap))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- heat maps


def test_kernel_taps():
    taps = gaussian.patch_kernel(32)
    assert taps.shape == (32,)
    np.testing.assert_array_equal(taps, taps[::-1])
    np.testing.assert_allclose(taps[[15, 16]], 0.5)
    np.testing.assert_allclose(taps[[0, 31]], 0.1623262, atol=1e-7)
    np.testing.assert_allclose(taps.sum(), 11.5168008, atol=1e-6)
    np.testing.assert_allclose(np.outer(taps, taps).sum(), 132.6366995, atol=1e-5)
    for size in (31, 0):
        with pytest.raises(ConfigError, match="even number"):
            gaussian.patch_kernel(size)


def test_heatmap_of_one_patch_and_of_a_constant():
    scores = np.zeros((1, 57, 57), np.float32)
    scores[0, 28, 28] = 1
    found = np.asarray(gaussian.patch_heatmap(jnp.asarray(scores), 32, 4, normalise=False))[0]
    lit = np.nonzero(found)
    assert [(a.min(), a.max()) for a in lit] == [(112, 143), (112, 143)]
    np.testing.assert_array_equal(
        np.argwhere(found == found.max()), [[127, 127], [127, 128], [128, 127], [128, 128]]
    )
    np.testing.assert_allclose(found.max(), 0.25)
    ones = jnp.ones((2, 57, 57))
    faded = np.asarray(gaussian.patch_heatmap(ones, 32, 4, normalise=False))
    assert faded.shape == (2, 256, 256)
    np.testing.assert_allclose(faded[:, 128, 128], 8.2525390, rtol=1e-6)
    np.testing.assert_allclose(faded[:, 0, 128], 0.4663183, rtol=1e-6)
    np.testing.assert_allclose(faded[:, 0, 0], 0.0263498, rtol=1e-5)
    np.testing.assert_allclose(gaussian.patch_heatmap(ones, 32, 4), 1.0, rtol=1e-6)
