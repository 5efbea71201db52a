"""Pictures as they are given: files, folders, patterns, arrays."""

import dataclasses
import glob
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core.errors import ConfigError, DataError
from dsad.core.types import Record, Sample, Source
from dsad.data import decode, files
from dsad.data.base import DataConfig, IndexedDataset

#: Suffixes of what is written for an image.
OUTPUTS = (".png", ".tiff")
#: Of the normal images whose looks are kept, at most so many are decoded for it.
LOOKED_AT = 64


class _Pictures(files.EncodedSource):
    """Files by their paths, and arrays (h, w, 3) uint8, as normal images of no category."""

    def __init__(self, images: Sequence[Any], category: str, lossy: tuple[str, ...]) -> None:
        self._images = images
        names = [_name(i, image) for i, image in enumerate(images)]
        records = [Record(path=n, category=category, label=0, kind="good") for n in names]
        super().__init__(records, lossy=lossy, rule=decode.MaskRule())

    def encoded(self, index: int) -> bytes:
        image = self._images[index]
        if isinstance(image, np.ndarray):
            return np.ascontiguousarray(image).tobytes()
        return decode.read_bytes(pathlib.Path(), self.records[index].path)

    def decoded(self, index: int) -> tuple[np.ndarray, str]:
        image = self._images[index]
        if not isinstance(image, np.ndarray):
            return super().decoded(index)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                f"image {index}: expected an array (h, w, 3) uint8, found {image.shape} "
                f"{image.dtype}. Give it as RGB from 0 to 255: repeat a grey channel three times, "
                "leave alpha out, scale and round floats."
            )
        return image, "RGB"

    def files(self, index: int) -> list[pathlib.Path]:
        """Of an array none."""
        image = self._images[index]
        return [] if isinstance(image, np.ndarray) else [pathlib.Path(image)]


def _name(index: int, image: Any) -> str:
    """The path of a file, the number of an array; raises DataError for anything else."""
    if isinstance(image, np.ndarray):
        return f"{index:06d}"
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    raise DataError(
        f"image {index}: expected a path or an array (h, w, 3) uint8, found {type(image).__name__}."
    )


