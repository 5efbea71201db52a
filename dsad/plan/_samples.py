"""How many images a config trains on: told, counted, or published."""

import os
import pathlib

from dsad.core.types import Dataset
from dsad.data import base as data_base
from dsad.data import imagenet, mtd, mvtec

#: Shipped configs that are for a data set which their ``data.name`` does not tell.
CONFIGS = {"mae_imagenet": "imagenet"}


def count(data: data_base.DataConfig, spec: str, told: int) -> tuple[int | None, int, str]:
    """Samples (None if unknown), categories, and where the numbers come from.

    ``spec`` is the value of ``--config``, ``told`` that of ``--samples``, 0 without it. A data set
    that is there is indexed, and its faults are errors; of the others the published size counts.
    """
    if told:
        return told, 1, "--samples"
    if data.name == "synthetic" or (data.root and os.path.isdir(os.path.expanduser(data.root))):
        dataset: Dataset = data_base.load(data)
        source = dataset.source("train")
        return len(source), len({r.category for r in source.records}), "the data set"
    found = published(data, pathlib.Path(spec.partition(":")[0]).stem)
    return found, max(1, len(data.categories)), "its published size" if found else ""


def published(data: data_base.DataConfig, config: str = "") -> int | None:
    """Normal training images (of ImageNet-1K all) of a published data set; None for others."""
    name = CONFIGS.get(config, data.name)
    if name == "imagenet" and not data.categories:
        return imagenet.IMAGES
    if name == "mvtec" and set(data.categories) <= set(mvtec.OFFICIAL):
        return sum(mvtec.OFFICIAL[c][0] for c in data.categories or mvtec.OFFICIAL)
    if name == "mtd:random":
        return mtd.RANDOM_SIZES[0]
    if name == "mtd:grouped":
        rows = mtd.group_list().items()
        return sum("/MT_Free/" in f"/{path}" and row["split"] == "train" for path, row in rows)
    return None
