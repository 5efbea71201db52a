"""Perlin noise: masks of local anomalies, and procedural textures to fill them with.

Masks are those of GLASS (Chen et al., "A Unified Anomaly Synthesis Strategy with Gradient Ascent
for Industrial Anomaly Detection and Localization", ECCV 2024) and, but for its constants, of DRAEM.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dsad.augment._draws import between, integers
from dsad.core.rng import named

Size = tuple[int, int]
#: Cells per side of the coarsest and finest noise are 1 and two to this power.
FINEST = 5
#: Noise above this is in the mask.
THRESHOLD = 0.5
#: Masks drawn before an image stays as it is; about one of twelve is empty.
ATTEMPTS = 100


def fade(t: jax.Array) -> jax.Array:
    """Perlin's quintic 6 t⁵ - 15 t⁴ + 10 t³."""
    return ((6 * t - 15) * t + 10) * t * t * t


def perlin(angles: jax.Array, cells: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Noise (...) at positions from 0 to 1, times √2, which brings it to [-1, 1].

    Args:
      angles: (m + 1, m + 1), of the unit gradients at the corners of cells.
      cells: (2,) int, cells along y and x, at most m.
      y: (...), positions from the top.
      x: (...), positions from the left.

    """
    at = [y * cells[0], x * cells[1]]
    low = [jnp.clip(jnp.floor(a).astype(jnp.int32), 0, n - 1) for a, n in zip(at, cells)]  # noqa: B905
    t = [a - i for a, i in zip(at, low, strict=True)]

    def corner(i: int, j: int) -> jax.Array:
        angle = angles[low[0] + i, low[1] + j]
        return jnp.cos(angle) * (t[0] - i) + jnp.sin(angle) * (t[1] - j)

    def along_y(j: int) -> jax.Array:
        return corner(0, j) + fade(t[0]) * (corner(1, j) - corner(0, j))

    return math.sqrt(2) * (along_y(0) + fade(t[1]) * (along_y(1) - along_y(0)))


def turned(size: Size, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions (h, w) from 0 to 1 of an image's pixels, turned about its centre in pixels."""
    height, width = size
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    rows = y * cosine - x * sine + (height - 1) / 2
    columns = y * sine + x * cosine + (width - 1) / 2
    return rows / height, columns / width


def _angles(key: jax.Array, name: str) -> jax.Array:
    side = 2**FINEST + 1
    return 2 * jnp.pi * jax.random.uniform(named(key, name), (side, side))


def _region(key: jax.Array, name: str, size: Size) -> jax.Array:
    """One thresholded noise (h, w) bool, turned by up to 90°, and nothing beyond its borders."""
    u = jax.random.uniform(named(key, name), (3,))
    y, x = turned(size, jnp.pi * (u[2] - 0.5))
    inside = (y >= 0) & (y < 1) & (x >= 0) & (x < 1)
    cells = 2 ** integers(u[:2], 0, FINEST)
    return inside & (perlin(_angles(key, f"{name} gradients"), cells, y, x) > THRESHOLD)


def _mask(key: jax.Array, size: Size) -> jax.Array:
    """One region, or what two have in common, or both: equally likely."""
    one, two = (_region(key, name, size) for name in ("region", "second region"))
    kind = jax.random.randint(named(key, "kind"), (), 0, 3)
    return jnp.where(kind == 0, one, jnp.where(kind == 1, one & two, one | two))


def perlin_masks(keys: jax.Array, size: Size) -> jax.Array:
    """Masks (b, h, w) bool, one key per sample (b,), drawn again until they are not empty."""

    def of_one(key: jax.Array) -> jax.Array:
        def draw(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + 1, _mask(jax.random.fold_in(key, state[0]), size)

        def empty(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            return ~jnp.any(state[1]) & (state[0] < ATTEMPTS)

        start = jnp.zeros((), jnp.int32), jnp.zeros(size, bool)
        return lax.while_loop(empty, draw, start)[1]

    return jax.vmap(of_one)(keys)


def textures(keys: jax.Array, size: Size) -> jax.Array:
    """Textures (b, h, w, 3) f32 in [0, 1], one key per sample (b,).

    Stripes, spots, smooth noise or grain between two colours, of any direction, wavelength (2
    pixels to the whole image) and contrast, bent by noise.
    """

    def of_one(key: jax.Array) -> jax.Array:
        u = jax.random.uniform(named(key, "texture"), (6,))
        positions = turned(size, 2 * jnp.pi * u[0])
        # In units of the diagonal, so that the corners of a turned image still lie within.
        diagonal = math.hypot(*size)
        y, x = (0.5 + (p - 0.5) * n / diagonal for p, n in zip(positions, size, strict=True))
        bend = 2 ** integers(jnp.stack([u[1], u[1]]), 0, FINEST)
        bent = perlin(_angles(key, "bend"), bend, y, x)
        most = math.log2(diagonal / 2)
        waves = 2 * jnp.pi * 2 ** between(u[2], (0.0, most))
        stripes = 0.5 + 0.5 * jnp.sin(waves * y + 4 * u[3] * bent)
        spots = stripes * (0.5 + 0.5 * jnp.sin(waves * x + 4 * u[3] * bent))
        grain = jax.random.uniform(named(key, "grain"), size)
        kind = integers(u[4], 0, 3)
        field = jnp.select(
            [kind == i for i in range(3)], [stripes, spots, 0.5 + 0.5 * bent], default=grain
        )
        field = jnp.clip(0.5 + (1 + 7 * u[5]) * (field - 0.5), 0, 1)[..., None]
        low, high = jax.random.uniform(named(key, "colours"), (2, 1, 1, 3))
        return low + field * (high - low)

    return jax.vmap(of_one)(keys)


def blended(
    images: jax.Array, fillings: jax.Array, masks: jax.Array, shares: jax.Array
) -> jax.Array:
    """Images (b, h, w, 3) whose ``masks`` (b, h, w) hold ``fillings``, unchanged elsewhere.

    ``shares`` (b,) of the image itself stay within the mask.
    """
    share = shares[:, None, None, None]
    return jnp.where(masks[..., None], share * images + (1 - share) * fillings, images)
