"""Colour changes of RGB images in [0, 1], with torchvision's semantics and one key per sample.

Images are (b, h, w, 3) float32. Inside, the work is done with the channels between rows and
columns, (b, h, 3, w), so that every operation runs over whole rows; XLA cancels the transposes
between consecutive functions of this package.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: ITU-R 601 luma.
LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = tuple(itertools.permutations(range(4)))


class JitterDraws(NamedTuple):
    """What a jitter does to each sample.

    ``factors`` (b, 3): brightness, contrast and saturation; ``shift`` (b,): hue, in turns;
    ``order`` (b, 4): the operations, first to last, as BRIGHTNESS ... HUE; ``apply`` (b,) bool.
    """

    factors: jax.Array
    shift: jax.Array
    order: jax.Array
    apply: jax.Array


def chosen(keys: jax.Array, probability: float) -> jax.Array:
    """Per-sample coin (b,) bool, True with ``probability``."""
    return jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(keys) < probability


def _lines(images: jax.Array) -> jax.Array:
    return jnp.swapaxes(images, -2, -1)


def _per_sample(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def _grey(lines: jax.Array) -> jax.Array:
    """Luma (b, h, 1, w)."""
    red, green, blue = (lines[:, :, i : i + 1] for i in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _exact_mean(grey: jax.Array, inside: jax.Array | None = None) -> jax.Array:
    """Mean (b,) of (b, h, 1, w) values in [0, 1], within 5e-7, as a sum of integers.

    ``inside`` (b, h, w) bool restricts it to the pixels that are True, at least one per sample.
    A float sum depends on how the compiler groups it, which differs with the size of a device's
    share of the batch; an integer sum does not. Adding 2^(23 - bits) leaves the value's first
    ``bits`` binary places as the low bits of the float, several times faster than a conversion.
    """
    height, width = grey.shape[1], grey.shape[3]
    height_bits, width_bits = math.ceil(math.log2(height)), math.ceil(math.log2(width))
    bits = min(23, 30 - width_bits)
    shift = max(0, bits + width_bits + height_bits - 30)  # both sums stay below 2^31
    base = np.float32(2.0 ** (23 - bits))
    fixed = jax.lax.bitcast_convert_type(grey + base, jnp.int32) - base.view(np.int32)
    if inside is not None:
        fixed = jnp.where(inside[:, :, None, :], fixed, 0)
    rows = jnp.sum(fixed, axis=(2, 3))
    total = jnp.sum((rows + (1 << shift >> 1)) >> shift, axis=1).astype(jnp.float32)
    if inside is None:
        return total * np.float32(2.0 ** (shift - bits) / (height * width))
    count = jnp.sum(inside, axis=(1, 2), dtype=jnp.int32).astype(jnp.float32)
    return total * np.float32(2.0 ** (shift - bits)) / count


def _blend_grey(lines: jax.Array, factor: jax.Array, share: jax.Array) -> jax.Array:
    """clip(factor * x + share * grey(x)), weights (b,): brightness (share 0) and saturation."""
    blended = _per_sample(factor) * lines + _per_sample(share) * _grey(lines)
    return jnp.clip(blended, 0, 1)


def _blend_mean(lines: jax.Array, factor: jax.Array, inside: jax.Array | None = None) -> jax.Array:
    """clip(factor * x + (1 - factor) * mean(grey(x))), factor (b,): contrast."""
    added = (1 - factor) * _exact_mean(_grey(lines), inside)
    return jnp.clip(_per_sample(factor) * lines + _per_sample(added), 0, 1)


def _shift_hue(lines: jax.Array, shift: jax.Array) -> jax.Array:
    """Turn the hue by ``shift`` (b,) turns at constant HSV value and saturation."""
    red, green, blue = (lines[:, :, i : i + 1] for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(chroma > 0, chroma, 1)
    # The hue in sixths of a turn; red is 0. Grey pixels come out as hue 0 with chroma 0.
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = hue + 6 * _per_sample(shift)
    # A channel loses its whole chroma within 1/6 turn of its opposite hue and nothing beyond 1/3.
    opposite = jnp.array([3, 5, 1], jnp.float32)[None, None, :, None]
    away = hue - opposite
    away = jnp.abs(away - 6 * jnp.round(away / 6))
    return jnp.clip(value - chroma * jnp.clip(2 - away, 0, 1), 0, 1)


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with the luma of each pixel, ``factor`` (b,) of the image, and clip to [0, 1]."""
    return _lines(_blend_grey(_lines(images), factor, 1 - factor))


