"""Facts of an image that the host finds once, from the decoded original, and the step receives.

An objective names the facts it needs; the pipeline computes them before an image is scaled to its
canvas and brings them in ``batch["facts"]``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from dsad.core.batch import Field
from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError


class Fact(NamedTuple):
    """``function`` of an image (h, w, 3) uint8 gives an array of ``shape`` and ``dtype``.

    With ``basis`` it is a function of what that gives of the image, once for all facts that share
    it.
    """

    function: Callable[[Any], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype
    basis: Callable[[np.ndarray], Any] | None = None


class BrightObject(NamedTuple):
    """Place and size of an object and size of its image in pixels, (2,) int32 each, x before y."""

    corner: np.ndarray
    extent: np.ndarray
    image: np.ndarray

    @property
    def pad(self) -> np.ndarray:
        """What ISSTAD's boxes add on each side."""
        return self.extent // np.asarray((10, 5), np.int32)


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


def bright_object(image: np.ndarray) -> BrightObject:
    """The largest bright object of an image (h, w, 3) uint8; all of it if it has a single luma.

    After ISSTAD's area limitation (arXiv 2303.17354): luma, Otsu's threshold, and of the
    8-connected bright areas the one that is largest with its holes filled (the first in reading
    order of equal ones).
    """
    height, width = image.shape[:2]
    grey = np.asarray(Image.fromarray(image).convert("L"))
    threshold = otsu(np.bincount(grey.ravel(), minlength=256))
    rows, columns = slice(0, height), slice(0, width)
    if threshold is not None:
        rows, columns = _largest_area(grey > threshold)
    extent = columns.stop - columns.start, rows.stop - rows.start
    places = (columns.start, rows.start), extent, (width, height)
    return BrightObject(*(np.asarray(place, np.int32) for place in places))


def foreground_box(bright: BrightObject) -> np.ndarray:
    """Box (x1, y1, x2, y2) int32 around an object, x2 and y2 just outside, (4,).

    The object's w by h pixels grow by floor(w / 10) to the left and right and floor(h / 5) to the
    top and bottom, as far as the image reaches.
    """
    near, far = bright.corner - bright.pad, bright.corner + bright.extent + bright.pad
    return np.concatenate([np.maximum(near, 0), np.minimum(far, bright.image)])


def foreground_box_published(bright: BrightObject) -> np.ndarray:
    """The box (4,) int32 of ISSTAD's code, which moves instead of losing its near sides.

    It always has the whole size, w + 2 floor(w / 10) by h + 2 floor(h / 5), unless its far sides
    leave the image: where the image cuts the pad on the left or top, the right or bottom gets up to
    twice the pad.
    """
    near = np.maximum(bright.corner - bright.pad, 0)
    return np.concatenate([near, np.minimum(near + bright.extent + 2 * bright.pad, bright.image)])


_BOX = functools.partial(Fact, shape=(4,), dtype=np.dtype(np.int32), basis=bright_object)
FACTS: Mapping[str, Fact] = {
    "original_size": Fact(original_size, (2,), np.dtype(np.int32)),
    "foreground_box": _BOX(foreground_box),
    "foreground_box_published": _BOX(foreground_box_published),
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
    bases = {FACTS[name].basis for name in names}
    known = {basis: basis(image) if basis else image for basis in bases}
    return {name: FACTS[name].function(known[FACTS[name].basis]) for name in names}