def source(
    images: Sequence[Any], category: str = "", lossy: tuple[str, ...] = ()
) -> files.EncodedSource:
    """Paths of files and arrays (h, w, 3) uint8 as normal images; decoded when they are asked for.

    ``lossy`` as in ``config.data``.
    """
    return _Pictures(images, category, lossy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureSet(IndexedDataset):
    """Normal images of one category, all of them to train on."""

    images: Sequence[Any]

    def source(self, split: str, category: str | None = None) -> files.EncodedSource:
        """All images for "train", none for "test"."""
        images = self.images if split == "train" else ()
        return source(images, self.categories[0], self.config.lossy)


def dataset(images: Sequence[Any], category: str, config: DataConfig) -> PictureSet:
    """Paths of files and arrays (h, w, 3) uint8 as a data set without test images."""
    splits = {"train": tuple(source(images, category).records), "test": ()}
    about = files.protocol(config, splits, licence="not stated", dataset="pictures", split="none")
    return PictureSet(
        name="pictures", categories=(category,), protocol=about, config=config, splits=splits,
        images=images,
    )  # fmt: skip


class Tolerant:
    """The samples of a source, one black pixel for those that cannot be read.

    ``faults`` says why, by number, once they were asked for.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.records: Sequence[Record] = source.records
        self.faults: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Sample:
        try:
            return self._source[index]
        except DataError as error:
            self.faults[index] = str(error)
        black = np.zeros((1, 1, 3), np.uint8)
        return Sample(record=self.records[index], image=black, mask=None)


def matching(arguments: Sequence[str], without: str = "") -> list[str]:
    """Paths of the images that arguments name, each once, in their order.

    An argument is a file, a folder (all images in it and below, by name), or a pattern with ``*``,
    ``?``, ``[...]`` or ``**``; what exists is never a pattern. Links to folders are followed. Below
    the folder ``without`` nothing is taken. Raises ConfigError for what names no image, and for a
    folder that cannot be listed.
    """
    paths: dict[str, str] = {}
    avoided = os.path.join(os.path.realpath(without), "") if without else ""
    for argument in arguments:
        text = os.path.expanduser(argument)
        matches = [text] if os.path.lexists(text) else sorted(glob.glob(text, recursive=True))
        if not matches:
            magic = glob.has_magic(text)
            what = "no file matches this pattern" if magic else "no such file or folder"
            raise ConfigError(f"{argument}: {what}; expected images, folders, or patterns.")
        found: list[str] = []
        for match in matches:
            found += _below(match) if os.path.isdir(match) else [match]
        kept = [p for p in found if not avoided or not os.path.realpath(p).startswith(avoided)]
        if found and not kept:
            raise ConfigError(
                f"{argument}: lies in {without}, which takes the outputs; choose another place for "
                "them."
            )
        if not kept:
            raise ConfigError(
                f"{argument}: no image there; expected files ending in "
                f"{', '.join(files.IMAGE_SUFFIXES)}."
            )
        for path in kept:
            paths.setdefault(os.path.abspath(path), os.path.normpath(path))
    return list(paths.values())


def _below(folder: str) -> Iterator[str]:
    """The images in a folder and below it; hidden ones are left out."""

    def unlisted(problem: OSError) -> None:
        raise ConfigError(
            f"{problem.filename}: the folder cannot be listed ({problem.strerror}); make it "
            "readable, or name the others."
        )

    for here, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        folders[:] = sorted(n for n in folders if not files.barred(os.path.join(here, n)))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(files.IMAGE_SUFFIXES):
                yield os.path.join(here, name)


def names(paths: Sequence[str]) -> list[str]:
    """A name for each path: below the last folder above all of them, with forward slashes.

    Suffixes are left out where all others differ without them, and no folder is called so with
    the suffix of an output.
    """
    whole = [os.path.abspath(p) for p in paths]
    top = os.path.commonpath([os.path.dirname(p) for p in whole])
    full = [pathlib.Path(os.path.relpath(p, top)).as_posix() for p in whole]
    short = [os.path.splitext(name)[0] for name in full]
    often = Counter(short)
    made = [f if often[s] > 1 else s for f, s in zip(full, short, strict=True)]
    folders = {os.fspath(above) for name in full for above in pathlib.PurePosixPath(name).parents}
    clash = len(set(made)) < len(made) or any(f"{m}{s}" in folders for m in made for s in OUTPUTS)
    return full if clash else made


def brightness(image: np.ndarray) -> float:
    """Mean grey level, 0 to 255."""
    return float(image.mean())


def looks(source: Source) -> dict[str, Any]:
    """What normal images look like, for comparison with others.

    ``brightness`` (mean, std over the images, 0 to 255) and the least and greatest ``height`` and
    ``width`` in pixels, of ``images`` that are spread evenly over the source.
    """
    count = min(LOOKED_AT, len(source))
    images = (source[i * len(source) // count].image for i in range(count))
    seen = [(brightness(image), *image.shape[:2]) for image in images]  # one at a time
    levels, heights, widths = zip(*seen, strict=True)
    return {
        "images": count,
        "brightness": [float(np.mean(levels)), float(np.std(levels))],
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
    }


@dataclasses.dataclass
class Drift:
    """Whether images, told of one by one, lie far outside the ``normals`` of ``looks``.

    Far: the mean brightness of n images two (and 1/√n, for chance) standard deviations and five
    grey levels away, as images of one batch may be alike; a side a third shorter or half longer
    than of any normal image, or the aspect ratio a tenth beyond theirs.
    """

    normals: Mapping[str, Any]
    images: int = 0
    brightness: float = 0.0
    far: int = 0
    first: tuple[int, int] = (0, 0)

    def add(self, level: float, shape: tuple[int, int]) -> None:
        """An image of this brightness and (h, w)."""
        self.images += 1
        self.brightness += (level - self.brightness) / self.images
        (low, high), (least, most) = self.normals["height"], self.normals["width"]
        (h, w), flat, steep = shape, least / high / 1.1, most / low * 1.1
        near = low / 1.5 <= h <= high * 1.5 and least / 1.5 <= w <= most * 1.5
        if not (near and flat <= w / h <= steep):
            self.first = self.first if self.far else shape
            self.far += 1

    def warnings(self) -> list[str]:
        """What is far, in sentences."""
        lines = []
        mean, std = self.normals["brightness"]
        if self.images and abs(self.brightness - mean) > max((2 + self.images**-0.5) * std, 5):
            lines.append(
                f"brightness: these images have {self.brightness:.0f} on average, the normal ones "
                f"{mean:.0f} ± {std:.0f} (0 to 255)"
            )
        if self.far:
            height, width = self.first
            ranges = (self.normals[side] for side in ("width", "height"))
            sides = [f"{a}" if a == b else f"{a}–{b}" for a, b in ranges]
            lines.append(
                f"size: {self.far} of {self.images} images, the first {width}×{height} pixels; the "
                f"normal ones are {sides[0]}×{sides[1]} (width × height)"
            )
        return lines
