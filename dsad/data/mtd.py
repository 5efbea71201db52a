"""Magnetic Tile Defect (MTD) in its original tree, cut in two ways.

Layout: ``MT_<Defect>/Imgs/<stem>.jpg`` with the mask ``<stem>.png`` beside it; MT_Free holds the
normal images. All images are grey and of their own size; masks are anti-aliased and binarised at
> 127 at full size; four masks of MT_Uneven are empty.

``mtd:random``: 761 training and 190 test normals by ``config.data.seed`` (the published sizes, not
the published list) and all 392 defective images; one normal stays unused and is named in the
protocol. Every tile was shot under about six exposures, so such a cut puts twins of nearly all
test normals into training: its numbers are optimistic.

``mtd:grouped``: mtd_groups.csv keeps all exposures of a tile on one side: 599 training and 353
test normals and the 392 defective images. The groups are a HEURISTIC: the file names
``exp<exposure>_num_<frame>`` do not name the tile, so neighbouring frames were joined by
likeness. Columns: image (defect/stem), split, group, exposure, flag ("empty_mask").
"""

import csv
import functools
import hashlib
import importlib.resources
import os
import pathlib

from dsad.core.types import Record
from dsad.data import files
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, chosen, error, variant, warning
from dsad.data.decode import MaskRule

CATEGORY = "magnetic_tile"
#: Images per folder MT_<name>; Free is normal.
COUNTS = {"Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Free": 952, "Uneven": 103}
ABOUT = About(
    title="MTD", licence="none stated; citation asked, research use",
    citation="Huang et al., Surface defect saliency of magnetic tile, The Visual Computer 2020",
    masks="grey, a defect above 127", columns=("images",),
    counts={f"MT_{defect}": (count,) for defect, count in COUNTS.items()}, categories=1,
    protocols={
        "grouped": "grouped by tile (heuristic list of dsad)",
        "random": "random, by config.data.seed",
    },
    remarks=(
        "Every tile was shot under about six exposures: a random cut puts twins into training.",
        "The masks of four images of MT_Uneven are empty.",
    ),
    marks=("MT_*/Imgs",),
)  # fmt: skip
#: Normals for training and test of the published random split.
RANDOM_SIZES = (761, 190)


@functools.cache
def group_list() -> dict[str, dict[str, str]]:
    """Rows of mtd_groups.csv by image path."""
    text = importlib.resources.files("dsad.data").joinpath("mtd_groups.csv").read_text("utf-8")
    rows = {}
    for row in csv.DictReader(text.splitlines()):
        defect, stem = row["image"].split("/")
        rows[f"MT_{defect}/Imgs/{stem}.jpg"] = row
    return rows


def _group(path: str) -> str:
    """The tile that several exposures show, where the list knows the image."""
    return group_list().get(path, {}).get("group", "")


def _folder(
    root: pathlib.Path, defect: str, config: DataConfig, faults: list[Fault]
) -> tuple[list[Record], dict[str, str]]:
    """Records of one defect folder, and the masks that exist for normal images."""
    path = f"MT_{defect}/Imgs"
    folder = root / path
    found = files.images(root, folder, faults, (".jpg",), others=(".png",))
    masks = files.images(root, folder, faults, (".png",), others=(".jpg",))
    if not found:
        what = "empty class: no .jpg image" if folder.is_dir() else "folder missing"
        faults.append(error("K0", path, f"{what}; expected the original MTD tree."))
    faults.extend(files.orphan_mask(masks[stem]) for stem in masks if stem not in found)
    kind, label = ("good", 0) if defect == "Free" else (defect.lower(), 1)
    mask_of = {image: masks[stem] for stem, image in found.items() if stem in masks}
    records = []
    for stem, image in found.items():
        shown = (mask_of[image],) if label and image in mask_of else ()
        if label and not shown:
            allowed = config.missing_masks == "image_only"
            faults.append(files.missing_mask(image, f"{path}/{stem}.png", allowed))
        seen = {"label": label, "kind": kind, "masks": shown, "group": _group(image)}
        records.append(Record(path=image, category=CATEGORY, **seen))
    return records, {} if label else mask_of


