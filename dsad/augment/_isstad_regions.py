"""Regions of ISSTAD's synthetic corruption: draws, masks and what happens inside them.

Everything is drawn in pixels of the original image and evaluated at the working size (S, S): a
working pixel stands for the original pixel under its centre.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsad.augment._draws import integers, uniforms
from dsad.augment.blur import NO_BLUR, along_both, blur_matrix
from dsad.augment.color import JitterDraws, adjust_saturation, apply_jitter, draw_jitter
from dsad.core.rng import named

RECTANGLE, ELLIPSE, POLYGON = range(3)
#: Original pixels: corners keep this distance from the far end of the box, ...
MARGIN = 50
#: ... and rectangles and ellipses are at least this wide and high.
LEAST = 10
VERTICES = 8
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.4}
BLUR = (15.0, 20.0)
#: Which of the six colour changes contain jitter, greyscale and blur.
_JITTERS, _GREYS, _BLURS = (0, 3, 4), (1, 3, 5), (2, 4, 5)


class Shapes(NamedTuple):
    """Shapes of each sample in original pixels, integers.

    ``kind`` (b, n): RECTANGLE, ELLIPSE or POLYGON; ``corner`` (b, n, 2): x, y; ``extent``
    (b, n, 2): width and height, the far pixel x + width belongs to the shape; ``vertices``
    (b, n, 8, 2): x, y, of which the first ``count`` (b, n) are used; ``used`` (b, n) bool.
    """

    kind: jax.Array
    corner: jax.Array
    extent: jax.Array
    vertices: jax.Array
    count: jax.Array
    used: jax.Array


class Change(NamedTuple):
    """What happens inside the regions of each sample.

    ``jitter``: colour draws; ``grey``, ``blur``, ``noise`` (b,) bool; ``sigma`` (b,): original
    pixels; ``mirror`` (b, 2) bool: top to bottom, left to right; ``noise_key`` (b,) keys.
    """

    jitter: JitterDraws
    grey: jax.Array
    blur: jax.Array
    sigma: jax.Array
    mirror: jax.Array
    noise: jax.Array
    noise_key: jax.Array


def draw_shapes(keys: jax.Array, box: jax.Array, n_max: int) -> Shapes:
    """1 to ``n_max`` shapes in each ``box`` (b, 4), (x1, y1, x2, y2) in original pixels.

    Corners and vertices are uniform from x1 to x2 - 50 and y1 to y2 - 50, widths from 10 to
    x2 - x, heights alike, all ends included. Where the box is under 50 pixels wide or high the
    published ranges are empty: corners then come from its first half, and the least width is what
    is left.
    """
    batch = keys.shape[0]
    number = integers(uniforms(keys, "number of shapes", ()), 1, n_max)
    u = uniforms(keys, "shapes", (n_max, 6 + 2 * VERTICES))
    near, far = box[:, None, :2], box[:, None, 2:]
    side = far - near
    margin = jnp.where(side >= MARGIN, MARGIN, (side + 1) // 2)
    last = far - margin
    corner = integers(u[..., 1:3], near, last)
    room = far - corner
    return Shapes(
        kind=integers(u[..., 0], 0, 2),
        corner=corner,
        extent=integers(u[..., 3:5], jnp.minimum(LEAST, room), room),
        vertices=integers(
            u[..., 6:].reshape(batch, n_max, VERTICES, 2), near[:, :, None], last[:, :, None]
        ),
        count=integers(u[..., 5], 3, VERTICES),
        used=jnp.arange(n_max)[None, :] < number[:, None],
    )


def _centres(length: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Working-pixel centres along axes of ``length`` (b,) original pixels, (b, side) each.

    The original pixel under the centre, exact as an integer, and the centre's coordinate, which is
    k at the centre of original pixel k.
    """
    doubled = (2 * jnp.arange(side, dtype=jnp.int32) + 1)[None, :] * length[:, None]
    return doubled // (2 * side), doubled.astype(jnp.float32) / (2 * side) - 0.5


def shape_masks(shapes: Shapes, size: jax.Array, side: int) -> jax.Array:
    """Masks (b, n, side, side) bool of the shapes in images of ``size`` (b, 2) height, width.

    Ellipses fill the box of the rectangle with the same corner and extent; polygons are filled by
    the even-odd rule, so parts that are covered twice stay empty.
    """
    row, y = (v[:, None, :, None] for v in _centres(size[:, 0], side))
    column, x = (v[:, None, None, :] for v in _centres(size[:, 1], side))
    left, top = (shapes.corner[..., i, None, None] for i in range(2))
    width, height = (shapes.extent[..., i, None, None] for i in range(2))
    rectangle = (row >= top) & (row <= top + height) & (column >= left) & (column <= left + width)
    # Distances from the centre in semi-axes; the box is one pixel wider than the extent.
    across = (2 * (x - left) - width) / (width + 1)
    along = (2 * (y - top) - height) / (height + 1)
    ellipse = jnp.square(across) + jnp.square(along) <= 1
    kind = shapes.kind[..., None, None]
    polygon = _even_odd(shapes, x, y)
    mask = jnp.where(kind == RECTANGLE, rectangle, jnp.where(kind == ELLIPSE, ellipse, polygon))
    return mask & shapes.used[..., None, None]


