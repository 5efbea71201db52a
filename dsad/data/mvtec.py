"""Folders in the layout of MVTec AD.

``<category>/train/good/*``, ``<category>/test/{good,<defect>}/*`` and
``<category>/ground_truth/<defect>/<stem>_mask.png`` (a mask named like its image is accepted too).
The root holds categories, or is itself one category (it has train/ or test/). Masks hold 0 and
255 only. A category without test/ can be pretrained on, one without train/ measure a fitted model.
"""

import pathlib

from dsad.core.types import Record
from dsad.data import files
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, chosen, error, variant, warning
from dsad.data.decode import MaskRule

#: Official MVTec AD counts: train, test good, test anomalous, defect types.
OFFICIAL = {
    "bottle": (209, 20, 63, 3),
    "cable": (224, 58, 92, 8),
    "capsule": (219, 23, 109, 5),
    "carpet": (280, 28, 89, 5),
    "grid": (264, 21, 57, 5),
    "hazelnut": (391, 40, 70, 4),
    "leather": (245, 32, 92, 5),
    "metal_nut": (220, 22, 93, 4),
    "pill": (267, 26, 141, 7),
    "screw": (320, 41, 119, 5),
    "tile": (230, 33, 84, 5),
    "toothbrush": (60, 12, 30, 1),
    "transistor": (213, 60, 40, 4),
    "wood": (247, 19, 60, 5),
    "zipper": (240, 32, 119, 7),
}
ABOUT = About(
    title="MVTec AD", licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., MVTec AD, CVPR 2019",
    address="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    masks="0 and 255", columns=("train", "good", "bad", "kinds"), counts=OFFICIAL,
    protocols={"": "official"},
    remarks=("Any other folders in this layout can be read; they are then named by their folder.",),
)  # fmt: skip
_PARTS = ("train", "test", "ground_truth")


