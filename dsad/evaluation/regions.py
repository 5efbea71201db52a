"""Regions of an anomaly map: what lies together above a threshold."""

import dataclasses
from typing import Any, cast

import numpy as np
from scipy import ndimage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Pixels above a threshold that touch each other, at corners, too.

    ``box`` is (left, top, right, bottom) in pixels of the image, the last two beyond the region;
    ``area`` its pixels, ``peak`` its highest value and ``at`` where that lies, (x, y).
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    at: tuple[int, int]


def regions(scores: np.ndarray, threshold: float) -> tuple[Region, ...]:
    """Those of a map (h, w), the highest peak first."""
    labels, count = cast("Any", ndimage.label(scores > threshold, np.ones((3, 3), bool)))
    places = cast("list[Any]", ndimage.find_objects(labels, count))
    made = []
    for number, (rows, columns) in enumerate(places, 1):
        inside = labels[rows, columns] == number
        values = np.where(inside, scores[rows, columns], -np.inf)
        y, x = np.unravel_index(int(values.argmax()), values.shape)
        made.append(
            Region(
                box=(columns.start, rows.start, columns.stop, rows.stop), area=int(inside.sum()),
                peak=float(values[y, x]), at=(int(x) + columns.start, int(y) + rows.start),
            )
        )  # fmt: skip
    return tuple(sorted(made, key=lambda r: (-r.peak, r.at)))
