"""Between the pixels of a file and the input of a network, and back."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image

from dsad.core.config import Refused, Settings, field
from dsad.core.errors import DataError

Method = Literal["stretched", "longer", "shorter", "windows"]

_PILLOW = "Pillow bilinear with antialiasing on uint8 RGB, "
_OUTSIDE = "; what lies outside of it is not inspected, and no pixel of it is measured"
#: What the methods do, for stamps.
_SAID = {
    "stretched": f"{_PILLOW}aspect ratio not kept, larger and smaller images alike",
    "longer": f"{_PILLOW}aspect ratio kept, the whole image in the middle of the input; the rest "
    "repeats its border and does not count",
    "shorter": f"{_PILLOW}aspect ratio kept, the middle of the image fills the input{_OUTSIDE}",
    "windows": f"{_PILLOW}aspect ratio kept, the image at its scale in overlapping windows; each "
    "place counts in the window in which it lies most central, and an image has the highest score "
    "of its windows",
}


def _snapped(x: float) -> float:
    """Without the rounding errors of a whole number."""
    return float(round(x)) if abs(x - round(x)) < 1e-6 else x


#: What ``inside`` gives of an input that counts as a whole.
WHOLE = np.tile(np.asarray([0, 1], np.float32), (1, 2, 2, 1))


class Axis(NamedTuple):
    """One direction of a view.

    A place x of the image is at ``scale`` · x + ``offset`` of the input; both are continuous, pixel
    centres lie at + 1/2. The view decides of the pixels ``first`` to ``last`` (excluded) of the
    image; they lie between ``low`` and ``high`` of the input.
    """

    scale: float
    offset: float
    first: int
    last: int
    low: float
    high: float

    def positions(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower and upper cell of ``size``, and the weight of the upper, for its pixels."""
        at = (np.arange(self.first, self.last) + 0.5) * self.scale + self.offset - 0.5
        at = np.clip(at, 0, size - 1)
        low = np.minimum(np.floor(at).astype(np.int64), max(size - 2, 0))
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    def content(self, length: int, size: int) -> tuple[float, float]:
        """Where in an input of ``size`` there is anything of an image of ``length``."""
        return max(0.0, self.offset), min(float(size), self.offset + self.scale * length)


class View(NamedTuple):
    """What one input of the network shows of an image."""

    rows: Axis
    columns: Axis

    def paint(self, target: np.ndarray, scores: np.ndarray) -> None:
        """Sample a map (height, width) at the centres of those pixels of (h, w) that it decides of.

        Bilinear; beyond the outer centres the edge value continues.
        """
        values = scores.astype(np.float32)
        low, high, weight = self.rows.positions(values.shape[0])
        values = values[low] + (values[high] - values[low]) * weight[:, None]
        low, high, weight = self.columns.positions(values.shape[1])
        values = values[:, low] + (values[:, high] - values[:, low]) * weight[None, :]
        rows, columns = (slice(axis.first, axis.last) for axis in self)
        target[rows, columns] = values