def random_cut(
    paths: list[str], seed: int, sizes: tuple[int, int] = RANDOM_SIZES
) -> tuple[list[str], list[str], list[str]]:
    """Train, test and unused paths, by the SHA-256 of (seed, path): the same on any machine.

    With fewer paths than the sizes ask for, a fifth goes to test and none is unused; the protocol
    of the data set says so ("cut").
    """
    order = sorted(paths, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).hexdigest())
    if len(order) < sum(sizes):
        test = max(1, round(len(order) / 5))
        return order[test:], order[:test], []
    return order[: sizes[0]], order[sizes[0] : sum(sizes)], order[sum(sizes) :]


def _grouped(normals: list[Record], faults: list[Fault]) -> tuple[set[str], set[str]]:
    rows = group_list()
    for record in normals:
        if record.path not in rows:
            text = "not in the group list of mtd:grouped; use mtd:random for other images."
            faults.append(error("K13", record.path, text))
    known = {r.path for r in normals if r.path in rows}
    train = {path for path in known if rows[path]["split"] == "train"}
    return train, known - train


def _rest(root: pathlib.Path, faults: list[Fault]) -> None:
    """K9 of what lies beside the folders of images."""
    known = {"": [f"MT_{defect}" for defect in COUNTS]}
    for place, names in (known | {f"MT_{defect}/": ["Imgs"] for defect in COUNTS}).items():
        for name in sorted(os.listdir(root / place)) if (root / place).is_dir() else []:
            if name not in names and not files.is_text(name):
                faults.append(files.ignored(f"{place}{name}", "no name of the layout"))


def _check_counts(records: list[Record], config: DataConfig, faults: list[Fault]) -> None:
    for defect, expected in COUNTS.items():
        found = sum(r.path.startswith(f"MT_{defect}/") for r in records)
        if found != expected:
            text = f"{found} images; MTD has {expected}."
            faults.append(files.miscounted(config, f"MT_{defect}", text))


def _twins(train: set[str], test: set[str]) -> int:
    """How many test paths have another exposure of their tile in train."""
    rows = group_list()
    groups = {rows[p]["group"] for p in train if p in rows}
    return sum(p in rows and rows[p]["group"] in groups for p in test)


def _cut(
    rule: str, normals: list[Record], config: DataConfig, faults: list[Fault]
) -> tuple[set[str], set[str], dict[str, object]]:
    """Paths of training and test normals, and what the protocol says about the cut."""
    if rule == "grouped":
        train, test = _grouped(normals, faults)
        return train, test, {"split": "grouped by tile (heuristic list of dsad)"}
    *sides, unused = random_cut([r.path for r in normals], config.seed)
    train, test = map(set, sides)
    if twins := _twins(train, test):
        text = f"{twins} of {len(test)} test normals have another exposure of their tile in train"
        faults.append(warning("K13", CATEGORY, f"{text}; mtd:grouped avoids this."))
    how = "published sizes, {} training and {} test normals".format(*RANDOM_SIZES)
    if len(normals) < sum(RANDOM_SIZES):
        how = f"a fifth of the normals to test: only {len(normals)}, published sizes do not fit"
    return train, test, {
        "split": f"random, seed {config.seed}", "cut": how, "unused": sorted(unused),
        "test_normals_with_twin_in_train": twins,
    }  # fmt: skip


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    rule = variant(config, ("grouped", "random"))
    root = files.root_folder(config)
    chosen(config, (CATEGORY,))
    faults = [] if root.is_dir() else [files.missing_root(root)]
    found: list[Record] = []
    normal_masks: dict[str, str] = {}
    if root.is_dir():
        for defect in COUNTS:
            records, masks = _folder(root, defect, config, faults)
            found += records
            normal_masks |= masks
        _rest(root, faults)
        _check_counts(found, config, faults)
    normals = [r for r in found if not r.label]
    train, test, facts = _cut(rule, normals, config, faults)
    splits = {
        "train": files.by_path(r for r in normals if r.path in train),
        "test": files.by_path(r for r in found if r.label or r.path in test),
    }
    return files.FileDataset(
        name=config.name, categories=(CATEGORY,), config=config, root=root, splits=splits,
        rule=MaskRule(threshold=127, values=None), faults=tuple(faults),
        protocol=files.protocol(
            config, splits, licence=ABOUT.licence, dataset=ABOUT.title, **facts,
        ),
        normal_masks={p: m for p, m in normal_masks.items() if p in train or p in test},
        skipped={
            "K11": "labels come from the folders alone",
            "K4": "any grey; binarised > 127",
            # Its leak is one warning of the index.
            **({"K13": "a random cut separates no groups"} if rule == "random" else {}),
        },
    )  # fmt: skip
