"""Any images with procedural defects: those of the synthetic data set, drawn into photographs."""

import dataclasses
import os
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from dsad.core.types import Record, Sample, Source
from dsad.data._defects import MASK_WEIGHT, kinds
from dsad.data._fields import Rng, grid

#: The kinds of defects that any material can have.
KINDS = tuple(kinds(""))
#: How their names begin in records: nobody shall take them for real ones.
PROCEDURAL = "procedural "
#: Said beside numbers that were measured against them.
NOTE = "procedural, no real ones"
#: A defect can be seen if it changes its pixels by so much of full scale on average: a piece of
#: the background set into the background is none. Until one can, this many are drawn.
VISIBLE, DRAWS = 0.04, 20


class Photo:
    """An image as a scene whose coordinates (0, 0) to (1, 1) are a square window of it.

    Its surroundings lie beyond, and where the image ends it is mirrored.
    """

    def __init__(self, image: np.ndarray, top: int, left: int, side: int):
        self.channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
        self.top, self.left, self.side = top, left, side

    def colour(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(h, w, 3) float32 in 0..1 at coordinates (h, w), bilinear."""
        at = (self.top + self.side * y - 0.5, self.left + self.side * x - 0.5)
        sampled = [ndimage.map_coordinates(c, at, order=1, mode="reflect") for c in self.channels]
        return np.stack(sampled, axis=-1)


def with_defect(image: np.ndarray, kind: str, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """An image (h, w, 3) uint8 with a defect of one of ``KINDS``, and its mask (h, w) bool.

    Sizes are in units of the shorter side, and the defect lies in a square of that side. Outside
    of it not a pixel changes. The first of ``DRAWS`` that can be seen is taken, else the clearest.
    """
    best, clearest = (image, np.zeros(image.shape[:2], bool)), -1.0
    for _ in range(DRAWS):
        made, mask = _drawn(image, kind, rng)
        change = np.abs(made[mask].astype(np.int16) - image[mask]).mean() if mask.any() else -1.0
        if change > clearest:
            best, clearest = (made, mask), float(change)
        if clearest >= 255 * VISIBLE:
            break
    return best


def _drawn(image: np.ndarray, kind: str, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    side = min(image.shape[:2])
    top, left = (int(rng.integers(n - side + 1)) for n in image.shape[:2])
    window = np.s_[top : top + side, left : left + side]
    pixels, weight = kinds("")[kind](Photo(image, top, left, side), *grid(side), rng)
    if (image == image[..., :1]).all():  # grey images have grey defects
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    made, mask = image.copy(), np.zeros(image.shape[:2], bool)
    changed = np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)
    made[window] = np.where(weight[..., None] > 0, changed, image[window])
    mask[window] = weight >= MASK_WEIGHT
    return made, mask


def _bytes(name: str) -> bytes:
    """Of any name that a file system may give, whether that is UTF-8 or not."""
    return name.encode(errors="surrogatepass")


def doubled(records: Iterable[Record]) -> list[Record]:
    """Every record of a normal image, and behind it that of the image with a procedural defect.

    Its ``kind`` begins with ``PROCEDURAL``. Kinds take turns in a category.
    """
    pairs: list[Record] = []
    turns: dict[str, int] = {}
    for record in records:
        turn = turns.setdefault(record.category, zlib.crc32(_bytes(record.category)))
        turns[record.category] += 1
        kind = KINDS[turn % len(KINDS)]
        stem, suffix = os.path.splitext(record.path)
        path = f"{stem} with {kind}{suffix}"
        drawn = {"path": path, "label": 1, "kind": PROCEDURAL + kind, "masks": (f"mask of {path}",)}
        pairs += [record, dataclasses.replace(record, **drawn)]
    return pairs


class WithDefects:
    """Every image of a source twice: as it is, and behind it with a defect drawn by ``seed``.

    For normal images; ``records`` are ``doubled``. A defect is a function of the seed and the
    image's path.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.records: Sequence[Record] = doubled(source.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Sample:
        sample, record = self.source[index // 2], self.records[index]
        if not record.label:
            return sample
        kind = record.kind.removeprefix(PROCEDURAL)
        name = f"{sample.record.path} with {kind}"
        rng = np.random.default_rng([self.seed, zlib.crc32(_bytes(name))])
        image, mask = with_defect(sample.image, kind, rng)
        return Sample(record=record, image=image, mask=mask)