def draw_jitter(
    keys: jax.Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> JitterDraws:
    """The draws of ``color_jitter`` for one key per sample (b,).

    Factors are uniform in [max(0, 1 - x), 1 + x], the hue shift in [-hue, hue], and the order of
    the four operations is one of 24.
    """
    widths = jnp.array([brightness, contrast, saturation], jnp.float32)
    low = jnp.maximum(1 - widths, 0)

    def draw(key: jax.Array) -> JitterDraws:
        uniform = jax.random.uniform(key, (6,), jnp.float32)
        factors = low + (1 + widths - low) * uniform[:3]
        order = (uniform[4] * len(_ORDERS)).astype(jnp.int32)  # u <= 1 - 2^-23, so at most 23
        return JitterDraws(
            factors,
            hue * (2 * uniform[3] - 1),
            jnp.array(_ORDERS, jnp.int32)[order],
            uniform[5] < probability,
        )

    return jax.vmap(draw)(keys)


def apply_jitter(
    images: jax.Array, draws: JitterDraws, *, hue: bool = True, inside: jax.Array | None = None
) -> jax.Array:
    """Brightness, contrast, saturation and hue of ``images`` changed in each sample's own order.

    The order differs between samples, so the contrast is done both before and after the hue, and
    brightness and saturation in every gap, each neutral in the samples where it is not its turn.
    Only the contrast needs a mean over the image; everything between two means is one pass.
    ``hue=False`` leaves the hue out, and with it what would follow it. ``inside`` (b, h, w) bool,
    at least one True per sample, says which pixels the contrast takes its mean of; default all.
    """
    lines = original = _lines(images)
    turn = jnp.argsort(draws.order, axis=1)  # (b, 4): when each operation has its turn
    late = turn[:, :3] > turn[:, HUE, None] if hue else jnp.zeros_like(turn[:, :3], dtype=bool)
    gap = 2 * late.astype(jnp.int32) + (turn[:, :3] > turn[:, CONTRAST, None])
    swap = turn[:, SATURATION] < turn[:, BRIGHTNESS]

    def pixel_operations(lines: jax.Array, number: int) -> jax.Array:
        active = gap == number
        factor = jnp.where(active, draws.factors, 1)
        share = 1 - factor[:, SATURATION]
        brightness, saturation = factor[:, BRIGHTNESS], factor[:, SATURATION]
        first = jnp.where(swap, saturation, brightness), jnp.where(swap, share, 0)
        second = jnp.where(swap, brightness, saturation), jnp.where(swap, 0, share)
        return _blend_grey(_blend_grey(lines, *first), *second)

    for after in range(2 if hue else 1):
        lines = pixel_operations(lines, 2 * after)
        mine = late[:, CONTRAST] == bool(after)
        lines = _blend_mean(lines, jnp.where(mine, draws.factors[:, CONTRAST], 1), inside)
        lines = pixel_operations(lines, 2 * after + 1)
        if hue and not after:
            lines = _shift_hue(lines, draws.shift)
    return _lines(jnp.where(_per_sample(draws.apply), lines, original))


def color_jitter(images: jax.Array, keys: jax.Array, *, hue: float, **amounts: float) -> jax.Array:
    """Change the colours of (b, h, w, 3) images as ``draw_jitter`` says, keys (b,) per sample."""
    return apply_jitter(images, draw_jitter(keys, hue=hue, **amounts), hue=hue > 0)


def to_grey(images: jax.Array, keys: jax.Array, *, probability: float) -> jax.Array:
    """With ``probability`` per sample, luma in all three channels."""
    lines = _lines(images)
    return _lines(jnp.where(_per_sample(chosen(keys, probability)), _grey(lines), lines))


def solarize(
    images: jax.Array, keys: jax.Array, *, probability: float, threshold: float = 0.5
) -> jax.Array:
    """With ``probability`` per sample, invert the values at or above ``threshold``."""
    invert = _per_sample(chosen(keys, probability)) & (images >= threshold)
    return jnp.where(invert, 1 - images, images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images - mean) / std per channel, images (..., 3)."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    scale = 1 / jnp.array(std, jnp.float32).reshape(shape)
    return (images - jnp.array(mean, jnp.float32).reshape(shape)) * scale
