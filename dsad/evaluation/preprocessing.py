"""Between the pixels of a file and the input of a network, and back."""

import dataclasses
from typing import Any, Literal

import numpy as np
import PIL.Image

from dsad.core.config import Settings, field
from dsad.core.errors import DataError

#: What the methods do, for stamps.
_SAID = {
    "stretched": "Pillow bilinear with antialiasing on uint8 RGB, aspect ratio not kept, larger "
    "and smaller images alike",
}


class Preprocessing(Settings, place="preprocessing"):
    """How an image becomes the input (``height``, ``width``) of a network, and a map its own.

    "stretched" resizes the whole image to the input, whatever its shape.
    """

    height: int = field(224, at_least=1)
    width: int = field(224, at_least=1)
    method: Literal["stretched"] = "stretched"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return self.height, self.width

    def describe(self) -> dict[str, Any]:
        """For stamps and names: every key, and what is done."""
        return {**dataclasses.asdict(self), "resize": _SAID[self.method]}

    def to_input(self, image: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 to (height, width, 3) uint8: Pillow's antialiased bilinear."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"expected a (h, w, 3) uint8 image, found {image.shape} {image.dtype}")
        picture = PIL.Image.fromarray(image)
        return np.asarray(picture.resize((self.width, self.height), PIL.Image.Resampling.BILINEAR))

    def affine(self, shape: tuple[int, int]) -> np.ndarray:
        """(2, 3) map from (x, y) of an image of ``shape`` (h, w) to those of the input.

        Continuous: pixel centres are at + 1/2.
        """
        height, width = shape
        return np.array([[self.width / width, 0, 0], [0, self.height / height, 0]], np.float64)

    def to_original(self, scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Bilinear sample of a map (height, width) at the centres of the pixels: (h, w) f32.

        Beyond the outer centres the edge value continues.
        """
        affine = self.affine(shape)
        rows = _positions(affine[1, 1], affine[1, 2], shape[0], scores.shape[0])
        columns = _positions(affine[0, 0], affine[0, 2], shape[1], scores.shape[1])
        values = scores.astype(np.float32)
        low, high, part = rows
        values = values[low] + (values[high] - values[low]) * part[:, None]
        low, high, part = columns
        return values[:, low] + (values[:, high] - values[:, low]) * part[None, :]


def _positions(
    scale: float, offset: float, n: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper cell, and the weight of the upper, for n pixel centres."""
    at = np.clip((np.arange(n) + 0.5) * scale + offset - 0.5, 0, size - 1)
    low = np.minimum(np.floor(at).astype(np.int64), max(size - 2, 0))
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
