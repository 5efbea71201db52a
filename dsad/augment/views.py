"""One random view of every image of a batch, on the device, with the coordinates of its crop."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from dsad.augment.blur import random_blur
from dsad.augment.color import chosen, color_jitter, normalize, solarize, to_grey
from dsad.augment.crops import Filter, box_coordinates, random_resized_crop_box, resized_crop
from dsad.core.config import Refused, Settings, field
from dsad.core.errors import DataError
from dsad.core.pixels import IMAGENET_MEAN, IMAGENET_STD
from dsad.core.rng import named, sample_keys
from dsad.core.types import Batch

#: What ``ViewConfig.jitter`` gives the amounts of.
JITTERED = ("brightness", "contrast", "saturation", "hue")


class Look(Protocol):
    """Settings of ``change_look``; see ``ViewConfig``."""

    @property
    def jitter(self) -> tuple[float, float, float, float]: ...
    @property
    def jitter_probability(self) -> float: ...
    @property
    def grey_probability(self) -> float: ...
    @property
    def blur(self) -> tuple[float, float]: ...
    @property
    def blur_probability(self) -> float: ...


def change_look(images: jax.Array, keys: Callable[[str], jax.Array], config: Look) -> jax.Array:
    """Jitter, grey and blur, in this order, of images (b, h, w, 3) float32 in [0, 1].

    ``keys`` gives those of the samples (b,) for the name of an operation.
    """
    if config.jitter_probability and any(config.jitter):
        amounts = dict(zip(JITTERED, config.jitter, strict=True))
        images = color_jitter(
            images, keys("jitter"), **amounts, probability=config.jitter_probability
        )
    if config.grey_probability:
        images = to_grey(images, keys("grey"), probability=config.grey_probability)
    if config.blur_probability:
        images = random_blur(
            images, keys("blur"), sigma=config.blur, probability=config.blur_probability
        )
    return images


class ViewConfig(Settings, place="view"):
    """How one view is made; the defaults are view 1 of DS2.

    A probability of 0 removes the operation from the program.

    Attributes:
      side: pixels of the square view.
      area: share of the image in the crop, from and to.
      aspect: width over height of the crop, from and to.
      flip: probability of mirroring left to right.
      jitter: brightness, contrast, saturation (relative) and hue (turns, at most 0.5).
      jitter_probability: of the change of colours.
      blur_sigma: of the Gaussian in pixels of a view of ``blur_side``, from and to.
      blur_side: the side that ``blur_sigma`` is meant for: in views of another side the Gaussian
        is smaller or larger in proportion; 0: it is the same in all.
      blur_probability: of the blur.
      grey_probability: of a view without colours.
      solarize_probability: of inverting bright values.
      solarize_threshold: values above it are inverted, in [0, 1].
      mean, std: normalisation of pixels in [0, 1], by channel.
      coordinates: what the box means, see ``crops.box_coordinates``; "centres" is the published
        rule of DS2 and PixPro.
      filter: of the crop's resizing.

    """

    side: int = field(224, at_least=2)
    area: tuple[float, float] = field((0.08, 1.0), above=0, at_most=1, rising=True)
    aspect: tuple[float, float] = field((0.75, 1.3333333333333333), above=0, rising=True)
    flip: float = field(0.5, within=(0, 1))
    jitter: tuple[float, float, float, float] = field((0.4, 0.4, 0.2, 0.1), at_least=0)
    jitter_probability: float = field(0.8, within=(0, 1))
    blur_sigma: tuple[float, float] = field((0.1, 2.0), above=0, rising=True)
    blur_side: int = field(0, at_least=0)
    blur_probability: float = field(1.0, within=(0, 1))
    grey_probability: float = field(0.0, within=(0, 1))
    solarize_probability: float = field(0.0, within=(0, 1))
    solarize_threshold: float = field(0.5, within=(0, 1))
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = field(IMAGENET_STD, above=0)
    coordinates: Literal["edges", "centres"] = "edges"
    filter: Filter = "bilinear"

    def check(self) -> None:
        if self.jitter[3] > 0.5:
            raise Refused("jitter[3]", "a hue of at most 0.5 turns", self.jitter[3])

    @property
    def blur(self) -> tuple[float, float]:
        """``blur_sigma`` in pixels of this view."""
        scale = self.side / self.blur_side if self.blur_side else 1.0
        return self.blur_sigma[0] * scale, self.blur_sigma[1] * scale


def draw_crops(batch: Batch, key: jax.Array, config: ViewConfig) -> tuple[jax.Array, jax.Array]:
    """Crop boxes in pixels (b, 4), (top, left, height, width), and flips (b,) of ``make_view``."""
    epoch, index = batch["epoch"], batch["index"]

    def draw(key: jax.Array, size: jax.Array) -> jax.Array:
        return random_resized_crop_box(key, size, area=config.area, aspect=config.aspect)

    boxes = jax.vmap(draw)(sample_keys(named(key, "crop"), epoch, index), batch["size"])
    if not config.flip:
        return boxes, jnp.zeros(index.shape, bool)
    return boxes, chosen(sample_keys(named(key, "flip"), epoch, index), config.flip)


def make_view(batch: Batch, key: jax.Array, config: ViewConfig) -> dict[str, Any]:
    """One view of each image: ``image`` (b, side, side, 3) float32 and ``box`` (b, 4) float32.

    Pure and jittable. Sample i's draws depend on (key, operation, epoch[i], index[i]) alone, not on
    its place in the batch, the number of devices or what other operations are on. ``box`` is
    (x0, y0, x1, y1) relative to the valid image, x1 < x0 after a flip; ``image`` is normalised.

    The order is that of the published recipes (DS2, PixPro, BYOL): crop, flip, jitter, grey, blur,
    solarize, normalise. The crop comes first because everything after it is then paid for on the
    view's pixels only, and a blur of stated width means pixels of the view.
    Raises DataError if the canvases are not uint8.
    """
    canvases = batch["image"]
    if canvases.dtype != jnp.uint8 or canvases.ndim != 4 or canvases.shape[-1] != 3:
        raise DataError(
            "batch['image']: expected uint8 canvases (b, H, W, 3), found "
            f"{canvases.dtype} {tuple(canvases.shape)}."
        )

    def keys(name: str) -> jax.Array:
        return sample_keys(named(key, name), batch["epoch"], batch["index"])

    boxes, flips = draw_crops(batch, key, config)
    box = box_coordinates(boxes, batch["size"], flips, convention=config.coordinates)
    turned = flips if config.flip else None
    images = resized_crop(canvases, boxes, config.side, turned, config.filter) / 255
    if config.filter == "bicubic":
        images = jnp.clip(images, 0.0, 1.0)  # the cubic overshoots at edges
    images = change_look(images, keys, config)
    if config.solarize_probability:
        probability, threshold = config.solarize_probability, config.solarize_threshold
        images = solarize(images, keys("solarize"), probability=probability, threshold=threshold)
    return {"image": normalize(images, config.mean, config.std), "box": box}
