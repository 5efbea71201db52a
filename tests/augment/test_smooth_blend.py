"""SmoothBlend: the published numbers, scipy's Gaussian, and blending in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from dsad.augment.cutpaste import Pieces, paste
from dsad.augment.smooth_blend import SmoothBlendConfig, draw_pieces, matte, smooth_blend
from dsad.core.errors import ConfigError
from dsad.core.rng import sample_keys
from tests.augment.test_color import grey64, reference

SIDE = 48
#: Pieces that can be seen in images of 48 pixels.
VISIBLE = {"area": (0.03, 0.08), "sigma_side": 0, "sigma": 1.5}
blend = jax.jit(smooth_blend, static_argnums=2)
matte_of = jax.jit(matte, static_argnums=(2, 3))


@functools.cache
def pieces(config, count=12, side=SIDE):
    index = jnp.arange(count)
    keys = sample_keys(jax.random.key(3), index % 2, index)
    return jax.device_get(jax.jit(draw_pieces, static_argnums=(1, 2))(keys, side, config))


def noise(count=12, side=SIDE):
    return np.random.default_rng(0).random((count, side, side, 3)).astype(np.float32)


def box(corner, extent):
    (top, left), (height, width) = corner, extent
    return slice(top, top + height), slice(left, left + width)


def scipy_matte(corner, extent, side, sigma):
    """The published definition: a blurred image of the rectangle, float64."""
    image = np.zeros((side, side))
    image[box(corner, extent)] = 1
    return ndimage.gaussian_filter(image, sigma, mode="constant", truncate=4.0) if sigma else image


def alone(height=20, width=20, top=100, left=100, sigma=2.0, side=224):
    corner, extent = (jnp.array([pair], jnp.int32) for pair in ((top, left), (height, width)))
    return np.asarray(matte_of(corner, extent, side, sigma))[0].astype(np.float64)


def test_the_published_numbers_of_a_matte():
    alpha = alone()
    assert alpha.sum() == pytest.approx(400, abs=1e-4)
    for inside, outside in ((100, 99), (119, 120)):
        for line in (alpha[110], alpha[:, 110]):
            assert line[inside] == pytest.approx(0.5997, abs=5e-5)
            assert line[outside] == pytest.approx(0.4003, abs=5e-5)
    assert (alpha > 0).sum() == 36 * 36
    assert (alpha[92:128, 92:128] > 0).all()
    assert alone(top=0, left=0).sum() == pytest.approx(369.37, abs=5e-3)
    narrow = alone(sigma=1.0)[110]
    assert narrow[100] == pytest.approx(0.6995, abs=5e-5)
    assert narrow[99] == pytest.approx(0.3005, abs=5e-5)


@pytest.mark.parametrize(
    ("height", "width", "peak"), [(20, 20, 0.6212), (9, 28, 0.39), (38, 13, 0.57)]
)
def test_a_wide_gaussian_leaves_a_smudge(height, width, peak):
    digits = 5e-5 if peak == 0.6212 else 5e-3
    assert alone(height, width, sigma=8.0).max() == pytest.approx(peak, abs=digits)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0, 2.0, 8.0])
def test_a_matte_equals_scipy_s_blur(sigma):
    """Anywhere, at edges and corners too, and of any size; exactly 0 outside of its support."""
    g = np.random.default_rng(1)
    extent = np.concatenate([g.integers(1, 20, (10, 2)), [[1, 1], [SIDE, SIDE]]]).astype(np.int32)
    corner = g.integers(0, SIDE - extent + 1).astype(np.int32)
    corner[0], corner[1] = 0, SIDE - extent[1]
    found = np.asarray(matte_of(jnp.asarray(corner), jnp.asarray(extent), SIDE, sigma))
    for i in range(len(extent)):
        expected = scipy_matte(corner[i], extent[i], SIDE, sigma)
        np.testing.assert_allclose(found[i], expected, atol=1e-6)
        reach = math.floor(4 * sigma + 0.5)
        near = np.maximum(corner[i] - reach, 0), np.minimum(corner[i] + extent[i] + reach, SIDE)
        elsewhere = np.ones((SIDE, SIDE), bool)
        elsewhere[box(near[0], near[1] - near[0])] = False
        assert not found[i][elsewhere].any()


def jittered(image, drawn, i):
    """The whole image in float64, the contrast with the mean of the piece alone."""
    image, piece = np.asarray(image, np.float64), box(drawn.source[i], drawn.extent[i])
    if drawn.jitter is None:
        return image
    for operation in drawn.jitter.order[i]:
        hue = operation == 3
        amount = float(drawn.jitter.shift[i] if hue else drawn.jitter.factors[i, operation])
        if operation == 1:
            mean = grey64(image[piece]).mean()
            image = np.clip(amount * image + (1 - amount) * mean, 0, 1)
        else:
            image = reference(image, operation, amount)
    return image


def layer_of(image, drawn, i, mode):
    colours, side = jittered(image, drawn, i), len(image)
    target = box(drawn.target[i], drawn.extent[i])
    if mode == "literal":
        layer = np.zeros_like(colours)
        layer[target] = colours[box(drawn.source[i], drawn.extent[i])]
        return layer
    rows, columns = (
        np.clip(np.arange(side) - drawn.target[i, a] + drawn.source[i, a], 0, side - 1)
        for a in (0, 1)
    )
    return colours[rows[:, None], columns[None, :]]


@pytest.mark.parametrize("mode", ["literal", "extended"])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_blending_equals_float64(mode, jitter):
    config = SmoothBlendConfig(mode=mode, jitter=jitter, **VISIBLE)
    images, drawn = noise(), pieces(config)
    assert (drawn.jitter is None) == (not jitter)
    found, alpha = jax.device_get(blend(images, drawn, config))
    again, _ = jax.device_get(blend(images, drawn, config))
    np.testing.assert_array_equal(found, again)
    for i, image in enumerate(images):
        share = scipy_matte(drawn.target[i], drawn.extent[i], SIDE, 1.5)
        np.testing.assert_allclose(alpha[i], share, atol=1e-6)
        layer = layer_of(image, drawn, i, mode)
        expected = (1 - share)[..., None] * image + share[..., None] * layer
        np.testing.assert_allclose(found[i], expected, atol=5e-6)
        outside = alpha[i] == 0
        assert outside.any()
        np.testing.assert_array_equal(found[i][outside], image[outside])
        if not jitter:
            assert (np.minimum(image, layer) <= found[i]).all()
            assert (found[i] <= np.maximum(image, layer)).all()


def test_without_jit_it_is_the_same_image():
    config = SmoothBlendConfig(mode="extended", jitter=0.0, **VISIBLE)
    images, drawn = noise(2), jax.tree.map(lambda a: jnp.asarray(a[:2]), pieces(config))
    found = smooth_blend(jnp.asarray(images), drawn, config)
    for mine, jitted in zip(found, blend(images, drawn, config), strict=True):
        np.testing.assert_allclose(mine, jitted, atol=1e-6)


def test_a_hard_edge_is_cutpaste():
    config = SmoothBlendConfig(**{**VISIBLE, "sigma": 0.0})
    images, drawn = noise(), pieces(config)
    found, alpha = blend(images, drawn, config)
    expected, inside = jax.jit(paste)(images, drawn)
    # The mean of the piece, which its contrast refers to, is that of a window here.
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(alpha, inside)


def test_an_empty_matte_returns_the_image():
    config = SmoothBlendConfig(mode="extended", **VISIBLE)
    images, drawn = noise(), pieces(config)
    found, alpha = blend(images, drawn._replace(extent=drawn.extent * 0, jitter=None), config)
    assert not np.asarray(alpha).any()
    np.testing.assert_array_equal(found, images)


def test_a_constant_image():
    """A dark ring in the published equation, nothing in the other mode."""
    pair = lambda *values: np.array([values], np.int32)  # noqa: E731
    drawn = Pieces(
        extent=pair(20, 20), source=pair(30, 50), box=pair(20, 20), target=pair(100, 100),
        angle=np.zeros(1, np.float32), jitter=None,
    )  # fmt: skip
    ones = np.ones((1, 224, 224, 3), np.float32)
    literal, _ = jax.device_get(blend(ones, drawn, SmoothBlendConfig(jitter=0.0)))
    assert literal.min() == pytest.approx(0.5997, abs=5e-5)
    loss = (1 - literal.astype(np.float64)).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(loss, 60.04, atol=5e-3)
    extended, _ = blend(ones, drawn, SmoothBlendConfig(jitter=0.0, mode="extended"))
    np.testing.assert_array_equal(extended, ones)


def test_sizes_and_places_of_pieces():
    drawn = pieces(SmoothBlendConfig(), count=10_000, side=224)
    height, width = drawn.extent.T.astype(np.float64)
    area, rounding = height * width, (height + width) / 2 + 0.25
    assert (area + rounding >= 0.005 * 224**2).all()
    assert (area - rounding <= 0.01 * 224**2).all()
    assert area.min() < 270
    assert area.max() > 480
    assert stats.kstest(area / 224**2, stats.uniform(0.005, 0.005).cdf).statistic < 0.03
    assert ((width + 0.5) / (height - 0.5) >= 0.3).all()
    assert ((width - 0.5) / (height + 0.5) <= 1 / 0.3).all()
    assert abs((width > height).mean() - (width < height).mean()) < 0.05
    for corner in (drawn.source, drawn.target):
        assert (corner >= 0).all()
        assert (corner + drawn.extent <= 224).all()
    apart = np.corrcoef(np.concatenate([drawn.source, drawn.target], axis=1).T) - np.eye(4)
    assert np.abs(apart).max() < 0.04
    factors = drawn.jitter.factors
    assert (np.abs(factors - 1) <= 0.1 + 1e-6).all()
    assert (np.abs(drawn.jitter.shift) <= 0.1).all()
    assert drawn.jitter.apply.all()


def test_the_softness_follows_the_side():
    assert SmoothBlendConfig().sigma_in(56) == 0.5
    assert SmoothBlendConfig(sigma_side=0).sigma_in(56) == 2.0
    for settings in ({"sigma": -1.0}, {"area": (0.0, 0.1)}, {"jitter": 0.6}):
        with pytest.raises(ConfigError, match=rf"blend\.{next(iter(settings))}"):
            SmoothBlendConfig(**settings)
