"""VisA (Zou et al., SPD, ECCV 2022): twelve objects, in three published setups.

Layout of the archive: ``<object>/Data/Images/{Normal,Anomaly}/*.JPG``, masks of the same stem in
``<object>/Data/Masks/Anomaly/*.png``, and the setups as ``split_csv/<setup>.csv`` (beside the
objects also works) with the columns object, split, label, image, mask; paths are relative to the
root. Masks hold the numbers of defect classes, 1 to 9, and look black; every value but 0 is a
defect. Some file names occur in Normal and in Anomaly: images are known by their paths.

``visa``: 1cls.csv, 8,659 normal training images and 962 + 1,200 for the test.

``visa:highshot``, ``visa:fewshot``: 2cls_highshot.csv and 2cls_fewshot.csv, where training has
labelled anomalous images too, 720 and 240. Detectors are fitted on the normal ones alone; training
by a method with labels takes all. The few-shot file is the POOL that k images per class are drawn
from (``config.shots``); the owner's draw is not published. Training images of these setups are test
images of ``visa``: never measure an encoder of one setup in another.
"""

import csv
import pathlib
from collections import Counter
from collections.abc import Mapping

from dsad.core.config import listed
from dsad.core.types import Record
from dsad.data import files
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, chosen, error, variant, warning
from dsad.data.decode import MaskRule

COLUMNS = ("object", "split", "label", "image", "mask")
#: Files by the variant of the name.
SETUPS = {"": "1cls.csv", "highshot": "2cls_highshot.csv", "fewshot": "2cls_fewshot.csv"}
#: Normal images of 1cls.csv for training and test, and of training in the other setups.
_NORMALS = {
    "candle": (900, 100, 600, 200),
    "capsules": (542, 60, 361, 120),
    "cashew": (450, 50, 300, 100),
    "chewinggum": (453, 50, 302, 101),
    "fryum": (450, 50, 300, 100),
    "macaroni1": (900, 100, 600, 200),
    "macaroni2": (900, 100, 600, 200),
    "pcb1": (904, 100, 602, 201),
    "pcb2": (901, 100, 601, 200),
    "pcb3": (905, 101, 604, 201),
    "pcb4": (904, 101, 603, 201),
    "pipe_fryum": (450, 50, 300, 100),
}


def published(setup: str) -> dict[str, tuple[int, ...]]:
    """Published counts of a setup by object: normal and anomalous training, then test images."""
    if not setup:
        return {name: (n[0], 0, n[1], 100) for name, n in _NORMALS.items()}
    column, bad = (2, 60) if setup == "highshot" else (3, 20)
    return {
        name: (n[column], bad, n[0] + n[1] - n[column], 100 - bad) for name, n in _NORMALS.items()
    }


ABOUT = About(
    title="VisA", licence="CC BY 4.0", citation="Zou et al., SPot-the-Difference, ECCV 2022",
    address="https://github.com/amazon-science/spot-diff",
    masks="numbers of defect classes; every value but 0 is a defect",
    columns=("train", "good", "bad"),
    counts={name: (train, *test) for name, (train, _, *test) in published("").items()},
    protocols={
        "": "published, 1-class",
        "highshot": "published, 2-class high-shot (labelled defects in training)",
        "fewshot": "published, pool of 2-class few-shot (labelled defects in training)",
    },
    remarks=(
        "Training images of the 2-class setups are test images of the 1-class one.",
        "Half of the defects of macaroni2 vanish at 256 pixels.",
    ),
    marks=("*/Data/Images/Anomaly", "split_csv/[12]cls*.csv"),
)  # fmt: skip
_LABELS = {"normal": ("Normal", 0), "anomaly": ("Anomaly", 1)}
_COPY = "Copy the published CSV again."


