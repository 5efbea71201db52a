"""The spectrum test: round objects fill a disc of frequencies, textures and flat images do not."""

import numpy as np
import pytest
from scipy import ndimage

from dsad.ops.spectrum import fits_hypersphere

Y, X = np.mgrid[:96, :80] - np.array([47.5, 39.5])[:, None, None]
R = np.hypot(X, Y)
SHAPES = {
    "disc": R < 25,
    "small disc": R < 10,
    "ring": (R < 35) & (R > 15),
    "blob": np.exp(-(R**2) / 50),
    "box": (np.abs(X) < 20) & (np.abs(Y) < 10),
    "flat": np.full_like(R, 0.5),
    "faint disc": 0.4 + 0.001 * (R < 25),
    "noise": np.random.default_rng(0).random(R.shape),
    "dots": (np.abs(X) % 12 < 2) & (np.abs(Y) % 12 < 2),
}


def image(name):
    colours = np.array([1.0, 0.7, 0.3]) if name == "ring" else np.ones(3)
    return 255 * np.float64(SHAPES[name])[..., None] * colours


def oracle(pixels):
    """By a matrix of waves, sums over windows and points one by one."""
    at = [np.clip((np.arange(289) + 0.5) * n / 289 - 0.5, 0, n - 1) for n in pixels.shape[:2]]
    grid = np.meshgrid(*at, indexing="ij")
    red, green, blue = (
        ndimage.map_coordinates(c, grid, order=1) for c in np.moveaxis(pixels, 2, 0)
    )
    grey = np.pad(0.299 * red + 0.587 * green + 0.114 * blue, 19, mode="reflect")
    window = np.lib.stride_tricks.sliding_window_view(grey, (39, 39))
    soft = window.mean(axis=(2, 3))
    waves = np.exp(-2j * np.pi * np.outer(np.arange(-144, 145), np.arange(289)) / 289)
    size = np.abs(waves @ soft @ waves.T)
    points = np.argwhere(20 * np.log(np.maximum(size, 1e-9)) > 170) - 144
    n, rho = len(points), np.hypot(*points.T).max()
    box = n / (4 * max(1, np.abs(points[:, 0]).max()) * max(1, np.abs(points[:, 1]).max()))
    disc = n / sum(y * y + x * x <= rho**2 for y in range(-205, 206) for x in range(-205, 206))
    return max(box, disc) > 0.21 and rho > 12 and n > 60


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_judged_as_by_the_definition(name):
    assert fits_hypersphere(image(name)) == oracle(image(name))
    if "disc" in name or name in ("flat", "noise", "dots"):
        assert fits_hypersphere(image(name)) == (name in ("disc", "small disc"))
