"""Post-processing of a thresholded anomaly map."""

import math
from typing import Any

import numpy as np
from scipy import ndimage

from dsad.core.config import Settings, field

_EIGHT = np.ones((3, 3), bool)
#: Directions of ``lines``, 180°/16 apart.
DIRECTIONS = 16


class Morphology(Settings, place="evaluation.morphology"):
    """What becomes of a mask (h, w) of the pixels above a threshold, in this order; all off.

    Radii, lengths and areas are in pixels of the original image. Nothing lies beyond its borders.
    Where SuperADD (arXiv 2605.14808) finds defects on a quarter of height and width, with
    lines=26, gate=0.8, fill_holes and erosion=1, these lengths are four times as many here.

    Attributes:
      closing: radius of the disc that dilates, then erodes: joins what lies so close together.
      lines: half length of lines, two pixels wide, in 16 directions: what lies so close together
        along one of them is joined by a bar that is a pixel wider.
      gate: pixels that closing or lines add must be above so many times the threshold.
      fill_holes: what a region encloses belongs to it.
      opening: radius of the disc that erodes, then dilates: removes what is thinner.
      smallest: area that an 8-connected region must have.
      erosion: radius of the disc that erodes, at the end.

    """

    closing: int = field(0, at_least=0)
    lines: int = field(0, at_least=0)
    gate: float = field(0.0, at_least=0, at_most=1)
    fill_holes: bool = False
    opening: int = field(0, at_least=0)
    smallest: int = field(0, at_least=0)
    erosion: int = field(0, at_least=0)

    def decided(self, scores: np.ndarray, limit: float) -> np.ndarray:
        """The mask (h, w) bool of scores (h, w) above a threshold after it."""
        return self.applied(scores > limit, scores > self.gate * limit if self.gate else None)

    def applied(self, mask: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
        """The mask (h, w) bool after it, without the gate, or with ``near`` (h, w) bool for it."""
        if not mask.any():
            return mask
        above = mask
        if self.closing:
            # On a wider canvas: what touches a border stays there.
            wide = np.pad(mask, self.closing)
            inner = slice(self.closing, -self.closing)
            mask = _eroded(_dilated(wide, self.closing), self.closing)[inner, inner]
        if self.lines:
            mask = mask | _closed_along_lines(above, self.lines)
        if near is not None:
            mask = mask & (near | above)
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
        if self.erosion:
            mask = _eroded(mask, self.erosion)
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


def _closed_along_lines(mask: np.ndarray, half: int) -> np.ndarray:
    """Dilated by lines two pixels wide and one more, eroded by the lines; all directions together.

    A line of that width is a thin one dilated by 2 x 2 pixels, so the wide steps frame the thin.
    """
    wide, found = ndimage.binary_dilation(mask, _EIGHT), np.zeros_like(mask)
    for i in range(DIRECTIONS):
        found |= ndimage.binary_erosion(
            closed_along(wide, half, math.pi * i / DIRECTIONS), np.ones((2, 2), bool)
        )
    return found


def closed_along(mask: np.ndarray, half: int, angle: float) -> np.ndarray:
    """A mask (h, w) bool closed by a line a pixel wide, from ``-half`` to ``half`` along ``angle``.

    Lines are ``y = r + round(x slope)``, or with x and y exchanged where they are steep; gaps in
    such a row r that are no longer than the line are filled.
    """
    if steep := abs(math.cos(angle)) < abs(math.sin(angle)):
        mask, angle = mask.T, math.pi / 2 - angle
    slope, longest = math.tan(angle), 2 * round(half * abs(math.cos(angle)))
    y, x = np.nonzero(mask)
    row = y - np.rint(x * slope).astype(int)
    order = np.lexsort((x, row))
    row, x = row[order], x[order]
    gap = np.diff(x) - 1
    at = np.flatnonzero((np.diff(row) == 0) & (gap > 0) & (gap <= longest))
    gap = gap[at]
    within = np.arange(gap.sum()) - np.repeat(np.cumsum(gap) - gap, gap)
    x = np.repeat(x[at] + 1, gap) + within
    closed = mask.copy()
    closed[np.repeat(row[at], gap) + np.rint(x * slope).astype(int), x] = True
    return closed.T if steep else closed
