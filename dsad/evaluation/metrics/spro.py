"""Saturated per-region overlap (sPRO) of MVTec LOCO: channels, saturation, and who counts.

A unit is a ground-truth channel, one annotated defect, whatever its connected components. Its
overlap is min(hits / S, 1): a missing object may lie anywhere in a large annotated area, so
covering S of its pixels is full credit. Only the S highest scores of a channel can move that
fraction: these, each with weight 1 / S, stand for the channel, which makes sPRO the curve of AUPRO
over other positives. The false-positive rate counts the pixels free of any channel.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsad.core.channels import Saturation
from dsad.core.errors import MetricError
from dsad.evaluation.metrics import inputs

#: Every pixel of a channel counts: without saturation.
FULL = Saturation(threshold=1.0, relative=True)


class Units(NamedTuple):
    """The channels of one image: flat indices of their pixels, S of each, and their union."""

    pixels: list[np.ndarray]
    saturated: list[int]
    union: np.ndarray

    @property
    def groups(self) -> int:
        """Number of channels."""
        return len(self.pixels)

    def positives(self, scores: Any, /) -> tuple[np.ndarray, np.ndarray]:
        """The S highest of the flat ``scores`` in each channel, and S beside each (uint32)."""
        top, sizes = [inputs.taken(scores, self.union[:0])], [np.zeros(0, np.uint32)]
        for at, size in zip(self.pixels, self.saturated, strict=True):
            inside = inputs.taken(scores, at)
            top.append(np.partition(inside, inside.size - size)[inside.size - size :])
            sizes.append(np.full(size, size, np.uint32))
        return np.concatenate(top), np.concatenate(sizes)


def units(maps: Sequence[Any], channels: Any, saturation: Any) -> list[Units]:
    """The channels of every image.

    Args:
      maps: (h, w) each; only the shapes are read.
      channels: per image a sequence of masks (h, w) or an array (c, h, w), bool or integers;
        channels may overlap. One without any pixel is padding, not a unit. Or what this function
        made of them before.
      saturation: one for all, or per image one per channel.

    Raises:
      MetricError: counts or shapes that do not fit each other.

    """
    if len(channels) != len(maps):
        raise MetricError(
            f"channels: expected a list of channels per map, found {len(maps)} maps and "
            f"{len(channels)} lists."
        )
    if all(isinstance(own, Units) for own in channels):
        return list(channels)
    shared = isinstance(saturation, Saturation)
    if not shared and len(saturation) != len(maps):
        raise MetricError(
            f"saturation: expected one Saturation, or a list of them per map; found {len(maps)} "
            f"maps and {len(saturation)} lists."
        )
    made = []
    for i, (score, own) in enumerate(zip(maps, channels, strict=True)):
        rules = [saturation] * len(own) if shared else list(saturation[i])
        if len(rules) != len(own):
            raise MetricError(
                f"saturation[{i}]: expected one per channel, found {len(own)} channels and "
                f"{len(rules)} saturations."
            )
        made.append(_image_units(score.shape, own, rules, i))
    return made


def _image_units(
    shape: tuple[int, ...], channels: Any, rules: Sequence[Saturation], image: int
) -> Units:
    pixels, saturated = [], []
    covered = np.zeros(math.prod(shape), bool)
    small = np.int32 if covered.size < 2**31 else np.int64  # half the memory of a set's defects
    for c, (channel, rule) in enumerate(zip(channels, rules, strict=True)):
        mask = inputs.boolean(channel, f"channels[{image}][{c}]")
        if mask.shape != shape:
            raise MetricError(
                f"channels[{image}][{c}]: expected the shape of the map {shape}, found "
                f"{mask.shape}; bring the map to the pixels of its channels first."
            )
        at = np.flatnonzero(mask).astype(small)
        if at.size:
            pixels.append(at)
            saturated.append(rule.pixels(at.size))
            covered[at] = True
    union = pixels[0] if len(pixels) == 1 else np.flatnonzero(covered).astype(small)
    return Units(pixels, saturated, union)
