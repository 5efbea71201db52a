"""The training images of ImageNet (ILSVRC 2012), from the published tars or an unpacked folder.

``config.data.root`` is ILSVRC2012_img_train.tar or the folder it lies in, a folder of the tars per
class that it holds (n01440764.tar, ...), or a folder with a folder per class. Nothing is unpacked:
an image is read from its place inside the tar. Listing 1.28 million images in a tar takes a minute
or two, so prepare such a root once (``dsad prepare``). Categories are the WordNet ids.

Some of the images are CMYK: training on them needs ``config.data.lossy=("CMYK",)``. There is no
test split: the set is for pretraining.
"""

import dataclasses
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsad.core.types import Record
from dsad.data import decode, files, folder
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, FaultError, IndexedDataset, chosen, error, variant
from dsad.data.decode import MaskRule

#: Classes and images of the training set.
CLASSES, IMAGES = 1000, 1_281_167
ABOUT = About(
    title="ImageNet (ILSVRC 2012)", licence="ImageNet terms of access: research only",
    citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
    address="https://image-net.org", masks="none", columns=("classes", "train"),
    counts={"all": (CLASSES, IMAGES)}, categories=CLASSES, protocols={"": "official training set"},
    remarks=("For pretraining alone: there is no test.", "22 images are CMYK, one is a PNG."),
    marks=("ILSVRC2012_img_train.tar", "n[0-9]*.tar"),
)  # fmt: skip
ARCHIVE = "ILSVRC2012_img_train.tar"
_CLASS_TAR = re.compile(r"n\d{8}\.tar")


class _Place(NamedTuple):
    """Where the content of a file begins in a tar, and its size in bytes."""

    archive: str
    offset: int
    size: int


class TarSource(files.EncodedSource):
    """Samples read from their places inside tar files."""

    def __init__(
        self, root: pathlib.Path, records: tuple[Record, ...], places: Mapping[str, _Place],
        config: DataConfig,
    ):  # fmt: skip
        super().__init__(records, lossy=config.lossy, rule=MaskRule())
        self._root, self._places = root, places

    def encoded(self, index: int) -> bytes:
        """The content of an image's file; raises DataError naming it (K8)."""
        path = self.records[index].path
        archive, offset, size = self._places[path]
        try:
            with decode.opened(self._root / archive) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as problem:
            text = f"{archive} cannot be read: {problem.strerror}. Copy it again."
            raise FaultError(error("K8", path, text)) from problem
        if len(data) < size:
            text = f"{archive} ends within this image; copy it again."
            raise FaultError(error("K8", path, text))
        return data

    def decoded(self, index: int) -> tuple[np.ndarray, str]:
        """Pixels (h, w, 3) uint8 and mode; FaultError (K3, K8) names the file and its tar."""
        path, data = self.records[index].path, self.encoded(index)
        try:
            return decode.decoded_image(data, path, self._lossy)
        except FaultError as problem:
            place = f"It lies in {self._places[path].archive}."
            told = [dataclasses.replace(f, message=f"{f.message} {place}") for f in problem.faults]
            raise FaultError(*told) from problem

    def size_of(self, index: int) -> int:
        """Bytes of an image's file."""
        return self._places[self.records[index].path].size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarDataset(IndexedDataset):
    """An index of tar files that satisfies the Dataset protocol."""

    root: pathlib.Path
    places: Mapping[str, _Place]

    def source(self, split: str, category: str | None = None) -> TarSource:
        """Samples of "train" ("test" is empty), of one category or of all, sorted by path."""
        records = files.select(self.splits, self.categories, split, category)
        return TarSource(self.root, records, self.places, self.config)


class _Members:
    """Files inside the tars of a root; what does not belong there becomes a fault."""

    def __init__(self, root: pathlib.Path, config: DataConfig):
        self.root, self.config = root, config
        self.places: dict[str, _Place] = {}
        self.faults: list[Fault] = []

    def classes(self, archive: str) -> dict[str, _Place]:
        """The tars of the classes inside the published tar."""
        found = {}
        whole = _Place(archive, 0, (self.root / archive).stat().st_size)
        for name, place in self._listed(archive, whole):
            if _CLASS_TAR.fullmatch(name):
                found[name[:-4]] = place
            else:
                self.faults.append(files.ignored(f"{archive}/{name}", "not the tar of a class"))
        return found

    def images(self, category: str, place: _Place) -> int:
        """Add the images of the tar of a class; returns how many there are."""
        before = len(self.places)
        for name, found in self._listed(f"{category}.tar", place):
            path = f"{category}/{name}"
            if reason := files.stray(os.path.basename(name)):
                self.faults.append(files.ignored(path, reason))
            elif path in self.places:
                self.faults.append(error("K7", path, "occurs twice in its tar; make it anew."))
            else:
                self.places[path] = found
        return len(self.places) - before

    def _listed(self, name: str, place: _Place) -> Iterator[tuple[str, _Place]]:
        """Names and places of the regular files in the tar that lies at a place."""
        try:
            with decode.opened(self.root / place.archive) as file:
                for member in _headers(file, place):
                    inside = member.name.removeprefix("./")
                    yield inside, _Place(place.archive, member.offset_data, member.size)
        # Of any kind: what a header trips it over depends on the bytes.
        except Exception as problem:
            text = f"not a whole tar file: {problem}; copy {place.archive} again."
            self.faults.append(error("K8", name, text))