class _Setup:
    """Records and faults of one CSV file."""

    def __init__(self, file: pathlib.Path, root: pathlib.Path, config: DataConfig):
        self.file, self.root, self.config = file, root, config
        self.one_class = file.name == SETUPS[""]
        self.faults: list[Fault] = []
        self.splits: dict[str, list[Record]] = {"train": [], "test": []}
        self.normal_masks: dict[str, str] = {}
        self.listed: dict[str, tuple[str, str]] = {}
        self.categories: tuple[str, ...] = ()
        self.files: set[str] = set()

    def read(self) -> None:
        rows = self._rows()
        if not rows:
            return
        self.categories = chosen(self.config, tuple({row["object"] for row in rows}))
        for name in sorted({*self.categories} & {*files.subfolders(self.root)}):
            self.files |= files.below(self.root, f"{name}/Data")
        for number, row in enumerate(rows, start=2):
            if row["object"] in self.categories:
                self._record(row, f"{self.file.name}:{number}")
        self._rest()

    def _rows(self) -> list[dict[str, str]]:
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream, restval="")
                rows, columns = list(reader), tuple(reader.fieldnames or ())
        except (OSError, ValueError, csv.Error) as problem:
            self.faults.append(error("K0", self.file.name, f"cannot be read: {problem}. {_COPY}"))
            return []
        if columns != COLUMNS:
            found = ", ".join(columns) or "none"
            text = f"columns {found}; expected {', '.join(COLUMNS)}. {_COPY}"
            self.faults.append(error("K0", self.file.name, text))
            return []
        if not rows:
            self.faults.append(error("K0", self.file.name, f"no row. {_COPY}"))
        return rows

    def _record(self, row: Mapping[str, str], where: str) -> None:
        split, path, mask = row["split"], row["image"], row["mask"]
        if split not in self.splits or row["label"] not in _LABELS:
            text = f"split {split!r}, label {row['label']!r}: expected train or test, and normal "
            self.faults.append(error("K11", where, f"{text}or anomaly. {_COPY}"))
            return
        folder, label = _LABELS[row["label"]]
        if not path.startswith(f"{row['object']}/Data/Images/{folder}/"):
            text = f"{path} is no {row['label']} image of {row['object']}, as the row says; "
            text += f"expected {row['object']}/Data/Images/{folder}/. {_COPY}"
            self.faults.append(error("K11", where, text))
            return
        if path in self.listed:
            other, before = self.listed[path]
            check = "K7" if other == split else "K14"
            self.faults.append(error(check, where, f"{path} again, as in {before}; remove one."))
            return
        self.listed[path] = split, where
        if path not in self.files:
            text = f"no such file, though {where} lists it. Unpack the archive again."
            self.faults.append(error("K8", path, text))
            return
        if self.one_class and split == "train" and label:
            text = f"{path} is anomalous: 1-class training is normal. {_COPY}"
            self.faults.append(error("K11", where, text))
            return
        masks = (mask,) if self._mask(path, mask, label) else ()
        kind = "anomaly" if label else "good"
        record = Record(path=path, category=row["object"], label=label, kind=kind, masks=masks)
        self.splits[split].append(record)

    def _mask(self, path: str, mask: str, label: int) -> bool:
        """K1: the mask column is empty for normal images and them alone."""
        if not label:
            if mask:
                text = f"a mask, {mask}, is listed for a normal image. {_COPY}"
                self.faults.append(error("K1", path, text))
            return False
        image = pathlib.PurePosixPath(path)
        if mask in self.files:
            if pathlib.PurePosixPath(mask).stem != image.stem:
                text = f"its mask has another stem in {self.file.name}, which is followed: {mask}. "
                self.faults.append(warning("K11", path, f"{text}{_COPY}"))
            return True
        usual = f"{image.parts[0]}/Data/Masks/Anomaly/{image.stem}.png"
        expected = mask or f"{usual} (the CSV has none)"
        allowed = self.config.missing_masks == "image_only"
        self.faults.append(files.missing_mask(path, expected, allowed))
        return False

    def _rest(self) -> None:
        """Files that the CSV does not name."""
        masks = {mask for records in self.splits.values() for r in records for mask in r.masks}
        images = {pathlib.PurePosixPath(path).stem for path in self.listed}
        for path in sorted(self.files - self.listed.keys() - masks):
            if reason := files.stray(path.rpartition("/")[2]):
                self.faults.append(files.ignored(path, reason))
            elif "/Data/Masks/" in path and pathlib.PurePosixPath(path).stem not in images:
                self.faults.append(files.orphan_mask(path))
            else:
                self.faults.append(files.ignored(path, f"not in {self.file.name}"))

    def official(self, setup: str) -> bool:
        """K12 by object: whether all counts are the published ones."""
        found = Counter(
            (r.category, split, r.label) for split, rs in self.splits.items() for r in rs
        )
        every = published(setup)
        same = [name in every for name in self.categories]
        for name in (name for name in self.categories if name in every):
            counts = tuple(found[name, split, label] for split in self.splits for label in (0, 1))
            same.append(counts == every[name])
            if not same[-1]:
                text = f"{counts[0]}+{counts[1]} training and {counts[2]}+{counts[3]} test images "
                text += "(normal + anomalous); VisA has {}+{} and {}+{}.".format(*every[name])
                self.faults.append(files.miscounted(self.config, name, text))
        return bool(same) and all(same)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    setup = variant(config, tuple(SETUPS))
    root = files.root_folder(config)
    places = [root / "split_csv" / SETUPS[setup], root / SETUPS[setup]]
    file = next((place for place in places if place.is_file()), places[0])
    found = _Setup(file, root, config)
    if not root.is_dir():
        found.faults.append(files.missing_root(root))
    elif not file.is_file():
        text = "no such file; it is part of the archive and says which images train. Copy it there."
        found.faults.append(error("K0", f"split_csv/{SETUPS[setup]}", text))
    else:
        found.read()
    official = found.official(setup)
    known = set(found.categories) & set(_NORMALS)
    if found.categories and not known:
        text = f"no object of VisA: {listed(found.categories)}."
        found.faults.append(warning("K12", SETUPS[setup], text))
    splits = {split: files.by_path(records) for split, records in found.splits.items()}
    return files.FileDataset(
        name=config.name, categories=found.categories, config=config, root=root, splits=splits,
        rule=MaskRule(threshold=0, values=None), faults=tuple(found.faults),
        skipped={"K4": ABOUT.masks, "K13": "the layout names no groups"},
        protocol=files.protocol(
            config, splits,
            licence=f"{ABOUT.licence} (VisA)" if official else files.licence(root),
            dataset="VisA" if official else f"{files.folder_name(root)} (VisA layout)",
            split=ABOUT.protocols[setup] if official else f"as {SETUPS[setup]} gives it",
            masks=ABOUT.masks, citation=ABOUT.citation,
        ),
    )  # fmt: skip
