"""Data sets made of files: listing folders, the index as a data set, samples on demand."""

import abc
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core.channels import Channel
from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import Record, Sample, Source
from dsad.data import decode
from dsad.data.base import (
    DataConfig,
    Fault,
    FaultError,
    IndexedDataset,
    Saturations,
    error,
    link_to_nothing,
    warning,
)  # fmt: skip
from dsad.data.combined import selected
from dsad.data.defective import WithDefects

#: Suffixes, in lower case, of files that count as images.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
_TEXT = re.compile("read_?me|licen[cs]e", re.IGNORECASE)
_COPY = re.compile(r"\(copy( \d+)?\)|[ -]copy( ?\(?\d+\)?)?$|~$", re.IGNORECASE)


def stray(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> str:
    """Why a file name is not taken for an image of the set, or ""."""
    stem, suffix = os.path.splitext(name)
    if name.startswith("."):
        return "hidden"
    if suffix.lower() not in suffixes:
        return f"suffix {suffix!r} is not one of {', '.join(suffixes)}"
    return "looks like a copy" if _COPY.search(stem) else ""


def is_text(name: str) -> bool:
    """Whether a file accompanies a data set: its licence, or what to read first."""
    return bool(_TEXT.match(name))


def barred(folder: str) -> str:
    """Why a folder is not entered, or ""."""
    if os.path.basename(folder).startswith("."):
        return "hidden"
    return "a link to a folder that it lies in" if _circular(folder) else ""


def _circular(folder: str) -> bool:
    """Whether a folder is a link to one above it, by the way of other links too.

    Links to other places are followed; these would never end.
    """
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    above = map(os.path.realpath, map(str, pathlib.PurePath(folder).parents))
    return any(os.path.commonpath((target, place)) == target for place in above)


def subfolders(folder: pathlib.Path) -> list[str]:
    """Sorted names of the visible folders in ``folder``; none if it does not exist.

    Raises OSError for a link to nothing, which may have been one.
    """
    if not folder.is_dir():
        return []
    for path in folder.iterdir():
        if link_to_nothing(str(path)) and not path.name.startswith("."):
            raise OSError(errno.ENOENT, "a link to nothing", str(path))
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def below(root: pathlib.Path, folder: str) -> set[str]:
    """Paths relative to ``root`` of all files in a folder and below, each folder listed once."""
    found: set[str] = set()
    for place, folders, names in os.walk(root / folder, followlinks=True):
        prefix = pathlib.Path(place).relative_to(root)
        found.update((prefix / name).as_posix() for name in names)
        folders[:] = [name for name in folders if not _circular(os.path.join(place, name))]
    return found


def images(
    root: pathlib.Path,
    folder: pathlib.Path,
    faults: list[Fault],
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    others: tuple[str, ...] = (),
) -> dict[str, str]:
    """Stem to path relative to ``root`` of the images directly in ``folder``, sorted by stem.

    Appends K9 warnings for what is ignored (except the suffixes in ``others``) and K7 errors for
    a stem with two suffixes.
    """
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        path = (folder / name).relative_to(root).as_posix()
        if os.path.splitext(name)[1].lower() in others and not name.startswith("."):
            continue
        if (folder / name).is_dir():
            reason = "a folder where only images are expected"
        else:
            reason = stray(name, suffixes)
        stem = os.path.splitext(name)[0]
        if reason:
            faults.append(ignored(path, reason))
        elif stem in found:
            faults.append(repeated(stem, path, found[stem]))
        else:
            found[stem] = path
    return dict(sorted(found.items()))


def root_folder(config: DataConfig) -> pathlib.Path:
    """The root as a path; ConfigError when the config names none."""
    if not config.root:
        raise ConfigError(
            f"config.data.root: empty; expected the folder that holds {config.name}. "
            "Set it with --config.data.root=DIR."
        )
    return pathlib.Path(os.path.expanduser(config.root))


def folder_name(folder: pathlib.Path) -> str:
    """What a folder is called, whatever way leads there; "images" for that of a file system."""
    return os.path.basename(os.path.realpath(folder)) or "images"


def parsed(text: str | bytes) -> Any:
    """What a text of JSON says, in UTF-8 with or without a mark; ValueError of any other text."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError as problem:
        raise ValueError("it is nested too deeply") from problem


def protocol(
    config: DataConfig, splits: Mapping[str, Iterable[Record]], *, licence: str, **facts: Any
) -> dict[str, Any]:
    """What a set of files is and how it is read: ``facts`` name the "dataset" and its "split"."""
    return {
        **facts, "split_hash": split_hash(splits), "licence": licence,
        "missing_masks": config.missing_masks, "lossy": sorted(config.lossy), "canvas_crop": "none",
    }  # fmt: skip


def ignored(path: str, reason: str) -> Fault:
    """The K9 fault of what does not belong to the set."""
    return warning("K9", path, f"ignored: {reason}.")


def miscounted(config: DataConfig, path: str, message: str) -> Fault:
    """The K12 fault of counts that are not the published ones: an error where these are asked."""
    return (error if config.strict else warning)("K12", path, message)


def missing_root(root: pathlib.Path) -> Fault:
    """The fault of a root that does not exist or is no folder."""
    what = "is not a folder" if root.exists() else "does not exist"
    return error("K0", str(root), f"{what}; set config.data.root to the data set's folder.")


def licence(root: pathlib.Path, categories: Sequence[str] = ()) -> str:
    """What the data folder says of its licence: the name of a file, or that there is none.

    Without a file of its own those in the folders of its ``categories`` are named.
    """
    found = _licences(root)[:1]
    if not found:
        inside = ((name, _licences(root / name)) for name in categories)
        found = [f"{name}/{file[0]}" for name, file in inside if file]
    return f"see {listed(found)} in the data folder" if found else "not stated in the data folder"


def _licences(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        named = [e for e in entries if e.name.lower().startswith(("license", "licence"))]
        return sorted(e.name for e in named if e.is_file())


def missing_mask(path: str, expected: str, allowed: bool) -> Fault:
    """The K1 fault of an anomalous image without mask: a warning where that is allowed."""
    if allowed:
        return warning("K1", path, f"no mask {expected}: used for image-level metrics only.")
    text = (
        f"anomalous image without mask; expected {expected}. Add it, or count such images in "
        'image-level metrics only with config.data.missing_masks="image_only".'
    )
    return error("K1", path, text)


def orphan_mask(path: str) -> Fault:
    """The K1 fault of a mask that belongs to no image."""
    return error("K1", path, "mask without image: no image has this stem; rename or remove it.")


def paired(
    images: Mapping[str, str], masks: Mapping[str, str], faults: list[Fault]
) -> dict[str, str]:
    """Mask paths by the stem of their image, for paths by stem; appends what has no partner.

    A mask has the stem of its image, or that and "_mask".
    """
    mask_of: dict[str, str] = {}
    for stem, path in masks.items():
        plain = stem.removesuffix("_mask")
        owner = plain if plain in images else stem
        if owner not in images:
            faults.append(orphan_mask(path))
        elif owner in mask_of:
            text = f"second mask of {images[owner]}, beside {mask_of[owner]}; remove one."
            faults.append(error("K7", path, text))
        else:
            mask_of[owner] = path
    return mask_of


def repeated(stem: str, path: str, other: str) -> Fault:
    """The K7 fault of two files of one stem."""
    text = f"the stem {stem!r} occurs twice in one folder, also as {other}: "
    return error("K7", path, f"{text}masks are matched by stem; remove or rename one.")


def split_groups(splits: Mapping[str, Iterable[Record]]) -> list[Fault]:
    """K13: groups of a category with images in several splits."""
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for split, records in splits.items():
        for r in records:
            if r.group:
                sides.setdefault((r.category, r.group), {}).setdefault(split, r.path)
    return [
        error("K13", path, f"its group {group} is also in {first}, as {side[first]}.")
        for (_, group), side in sides.items()
        for first, *others in [list(side)]
        for path in (side[other] for other in others)
    ]


def split_hash(splits: Mapping[str, Iterable[Record]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the sorted lines (split, path, label)."""
    lines = sorted(f"{s}\t{r.path}\t{r.label}" for s, records in splits.items() for r in records)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()[:16]


def select(
    splits: Mapping[str, tuple[Record, ...]],
    categories: tuple[str, ...],
    split: str,
    category: str | None,
) -> tuple[Record, ...]:
    """Records of one split and of one category or all; ConfigError for a name that is not there."""
    if split not in splits:
        raise ConfigError(f"no split {split!r}: expected one of {listed(splits)}.")
    if category is None:
        return splits[split]
    if category not in categories:
        hint = suggestion(category, categories)
        raise ConfigError(f"no category {category!r}.{hint} There is: {listed(categories)}.")
    return tuple(r for r in splits[split] if r.category == category)


class EncodedSource(abc.ABC):
    """Samples decoded on access from the bytes of image and mask files, wherever these lie.

    Safe to use from several threads. Subclasses say where the bytes come from.
    """

    def __init__(
        self, records: Sequence[Record], *, lossy: tuple[str, ...], rule: decode.MaskRule,
        saturations: Saturations | None = None,
    ):  # fmt: skip
        self.records = records
        self._lossy, self.rule, self._saturations = lossy, rule, saturations or {}

    def __len__(self) -> int:
        return len(self.records)

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """The content of an image's file; raises DataError naming it (K8)."""

    def encoded_masks(self, index: int) -> list[bytes]:
        """The contents of the files ``masks`` of a sample's record."""
        raise DataError(f"{self.records[index].path}: masks are named, but none is stored here.")

    def size_of(self, index: int) -> int:
        """Bytes of a sample's files."""
        masks = self.encoded_masks(index) if self.records[index].masks else []
        return len(self.encoded(index)) + sum(map(len, masks))

    def __getitem__(self, index: int, /) -> Sample:
        """Decode one sample; raises DataError naming the file (K2, K3, K4, K8)."""
        image, _ = self.decoded(index)
        mask = self.annotation(index, image.shape[:2])
        return Sample(record=self.records[index], image=image, mask=mask)

    def decoded(self, index: int) -> tuple[np.ndarray, str]:
        """Pixels (h, w, 3) uint8 and the file's mode; FaultError (K3, K8) names the file."""
        return decode.decoded_image(self.encoded(index), self.records[index].path, self._lossy)

    def annotation(self, index: int, shape: tuple[int, int]) -> np.ndarray | None:
        """All masks of a sample, joined, whose image has ``shape`` (h, w) and is not decoded.

        Raises DataError naming the mask's file (K2, K3, K4, K8).
        """
        record = self.records[index]
        if record.label == 0:
            return np.zeros(shape, bool)
        if not record.masks:
            return None
        joined = np.zeros(shape, bool)
        for values in self._mask_values(index, shape, self.rule):
            joined |= values > self.rule.threshold
        return joined

    def _mask_values(
        self, index: int, shape: tuple[int, int], rule: decode.MaskRule
    ) -> Iterator[np.ndarray]:
        paths = self.records[index].masks
        for path, content in zip(paths, self.encoded_masks(index), strict=True):
            values = decode.mask_values(content, path, rule)
            if fault := decode.size_fault(path, values, shape):
                raise FaultError(fault)
            yield values

    @property
    def saturated(self) -> bool:
        """Whether every mask file here is a defect whose saturation is known."""
        known = self._saturations
        return bool(known) and all(record.category in known for record in self.records)

    def channels(self, index: int, shape: tuple[int, int]) -> list[Channel]:
        """The defects of a sample of a ``saturated`` source, one of each mask file that has any.

        Raises DataError naming the file (K2, K3, K4, K8).
        """
        record = self.records[index]
        if not record.masks:
            return []
        known = self._saturations[record.category]
        every = self._mask_values(index, shape, decode.defect_rule(known))
        return [Channel(v > 0, known[int(v.max())]) for v in every if v.any()]

    def identity(self, index: int) -> str:
        """SHA-256 of what the pixels are made from: the bytes of the file, and what may be lost.

        Pixels that ``lossy`` allows are not the same as pixels that need no permission: what was
        kept of them must not be found by a config that refuses their file.
        """
        digest = hashlib.sha256(f"upright {sorted(self._lossy)}".encode())
        digest.update(self.encoded(index))
        return digest.hexdigest()


class FileSource(EncodedSource):
    """Samples read from the files of a data set."""

    def __init__(self, dataset: "FileDataset", records: Sequence[Record]):
        super().__init__(
            records, lossy=dataset.config.lossy, rule=dataset.rule, saturations=dataset.saturations
        )
        self._root, self._mask_content = dataset.root, dataset.mask_content

    def encoded(self, index: int) -> bytes:
        """The content of an image's file; raises DataError naming it (K8)."""
        return decode.read_bytes(self._root, self.records[index].path)

    def encoded_masks(self, index: int) -> list[bytes]:
        """The contents of the mask files of a sample."""
        record = self.records[index]
        return [self._mask_content(self._root, record.path, path) for path in record.masks]

    def size_of(self, index: int) -> int:
        """Bytes of a sample's files, asked from the file system."""
        try:
            return sum(file.stat().st_size for file in self.files(index))
        except OSError as problem:
            text = f"cannot be read: {problem.strerror}. Expected an image file; copy it again."
            raise FaultError(error("K8", self.records[index].path, text)) from problem

    def files(self, index: int) -> list[pathlib.Path]:
        """Those of image and masks."""
        record = self.records[index]
        return [self._root / path for path in (record.path, *record.masks)]


def mask_file(root: pathlib.Path, image: str, path: str) -> bytes:
    """The content of an image's mask file as it lies there; FaultError (K8) names it."""
    del image
    return decode.read_bytes(root, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileDataset(IndexedDataset):
    """An index of files that satisfies the Dataset protocol.

    ``normal_masks`` maps normal images to mask files that exist for them (all zero, or K6).
    ``rules`` are narrower rules of categories, by which the full check looks at masks.
    ``mask_content`` gives, of root, image and annotation file, the content of a mask file: another
    one than ``mask_file`` draws what the annotation only describes.
    ``skipped`` says for a check why it does not apply. With ``procedural`` the test images are
    normal, and each has a twin with a defect drawn by ``config.seed``.
    """

    root: pathlib.Path
    rule: decode.MaskRule
    normal_masks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, decode.MaskRule] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    procedural: bool = False
    mask_content: Callable[[pathlib.Path, str, str], bytes] = mask_file

    def source(self, split: str, category: str | None = None) -> Source:
        """Samples of a split, of one category or of all, sorted by path."""
        records = select(self.splits, self.categories, split, category)
        if split == "train" or not self.procedural:
            return FileSource(self, records)
        both = WithDefects(FileSource(self, [r for r in records if not r.label]), self.config.seed)
        rows = sorted(range(len(both)), key=lambda i: both.records[i].path)
        return selected(both, rows)


def by_path(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records sorted by path: the order never depends on the file system."""
    return tuple(sorted(records, key=lambda r: r.path))


def normals(paths: Iterable[tuple[str, str]]) -> tuple[Record, ...]:
    """Records of normal images by (category, path), sorted by path."""
    return by_path(Record(path=p, category=c, label=0, kind="good") for c, p in paths)
