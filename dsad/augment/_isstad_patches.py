"""Patches of ISSTAD's synthetic corruption: small rectangles changed one after another.

Everything is drawn in original pixels. Each patch is worked on in a window of fixed size, so a
patch costs the same in an image of any size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsad.augment._draws import integers, uniforms
from dsad.augment.blur import NO_BLUR, TRUNCATE, along_both, taps
from dsad.augment.color import JitterDraws, adjust_saturation, apply_jitter, draw_jitter
from dsad.core.rng import named

MOST = 100
#: Sides of a patch go from this many original pixels to about an eighth of the image more.
LEAST = 8
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BLUR = (0.1, 2.0)
#: Which of the eight changes contain jitter, greyscale, blur and the two flips.
_JITTERS, _GREYS, _BLURS = (0, 3, 6, 7), (1, 3, 6, 7), (2, 3, 6, 7)
_LEFT_RIGHT, _TOP_BOTTOM = (4, 6), (5, 7)


class Patches(NamedTuple):
    """Patches of each sample, in the order of their application.

    ``corner`` and ``extent`` (b, 100, 2) int32: top, left and height, width in working pixels;
    ``jitter``: colour draws (b, 100, ...); ``grey`` (b, 100) bool; ``sigma`` (b, 100, 2): working
    pixels along height and width, tiny where there is no blur; ``mirror`` (b, 100, 2) bool: top to
    bottom, left to right; ``used`` (b, 100) bool.
    """

    corner: jax.Array
    extent: jax.Array
    jitter: JitterDraws
    grey: jax.Array
    sigma: jax.Array
    mirror: jax.Array
    used: jax.Array


def window(side: int) -> int:
    """Pixels of the square window that holds every patch of an image of ``side`` pixels."""
    return side // 8 + LEAST


def draw_patches(keys: jax.Array, size: jax.Array, side: int) -> Patches:
    """1 to 100 patches for images of ``size`` (b, 2), original height and width, at ``side``.

    Heights are uniform integers from 8 to floor((H - 8) / 8) + 8 original pixels, widths alike, and
    the place is uniform among those that fit. A patch takes the working pixels whose centres it
    covers, at least one. Originals smaller than the working size count as being of that size, which
    bounds the patches by the window: lengths are then working pixels.
    """
    number = integers(uniforms(keys, "number of patches", ()), 1, MOST)
    u = uniforms(keys, "patches", (MOST, 6))
    size = jnp.maximum(size, side)[:, None, :]
    extent = integers(u[..., 0:2], LEAST, (size - LEAST) // 8 + LEAST)
    corner = integers(u[..., 2:4], 0, size - extent)
    # The first working pixel whose centre, (2 i + 1) * size / (2 side), is not before the edge.
    first, end = ((2 * side * edge + size - 1) // (2 * size) for edge in (corner, corner + extent))
    first = jnp.minimum(first, side - 1)
    option = integers(u[..., 4], 0, 7)

    def among(options: tuple[int, ...]) -> jax.Array:
        return jnp.any(option[..., None] == jnp.array(options)[None, None, :], axis=-1)

    apart = jax.vmap(lambda k: jax.random.split(named(k, "jitter"), MOST))(keys)
    jitter = jax.vmap(lambda k: draw_jitter(k, **JITTER, probability=1.0))(apart)
    sigma = (BLUR[0] + (BLUR[1] - BLUR[0]) * u[..., 5:]) * side / size.astype(jnp.float32)
    return Patches(
        corner=first,
        extent=jnp.maximum(end - first, 1),
        jitter=jitter._replace(apply=among(_JITTERS)),
        grey=among(_GREYS),
        sigma=jnp.where(among(_BLURS)[..., None], sigma, NO_BLUR),
        mirror=jnp.stack([among(_TOP_BOTTOM), among(_LEFT_RIGHT)], axis=-1),
        used=jnp.arange(MOST)[None, :] < number[:, None],
    )


def _filters(sigma: jax.Array, extent: jax.Array, mirror: jax.Array, pixels: int) -> jax.Array:
    """Matrices (b, pixels, pixels) that blur the first ``extent`` (b,) pixels, then mirror them.

    The patch's edge pixels are repeated beyond it, so the first and the last column collect the
    kernel's tails. What comes out beyond the patch has no meaning.
    """
    radius = math.ceil(TRUNCATE * BLUR[1])
    half, tail = taps(sigma, radius)
    place, last = jnp.arange(pixels, dtype=jnp.int32)[None, :], extent[:, None] - 1
    out = jnp.where(mirror[:, None], last - place, place)

    def at(table: jax.Array, distance: jax.Array) -> jax.Array:
        return jnp.take_along_axis(table, jnp.clip(distance, 0, radius + 1), axis=1)

    between = jnp.abs(out[:, :, None] - place[:, None, :])
    band = at(half, between.reshape(-1, pixels * pixels)).reshape(between.shape)
    first = (place == 0)[:, None, :]
    end = (place == last)[:, None, :]
    left, right = at(tail, out)[:, :, None], at(tail, last - out)[:, :, None]
    matrix = jnp.where(first, left, jnp.where(end, right, band))
    matrix = jnp.where(place[:, None, :] > last[:, :, None], 0, matrix)
    return jnp.where((last == 0)[:, :, None], first.astype(jnp.float32), matrix)


def _changed(windows: jax.Array, patch: Patches, inside: jax.Array) -> jax.Array:
    """Jitter, greyscale, blur, flip of the patches at the origins of ``windows`` (b, P, P, 3)."""
    pixels = windows.shape[1]
    out = apply_jitter(windows, patch.jitter, inside=inside)
    out = adjust_saturation(out, jnp.where(patch.grey, jnp.float32(0), jnp.float32(1)))
    rows, columns = (
        _filters(patch.sigma[:, i], patch.extent[:, i], patch.mirror[:, i], pixels)
        for i in range(2)
    )
    # Without the barrier the colours are computed again for each use of the product.
    return jnp.clip(along_both(lax.optimization_barrier(out), rows, columns), 0, 1)


def apply_patches(
    images: jax.Array, patches: Patches, step: float, *, label_all: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The images (b, S, S, 3) with the used patches changed one after another, and their labels.

    A patch in which no value changes by more than ``step`` is left as it is and unlabelled;
    ``label_all`` labels it all the same. Labels are (b, S, S) bool.
    """
    side = images.shape[1]
    pixels = window(side)
    # Image and label in one array; the margin lets every window start at its patch.
    state = jnp.concatenate([images, jnp.zeros_like(images[..., :1])], axis=-1)
    state = jnp.pad(state, ((0, 0), (0, pixels), (0, pixels), (0, 0)))
    state = jnp.swapaxes(state, 2, 3)
    place = jnp.arange(pixels)

    def paint(state: jax.Array, patch: Patches) -> tuple[jax.Array, None]:
        def cut(image: jax.Array, at: jax.Array) -> jax.Array:
            return lax.dynamic_slice(image, (at[0], 0, at[1]), (pixels, 4, pixels))

        def paste(image: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(image, part, (at[0], 0, at[1]))

        lines = jax.vmap(cut)(state, patch.corner)
        before = jnp.swapaxes(lines[:, :, :3], 2, 3)
        height, width = (patch.extent[:, i, None, None] for i in range(2))
        inside = (place[None, :, None] < height) & (place[None, None, :] < width)
        after = _changed(before, patch, inside)
        differs = jnp.any(jnp.abs(after - before) > step, axis=-1) & inside
        found = patch.used & jnp.any(differs, axis=(1, 2))
        paint_here = (inside & found[:, None, None])[:, :, None]
        label_here = inside & (patch.used if label_all else found)[:, None, None]
        colour = jnp.where(paint_here, jnp.swapaxes(after, 2, 3), lines[:, :, :3])
        label = jnp.where(label_here[:, :, None], jnp.float32(1), lines[:, :, 3:])
        part = jnp.concatenate([colour, label], axis=2)
        return jax.vmap(paste)(state, part, patch.corner), None

    in_turn = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), patches)
    state, _ = lax.scan(paint, state, in_turn)
    state = jnp.swapaxes(state, 2, 3)[:, :side, :side]
    return state[..., :3], state[..., 3] > 0
