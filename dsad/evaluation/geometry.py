"""Between original pixels and the network's square input."""

import numpy as np
import PIL.Image

from dsad.core.errors import DataError

#: Of ``resize_image``.
RESIZE = "Pillow bilinear, antialiased, on uint8 RGB, aspect not kept"


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) uint8 to (size, size, 3) uint8: Pillow's antialiased bilinear, aspect not kept."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"expected a (h, w, 3) uint8 image, found {image.shape} {image.dtype}")
    picture = PIL.Image.fromarray(image)
    return np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR))


def input_affine(height: int, width: int, size: int) -> np.ndarray:
    """(2, 3) map from original (x, y) to network input, continuous: pixel centres are at + 1/2."""
    return np.array([[size / width, 0, 0], [0, size / height, 0]], np.float64)


def to_original(scores: np.ndarray, affine: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear sample of a map (s, s) at the centres of the original pixels: (height, width) f32.

    ``affine`` is axis-parallel, as ``input_affine`` gives it; beyond the outer centres the edge
    value continues.
    """
    rows = _positions(affine[1, 1], affine[1, 2], height, scores.shape[0])
    columns = _positions(affine[0, 0], affine[0, 2], width, scores.shape[1])
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
