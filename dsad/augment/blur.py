"""Gaussian blur with one standard deviation per sample, as two matrix products."""

import math

import jax
import jax.numpy as jnp

#: The kernel ends at this many of the largest standard deviations: 6e-5 of the mass lies beyond.
TRUNCATE = 4.0
#: A standard deviation, in pixels, so small that all weights but the middle one round to 0.
NO_BLUR = 1e-3


def taps(sigma: jax.Array, radius: int) -> tuple[jax.Array, jax.Array]:
    """Weights (b, radius + 2) at distances 0, 1, ... of Gaussians ``sigma`` (b,) cut at ``radius``.

    And their tails: the sum of the weights at that distance and beyond. The last of both is 0.
    """
    offsets = jnp.arange(radius + 1, dtype=jnp.float32)[None, :]
    half = jnp.exp(-0.5 * jnp.square(offsets / sigma[:, None]))
    half = half / (2 * jnp.sum(half, axis=1, keepdims=True) - half[:, :1])
    tail = jnp.flip(jnp.cumsum(jnp.flip(half, 1), axis=1), 1)
    return jnp.pad(half, ((0, 0), (0, 1))), jnp.pad(tail, ((0, 0), (0, 1)))


def blur_matrix(sigma: jax.Array, pixels: int, radius: int) -> jax.Array:
    """Blur matrices (b, pixels, pixels): row o holds the weights of the inputs of output o.

    Pixels beyond the ends count as copies of the outermost ones: those collect the kernel's tails.
    A ``sigma`` of NO_BLUR pixels gives the identity.
    """
    half, tail = taps(sigma, radius)
    place = jnp.arange(pixels)
    distance = jnp.abs(place[:, None] - place[None, :])
    band = half[:, jnp.minimum(distance, radius + 1)]
    first = tail[:, jnp.minimum(place, radius + 1)][:, :, None]
    ends = (place == 0)[None, None, :], (place == pixels - 1)[None, None, :]
    return jnp.where(ends[0], first, jnp.where(ends[1], jnp.flip(first, 1), band))


def gaussian_blur(images: jax.Array, sigma: jax.Array, *, radius: int) -> jax.Array:
    """Blur (b, h, w, c) images, h and w at least 2, with standard deviations ``sigma`` (b,) pixels.

    ``sigma`` (b, 2) gives one along the height and one along the width.
    The sampled Gaussian, cut off at ``radius`` pixels and renormalised; edge pixels are repeated
    (scipy's mode "nearest"; Pillow, whose blur approximates the Gaussian by boxes, does the same).
    """
    height, width = images.shape[1:3]
    along = (sigma, sigma) if sigma.ndim == 1 else (sigma[:, 0], sigma[:, 1])
    rows = blur_matrix(along[0], height, radius)
    same = sigma.ndim == 1 and height == width
    return along_both(images, rows, rows if same else blur_matrix(along[1], width, radius))


def along_both(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """``rows`` (b, s, h) and ``columns`` (b, t, w) times images (b, h, w, c): (b, s, t, c)."""
    lines = jnp.swapaxes(images, 2, 3)  # as in crops.resized_crop: no transposes in between
    exact = jax.lax.Precision.HIGHEST
    lines = jnp.einsum("bsh,bhcw->bscw", rows, lines, precision=exact)
    lines = jnp.einsum("bscw,btw->bsct", lines, columns, precision=exact)
    return jnp.swapaxes(lines, 2, 3)


def draw_blur(
    keys: jax.Array, *, sigma: tuple[float, float], probability: float
) -> tuple[jax.Array, jax.Array]:
    """Standard deviations (b,) in pixels, uniform in ``sigma``, and whether to blur (b,) bool."""
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (2,), jnp.float32))(keys)
    return sigma[0] + (sigma[1] - sigma[0]) * uniform[:, 0], uniform[:, 1] < probability


def random_blur(
    images: jax.Array, keys: jax.Array, *, sigma: tuple[float, float], probability: float
) -> jax.Array:
    """With ``probability`` per sample, blur with a standard deviation drawn from ``sigma``."""
    amount, apply = draw_blur(keys, sigma=sigma, probability=probability)
    blurred = gaussian_blur(images, amount, radius=math.ceil(TRUNCATE * sigma[1]))
    if probability >= 1:
        return blurred
    return jnp.where(apply[:, None, None, None], blurred, images)
