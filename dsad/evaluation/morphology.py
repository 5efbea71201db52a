"""Post-processing of a thresholded anomaly map."""

from typing import Any

import numpy as np
from scipy import ndimage

from dsad.core.config import Settings, field

_EIGHT = np.ones((3, 3), bool)


class Morphology(Settings, place="evaluation.morphology"):
    """What becomes of a mask (h, w) of the pixels above a threshold, in this order; all off.

    Radii and areas are in pixels of the original image. Nothing lies beyond its borders.

    Attributes:
      closing: radius of the disc that dilates, then erodes: joins what lies so close together.
      fill_holes: what a region encloses belongs to it.
      opening: radius of the disc that erodes, then dilates: removes what is thinner.
      smallest: area that an 8-connected region must have.

    """

    closing: int = field(0, at_least=0)
    fill_holes: bool = False
    opening: int = field(0, at_least=0)
    smallest: int = field(0, at_least=0)

    def applied(self, mask: np.ndarray) -> np.ndarray:
        """The mask (h, w) bool after it."""
        if not mask.any():
            return mask
        if self.closing:
            # On a wider canvas: what touches a border stays there.
            wide = np.pad(mask, self.closing)
            inner = slice(self.closing, -self.closing)
            mask = _eroded(_dilated(wide, self.closing), self.closing)[inner, inner]
        if self.fill_holes:
            filled: Any = ndimage.binary_fill_holes(mask)
            mask = filled
        if self.opening:
            mask = _dilated(_eroded(mask, self.opening), self.opening)
        if self.smallest > 1:
            regions: Any = ndimage.label(mask, structure=_EIGHT)
            areas = np.bincount(regions[0].ravel())
            areas[0] = 0
            mask = (areas >= self.smallest)[regions[0]]
        return mask


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels at most so far from one of the mask."""
    if not mask.any():
        return mask
    away: Any = ndimage.distance_transform_edt(~mask)
    return away <= radius


def _eroded(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels further than that from all that is not of the mask, as what lies beyond borders."""
    inside: Any = ndimage.distance_transform_edt(np.pad(mask, 1))
    return inside[1:-1, 1:-1] > radius