def _even_odd(shapes: Shapes, x: jax.Array, y: jax.Array) -> jax.Array:
    """True where a ray to the right crosses the outline an odd number of times."""
    points = shapes.vertices.astype(jnp.float32)
    here = jnp.arange(VERTICES)[None, None, :]
    count = shapes.count[..., None]
    following = jnp.where(here + 1 < count, here + 1, 0)
    ends = jnp.take_along_axis(points, following[..., None], axis=2)
    inside = jnp.zeros((), bool)
    for i in range(VERTICES):
        (x0, y0), (x1, y1) = (
            (p[:, :, i, 0, None, None], p[:, :, i, 1, None, None]) for p in (points, ends)
        )
        crosses = ((y0 <= y) != (y1 <= y)) & (i < shapes.count[..., None, None])
        slope = (x1 - x0) / jnp.where(y1 == y0, 1, y1 - y0)
        crossing = jnp.where(crosses, x0 + (y - y0) * slope, -jnp.inf)
        inside = inside ^ (x < crossing)
    return inside


def draw_change(keys: jax.Array) -> Change:
    """One of three families with equal probability for each key (b,): colour, flip or noise.

    Colour is one of six: jitter, greyscale, blur or two of them; a flip is horizontal, vertical or
    both, all equally likely.
    """
    u = uniforms(keys, "change", (4,))
    family = integers(u[:, 0], 0, 2)
    colour = jnp.where(family == 0, integers(u[:, 1], 0, 5), -1)
    flip = jnp.where(family == 1, integers(u[:, 2], 0, 2), -1)

    def among(options: tuple[int, ...]) -> jax.Array:
        return jnp.any(colour[:, None] == jnp.array(options)[None, :], axis=1)

    jitter = draw_jitter(jax.vmap(lambda k: named(k, "jitter"))(keys), **JITTER, probability=1.0)
    return Change(
        jitter=jitter._replace(apply=among(_JITTERS)),
        grey=among(_GREYS),
        blur=among(_BLURS),
        sigma=BLUR[0] + (BLUR[1] - BLUR[0]) * u[:, 3],
        mirror=jnp.stack([flip >= 1, (flip == 0) | (flip == 2)], axis=1),
        noise=family == 2,
        noise_key=jax.vmap(lambda k: named(k, "noise"))(keys),
    )


def apply_change(images: jax.Array, change: Change, size: jax.Array) -> jax.Array:
    """The whole images (b, S, S, 3) in [0, 1], changed; ``size`` (b, 2) original height and width.

    Jitter and greyscale as in ``color``; the blur's standard deviation is in original pixels; noise
    is half of the image and half of values uniform in 0 .. 255, drawn anew for each working pixel
    and channel.
    """
    side = images.shape[1]
    images = apply_jitter(images, change.jitter)
    images = adjust_saturation(images, jnp.where(change.grey, jnp.float32(0), jnp.float32(1)))
    sigma = change.sigma[:, None] * side / size.astype(jnp.float32)
    sigma = jnp.where(change.blur[:, None], sigma, NO_BLUR)
    blurs = (blur_matrix(sigma[:, i], side, side - 1) for i in range(2))
    # With the rows of its matrix in reverse order the blur also mirrors.
    rows, columns = (
        jnp.where(change.mirror[:, i, None, None], jnp.flip(matrix, 1), matrix)
        for i, matrix in enumerate(blurs)
    )
    images = jnp.clip(along_both(images, rows, columns), 0, 1)  # sums may round above 1
    mixed = 0.5 * images + (0.5 / 255) * _noise(change.noise_key, images.shape)
    return jnp.where(change.noise[:, None, None, None], mixed, images)


def _noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform 0 .. 255 as float32 of ``shape`` (b, ...), four values from every 32 random bits."""
    count = math.prod(shape[1:])
    words = jax.vmap(lambda k: jax.random.bits(k, (-(-count // 4),), jnp.uint32))(keys)
    parts = [(words >> shift) & 255 for shift in (0, 8, 16, 24)]
    values = jnp.concatenate(parts, axis=1)[:, :count]
    return values.astype(jnp.float32).reshape(shape)


def without_background(images: jax.Array) -> jax.Array:
    """Images (b, S, S, 3) in [0, 1] whose pixels up to the mean luma take the others' mean colour.

    The mean colour is cut to whole 8-bit steps. All sums are of integers, so that no compiler's
    order of additions decides on which side of the mean a pixel is. An image of one luma has
    nothing above the mean and stays as it is.
    """
    side = images.shape[1]
    values = jnp.round(255 * images).astype(jnp.int32)
    luma = 299 * values[..., 0] + 587 * values[..., 1] + 114 * values[..., 2]
    rows = jnp.sum(luma, axis=2)
    # floor(sum / side^2) without the sum, which does not fit 32 bits.
    mean = (jnp.sum(rows // side, axis=1) + jnp.sum(rows % side, axis=1) // side) // side
    bright = (luma > mean[:, None, None])[..., None]
    count = jnp.sum(bright, axis=(1, 2))
    total = jnp.sum(jnp.where(bright, values, 0), axis=(1, 2))
    colour = (total // jnp.maximum(count, 1)).astype(jnp.float32) / 255
    keep = bright | (count == 0)[:, None, None]
    return jnp.where(keep, images, colour[:, None, None, :])
