"""Structural similarity of images (Wang et al. 2004), differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

#: Window of the published index: 11 taps of a Gaussian of 1.5 pixels.
RADIUS, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2


@functools.lru_cache(maxsize=16)
def _band(pixels: int) -> np.ndarray:
    """The window along one axis as a matrix; what lies outside the image counts as zero."""
    taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    taps /= taps.sum()
    gap = np.arange(pixels)[:, None] - np.arange(pixels)[None, :]
    inside = np.abs(gap) <= RADIUS
    return np.where(inside, taps[np.clip(gap + RADIUS, 0, 2 * RADIUS)], 0.0).astype(np.float32)


def _filtered(x: jax.Array) -> jax.Array:
    rows, columns = jnp.asarray(_band(x.shape[1])), jnp.asarray(_band(x.shape[2]))
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("th,bhwc->btwc", rows, x, precision=exact)
    return jnp.einsum("sw,btwc->btsc", columns, x, precision=exact)


def ssim_map(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity at every pixel and channel of two images (b, h, w, c), in [−1, 1].

    The constants suit values in [0, 1]. Borders are padded with zeros (the common training form),
    which lowers the index within 5 pixels of an edge.
    """
    mean_x, mean_y = _filtered(x), _filtered(y)
    var_x = _filtered(x * x) - mean_x * mean_x
    var_y = _filtered(y * y) - mean_y * mean_y
    both = _filtered(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + C1) * (2 * both + C2)
    return top / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean structural similarity () of two batches of images (b, h, w, c), see ``ssim_map``."""
    return jnp.mean(ssim_map(x, y))