class _Scan:
    """Collects records and faults of one root."""

    def __init__(self, root: pathlib.Path, config: DataConfig):
        self.root, self.config = root, config
        self.train: list[Record] = []
        self.test: list[Record] = []
        self.normal_masks: dict[str, str] = {}
        self.faults: list[Fault] = []

    def relative(self, folder: pathlib.Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def ignored(self, path: pathlib.Path, reason: str) -> None:
        self.faults.append(files.ignored(self.relative(path), reason))

    def category(self, name: str, folder: pathlib.Path) -> None:
        self.loose(folder)
        for part in files.subfolders(folder):
            if part not in _PARTS:
                self.ignored(folder / part, "not a folder of the layout")
        self.training(name, folder / "train")
        for part, what in {"train": "fitted on", "test": "measured on"}.items():
            if not (folder / part).is_dir():
                text = f"missing: nothing can be {what} the category."
                self.faults.append(warning("K0", self.relative(folder / part), text))
        self.testing(name, folder)

    def nonempty(self, folder: pathlib.Path) -> dict[str, str]:
        found = files.images(self.root, folder, self.faults)
        if not found:
            what = "empty class: the folder holds no image" if folder.is_dir() else "folder missing"
            suffixes = ", ".join(files.IMAGE_SUFFIXES)
            text = f"{what}; expected files with {suffixes}."
            self.faults.append(error("K0", self.relative(folder), text))
        return found

    def loose(self, folder: pathlib.Path) -> None:
        """Files outside the folders of classes, but texts about the set."""
        for file in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not file.is_dir() and not files.is_text(file.name):
                self.ignored(file, "a file outside a class folder")

    def training(self, name: str, folder: pathlib.Path) -> None:
        self.loose(folder)
        for kind in files.subfolders(folder):
            if kind != "good":
                self.ignored(folder / kind, "training uses train/good only")
        found = self.nonempty(folder / "good") if folder.is_dir() else {}
        for path in found.values():
            self.train.append(Record(path=path, category=name, label=0, kind="good"))

    def testing(self, name: str, folder: pathlib.Path) -> None:
        self.loose(folder / "test")
        self.loose(folder / "ground_truth")
        kinds = files.subfolders(folder / "test")
        if kinds and "good" not in kinds:
            path = self.relative(folder / "test" / "good")
            text = "missing: without normal test images there are no image numbers."
            self.faults.append(warning("K0", path, text))
        for kind in kinds:
            found = self.nonempty(folder / "test" / kind)
            self.pair(name, kind, found, folder / "ground_truth" / kind)
        for kind in files.subfolders(folder / "ground_truth"):
            if kind not in kinds:
                masks = files.images(self.root, folder / "ground_truth" / kind, self.faults)
                self.faults += map(files.orphan_mask, masks.values())

    def pair(self, name: str, kind: str, found: dict[str, str], masks: pathlib.Path) -> None:
        """Match masks to images by stem."""
        there = files.images(self.root, masks, self.faults)
        mask_of = files.paired(found, there, self.faults)
        for stem, path in found.items():
            label = 0 if kind == "good" else 1
            mask = mask_of.get(stem)
            if label == 0 and mask:
                self.normal_masks[path] = mask
            if label == 1 and mask is None:
                expected = f"{self.relative(masks)}/{stem}_mask.png"
                allowed = self.config.missing_masks == "image_only"
                self.faults.append(files.missing_mask(path, expected, allowed))
            shown = (mask,) if label and mask else ()
            self.test.append(Record(path=path, category=name, label=label, kind=kind, masks=shown))

    def counts(self, name: str) -> bool:
        """K12: whether the counts are the official ones; adds the fault if they are not."""
        test = [r for r in self.test if r.category == name]
        kinds = {r.kind for r in test if r.label}
        bad = sum(r.label for r in test)
        found = (sum(r.category == name for r in self.train), len(test) - bad, bad, len(kinds))
        if name in OFFICIAL and found != OFFICIAL[name]:
            text = "/".join(map(str, found)) + " train/good/anomalous images/kinds; MVTec AD has "
            text += "/".join(map(str, OFFICIAL[name])) + "."
            self.faults.append(files.miscounted(self.config, name, text))
        return found == OFFICIAL.get(name)


def _folders(root: pathlib.Path, scan: _Scan) -> dict[str, pathlib.Path]:
    if (root / "train").is_dir() or (root / "test").is_dir():
        return {files.folder_name(root): root}
    found = {}
    scan.loose(root)
    for name in files.subfolders(root):
        if any((root / name / part).is_dir() for part in ("train", "test")):
            found[name] = root / name
        else:
            scan.ignored(root / name, "not a category (no train/ or test/ inside)")
    if not found:
        text = "no category found; expected <category>/train/good and <category>/test/<kind>."
        scan.faults.append(error("K0", str(root), text))
    return found


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    variant(config)
    root = files.root_folder(config)
    found = _Scan(root, config)
    found.faults += [] if root.is_dir() else [files.missing_root(root)]
    folders = _folders(root, found) if root.is_dir() else {}
    categories = chosen(config, tuple(folders)) if folders else ()
    for name in categories:
        found.category(name, folders[name])
    official = bool(categories) and all([found.counts(name) for name in categories])
    splits = {"train": files.by_path(found.train), "test": files.by_path(found.test)}
    skipped = {"K11": "labels come from the folders alone", "K13": "the layout names no groups"}
    if not any(name in OFFICIAL for name in categories):
        skipped["K12"] = "no category has the name of an official one"
    return files.FileDataset(
        name="mvtec", categories=categories, config=config, root=root, splits=splits,
        rule=MaskRule(threshold=127, values=(0, 255)), faults=tuple(found.faults),
        normal_masks=found.normal_masks, skipped=skipped,
        protocol=files.protocol(
            config, splits,
            licence="CC BY-NC-SA 4.0 (MVTec AD)" if official else files.licence(root, categories),
            dataset="MVTec AD" if official else f"{files.folder_name(root)} (MVTec AD layout)",
            split="official" if official else "as the folders give it",
        ),
    )  # fmt: skip
