"""CutPaste and scars: a piece of an image, its colours changed a little, on another place of it.

Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsad.augment._draws import between, integers, uniforms
from dsad.augment.color import JitterDraws, apply_jitter, draw_jitter
from dsad.augment.views import JITTERED
from dsad.core.config import Settings, field
from dsad.core.rng import named


class CutPasteConfig(Settings, place="patches"):
    """How pieces are cut; the defaults are published.

    Attributes:
      area: share of the image in a CutPaste piece, from and to.
      aspect: width over height of a CutPaste piece, from and to, uniform in the logarithm.
      jitter: most that brightness, contrast, saturation (relative) and hue (turns) change by.
      scar_width, scar_length: of a scar in pixels of an image of ``scar_side``, from and to.
      scar_side: images of another side have scars as ``scar_ranges`` says.
      scar_rotation: of a scar in degrees, at most, to either side.

    """

    area: tuple[float, float] = field((0.02, 0.15), above=0, at_most=1, rising=True)
    aspect: tuple[float, float] = field((0.3, 1 / 0.3), above=0, rising=True)
    jitter: float = field(0.1, within=(0, 0.5))
    scar_width: tuple[float, float] = field((2.0, 16.0), at_least=1, rising=True)
    scar_length: tuple[float, float] = field((10.0, 25.0), at_least=1, rising=True)
    scar_side: int = field(256, at_least=1)
    scar_rotation: float = field(45.0, within=(0, 180))

    def scar_ranges(self, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Widths and lengths of scars in images of ``side`` pixels, each from and to.

        The published code's rule for its crops: the widths scale, at least 1 pixel, and the lengths
        keep their ratios to the widths: 1 to 4 and 5 to 6 pixels of 64.
        """
        scale = side / self.scar_side
        widths = tuple(max(1, _rounded(w * scale)) for w in self.scar_width)
        pairs = zip(self.scar_length, self.scar_width, widths, strict=True)
        lengths = sorted(max(1, _rounded(long / wide * here)) for long, wide, here in pairs)
        return (widths[0], widths[1]), (lengths[0], lengths[1])

    def scar_box(self, side: int) -> int:
        """Side in pixels of a square that holds every turned scar."""
        (_, width), (_, length) = self.scar_ranges(side)
        return math.ceil(math.hypot(width, length)) + 1


def _rounded(length: float) -> int:
    return round(length + 0.01)


class Pieces(NamedTuple):
    """What is cut and where it goes; whole pixels int32, (height, width) or (top, left).

    ``extent`` (b, 2) of the piece, ``source`` (b, 2) its corner; ``box`` (b, 2) and ``target``
    (b, 2): extent and corner of the upright box around the turned piece; ``angle`` (b,) in
    radians, counter-clockwise; ``jitter`` of its colours, None for none.
    """

    extent: jax.Array
    source: jax.Array
    box: jax.Array
    target: jax.Array
    angle: jax.Array
    jitter: JitterDraws | None


def draw_cutpaste(keys: jax.Array, side: int, config: CutPasteConfig) -> Pieces:
    """One upright piece for each image (b,) of ``side`` pixels, keys (b,)."""
    u = uniforms(keys, "cutpaste", (2,))
    pixels = side**2 * between(u[:, 0], config.area)
    ratio = jnp.exp(between(u[:, 1], (math.log(config.aspect[0]), math.log(config.aspect[1]))))
    extent = jnp.sqrt(jnp.stack([pixels / ratio, pixels * ratio], axis=1))
    return _placed(keys, side, extent, jnp.zeros_like(ratio), config.jitter)


def draw_scar(keys: jax.Array, side: int, config: CutPasteConfig) -> Pieces:
    """One narrow, turned piece for each image (b,), keys (b,); its width is that before turning."""
    u = uniforms(keys, "scar", (3,))
    widths, lengths = config.scar_ranges(side)
    extent = jnp.stack([between(u[:, 0], lengths), between(u[:, 1], widths)], axis=1)
    most = math.radians(config.scar_rotation)
    return _placed(keys, side, extent, between(u[:, 2], (-most, most)), config.jitter)


def _placed(
    keys: jax.Array, side: int, extent: jax.Array, angle: jax.Array, jitter: float
) -> Pieces:
    """Source and target independent and uniform among the places inside the image.

    The published code truncates a real number below the last place, and so never reaches that.
    """
    whole = jnp.clip(jnp.round(extent), 1, side)
    # The upright box as Pillow's rotation enlarges it.
    reach = (
        jnp.abs(jnp.cos(angle))[:, None] * whole
        + jnp.abs(jnp.sin(angle))[:, None] * (whole[:, ::-1])
    )
    box = jnp.ceil((whole + reach) / 2) - jnp.floor((whole - reach) / 2)
    whole, box = whole.astype(jnp.int32), jnp.minimum(box, side).astype(jnp.int32)
    place = uniforms(keys, "place", (4,))
    draws = None
    if jitter:
        own = jax.vmap(lambda k: named(k, "jitter"))(keys)
        draws = draw_jitter(own, **dict.fromkeys(JITTERED, jitter), probability=1.0)
    return Pieces(
        extent=whole,
        source=integers(place[:, :2], 0, side - whole),
        box=box,
        target=integers(place[:, 2:], 0, side - box),
        angle=angle,
        jitter=draws,
    )


def paste(images: jax.Array, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    """Images (b, S, S, 3) float32 in [0, 1] with their pieces pasted, and where: (b, S, S) bool.

    A pixel of the turned piece takes the nearest one of the piece; the corners of its box stay.
    """
    b, side = images.shape[:2]
    place = jnp.arange(side)
    rows, columns = place[None, :, None], place[None, None, :]

    def column(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return values[:, 0, None, None], values[:, 1, None, None]

    (height, width), (top, left) = column(pieces.extent), column(pieces.source)
    (box_height, box_width), (down, right) = column(pieces.box), column(pieces.target)
    colours = images
    if pieces.jitter is not None:
        cut = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        colours = apply_jitter(images, pieces.jitter, inside=cut)
    cos, sin = (f(pieces.angle)[:, None, None] for f in (jnp.cos, jnp.sin))
    # Centres of pixels from the middle of the box: halves, which float32 holds exactly.
    dy = rows + 0.5 - down - box_height / 2
    dx = columns + 0.5 - right - box_width / 2
    y = jnp.floor(cos * dy + sin * dx + height / 2).astype(jnp.int32)
    x = jnp.floor(cos * dx - sin * dy + width / 2).astype(jnp.int32)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = jnp.where(inside, (y + top) * side + x + left, 0).reshape(b, -1, 1)
    moved = jnp.take_along_axis(colours.reshape(b, side * side, 3), index, axis=1)
    return jnp.where(inside[..., None], moved.reshape(images.shape), images), inside
