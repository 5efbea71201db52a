"""SmoothBlend: a small piece of an image, its colours changed a little, blended in elsewhere.

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022. It is CutPaste with soft edges. The strengths were not published; the
defaults are those that a third-party code and CutPaste suggest.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsad.augment.blur import TRUNCATE, along_both
from dsad.augment.color import apply_jitter
from dsad.augment.cutpaste import CutPasteConfig, Pieces, draw_cutpaste
from dsad.core.config import Settings, field


class SmoothBlendConfig(Settings, place="blend"):
    """How a piece is cut and blended.

    Attributes:
      area: share of the image in the piece, from and to (CutPaste: 0.02 to 0.15).
      aspect: width over height of the piece, from and to, uniform in the logarithm.
      jitter: most that brightness, contrast, saturation (relative) and hue (turns) change by.
      sigma: of the Gaussian that softens the matte, in pixels of an image of ``sigma_side``; with
        small pieces a large one leaves a dark smudge. 0: a hard edge.
      sigma_side: the side that ``sigma`` is meant for: in images of another side the Gaussian is
        smaller or larger in proportion; 0: it is the same in all.
      mode: what the soft edge shows. "literal", the published equation, blends towards black
        around the piece, which leaves a dark ring; "extended" towards what surrounds the piece at
        its source.

    """

    area: tuple[float, float] = field((0.005, 0.01), above=0, at_most=1, rising=True)
    aspect: tuple[float, float] = field((0.3, 1 / 0.3), above=0, rising=True)
    jitter: float = field(0.1, within=(0, 0.5))
    sigma: float = field(2.0, at_least=0)
    sigma_side: int = field(224, at_least=0)
    mode: Literal["literal", "extended"] = "literal"

    def sigma_in(self, side: int) -> float:
        """``sigma`` in pixels of an image of ``side``."""
        return self.sigma * (side / self.sigma_side if self.sigma_side else 1.0)

    def longest(self, side: int) -> int:
        """Most pixels that a piece has in height or width, in images of ``side``."""
        most = self.area[1] * max(self.aspect[1], 1 / self.aspect[0])
        return min(side, math.ceil(side * math.sqrt(most)))


def draw_pieces(keys: jax.Array, side: int, config: SmoothBlendConfig) -> Pieces:
    """One upright piece for each image (b,) of ``side`` pixels, keys (b,)."""
    cut = CutPasteConfig(area=config.area, aspect=config.aspect, jitter=config.jitter)
    return draw_cutpaste(keys, side, cut)


def _radius(sigma: float) -> int:
    return math.floor(TRUNCATE * sigma + 0.5)


def matte(corner: jax.Array, extent: jax.Array, side: int, sigma: float) -> jax.Array:
    """Blurred rectangles (b, side, side) in [0, 1]: how far each pixel takes the piece.

    The blur of a rectangle is the product of two blurred intervals, and a blurred interval is the
    difference of two sums of the kernel: no convolution is needed. The kernel is the sampled
    Gaussian, cut at four standard deviations and normalised; outside of the image nothing counts.

    Args:
      corner: top and left (b, 2), whole pixels.
      extent: height and width (b, 2), whole pixels.
      side: of the images in pixels.
      sigma: standard deviation in pixels; 0 gives the rectangle itself.

    """
    radius = _radius(sigma)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * np.square(offsets / sigma)) if radius else np.ones(1)
    sums = np.concatenate([[0.0], np.cumsum(weights) / np.sum(weights)])
    sums[-1] = 1.0  # exactly, so that the difference far from an edge is exactly 0 or 1
    table, last = jnp.asarray(sums, jnp.float32), 2 * radius + 1
    distance = jnp.arange(side)[None, None, :] - corner[:, :, None]
    begun = table[jnp.clip(distance + radius + 1, 0, last)]
    ended = table[jnp.clip(distance - extent[:, :, None] + radius + 1, 0, last)]
    rows, columns = jnp.unstack(begun - ended, axis=1)
    return rows[:, :, None] * columns[:, None, :]


def smooth_blend(
    images: jax.Array, pieces: Pieces, config: SmoothBlendConfig
) -> tuple[jax.Array, jax.Array]:
    """Images (b, S, S, 3) float32 in [0, 1] with their pieces blended in, and mattes (b, S, S).

    (1 - matte) * image + matte * layer, between the two at every pixel, and bit for bit the image
    where the matte is 0. Before normalisation: black is 0 here. Pure and jittable with a static
    ``config``, whose pieces these are: of larger ones only the first part would be seen.
    """
    side, sigma = images.shape[1], config.sigma_in(images.shape[1])
    margin = _radius(sigma)
    # What can be seen of a layer lies in a window of a fixed size: a fraction of the pixels. It is
    # cut and placed by products with unit vectors, which are exact, and quick on accelerators.
    window = jnp.arange(config.longest(side) + 2 * margin)[None, None, :]
    inside = (window >= margin) & (window < margin + pieces.extent[:, :, None])
    inside = inside[:, 0, :, None] & inside[:, 1, None, :]
    place = jnp.arange(side)[None, None, None, :]

    def marked(corner: jax.Array, last: int | None) -> list[jax.Array]:
        at = jnp.clip(window + corner[:, :, None] - margin, 0 if last else None, last)
        return list(jnp.unstack((at[..., None] == place).astype(jnp.float32), axis=1))

    layer = along_both(images, *marked(pieces.source, side - 1))  # the edge goes on beyond itself
    if pieces.jitter is not None:
        layer = apply_jitter(layer, pieces.jitter, inside=inside)
    if config.mode == "literal":
        layer = jnp.where(inside[..., None], layer, 0.0)
    layer = along_both(layer, *(jnp.swapaxes(m, 1, 2) for m in marked(pieces.target, None)))
    alpha = matte(pieces.target, pieces.extent, side, sigma)
    share = alpha[..., None]
    mixed = (1 - share) * images + share * layer
    mixed = jnp.clip(mixed, jnp.minimum(images, layer), jnp.maximum(images, layer))
    return jnp.where(share > 0, mixed, images), alpha
