"""One random view of every image of a batch, on the device, with the coordinates of its crop."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.blur import random_blur
from dsad.augment.color import chosen, color_jitter, normalize, solarize, to_grey
from dsad.augment.crops import Filter, box_coordinates, random_resized_crop_box, resized_crop
from dsad.core.config import check_options
from dsad.core.errors import ConfigError, DataError
from dsad.core.pixels import IMAGENET_MEAN, IMAGENET_STD
from dsad.core.rng import named, sample_keys
from dsad.core.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How one view is made; the defaults are view 1 of DS2.

    ``side``: pixels of the square view. ``area``: share of the image in the crop. ``aspect``: width
    over height of the crop. ``flip``: probability of mirroring left to right. ``jitter``:
    brightness, contrast, saturation (relative) and hue (turns, at most 0.5). ``blur_sigma``: pixels
    of the view. ``coordinates``: what the box means, see ``crops.box_coordinates``; "centres" is
    the published rule of DS2 and PixPro. ``filter``: of the crop's resizing. A probability of
    0 removes the operation from the program.
    """

    side: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 1.3333333333333333)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_probability: float = 1.0
    grey_probability: float = 0.0
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    coordinates: Literal["edges", "centres"] = "edges"
    filter: Filter = "bilinear"

    def __post_init__(self) -> None:
        """Refuse values without a meaning; raises ConfigError naming the key."""
        if self.side < 2:
            raise ConfigError(f"view.side: expected at least 2 pixels, found {self.side}.")
        self._check_interval("area", above=0.0, at_most=1.0)
        self._check_interval("aspect", above=0.0)
        self._check_interval("blur_sigma", above=0.0)
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_probability")):
            self._check_range(name, (getattr(self, name),), 0.0, 1.0)
        self._check_range("flip", (self.flip,), 0.0, 1.0)
        self._check_range("solarize_threshold", (self.solarize_threshold,), 0.0, 1.0)
        self._check_lengths()
        self._check_range("jitter", self.jitter[:3], 0.0, math.inf)
        self._check_range("jitter", self.jitter[3:], 0.0, 0.5, "the hue (fourth value) ")
        self._check_range("mean", self.mean, -math.inf, math.inf)
        if not all(0 < s < math.inf for s in self.std):
            raise ConfigError(f"view.std: expected positive numbers, found {self.std}.")
        check_options(self, "view")

    def _check_interval(self, name: str, *, above: float, at_most: float = math.inf) -> None:
        value = getattr(self, name)
        good = len(value) == 2 and above < value[0] <= value[1] <= at_most
        if not good or not math.isfinite(value[1]):
            limit = "" if at_most == math.inf else f" up to {at_most:g}"
            raise ConfigError(
                f"view.{name}: expected (low, high) with {above:g} < low <= high{limit}, "
                f"found {value}."
            )

    def _check_lengths(self) -> None:
        for name, length in (("jitter", 4), ("mean", 3), ("std", 3)):
            if len(getattr(self, name)) != length:
                raise ConfigError(
                    f"view.{name}: expected {length} numbers, found {getattr(self, name)}."
                )

    def _check_range(
        self, name: str, values: Sequence[float], low: float, high: float, what: str = ""
    ) -> None:
        if not all(low <= v <= high and math.isfinite(v) for v in values):
            span = "finite numbers" if low == -math.inf else f"{what}in [{low:g}, {high:g}]"
            raise ConfigError(f"view.{name}: expected {span}, found {getattr(self, name)}.")


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
    if config.jitter_probability and any(config.jitter):
        brightness, contrast, saturation, hue = config.jitter
        images = color_jitter(
            images,
            keys("jitter"),
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            probability=config.jitter_probability,
        )
    if config.grey_probability:
        images = to_grey(images, keys("grey"), probability=config.grey_probability)
    if config.blur_probability:
        images = random_blur(
            images, keys("blur"), sigma=config.blur_sigma, probability=config.blur_probability
        )
    if config.solarize_probability:
        images = solarize(
            images,
            keys("solarize"),
            probability=config.solarize_probability,
            threshold=config.solarize_threshold,
        )
    return {"image": normalize(images, config.mean, config.std), "box": box}
