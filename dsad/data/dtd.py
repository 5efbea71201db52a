"""DTD (Cimpoi et al., CVPR 2014): 5,640 images of 47 kinds of textures, normal all of them.

Layout: ``images/<class>/*.jpg`` and the lists ``labels/{train,val,test}<1..10>.txt`` of ten splits.
``config.data.root`` is the folder that holds both. Textures are used for pretraining and as the
source of synthetic defects; there is no test.

``dtd``: all images. ``dtd:1`` to ``dtd:10``: the 1,880 training images of an official split.
"""

import dataclasses
import pathlib

from dsad.data import decode, files, folder
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, error, variant

#: Classes, images of each, and of each in the training list of a split.
CLASSES, EACH, LISTED = 47, 120, 40
SPLITS = tuple(map(str, range(1, 11)))
ABOUT = About(
    title="DTD", licence="research use",
    citation="Cimpoi et al., Describing Textures in the Wild, CVPR 2014",
    address="https://www.robots.ox.ac.uk/~vgg/data/dtd", masks="none",
    columns=("classes", "train"), counts={"all": (CLASSES, CLASSES * EACH)}, categories=CLASSES,
    protocols={"": "all images train"}
    | {split: f"training images of official split {split}" for split in SPLITS},
    remarks=("For pretraining and synthetic defects alone: there is no test.",),
    marks=("labels/train1.txt", "images/banded"),
)  # fmt: skip


def _listed(root: pathlib.Path, split: str, faults: list[Fault]) -> set[str]:
    """The images that the training list of a split names."""
    file = root / "labels" / f"train{split}.txt"
    try:
        return set(decode.regular_bytes(file).decode().split())
    except (OSError, ValueError) as problem:
        text = f"cannot be read: {problem}. Copy the published labels there."
        faults.append(error("K0", f"labels/{file.name}", text))
        return set()


def _counts(config: DataConfig, classes: int, images: int, each: int) -> list[Fault]:
    """K12, unless the config asks for some of the classes only."""
    if config.categories or (classes, images) == (CLASSES, CLASSES * each):
        return []
    text = f"{images:,} images of {classes} classes; DTD has {CLASSES * each:,} of {CLASSES}."
    return [files.miscounted(config, "images", text)]


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    split = variant(config, ("", *SPLITS))
    root = files.root_folder(config)
    found = folder.scan(dataclasses.replace(config, name="dtd", root=str(root / "images")))
    faults, train = list(found.faults), found.splits["train"]
    if split and root.is_dir():
        names = _listed(root, split, faults)
        for path in sorted(names - {r.path for r in train}):
            if path.partition("/")[0] in found.categories:
                text = f"no such file, though labels/train{split}.txt lists it; copy it again."
                faults.append(error("K8", path, text))
        train = tuple(r for r in train if r.path in names)
    if train:
        each = LISTED if split else EACH
        faults += _counts(config, len({r.category for r in train}), len(train), each)
    splits = {"train": train, "test": ()}
    return dataclasses.replace(
        found, name=config.name, config=config, splits=splits, faults=tuple(faults),
        skipped={name: why for name, why in found.skipped.items() if name != "K12"},
        protocol=files.protocol(
            config, splits, licence=f"{ABOUT.licence} (DTD)", dataset="DTD",
            split=ABOUT.protocols[split], citation=ABOUT.citation,
        ),
    )  # fmt: skip
