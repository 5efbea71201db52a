"""Synthetic corruption of whole images with pixel labels, as ISSTAD's second stage trains on.

Two kinds: "region" replaces a few large shapes by the same place of a transformed copy, "patch"
changes up to 100 small rectangles one after another.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dsad.augment import _isstad_patches, _isstad_regions
from dsad.augment._draws import integers, uniforms
from dsad.core.config import Refused, Settings, field
from dsad.core.errors import ConfigError, DataError

#: Half of an 8-bit step. A value that differs by more has changed as a byte; rounding errors of a
#: change that does nothing (grey pixels made grey) stay far below.
HALF_STEP = 0.5 / 255


class CorruptionConfig(Settings, place="corruption"):
    """How images are corrupted; the defaults are ISSTAD's for most categories.

    Attributes:
      kind: "region" or "patch".
      most_draw: k: an integer is drawn from 0 .. k, and 0 leaves the image clean.
      n_max: most shapes of an image; for regions.
      limit_box: keep shapes inside the foreground box; for regions.
      box: the foreground box is "padded" on each side as far as the image reaches, or as
        "published", where what is cut on the left or top is added on the other side; for regions.
      remove_background: take what is put into the shapes from an image whose background has one
        colour; for regions.
      label: "changed" labels a shape or patch only if at least one 8-bit value in it changed
        (published for patches), "mask" labels all of them (published for regions: there a grey
        object made grey, or a flip of a symmetric one, counts as a defect).
      original_side: longer side in pixels of the photographs that the method's lengths refer to; 0
        takes each image's own size, another value is for copies of reduced size.

    """

    kind: Literal["region", "patch"] = "region"
    most_draw: int = field(2, at_least=1)
    n_max: int = field(3, at_least=1)
    limit_box: bool = True
    box: Literal["padded", "published"] = "padded"
    remove_background: bool = False
    label: Literal["changed", "mask"] = "changed"
    original_side: float = field(0.0, at_least=0)

    def check(self) -> None:
        if 0 < self.original_side < 16:
            raise Refused("original_side", "0 or at least 16 pixels", self.original_side)

    @property
    def facts(self) -> tuple[str, ...]:
        """Names of the facts of ``dsad.data.facts`` that ``corrupt`` is to be given."""
        return ("original_size", self.box_fact) if self.box_fact else ("original_size",)

    @property
    def box_fact(self) -> str | None:
        """Name of the one that is its ``box``; None where it needs none."""
        if self.kind == "patch" or not self.limit_box:
            return None
        return "foreground_box" if self.box == "padded" else "foreground_box_published"


def drawn(keys: jax.Array, most_draw: int) -> jax.Array:
    """Which samples are corrupted (b,) bool: an integer uniform in 0 .. ``most_draw`` is not 0."""
    return integers(uniforms(keys, "corrupt", ()), 0, most_draw) > 0


def corrupt(
    images: jax.Array,
    keys: jax.Array,
    config: CorruptionConfig,
    *,
    size: jax.Array,
    box: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Corrupted images (b, S, S, 3) float32 in [0, 1] and labels (b, S, S) bool.

    Pure and jittable with a static ``config``. Sample i depends on its own rows alone, not on its
    place in the batch or the devices. Where the label is False the image is exactly as it came.
    After the second stage of ISSTAD (arXiv 2303.17354), at the working size: lengths and draws are
    those of the original, but noise is drawn for working pixels, and nothing is rounded to bytes.

    Args:
      images: (b, S, S, 3) float32 in [0, 1], whole images resized to the working size without
        keeping their aspect ratio; S from 16 to 2048.
      keys: (b,), one per sample.
      config: what to do.
      size: (b, 2) integers, height and width of the original images in pixels.
      box: (b, 4) integers, foreground box (x1, y1, x2, y2) in original pixels, x2 and y2 just
        outside; needed for regions with ``limit_box``, else ignored.

    Raises:
      DataError: images of another shape or type.
      ConfigError: ``limit_box`` without a box.

    """
    _check(images, config, box)
    side = images.shape[1]
    frame = jnp.concatenate([jnp.zeros_like(size), size[:, ::-1]], axis=1)
    limits = box if config.limit_box and box is not None else frame
    size, limits = _enlarged(size, limits, config.original_side)
    chosen = drawn(keys, config.most_draw)
    if config.kind == "patch":
        patches = _isstad_patches.draw_patches(keys, size, side)
        patches = patches._replace(used=patches.used & chosen[:, None])
        return _isstad_patches.apply_patches(
            images, patches, HALF_STEP, label_all=config.label == "mask"
        )
    shapes = _isstad_regions.draw_shapes(keys, limits, config.n_max)
    shapes = shapes._replace(used=shapes.used & chosen[:, None])
    masks = _isstad_regions.shape_masks(shapes, size, side)
    source = _isstad_regions.without_background(images) if config.remove_background else images
    changed = _isstad_regions.apply_change(source, _isstad_regions.draw_change(keys), size)
    if config.label == "changed":
        differs = jnp.any(jnp.abs(changed - images) > HALF_STEP, axis=-1)
        counts = jnp.any(masks & differs[:, None], axis=(2, 3), keepdims=True)
        masks = masks & counts
    label = jnp.any(masks, axis=1)
    return jnp.where(label[..., None], changed, images), label


def _check(images: jax.Array, config: CorruptionConfig, box: jax.Array | None) -> None:
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != jnp.float32 or not square or not 16 <= images.shape[1] <= 2048:
        raise DataError(
            "corrupt: expected float32 images (b, S, S, 3) in [0, 1] with S from 16 to 2048, found "
            f"{images.dtype} {tuple(images.shape)}."
        )
    if config.box_fact and box is None:
        raise ConfigError(
            "corruption.limit_box: needs the foreground box of each image; give `box` (the fact "
            f"{config.box_fact}), or set limit_box=False."
        )


def _enlarged(size: jax.Array, box: jax.Array, original_side: float) -> tuple[jax.Array, jax.Array]:
    """Size and box as if the longer side of each image were ``original_side``; 0 changes nothing.

    The box keeps at least one pixel and stays inside the image.
    """
    size, box = size.astype(jnp.int32), box.astype(jnp.int32)
    if original_side:
        longer = jnp.max(size, axis=1, keepdims=True).astype(jnp.float32)
        factor = original_side / longer
        size = jnp.maximum(jnp.round(size * factor), 1).astype(jnp.int32)
        box = jnp.round(box * factor).astype(jnp.int32)
    far = jnp.clip(box[:, 2:], 1, size[:, ::-1])
    near = jnp.clip(box[:, :2], 0, far - 1)
    return size, jnp.concatenate([near, far], axis=1)
