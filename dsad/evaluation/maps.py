"""Anomaly maps as files: float32 TIFF, or 16-bit PNG with the scale beside it.

``<folder>/<path of the image>`` with the suffix ``.tiff`` or ``.png``: for MVTec AD that is
``<category>/test/<kind>/<number>.tiff``, the layout its evaluation code reads.
"""

import io
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
import tifffile
from etils import epath

from dsad.core import paths
from dsad.core.errors import DataError


class MapWriter:
    """Writes maps into a folder, also of a bucket; a reader never sees half a file."""

    def __init__(self, folder: str | epath.PathLike, kind: str) -> None:
        self.folder, self.kind = paths.directory(folder), kind

    def note(self, stamp: dict[str, Any]) -> None:
        """Write ``stamp.json``: what the maps mean."""
        text = json.dumps(stamp, indent=1, ensure_ascii=False)
        paths.write_whole(self.folder / "stamp.json", text)

    def write(self, path: str, scores: np.ndarray) -> epath.Path:
        """Write the map (h, w) of the image at ``path``, relative to its data set."""
        target = map_path(self.folder, path, self.kind)
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
            paths.write_whole(target.with_suffix(".json"), json.dumps(scale))
        return paths.write_whole(target, packed.getvalue())


def check_paths(images: Iterable[str], kind: str) -> None:
    """Refuse images, by path, whose maps would lie outside the folder or in one place."""
    taken: dict[epath.Path, str] = {}
    for path in images:
        target = map_path("anomaly_maps", path, kind)
        if (other := taken.setdefault(target, path)) != path:
            raise DataError(
                f"{target}: the maps of {other} and {path} would both go there; rename one image."
            )


def map_path(folder: str | epath.PathLike, path: str, kind: str) -> epath.Path:
    """Where the map of an image lies."""
    parts = pathlib.PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{path}: expected a path relative to the data set's root.")
    return (paths.directory(folder) / parts).with_suffix(f".{kind}")