class Preprocessing(Settings, place="preprocessing"):
    """How an image becomes inputs (``height``, ``width``) of a network, and their maps its own.

    Attributes:
      height, width: of the input, in pixels.
      method: "stretched" resizes the whole image to the input, whatever its shape; "longer" keeps
        its shape and fits it in; "shorter" keeps its shape and fills the input with its middle;
        "windows" cuts it, at ``scale``, into as many inputs as it takes.
      crop: share of the sides of the resized image that the input shows, with "stretched" and
        "shorter": 0.875 for the middle 224 of 256 pixels.
      overlap: pixels that a window shows on each side beyond those that it decides of, at least.
      scale: pixels of the resized image for one of the image, with "windows".

    """

    height: int = field(224, at_least=1)
    width: int = field(224, at_least=1)
    method: Method = "stretched"
    crop: float = field(1.0, above=0, at_most=1)
    overlap: int = field(32, at_least=0)
    scale: float = field(1.0, above=0)

    def check(self) -> None:
        if self.crop < 1 and self.method not in ("stretched", "shorter"):
            raise Refused("crop", f'1 for "{self.method}" images', self.crop)
        if self.scale != 1 and self.method != "windows":
            raise Refused(
                "scale", f'1 for "{self.method}" images, other than "windows"', self.scale
            )
        if self.method == "windows" and 2 * self.overlap >= min(self.size):
            expected = f"less than half of the smaller side of the input, {min(self.size)}"
            raise Refused("overlap", expected, self.overlap)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return self.height, self.width

    @property
    def whole(self) -> bool:
        """Whether every image is one input, all of which counts."""
        return self.method in ("stretched", "shorter")

    @property
    def everything(self) -> bool:
        """Whether the inputs show all of an image."""
        return self.method in ("longer", "windows") or (self.method, self.crop) == ("stretched", 1)

    @property
    def single(self) -> bool:
        """Whether every image is one input."""
        return self.method != "windows"

    def describe(self) -> dict[str, Any]:
        """For stamps and names: every key that says anything, and what is done."""
        said = dataclasses.asdict(self)
        if self.crop == 1:
            del said["crop"]
        if self.method != "windows":
            del said["overlap"], said["scale"]
        middle = f"; the middle {self.crop:g} of either side{_OUTSIDE}"
        cut = self.method == "stretched" and self.crop < 1
        return {**said, "resize": _SAID[self.method] + (middle if cut else "")}

    def views(self, shape: tuple[int, int]) -> list[View]:
        """The inputs that an image of ``shape`` (h, w) becomes, from its top left on.

        Every pixel of the image that is inspected is decided of by exactly one.
        """
        axes = (self._axes(n, size, shape) for n, size in zip(shape, self.size, strict=True))
        return list(itertools.starmap(View, itertools.product(*axes)))

    def _axes(self, length: int, size: int, shape: tuple[int, int]) -> list[Axis]:
        ratios = [s / n for s, n in zip(self.size, shape, strict=True)]
        if self.method == "windows":
            return self._windows(length, size)
        if self.method == "longer":
            inner = max(1, round(length * min(ratios)))
            offset = (size - inner) // 2
            return [Axis(inner / length, offset, 0, length, offset, offset + inner)]
        scale = (size / length if self.method == "stretched" else max(ratios)) / self.crop
        offset = _snapped((size - length * scale) / 2)
        first = max(0, math.ceil(-offset / scale - 0.5))
        last = min(length, math.ceil((size - offset) / scale - 0.5))
        return [Axis(scale, offset, first, max(last, first + 1), 0, size)]

    def _windows(self, length: int, size: int) -> list[Axis]:
        inner = max(1, round(length * self.scale))
        scale = inner / length
        if inner <= size:
            offset = (size - inner) // 2
            return [Axis(scale, offset, 0, length, offset, offset + inner)]
        steps = max(1, math.ceil((inner - size) / (size - 2 * self.overlap)))
        starts = [i * (inner - size) // steps for i in range(steps + 1)]
        # Between two windows the middle of what both show; that of an odd width is the former's.
        ends = [b + (a + size - b + 1) // 2 for a, b in itertools.pairwise(starts)]
        edges = [0, *ends, inner]
        pixels = [min(length, max(0, math.ceil(edge / scale - 0.5))) for edge in edges]
        return [
            Axis(scale, -start, pixels[i], pixels[i + 1], edges[i] - start, edges[i + 1] - start)
            for i, start in enumerate(starts)
        ]

    def to_input(self, image: np.ndarray, view: View | None = None) -> np.ndarray:
        """(h, w, 3) uint8 to (height, width, 3) uint8: Pillow's antialiased bilinear.

        Without a ``view`` the only one of the image. Beyond the image its border is repeated.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"expected a (h, w, 3) uint8 image, found {image.shape} {image.dtype}")
        if view is None:
            (view,) = self.views(image.shape[:2])
        seen, target, around = [], [], []
        for axis, length, size in zip(view, image.shape, self.size, strict=False):
            low, high = (round(x) for x in axis.content(length, size))
            ends = (_snapped((x - axis.offset) / axis.scale) for x in (low, high))
            seen.append([min(max(x, 0.0), float(length)) for x in ends])
            target.append(high - low)
            around.append((low, size - high))
        if all(x.is_integer() and y - x == n for (x, y), n in zip(seen, target, strict=True)):
            (top, bottom), (left, right) = ((int(x), int(y)) for x, y in seen)
            part = image[top:bottom, left:right]
        else:
            box = (seen[1][0], seen[0][0], seen[1][1], seen[0][1])
            picture = PIL.Image.fromarray(image)
            bilinear = PIL.Image.Resampling.BILINEAR
            part = np.asarray(picture.resize((target[1], target[0]), bilinear, box=box))
        return np.pad(part, (*around, (0, 0)), mode="edge") if np.any(around) else part

    def inside(self, views: Sequence[View], shape: tuple[int, int]) -> np.ndarray:
        """(n, 2, 2, 2) float32: what counts, and what shows the image, of each view.

        Both as rows and columns from and to, in shares of the input.
        """
        sizes, made = self.size, np.zeros((len(views), 2, 2, 2), np.float32)
        for i, view in enumerate(views):
            for axis, part in enumerate(view):
                made[i, 0, axis] = part.low, part.high
                made[i, 1, axis] = part.content(shape[axis], sizes[axis])
        return made / np.asarray(sizes, np.float32)[None, None, :, None]

    def inspected(self, shape: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of an image of ``shape`` (h, w) that any input shows."""
        views = self.views(shape)
        rows, columns = (
            slice(min(v[axis].first for v in views), max(v[axis].last for v in views))
            for axis in (0, 1)
        )
        return rows, columns

    def inspected_part(self, image: np.ndarray) -> np.ndarray:
        """What any input shows of an image, or of its map or mask, (h, w, ...)."""
        return image if self.everything else image[self.inspected(image.shape[:2])]

    def to_original(self, scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The map (height, width) of a single view on all pixels (h, w) f32, see ``View.paint``.

        A pixel that the view does not show gets the lowest score of the others.
        """
        made, (view,) = np.empty(shape, np.float32), self.views(shape)
        view.paint(made, scores)
        if not self.everything:
            rows, columns = self.inspected(shape)
            inner = made[rows, columns].copy()
            made[...] = inner.min()
            made[rows, columns] = inner
        return made
