"""A data set at a glance: small pictures of its images by category and kind, as one PNG.

Defects are tinted and ringed, so that a mask on the wrong image, or a turned one, is seen before
anything is computed.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from dsad.core.errors import DataError
from dsad.core.types import Dataset, Record, Sample, Source

#: At most so many pictures, so many of one kind, and so many beside each other.
LIMIT, OF_A_KIND, COLUMNS = 60, 4, 6
#: Longest side of a picture, height of a line of text and space between pictures, in pixels.
SIDE, LINE, GAP = 200, 17, 10
_DEFECT = np.asarray((255, 0, 70), np.float32)
_INK, _PAPER, _EMPTY = "#202020", "#ffffff", "#d8d8d8"


class Choice(NamedTuple):
    """An image of a data set: where it is, and the ``kind`` it is shown under."""

    category: str
    kind: str
    split: str
    index: int


def chosen(dataset: Dataset, limit: int = LIMIT) -> tuple[list[Choice], str]:
    """The first images of every kind of every category, and in words what is left out ("": none).

    Where not all fit, categories come first, then kinds, then further images of a kind.
    """
    groups: dict[str, dict[str, list[Choice]]] = {}
    total = 0
    for split in ("test", "train"):
        for i, record in enumerate(dataset.source(split).records):
            kind, total = f"{split} {record.kind}", total + 1
            of_kind = groups.setdefault(record.category, {}).setdefault(kind, [])
            of_kind.append(Choice(record.category, kind, split, i))
    ranked = [
        (number, place, choice)
        for kinds in groups.values()
        for place, kind in enumerate(sorted(kinds, key=_first_defects_then_good))
        for number, choice in enumerate(kinds[kind][:OF_A_KIND])
    ]
    taken = [choice for *_, choice in sorted(ranked)[:limit]]
    shown = {(choice.category, choice.kind) for choice in taken}
    kinds = sum(map(len, groups.values()))
    left = "" if len(taken) == total else f"{len(taken):,} of {total:,} images"
    if len(shown) < kinds:
        left += f" and {len(shown)} of {kinds} kinds; config.data.categories chooses others"
    return sorted(taken), left


def _first_defects_then_good(kind: str) -> tuple[bool, bool, str]:
    split, _, name = kind.partition(" ")
    return split == "train", name == "good", kind


def sheet(dataset: Dataset, limit: int = LIMIT) -> tuple[bytes, str]:
    """The pictures as the content of a PNG file, and what is left out, see ``chosen``.

    One image at a time is decoded; one that cannot be is a grey field that says so.
    """
    choices, left = chosen(dataset, limit)
    sources = {split: dataset.source(split) for split in ("train", "test")}
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # letters of most languages
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), LINE - 5)
    rows = list(_rows(choices))
    width, high = COLUMNS * (SIDE + GAP) + GAP, SIDE + 2 * LINE + GAP
    heights = [LINE + GAP if isinstance(row, str) else high for row in rows]
    page = Image.new("RGB", (width, sum(heights) + 2 * LINE + 2 * GAP), _PAPER)
    pen, top = ImageDraw.Draw(page), GAP
    title = f"{dataset.name}{f': {left}' if left else ''}"
    pen.text((GAP, top), _fitted(title, font, width - 2 * GAP), _INK, font)
    top += 2 * LINE
    for row, height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            pen.text((GAP, top), _fitted(row, font, width - 2 * GAP), _INK, font)
        else:
            for column, choice in enumerate(row):
                place = (GAP + column * (SIDE + GAP), top)
                _draw(page, place, sources[choice.split], choice, font)
        top += height
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue(), left


def _rows(choices: Sequence[Choice]) -> Iterator[str | list[Choice]]:
    """The name of every category, and below it its pictures by rows."""
    categories: dict[str, list[Choice]] = {}
    for choice in choices:
        categories.setdefault(choice.category, []).append(choice)
    for name, members in categories.items():
        yield name
        for start in range(0, len(members), COLUMNS):
            yield members[start : start + COLUMNS]


def _draw(
    page: Image.Image, place: tuple[int, int], source: Source, choice: Choice,
    font: ImageFont.FreeTypeFont,
) -> None:  # fmt: skip
    """A picture with its kind and the name of its file below."""
    pen, (left, top) = ImageDraw.Draw(page), place
    record, note = source.records[choice.index], ""
    try:
        sample = source[choice.index]
        small = thumbnail(sample)
        page.paste(small, (left, top + SIDE - small.height))
        note = " (no mask)" if sample.mask is None else ""
    except DataError:  # check-data says why
        pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), _EMPTY)
        pen.text((left + GAP, top + GAP), "cannot be read", _INK, font)
    for line, text in enumerate((choice.kind + note, _file(record))):
        where = (left, top + SIDE + 1 + line * LINE)
        pen.text(where, _fitted(text, font, SIDE), _INK, font)


def _file(record: Record) -> str:
    return record.path.rpartition("/")[2]


def thumbnail(sample: Sample, side: int = SIDE) -> Image.Image:
    """The image of a sample, its longer side ``side`` pixels, with its defects tinted and ringed.

    A defect smaller than a pixel of the picture is still ringed.
    """
    height, width = sample.image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(sample.image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
    if sample.mask is None or not sample.mask.any():
        return small
    defect = np.zeros(size[::-1], bool)
    rows, columns = np.nonzero(sample.mask)
    defect[rows * size[1] // height, columns * size[0] // width] = True
    if scale > 1:  # the pixels of an enlarged mask lie apart
        mask = Image.fromarray(sample.mask).resize(size, Image.Resampling.NEAREST)
        defect = np.asarray(mask, bool)
    ring = ndimage.binary_dilation(defect, np.ones((3, 3), bool), iterations=2) & ~defect
    weight = np.where(ring, 1.0, np.where(defect, 0.3, 0.0)).astype(np.float32)[..., None]
    pixels = np.asarray(small, np.float32)
    return Image.fromarray(np.rint(pixels + (_DEFECT - pixels) * weight).astype(np.uint8))


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text, its middle left out where it is wider than so many pixels."""
    whole = text = text.encode(errors="backslashreplace").decode()
    kept = len(whole)
    while font.getlength(text) > width:
        kept -= 1
        text = f"{whole[: kept // 2]}…{whole[len(whole) - kept + kept // 2 :]}"
    return text
