"""Images on canvases of one size: what training reads, and how a whole source is decoded."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from dsad.core import batch as batches
from dsad.core.batch import BatchSpec
from dsad.core.types import CanvasSource, Progress, Source, silent
from dsad.data import facts as image_facts

#: Threads that decode.
THREADS = max(2, min(16, os.cpu_count() or 2))


def size_on(side: int, height: int, width: int) -> tuple[int, int]:
    """Height and width that an image of so many pixels has on a canvas: never enlarged."""
    scale = min(1.0, side / max(height, width))
    if scale == 1.0:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def nearest_pixels(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask or labels (h, w) sampled at the pixel centres of another size."""
    if mask.shape == size:
        return mask
    at = (
        ((np.arange(n) + 0.5) * full / n).astype(int)
        for n, full in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(*at)]


def place(image: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Put an image (h, w, 3) uint8 top left on a canvas of zeros; returns its size there.

    An image larger than the canvas is scaled down to fit (aspect kept, Pillow's antialiased
    bilinear filter); a smaller one stays as it is.
    """
    height, width = size_on(len(out), *image.shape[:2])
    if (height, width) != image.shape[:2]:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        image = np.asarray(small)
    out[:height, :width] = image
    return height, width


#: Writes sample ``index`` into the fields ``BatchSpec.read`` of one row, all zero before.
Reader = Callable[[int, dict[str, Any]], None]


class _Decode:
    """Canvases from the samples of a source; the facts of an image are found the first time."""

    def __init__(self, source: Source, spec: BatchSpec):
        self.source, self.facts = source, tuple(spec.facts)
        self.known: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, index: int, row: dict[str, Any]) -> None:
        sample = self.source[index]
        if self.facts and index not in self.known:  # two threads may find them, and find the same
            self.known[index] = image_facts.find(self.facts, sample.image)
        row["size"][:] = size = place(sample.image, row["image"])
        for name, value in self.known.get(index, {}).items():
            row["facts"][name][...] = value
        if "mask" in row and sample.mask is not None:
            row["mask"][: size[0], : size[1]] = nearest_pixels(sample.mask, size)
            row["masked"][...] = 1


def reader_of(source: Source, spec: BatchSpec) -> Reader:
    """How samples get onto canvases: a source may hold them ready."""
    if isinstance(source, CanvasSource):
        return source.canvas_reader(spec)
    return _Decode(source, spec)


def columns(source: Source, spec: BatchSpec) -> dict[str, np.ndarray]:
    """The fields ``BatchSpec.columns`` of all samples, (N,) int32 each."""
    keys: dict[str, list[Any]] = {
        "category": [r.category for r in source.records],
        "group": [(r.category, r.group) for r in source.records],
    }
    numbers = {}
    for name in spec.columns:
        if name == "label":
            numbers[name] = np.asarray([r.label for r in source.records], np.int32)
            continue
        number = {key: i for i, key in enumerate(sorted(set(keys[name])))}
        numbers[name] = np.asarray([number[key] for key in keys[name]], np.int32)
    return numbers


def fill(arrays: dict[str, Any], row: int, reader: Reader, index: int) -> None:
    """Read sample ``index`` into a row of arrays of ``BatchSpec.read``."""

    def view(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: view(part) for name, part in value.items()}
        return value[row, ...]

    reader(index, view(arrays))


def canvases(
    source: Source,
    spec: BatchSpec,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The fields ``BatchSpec.stored`` of all samples of a source but features, read by threads.

    Only ``rows`` are read, if given; the others stay zero, which costs no memory where the
    system gives pages on first use. Raises DataError naming the first file that cannot be read.
    """
    reader, arrays = reader_of(source, spec), batches.zeros(spec.read, len(source))
    rows = range(len(source)) if rows is None else [int(row) for row in rows]
    tell = progress or silent
    tell(0, len(rows), "decoding images")
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            placed = pool.map(lambda i: fill(arrays, i, reader, i), rows)
            for done, _ in enumerate(placed, start=1):
                tell(done, len(rows), "decoding images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {**arrays, **columns(source, spec)}
