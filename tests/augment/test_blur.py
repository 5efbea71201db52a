import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from dsad.augment.blur import draw_blur, gaussian_blur, random_blur

blur = jax.jit(gaussian_blur, static_argnames="radius")


def scipy_blur(image, sigma, radius):
    out = image.astype(np.float64)
    for axis in (0, 1):
        out = ndimage.gaussian_filter1d(out, sigma, axis=axis, mode="nearest", radius=radius)
    return out


@pytest.mark.parametrize("shape", [(40, 40), (23, 31), (5, 4)], ids=str)
def test_blur_equals_scipy(shape):
    """Including images smaller than the kernel."""
    images = np.random.default_rng(0).random((4, *shape, 3), dtype=np.float32)
    sigma = np.array([0.1, 0.7, 1.3, 2.0], np.float32)
    found = blur(images, sigma, radius=8)
    assert found.dtype == jnp.float32
    for i in range(4):
        np.testing.assert_allclose(found[i], scipy_blur(images[i], sigma[i], 8), atol=2e-6)


def test_truncation_is_negligible():
    image = np.random.default_rng(1).random((1, 64, 64, 1), dtype=np.float32)
    found = blur(jnp.asarray(image), jnp.array([2.0], jnp.float32), radius=8)
    np.testing.assert_allclose(found[0], scipy_blur(image[0], 2.0, 30), atol=2e-4)


def test_constant_stays_and_mean_of_an_impulse_is_kept():
    constant = jnp.full((2, 9, 11, 3), 0.37, jnp.float32)
    sigma = jnp.array([0.3, 3.0], jnp.float32)
    np.testing.assert_allclose(blur(constant, sigma, radius=12), constant, atol=1e-6)
    impulse = jnp.zeros((1, 33, 33, 1), jnp.float32).at[0, 16, 16, 0].set(1)
    blurred = np.asarray(blur(impulse, sigma[1:], radius=12), np.float64)[0, :, :, 0]
    assert blurred.sum() == pytest.approx(1, abs=1e-6)
    place = np.arange(33) - 16
    assert (blurred.sum(0) * place**2).sum() == pytest.approx(9, rel=0.01)  # sigma squared


def test_random_blur_draws():
    keys = jax.random.split(jax.random.key(2), 3000)
    sigma, apply = (np.asarray(x) for x in draw_blur(keys, sigma=(0.1, 2.0), probability=0.1))
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    images = jnp.zeros((3000, 4, 4, 1), jnp.float32).at[:, 2, 2].set(1)
    jitted = jax.jit(random_blur, static_argnames=("sigma", "probability"))
    found = np.asarray(jitted(images, keys, sigma=(0.8, 2.0), probability=0.1))
    changed = (found != np.asarray(images)).any((1, 2, 3))
    np.testing.assert_array_equal(changed, apply)
    assert stats.binomtest(int(changed.sum()), 3000, 0.1).pvalue > 1e-3
    always = np.asarray(jitted(images, keys, sigma=(0.8, 2.0), probability=1.0))
    np.testing.assert_allclose(found[changed], always[changed], atol=1e-7)
    assert (always != np.asarray(images)).any((1, 2, 3)).all()
