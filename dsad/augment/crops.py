"""Random resized crops as two matrix products, with the coordinates of what was cut out."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.ops.resize import cubic

Convention = Literal["edges", "centres"]
Filter = Literal["bilinear", "bicubic"]


def random_resized_crop_box(
    key: jax.Array,
    size: jax.Array,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> jax.Array:
    """A random box (top, left, height, width), whole pixels as float32 (4,), inside an image.

    The rule of the common random resized crop: the box's share of the image is uniform in ``area``
    and its width / height log-uniform in ``aspect``; the first of ``tries`` draws that fits is
    placed uniformly. If none fits: the largest centred box whose aspect ratio is within bounds.
    ``size`` is the valid (height, width), (2,), at least one pixel each. One image; use vmap.
    """
    height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    uniform = jax.random.uniform(key, (2 * tries + 2,), jnp.float32)
    draws, place = uniform[:-2].reshape(tries, 2), uniform[-2:]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    pixels = height * width * (area[0] + (area[1] - area[0]) * draws[:, 0])
    ratio = jnp.exp(low + (high - low) * draws[:, 1])
    heights, widths = jnp.round(jnp.sqrt(pixels / ratio)), jnp.round(jnp.sqrt(pixels * ratio))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    found, first = jnp.any(fits), jnp.argmax(fits)

    tallest = jnp.clip(jnp.round(width / aspect[0]), 1, height)
    widest = jnp.clip(jnp.round(height * aspect[1]), 1, width)
    box_height = jnp.where(found, heights[first], tallest)
    box_width = jnp.where(found, widths[first], widest)
    room = jnp.stack([height - box_height, width - box_width])
    # u < 1, but u * (room + 1) may round up to room + 1.
    placed = jnp.minimum(jnp.floor(place * (room + 1)), room)
    corner = jnp.where(found, placed, jnp.floor(room / 2))
    return jnp.concatenate([corner, jnp.stack([box_height, box_width])])


def _weights(
    start: jax.Array, extent: jax.Array, pixels: int, side: int, flip: jax.Array | None,
    kernel: Filter,
) -> jax.Array:  # fmt: skip
    """Antialiased weights (b, side, pixels) of intervals ``start``, ``extent`` (b,).

    The triangle is as wide as an output pixel, at least one input pixel, cut off at the interval's
    ends and renormalised to sum one; so is Keys' cubic with a = -0.5, twice as wide. For
    whole-pixel boxes everything before the divisions is an integer that float32 holds exactly
    (pixels * side up to 2^23): the doubled distance between the centres of input i and output o,
    times ``side``, is (2i + 1) * side - (2o + 1) * extent.
    """
    start, extent = start[:, None, None], extent[:, None, None]
    output = jnp.arange(side, dtype=jnp.float32)[None, :, None]
    if flip is not None:
        output = jnp.where(flip[:, None, None], side - 1 - output, output)
    centre = 2 * (jnp.arange(pixels, dtype=jnp.float32)[None, None, :] - start) + 1
    distance = jnp.abs(centre * side - (2 * output + 1) * extent)
    inside = (centre > 0) & (centre < 2 * extent)
    unit = 2 * jnp.maximum(extent, side)
    values = (
        jnp.maximum(unit - distance, 0) if kernel == "bilinear" else cubic(distance / unit, -0.5)
    )
    weights = jnp.where(inside, values, 0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def resized_crop(
    images: jax.Array,
    boxes: jax.Array,
    side: int,
    flip: jax.Array | None = None,
    kernel: Filter = "bilinear",
) -> jax.Array:
    """Cut ``boxes`` (b, 4) out of ``images`` (b, H, W, c) and resize them to (b, side, side, c).

    Equals Pillow's crop followed by a bilinear or bicubic resize (antialiased when shrinking),
    before rounding to integers and, for bicubic, clipping to 0 and 255: pixels outside the
    box, padding of the canvas included, have weight zero. Values keep the scale of the input
    (uint8 gives 0 to 255); the result is float32. Where ``flip`` (b,) bool is True the result is
    mirrored left to right. A single (H, W, c) image with a (4,) box and scalar flip gives
    (side, side, c).
    """
    if images.ndim == 3:
        single = None if flip is None else flip[None]
        return resized_crop(images[None], boxes[None], side, single, kernel)[0]
    rows = _weights(boxes[:, 0], boxes[:, 2], images.shape[1], side, None, kernel)
    columns = _weights(boxes[:, 1], boxes[:, 3], images.shape[2], side, flip, kernel)
    # With the channels between rows and columns both contractions are plain matrix products
    # without a transpose between them, and colour operations that follow run over whole rows.
    lines = jnp.swapaxes(images, 2, 3).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    lines = jnp.einsum("bhcw,btw->bhct", lines, columns, precision=exact)
    lines = jnp.einsum("bsh,bhct->bsct", rows, lines, precision=exact)
    return jnp.swapaxes(lines, 2, 3)


def box_coordinates(
    box: jax.Array, size: jax.Array, flip: jax.Array, *, convention: Convention = "edges"
) -> jax.Array:
    """Boxes (..., 4) in pixels as (x0, y0, x1, y1) relative to the image ``size`` (..., 2).

    "edges" gives the outer edges of the box, left/W to (left + width)/W. "centres" gives the
    centres of its outermost pixels over size - 1, as DS2 and PixPro publish it: under that rule two
    views of the same point can disagree by up to one pixel. Where ``flip`` (...) is True, x0 and x1
    change places, so that x0 always belongs to the left side of the view.
    """
    height, width = size[..., 0].astype(jnp.float32), size[..., 1].astype(jnp.float32)
    top, left, box_height, box_width = (box[..., i].astype(jnp.float32) for i in range(4))
    if convention == "centres":
        height, width = jnp.maximum(height - 1, 1), jnp.maximum(width - 1, 1)
        box_height, box_width = box_height - 1, box_width - 1
    x0, x1 = left / width, (left + box_width) / width
    y0, y1 = top / height, (top + box_height) / height
    return jnp.stack([jnp.where(flip, x1, x0), y0, jnp.where(flip, x0, x1), y1], axis=-1)


def whole_images(batch: Mapping[str, Any], side: int) -> jax.Array:
    """The images of a batch of canvases, stretched to (b, side, side, 3) float32 in [0, 1]."""
    size = batch["size"]
    boxes = jnp.concatenate([jnp.zeros_like(size), size], axis=1).astype(jnp.float32)
    return resized_crop(batch["image"], boxes, side) / 255
