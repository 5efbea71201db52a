"""Images on canvases of one size: what training reads, and how a whole source is decoded."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from dsad.core.types import Progress, Source
from dsad.data import facts as image_facts

#: Threads that decode.
THREADS = max(2, min(16, os.cpu_count() or 2))


def canvas(image: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image (h, w, 3) uint8 on a zero canvas (side, side, 3), top left, and its size there.

    An image larger than the canvas is scaled down to fit (aspect kept, Pillow's antialiased
    bilinear filter); a smaller one stays as it is.
    """
    out = np.zeros((side, side, 3), np.uint8)
    return out, _place(image, out)


def _place(image: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Put an image on a canvas of zeros; returns its height and width there."""
    side = len(out)
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        height, width = image.shape[:2]
    out[:height, :width] = image
    return height, width


def category_ids(source: Source) -> np.ndarray:
    """(N,) int32 position of each sample's category in the sorted names of the source's."""
    names = sorted({record.category for record in source.records})
    number = {name: i for i, name in enumerate(names)}
    return np.asarray([number[record.category] for record in source.records], np.int32)


#: Height and width of an image on its canvas, and its facts.
Placed = tuple[tuple[int, int], dict[str, np.ndarray]]
#: Puts sample ``index`` on a canvas of zeros (side, side, 3).
Reader = Callable[[int, np.ndarray], Placed]


class _Decode:
    """Canvases from the samples of a source; the facts of an image are found the first time."""

    def __init__(self, source: Source, facts: Sequence[str]):
        self.source, self.facts = source, facts
        self.known: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, index: int, out: np.ndarray) -> Placed:
        original = self.source[index].image
        if self.facts and index not in self.known:  # two threads may find them, and find the same
            self.known[index] = image_facts.find(self.facts, original)
        return _place(original, out), self.known.get(index, {})


def reader_of(source: Source, side: int, facts: Sequence[str]) -> Reader:
    """How samples get onto canvases: a source may hold them ready, see ``dsad.data.records``."""
    ready = getattr(source, "canvas_reader", None)
    return ready(side, facts) if ready else _Decode(source, facts)


def empty(count: int, side: int, facts: Sequence[str]) -> dict[str, Any]:
    """Room for so many canvases, their valid sizes and facts."""
    return {
        "image": np.zeros((count, side, side, 3), np.uint8),
        "size": np.zeros((count, 2), np.int32),
        "facts": image_facts.empty(facts, count),
    }


def fill(arrays: dict[str, Any], row: int, reader: Reader, index: int) -> None:
    """Read sample ``index`` into a row of ``empty``'s arrays."""
    arrays["size"][row], facts = reader(index, arrays["image"][row])
    for name, value in facts.items():
        arrays["facts"][name][row] = value


def canvases(
    source: Source,
    side: int,
    *,
    facts: Sequence[str] = (),
    rows: Sequence[int] | np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All samples of a source as arrays, decoded by threads.

    ``image`` (N, side, side, 3) uint8, ``size`` (N, 2) int32 valid height and width, ``category``
    (N,) int32 position in the sorted names of the source's categories, ``facts``: a dict of arrays
    (N, ...), those of ``dsad.data.facts`` that are asked for, of the images before they are
    scaled. Only ``rows`` are read, if given; the others stay zero, which costs no memory where the
    system gives pages on first use. Raises DataError naming the first file that cannot be read.
    """
    reader, arrays = reader_of(source, side, facts), empty(len(source), side, facts)
    rows = range(len(source)) if rows is None else [int(row) for row in rows]
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            placed = pool.map(lambda i: fill(arrays, i, reader, i), rows)
            for done, _ in enumerate(placed, start=1):
                if progress is not None:
                    progress(done, len(rows), "decoding images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {**arrays, "category": category_ids(source)}
