"""GLASS's test of a class by the spectrum of its mean image (ECCV 2024, public code)."""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from dsad.ops.resize import resize_maps

SIDE, BLUR = 289, 39
#: Decibels above which a frequency counts, and what the region of those has to exceed.
LEVEL, DENSITY, RADIUS, POINTS = 170, 0.21, 12, 60


def fits_hypersphere(image: np.ndarray) -> bool:
    """Whether the mean training image (h, w, 3), RGB from 0 to 255, has a filled spectrum.

    Its strong frequencies, n of them, fill at least 0.21 of a box or a disc around frequency 0:
    max(n / (4 a_x a_y), n / pixels within ρ) > 0.21, and ρ > 12 and n > 60, with a_x and a_y their
    largest distances along the axes and ρ the largest of all. The published code rounds the image
    to whole numbers after each step; this does not.
    """
    channels = jnp.asarray(np.moveaxis(np.asarray(image, np.float32), 2, 0))
    resized = np.float64(resize_maps(channels, (SIDE, SIDE)))
    grey = np.tensordot([0.299, 0.587, 0.114], resized, axes=1)
    soft = ndimage.uniform_filter(grey, BLUR, mode="mirror")
    with np.errstate(divide="ignore"):
        strength = 20 * np.log(np.abs(np.fft.fftshift(np.fft.fft2(soft))))
    y, x = np.nonzero(strength > LEVEL)
    n, (y, x) = len(y), (np.abs(y - SIDE // 2), np.abs(x - SIDE // 2))
    if n <= POINTS:
        return False
    radius = np.sqrt(np.max(x**2 + y**2))
    at = np.arange(-SIDE, SIDE + 1)
    disc = np.count_nonzero(at[:, None] ** 2 + at[None, :] ** 2 <= np.max(x**2 + y**2))
    box = 4 * max(x.max(), 1) * max(y.max(), 1)
    return bool(max(n / box, n / disc) > DENSITY and radius > RADIUS)
