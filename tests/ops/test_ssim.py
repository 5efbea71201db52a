"""Structural similarity against scipy's Gaussian filter and the published values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dsad.ops import ssim


def oracle(x, y):
    """The index in float64: filters of the products, zeros outside the image."""
    f = lambda a: ndimage.gaussian_filter(  # noqa: E731
        a, 1.5, axes=(1, 2), mode="constant", radius=5
    )
    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = f(x), f(y)
    vx, vy, xy = f(x * x) - mx**2, f(y * y) - my**2, f(x * y) - mx * my
    top = (2 * mx * my + 1e-4) * (2 * xy + 9e-4)
    return top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))


def test_equals_the_definition():
    g = np.random.default_rng(0)
    x = g.uniform(size=(2, 23, 31, 3)).astype(np.float32)
    y = np.clip(x + 0.3 * g.standard_normal(x.shape), 0, 1).astype(np.float32)
    np.testing.assert_allclose(ssim.ssim_map(x, y), oracle(x, y), atol=2e-5)
    assert float(ssim.ssim(x, y)) == pytest.approx(oracle(x, y).mean(), abs=1e-6)


def test_published_values():
    half, quarter = jnp.full((1, 64, 64, 3), 0.5), jnp.full((1, 64, 64, 3), 0.25)
    found = np.asarray(ssim.ssim_map(half, quarter))
    assert found.mean() == pytest.approx(0.763405, abs=2e-6)
    assert found[0, 6:-6, 6:-6].mean() == pytest.approx(0.800064, abs=2e-6)
    assert float(ssim.ssim(half, half)) == 1
    impulse = jnp.zeros((1, 21, 21, 1)).at[0, 10, 10, 0].set(1.0)
    assert float(ssim._filtered(impulse)[0, 10, 10, 0]) == pytest.approx(0.0707622, abs=1e-7)


def test_gradient_pulls_towards_the_image():
    x = np.random.default_rng(0).uniform(size=(1, 16, 16, 1)).astype(np.float32)
    y = jnp.full_like(x, 0.5)
    step = 0.5 * jax.grad(lambda y: -ssim.ssim(jnp.asarray(x), y))(y) * x.size
    assert ssim.ssim(x, y - 0.01 * step) > ssim.ssim(x, y)
