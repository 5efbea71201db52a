import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from dsad.augment import color

AMOUNTS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    images = rng.random((4, 12, 20, 3), dtype=np.float32)
    images[1, :, :10] = images[1, :, :10, :1]  # grey pixels
    images[2, 0] = 0
    images[2, 1] = 1
    images[2, 2] = [1, 0, 0]
    images[2, 3] = [0, 0.5, 0.5]
    images[2, 4] = [0.5, 0.25, 0.5]
    return images


def grey64(image):
    return (image.astype(np.float64) @ [0.299, 0.587, 0.114])[..., None]


def reference(image, operation, amount):
    """One operation on one image in float64."""
    image = image.astype(np.float64)
    if operation == color.BRIGHTNESS:
        return np.clip(amount * image, 0, 1)
    if operation == color.CONTRAST:
        return np.clip(amount * image + (1 - amount) * grey64(image).mean(), 0, 1)
    if operation == color.SATURATION:
        return np.clip(amount * image + (1 - amount) * grey64(image), 0, 1)
    flat = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
    turned = [colorsys.hsv_to_rgb((h + amount) % 1.0, s, v) for h, s, v in flat]
    return np.array(turned).reshape(image.shape)


@functools.partial(jax.jit, static_argnums=1)
def adjust(images, operation, amounts):
    """A jitter that does one operation alone."""
    factors, shift = np.ones((len(images), 3), np.float32), jnp.zeros_like(amounts)
    if operation == color.HUE:
        shift = amounts
    else:
        factors = jnp.asarray(factors).at[:, operation].set(amounts)
    order, apply = np.tile(np.arange(4), (len(images), 1)), np.ones(len(images), bool)
    draws = color.JitterDraws(jnp.asarray(factors), shift, jnp.asarray(order), jnp.asarray(apply))
    return color.apply_jitter(images, draws, hue=operation == color.HUE)


@pytest.mark.parametrize("operation", range(4))
def test_adjust_equals_float64(images, operation):
    amounts = np.float32([-0.5, -0.1, 0.07, 1 / 3] if operation == color.HUE else [0, 0.6, 1, 1.7])
    found = adjust(images, operation, amounts)
    assert found.dtype == jnp.float32
    for i in range(4):
        expected = reference(images[i], operation, float(amounts[i]))
        np.testing.assert_allclose(found[i], expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(224, 224), (3, 1025), (700, 1), (256, 512)], ids=str)
