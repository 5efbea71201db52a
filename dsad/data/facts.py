"""Facts of an image that the host finds once, from the decoded original, and the step receives.

An objective names the facts it needs; the pipeline computes them before an image is scaled to its
canvas and brings them in ``batch["facts"]``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from dsad.core.batch import Field
from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError


class Fact(NamedTuple):
    """``function`` of an image (h, w, 3) uint8 gives an array of ``shape`` and ``dtype``."""

    function: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype


def original_size(image: np.ndarray) -> np.ndarray:
    """Height and width (2,) int32 in pixels of an image (h, w, 3) uint8."""
    return np.asarray(image.shape[:2], np.int32)


def otsu(histogram: np.ndarray) -> int | None:
    """Otsu's threshold t of a histogram (256,): values above t are the bright class.

    It maximises the variance between the two classes, which is proportional to
    (m n - s N)^2 / (s (N - s)) with s values up to t that sum to m, of N values that sum to n; the
    lowest of equal maxima. None if there is only one value.
    """
    counts = histogram.astype(np.float64)
    up_to, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    parts = up_to * (up_to[-1] - up_to)
    if not parts.any():
        return None
    between = np.square(sums * up_to[-1] - up_to * sums[-1])
    return int(np.argmax(np.divide(between, parts, out=np.zeros(256), where=parts > 0)))


def _filled_size(area: np.ndarray) -> int:
    """Pixels of an area (h, w) bool with its holes, the dark parts that do not reach outside it."""
    found: Any = ndimage.label(np.pad(~area, 1, constant_values=True))  # the stubs say int or tuple
    dark = found[0]
    return area.size - int(np.count_nonzero(dark[1:-1, 1:-1] == dark[0, 0]))


def _largest_area(bright: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the 8-connected area that is largest with its holes filled."""
    found: Any = ndimage.label(bright, structure=np.ones((3, 3), int))
    areas = found[0]
    sizes = np.bincount(areas.ravel())[1:]
    boxes = ndimage.find_objects(areas)
    # Only an area whose box has as many pixels as the largest area can become the largest.
    frames = [(s[0].stop - s[0].start) * (s[1].stop - s[1].start) for s in boxes]
    able = np.flatnonzero(np.asarray(frames) >= sizes.max())
    if len(able) > 1:
        filled = [_filled_size(areas[boxes[i]] == i + 1) for i in able]
        return boxes[able[int(np.argmax(filled))]]
    return boxes[able[0]]


def foreground_box(image: np.ndarray) -> np.ndarray:
    """Box (x1, y1, x2, y2) int32 of the largest bright object, x2 and y2 just outside, (4,).

    After ISSTAD's area limitation (arXiv 2303.17354): luma, Otsu's threshold, and of the
    8-connected bright areas the one that is largest with its holes filled (the first in reading
    order of equal ones); its bounding box, w by h pixels, grows by floor(w / 10) to the left and
    right and floor(h / 5) to the top and bottom, as far as the image reaches. ``image`` is
    (h, w, 3) uint8; one of a single luma is its own box.
    """
    height, width = image.shape[:2]
    grey = np.asarray(Image.fromarray(image).convert("L"))
    threshold = otsu(np.bincount(grey.ravel(), minlength=256))
    if threshold is None:
        return np.asarray((0, 0, width, height), np.int32)
    rows, columns = _largest_area(grey > threshold)
    across = (columns.stop - columns.start) // 10
    along = (rows.stop - rows.start) // 5
    box = (
        max(0, columns.start - across),
        max(0, rows.start - along),
        min(width, columns.stop + across),
        min(height, rows.stop + along),
    )
    return np.asarray(box, np.int32)


FACTS: Mapping[str, Fact] = {
    "original_size": Fact(original_size, (2,), np.dtype(np.int32)),
    "foreground_box": Fact(foreground_box, (4,), np.dtype(np.int32)),
}


def fields(names: Sequence[str]) -> dict[str, Field]:
    """Shape and type of the named facts; ConfigError names one that does not exist."""
    for name in names:
        if name not in FACTS:
            raise ConfigError(
                f"no fact named {name!r}.{suggestion(name, FACTS)} "
                f"dsad.data.facts has: {listed(FACTS)}."
            )
    return {name: Field(FACTS[name].shape, FACTS[name].dtype) for name in names}


def find(names: Sequence[str], image: np.ndarray) -> dict[str, np.ndarray]:
    """The facts of one image (h, w, 3) uint8."""
    return {name: FACTS[name].function(image) for name in names}
