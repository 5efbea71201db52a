"""Anomaly maps as files: float32 TIFF, or 16-bit PNG with the scale beside it.

``<folder>/<path of the image>`` with the suffix ``.tiff`` or ``.png``: for MVTec AD that is
``<category>/test/<kind>/<number>.tiff``, the layout its evaluation code reads.
"""

import io
import json
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image
import tifffile

from dsad.core.errors import DataError


class MapWriter:
    """Writes maps as they are made; a reader never sees half a file."""

    def __init__(self, folder: str | os.PathLike[str], kind: str) -> None:
        self.folder, self.kind = pathlib.Path(folder), kind
        self._written: dict[pathlib.Path, str] = {}

    def note(self, stamp: dict[str, Any]) -> None:
        """Write ``stamp.json``: what the maps mean."""
        text = json.dumps(stamp, indent=1, ensure_ascii=False)
        replace(self.folder / "stamp.json", text.encode())

    def write(self, path: str, scores: np.ndarray) -> pathlib.Path:
        """Write the map (h, w) of the image at ``path``, relative to its data set."""
        target = map_path(self.folder, path, self.kind)
        if (other := self._written.setdefault(target, path)) != path:
            raise DataError(
                f"{target}: the maps of {other} and {path} would both go there; rename one image."
            )
        scores = np.asarray(scores, np.float32)
        packed = io.BytesIO()
        if self.kind == "tiff":
            tifffile.imwrite(packed, scores, photometric="minisblack", metadata=None)
        else:
            low, high = float(scores.min()), float(scores.max())
            if not np.isfinite([low, high]).all():
                raise DataError(f"{path}: NaN or infinite scores cannot be saved as PNG.")
            step = (high - low) / 65535
            levels = np.rint((scores.astype(np.float64) - low) / (step or 1.0)).astype(np.uint16)
            PIL.Image.fromarray(levels).save(packed, "PNG")
            # The scale first: a picture without it would be worth nothing.
            scale = {"path": path, "offset": low, "step": step}
            replace(_scale(target), json.dumps(scale).encode())
        return replace(target, packed.getvalue())


def map_path(folder: str | os.PathLike[str], path: str, kind: str) -> pathlib.Path:
    """Where the map of an image lies."""
    parts = pathlib.PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{path}: expected a path relative to the data set's root.")
    return pathlib.Path(folder, *parts.parts).with_suffix(f".{kind}")


def read_map(path: str | os.PathLike[str]) -> np.ndarray:
    """A map (h, w) float32 as written: exact from TIFF, within half a step from PNG."""
    file = pathlib.Path(path)
    try:
        if file.suffix == ".tiff":
            values = np.asarray(tifffile.imread(file))
            if values.ndim != 2 or values.dtype.kind != "f":
                raise ValueError(f"expected (h, w) floats, found {values.shape} {values.dtype}")
            return values.astype(np.float32, copy=False)
        with PIL.Image.open(file) as picture:
            levels = np.asarray(picture, np.float64)
        scale = json.loads(_scale(file).read_text(encoding="utf-8"))
        return np.asarray(scale["offset"] + levels * scale["step"], np.float32)
    except (OSError, ValueError, KeyError, tifffile.TiffFileError) as error:
        raise DataError(f"{file}: no readable anomaly map ({error}).") from error


def replace(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Write under a temporary name and move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def _scale(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
