"""SubspaceAD: properties of residuals and of the fit; the contract has the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.core.errors import ConfigError
from dsad.detectors import _subspace
from tests.contracts.detectors.common import ALONE, Batches, made, maps_of, upsampled

ONE = {"layers": ("layer2",)}


def fitted(normal, order=None, size=4, **config):
    detector = made("subspace", **{**ONE, **config})
    return detector, detector.fit(Batches({"layer2": normal}, order, size), **ALONE)


def correlated(seed, shape, depth=12, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((depth, depth))
    mixing = mixing * np.geomspace(3, 0.05, depth)
    values = rng.standard_normal((*shape, depth)) @ mixing.T + 3
    return (scale * values).astype(np.float32)


def parts(state):
    axes = np.float64(state["axes"])
    return np.float64(state["mean"]), axes[axes.any(axis=1)]


def residuals(detector, state, values):
    return np.asarray(jax.jit(detector.score)(state, {"layer2": np.float32(values)}).map)


NORMAL, TEST = correlated(0, (6, 5, 4)), correlated(1, (3, 5, 4))


def eigen(values):
    rows = np.float64(values).reshape(-1, values.shape[-1])
    found, vectors = np.linalg.eigh(np.cov(rows.T))
    return rows.mean(axis=0), found[::-1], vectors[:, ::-1]


def test_residuals_are_what_the_axes_leave():
    """||f - mu||^2 - ||C (f - mu)||^2; r the fewest axes with 99 % of the variance.

    Float32 leaves 4e-6 of a residual that is a hundredth of what it is the difference of.
    """
    detector, state = fitted(NORMAL)
    mean, variances, vectors = eigen(NORMAL)
    count = int(np.argmax(np.cumsum(variances) / variances.sum() >= 0.99)) + 1
    assert 1 < count < 12
    assert len(parts(state)[1]) == count
    gaps = np.float64(TEST) - mean
    expected = (gaps**2).sum(axis=3) - ((gaps @ vectors[:, :count]) ** 2).sum(axis=3)
    np.testing.assert_allclose(residuals(detector, state, TEST), expected, rtol=2e-5)


def test_in_float64_residuals_and_their_mean_are_the_identities():
    mean, variances, vectors = eigen(NORMAL)
    kept, axes = [], vectors[:, :6].T
    with jax.enable_x64(True):
        found = [np.asarray(_subspace.patch_errors(*map(jnp.asarray, (mean, axes, np.float64(x)))))
                 for x in (TEST, NORMAL)]  # fmt: skip
    assert found[0].dtype == np.float64
    gaps = np.float64(TEST) - mean
    expected = (gaps**2).sum(axis=3) - ((gaps @ axes.T) ** 2).sum(axis=3)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12)
    rows = NORMAL.reshape(-1, 12)
    moments = _subspace.Moments(rows)
    moments.add(rows)
    moments.subspace(lambda values: kept.append(values) or 6)
    n = len(rows)
    np.testing.assert_allclose(kept[0], (n - 1) / n * variances, rtol=1e-10)
    assert found[1].mean() == pytest.approx((n - 1) / n * variances[6:].sum(), rel=1e-12)
    assert found[1].mean() == pytest.approx(kept[0][6:].sum(), rel=1e-10)


def test_mean_residual_of_what_was_fitted_is_the_variance_left():
    detector, state = fitted(NORMAL)
    _, variances, _ = eigen(NORMAL)
    n, count = NORMAL[..., 0].size, len(parts(state)[1])
    expected = (n - 1) / n * variances[count:].sum()
    assert residuals(detector, state, NORMAL).mean() == pytest.approx(expected, rel=1e-5)


def test_inside_is_zero_and_orthogonal_parts_count_their_square():
    detector, state = fitted(NORMAL)
    mean, axes = parts(state)
    rng = np.random.default_rng(4)
    inside = mean + rng.standard_normal((1, 5, 4, len(axes))) @ axes
    beyond = rng.standard_normal((1, 5, 4, 12))
    beyond -= beyond @ axes.T @ axes
    same = np.broadcast_to(mean, (1, 5, 4, 12))
    np.testing.assert_array_equal(residuals(detector, state, same), 0)
    np.testing.assert_allclose(residuals(detector, state, inside), 0, atol=1e-9)
    expected = (beyond**2).sum(axis=3)
    np.testing.assert_allclose(residuals(detector, state, mean + beyond), expected, rtol=1e-4)


def test_scale_counts_squared():
    plain = residuals(*fitted(NORMAL), TEST)
    scaled = residuals(*fitted(8 * NORMAL), 8 * TEST)
    np.testing.assert_allclose(scaled, 64 * plain, rtol=1e-4)


def test_moments_of_batches_are_those_of_all_in_any_order():
    rows = np.float32(NORMAL.reshape(-1, 12))
    together, apart = _subspace.Moments(rows), _subspace.Moments(rows[70:75])
    together.add(rows)
    for at in (60, 0, 90, 30):
        apart.add(rows[at : at + 30])
    found = [m.subspace(lambda v: 5) for m in (together, apart)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(np.abs(a), np.abs(b), rtol=1e-5, atol=1e-6)
    covariance = [m.products / m.count - np.outer(m.total, m.total) / m.count**2
                  for m in (together, apart)]  # fmt: skip
    np.testing.assert_allclose(*covariance, rtol=1e-10, atol=1e-12)
    plain = residuals(*fitted(NORMAL), TEST)
    other = residuals(*fitted(NORMAL, np.array([4, 1, 5, 0, 3, 2]), 3), TEST)
    np.testing.assert_allclose(other, plain, rtol=1e-5)


def test_fewer_cells_than_channels_are_explained_whole():
    few = correlated(0, (2, 2, 2), depth=40)
    detector, state = fitted(few, variance=1.0)
    assert len(parts(state)[1]) == 7
    np.testing.assert_allclose(residuals(detector, state, few), 0, atol=1e-6)


def test_full_share_keeps_no_axis_of_rounding():
    """Ten channels, four of them sums of the others."""
    low = correlated(0, (6, 5, 4), depth=6)
    normal = np.concatenate([low, low[..., :4] + low[..., 2:6]], axis=3)
    _, state = fitted(normal, variance=1.0)
    assert len(parts(state)[1]) == 6


def test_equals_fre_but_for_a_tie():
    fre = made("fre", **ONE, mode="patch", pool=1, variance=0.99)
    state = fre.fit(Batches({"layer2": NORMAL}), **ALONE)
    expected = jax.jit(fre.score)(state, {"layer2": TEST}).map
    np.testing.assert_allclose(residuals(*fitted(NORMAL), TEST), expected, rtol=1e-6)
    tied = np.array([2.0, 1.0, 1.0])
    assert _subspace.leading(tied, 0.75, reached=True) == 2
    assert _subspace.leading(tied, 0.75) == 3


def test_image_scores_are_of_raw_cells():
    detector, state = fitted(NORMAL, tail=0.1)
    scores = jax.jit(detector.score)(state, {"layer2": TEST})
    expected = np.sort(np.asarray(scores.map).reshape(3, -1), axis=1)[:, -2:].mean(axis=1)
    np.testing.assert_allclose(scores.image, expected, rtol=1e-6)


def test_published_maps_are_under_a_kernel_that_is_almost_a_box():
    """Mirrored without their edge; the image score is of the 4,515 highest of 672² pixels."""
    taps = np.exp(-0.5 * (np.arange(-1.0, 2.0) / 4) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    np.testing.assert_allclose(kernel[0, :2], [0.1088, 0.1123], atol=5e-5)
    assert kernel[1, 1] == pytest.approx(0.1158, abs=5e-5)
    plain = residuals(*fitted(NORMAL), TEST)
    detector, state = fitted(NORMAL, map_rule="published", sigma=0.0)
    scores = jax.jit(detector.score)(state, {"layer2": TEST})
    large = upsampled(np.float64(plain), (672, 672))
    expected = np.stack([ndimage.correlate(m, kernel, mode="mirror") for m in large])
    np.testing.assert_allclose(scores.map, expected, rtol=2e-5)
    highest = np.sort(expected.reshape(3, -1), axis=1)[:, -4515:]
    np.testing.assert_allclose(scores.image, highest.mean(axis=1), rtol=1e-5)
    with pytest.raises(ConfigError, match=r'sigma: expected 0 with map_rule = "published"'):
        made("subspace", map_rule="published")


def test_cells_outside_are_not_normal():
    source = Batches({"layer2": NORMAL})
    half = np.broadcast_to(np.float32([[0.0, 1.0], [0.0, 0.5]]), (4, 2, 2))
    cut = [b._replace(inside=half) for b in source]
    detector = made("subspace", **ONE)
    state = detector.fit(cut, **ALONE)
    expected = fitted(NORMAL[:, :, :2])[1]
    np.testing.assert_allclose(state["mean"], expected["mean"], rtol=1e-6)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (7, 8)), (24, range(13, 18)), (40, range(22, 29)), (32, range(18, 23))],
)
def test_blocks_are_a_share_of_the_depth(depth, blocks):
    assert made("subspace", depth=depth).layers == tuple(f"block{i}" for i in blocks)


def test_refusals():
    with pytest.raises(ConfigError, match=r"detector\.span: .*below 12"):
        made("subspace", span=(1.0, 1.0))
    for config, key in [({"variance": 0.0}, "variance"), ({"tail": 0.0}, "tail")]:
        with pytest.raises(ConfigError, match=key):
            made("subspace", **config)
    with pytest.raises(ConfigError, match=r"maps of equal shape.*'layer3': \(3, 3, 4\)"):
        made("subspace", layers=("layer2", "layer3")).fit(Batches(maps_of(0, 4)), **ALONE)
