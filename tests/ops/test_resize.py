"""Resampling and smoothing against scipy and plain float64 numpy."""

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dsad.core.errors import ConfigError
from dsad.ops.resize import gaussian_smooth, match_grid, neighbourhood_mean, resize_maps

RNG = np.random.default_rng(0)


def interpolated(image, size, align_corners):
    """Bilinear samples by scipy at coordinates written from the definition."""
    axes = []
    for n, m in zip(image.shape, size, strict=True):
        i = np.arange(m)
        scaled = (i + 0.5) * n / m - 0.5
        axes.append(i * (n - 1) / max(m - 1, 1) if align_corners else np.clip(scaled, 0, n - 1))
    grid = np.meshgrid(*axes, indexing="ij")
    return ndimage.map_coordinates(image.astype(np.float64), grid, order=1, mode="nearest")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(56, 30), (7, 5), (3, 9), (1, 1), (224, 11)])
def test_resize_equals_scipy(size, align_corners):
    maps = RNG.standard_normal((2, 7, 5)).astype(np.float32)
    found = resize_maps(maps, size, align_corners)
    expected = np.stack([interpolated(m, size, align_corners) for m in maps])
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_upsampling_equals_pillow():
    maps = RNG.standard_normal((1, 28, 28)).astype(np.float32)
    expected = Image.fromarray(maps[0]).resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resize_maps(maps, (224, 224))[0], np.asarray(expected), atol=1e-5)


def test_resize_of_one_pixel_and_constant_maps():
    one = np.full((1, 1, 1), 2.5, np.float32)
    for align_corners in (False, True):
        np.testing.assert_array_equal(resize_maps(one, (4, 3), align_corners), 2.5)
    flat = np.full((1, 6, 6), 0.3, np.float32)
    np.testing.assert_allclose(resize_maps(flat, (50, 37)), np.float32(0.3), rtol=3e-7)


def test_match_grid_acts_per_channel():
    features = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
    found = match_grid(features, (8, 9))
    for c in range(3):
        expected = np.stack([interpolated(m, (8, 9), False) for m in features[..., c]])
        np.testing.assert_allclose(found[..., c], expected, atol=2e-6)
    repeated = match_grid(features, (8, 12), "nearest")
    np.testing.assert_array_equal(repeated, features.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_array_equal(match_grid(features, (4, 6)), features)


@pytest.mark.parametrize(("sigma", "truncate"), [(4.0, 4.0), (0.7, 3.0), (9.0, 4.0), (0.1, 4.0)])
@pytest.mark.parametrize("shape", [(2, 40, 31), (1, 5, 3), (1, 1, 1)])
def test_smoothing_equals_scipy(shape, sigma, truncate):
    maps = RNG.standard_normal(shape).astype(np.float32)
    expected = np.stack(
        [ndimage.gaussian_filter(np.float64(m), sigma, truncate=truncate) for m in maps]
    )
    found = jax.jit(gaussian_smooth, static_argnums=(1, 2))(maps, sigma, truncate)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(gaussian_smooth(maps, 0.0), maps)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("grid", [(6, 7), (2, 1)])
def test_neighbourhood_mean_equals_scipy(size, grid):
    features = RNG.standard_normal((2, *grid, 3)).astype(np.float32)
    window = (1, size, size, 1)
    zeros = ndimage.uniform_filter(features.astype(np.float64), window, mode="constant")
    share = ndimage.uniform_filter(np.ones(features.shape), window, mode="constant")
    np.testing.assert_allclose(neighbourhood_mean(features, size), zeros / share, atol=1e-6)
    np.testing.assert_allclose(neighbourhood_mean(features, size, False), zeros, atol=1e-6)


def test_published_borders_of_a_constant_map():
    found = neighbourhood_mean(np.ones((1, 5, 5, 1), np.float32), 3, count_normalised=False)
    np.testing.assert_allclose(found[0, :2, :2, 0], [[4 / 9, 6 / 9], [6 / 9, 1]], rtol=1e-6)
    np.testing.assert_allclose(neighbourhood_mean(np.ones((1, 5, 5, 1), np.float32)), 1, rtol=1e-6)


def test_bad_input():
    maps, features = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4, 2), np.float32)
    with pytest.raises(ConfigError, match=r"non-empty \(b, h, w\) array, found \(1, 4, 4, 2\)"):
        resize_maps(features, (8, 8))
    with pytest.raises(ConfigError, match=r"size: expected .* found \(0, 8\)"):
        resize_maps(maps, (0, 8))
    with pytest.raises(ConfigError, match="found 'cubic'"):
        match_grid(features, (8, 8), "cubic")
    with pytest.raises(ConfigError, match="sigma >= 0"):
        gaussian_smooth(maps, -1.0)
    with pytest.raises(ConfigError, match="odd number >= 1, found 2"):
        neighbourhood_mean(features, 2)