def _headers(file: Any, place: _Place) -> Iterator[tarfile.TarInfo]:
    """Those of the regular files in the tar that lies at a place."""
    file.seek(place.offset)
    # From here on, offsets are those in the file: an inner tar ends by its own marks.
    opened: Any = tarfile.TarFile(fileobj=file)
    while (member := opened.next()) is not None:
        opened.members = []  # an index of its own, not needed twice
        if member.size < 0 or opened.offset <= member.offset:  # it would go round for ever
            raise tarfile.ReadError("a file of negative size")
        if not member.isfile():
            continue
        if member.offset_data + member.size > place.offset + place.size:
            raise tarfile.ReadError("unexpected end of data")
        yield member


def _archives(root: pathlib.Path) -> tuple[pathlib.Path, str, dict[str, _Place]]:
    """The folder, the published tar in it, or else the tars per class in it."""
    if root.is_file():
        return root.parent, root.name, {}
    if (root / ARCHIVE).is_file():
        return root, ARCHIVE, {}
    with os.scandir(root) as entries:
        tars = {e.name: e.stat().st_size for e in entries if _CLASS_TAR.fullmatch(e.name)}
    return root, "", {name[:-4]: _Place(name, 0, size) for name, size in sorted(tars.items())}


def _protocol(config: DataConfig, root: pathlib.Path, splits: Any, official: bool) -> dict:
    return files.protocol(
        config, splits, licence=ABOUT.licence,
        dataset=ABOUT.title if official else f"{root.name} (ImageNet layout)",
        split="official training set" if official else "all images train, none is held out",
    )  # fmt: skip


def _counts(config: DataConfig, categories: int, images: int) -> list[Fault]:
    """K12, unless the config asks for some of the classes only."""
    if config.categories or (categories, images) == (CLASSES, IMAGES):
        return []
    text = f"{images:,} images of {categories:,} classes; ImageNet has {IMAGES:,} of {CLASSES:,}."
    return [files.miscounted(config, "train", text)]


def _unpacked(config: DataConfig) -> files.FileDataset:
    found = folder.scan(config)
    images, classes = len(found.splits["train"]), len(found.categories)
    official = (classes, images) == (CLASSES, IMAGES)
    faults = _counts(config, classes, images) if images else []
    return dataclasses.replace(
        found,
        name="imagenet",
        protocol=_protocol(config, found.root, found.splits, official),
        faults=(*found.faults, *faults),
        skipped={name: why for name, why in found.skipped.items() if name != "K12"},
    )


def scan(config: DataConfig) -> files.FileDataset | TarDataset:
    """The index with its faults, none of them raised."""
    variant(config)
    root = files.root_folder(config)
    where, archive, tars = _archives(root) if root.exists() else (root, "", {})
    if not archive and not tars:
        return _unpacked(config)
    members = _Members(where, config)
    if archive:
        tars = members.classes(archive)
    categories = chosen(config, tuple(tars)) if tars else ()
    for name in categories:
        if not members.images(name, tars[name]):
            members.faults.append(error("K0", f"{name}.tar", "empty class: no image in it."))
    splits = {"train": files.normals((p.partition("/")[0], p) for p in members.places), "test": ()}
    images = len(splits["train"])
    if not tars:
        members.faults.append(error("K0", archive, f"no tar of a class in it; expected {ARCHIVE}."))
    else:
        members.faults += _counts(config, len(categories), images)
    return TarDataset(
        name="imagenet",
        categories=categories,
        protocol=_protocol(config, root, splits, (len(categories), images) == (CLASSES, IMAGES)),
        config=config,
        root=where,
        splits=splits,
        places=members.places,
        faults=tuple(members.faults),
    )