def test_contrast_of_large_and_extreme_images(shape):
    """The integer sum neither overflows nor loses precision."""
    noise = np.random.default_rng(4).random((1, *shape, 3), dtype=np.float32)
    images = np.concatenate([noise, np.ones_like(noise), noise.round(), 1e-4 * noise])
    factor = np.float32([0.5, 0.6, 1.4, 0.3])
    found = adjust(images, color.CONTRAST, factor)
    for i in range(4):
        expected = reference(images[i], color.CONTRAST, float(factor[i]))
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_adjust_matches_pillow_within_its_integer_rounding():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pillow = Image.fromarray(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for operation, enhancer in enumerate(enhancers):
        for factor in (0.6, 1.4):
            amount = jnp.array([factor], jnp.float32)
            found = adjust(image[None] / np.float32(255), operation, amount)[0]
            expected = np.asarray(enhancer(pillow).enhance(factor), np.float32)
            assert np.abs(np.asarray(found) * 255 - expected).max() < 1.5


def test_hue_keeps_value_and_saturation_and_third_of_a_turn_permutes(images):
    third = adjust(images, color.HUE, jnp.full((4,), 1 / 3, jnp.float32))
    np.testing.assert_allclose(third, np.roll(images, 1, axis=-1), atol=1e-6)
    shifted = np.asarray(adjust(images, color.HUE, jnp.full((4,), 0.07, jnp.float32)))
    np.testing.assert_allclose(shifted.max(-1), images.max(-1), atol=1e-6)
    np.testing.assert_allclose(shifted.min(-1), images.min(-1), atol=1e-6)


def test_every_order_equals_the_sequence():
    """All 24 orders at once against the operations one after the other in float64."""
    rng = np.random.default_rng(2)
    orders = np.array(list(itertools.permutations(range(4))), np.int32)
    images = rng.random((24, 6, 7, 3), dtype=np.float32)
    factors = rng.uniform(0.3, 1.7, (24, 3)).astype(np.float32)
    shift = rng.uniform(-0.3, 0.3, 24).astype(np.float32)
    apply = np.ones(24, bool)
    apply[[3, 17]] = False
    draws = color.JitterDraws(*(jnp.asarray(x) for x in (factors, shift, orders, apply)))
    found = np.asarray(jax.jit(color.apply_jitter)(images, draws))
    without_hue = np.asarray(color.apply_jitter(jnp.asarray(images), draws, hue=False))
    for i in range(24):
        if not apply[i]:
            np.testing.assert_array_equal(found[i], images[i])
            continue
        expected = plain = images[i]
        for operation in orders[i]:
            amount = shift[i] if operation == color.HUE else factors[i, operation]
            expected = reference(expected, operation, float(amount))
            if operation != color.HUE:
                plain = reference(plain, operation, float(amount))
        np.testing.assert_allclose(found[i], expected, atol=4e-6)
        np.testing.assert_allclose(without_hue[i], plain, atol=4e-6)


def test_color_jitter_is_its_draws_applied(images):
    keys = jax.random.split(jax.random.key(0), 4)

    @functools.partial(jax.jit, static_argnames="probability")
    def both(images, keys, probability):
        draws = color.draw_jitter(keys, **AMOUNTS, probability=probability)
        found = color.color_jitter(images, keys, **AMOUNTS, probability=probability)
        return found, color.apply_jitter(images, draws)

    found, expected = both(images, keys, probability=0.8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.asarray(found) != images).any()
    never, _ = both(images, keys, probability=0.0)
    np.testing.assert_array_equal(never, images)


def test_draws_are_distributed_as_stated():
    keys = jax.random.split(jax.random.key(11), 6000)
    draw = jax.jit(lambda k: color.draw_jitter(k, **AMOUNTS, probability=0.8))
    factors, shift, order, apply = (np.asarray(x) for x in draw(keys))
    for i, width in enumerate((0.4, 0.4, 0.2)):
        assert stats.kstest(factors[:, i], stats.uniform(1 - width, 2 * width).cdf).pvalue > 1e-3
    assert stats.kstest(shift, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef([*factors.T, shift]) - np.eye(4)).max() < 0.06
    assert stats.binomtest(int(apply.sum()), 6000, 0.8).pvalue > 1e-3
    codes = order @ [64, 16, 4, 1]
    values, counts = np.unique(codes, return_counts=True)
    assert len(values) == 24
    assert all(sorted(o) == [0, 1, 2, 3] for o in order[:50])
    assert stats.chisquare(counts).pvalue > 1e-3


def test_factor_never_below_zero():
    keys = jax.random.split(jax.random.key(1), 3000)
    amounts = {"brightness": 1.5, "contrast": 0.0, "saturation": 0.8, "hue": 0.0}
    draws = color.draw_jitter(keys, **amounts, probability=1.0)
    low, high = np.asarray(draws.factors).min(0), np.asarray(draws.factors).max(0)
    assert 0 <= low[0] < 0.01
    assert 2.49 < high[0] <= 2.5
    assert low[1] == high[1] == 1
    assert 0.2 <= low[2] < 0.21
    assert not np.asarray(draws.shift).any()
    assert bool(draws.apply.all())


def test_grey_and_solarize(images):
    keys = jax.random.split(jax.random.key(5), 4)
    grey = color.to_grey(jnp.asarray(images), keys, probability=1.0)
    expected = np.repeat(grey64(images), 3, axis=-1)
    np.testing.assert_allclose(grey, expected, atol=1e-6)
    images[0, 0, 0] = [0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0.75]
    inverted = np.asarray(color.solarize(jnp.asarray(images), keys, probability=1.0))
    np.testing.assert_array_equal(inverted, np.where(images >= 0.5, 1 - images, images))
    np.testing.assert_allclose(inverted[0, 0, 0], [0.5, 0.5, 0.25], atol=1e-7)
    for function in (color.to_grey, color.solarize):
        np.testing.assert_array_equal(function(jnp.asarray(images), keys, probability=0.0), images)


@pytest.mark.parametrize("function", [color.to_grey, color.solarize])
def test_probability_is_per_sample(function):
    keys = jax.random.split(jax.random.key(6), 3000)
    images = jnp.broadcast_to(jnp.array([0.2, 0.6, 0.9], jnp.float32), (3000, 1, 2, 3))
    changed = np.asarray(function(images, keys, probability=0.2) != images).any((1, 2, 3))
    assert stats.binomtest(int(changed.sum()), 3000, 0.2).pvalue > 1e-3


def test_normalize():
    images = np.random.default_rng(0).random((2, 3, 4, 3), dtype=np.float32)
    found = color.normalize(jnp.asarray(images), (0.1, 0.2, 0.3), (0.5, 2.0, 4.0))
    expected = (images.astype(np.float64) - [0.1, 0.2, 0.3]) / [0.5, 2.0, 4.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
