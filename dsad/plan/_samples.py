"""How many images a config trains on: told, counted, or published."""

import os
import pathlib

from dsad.assembly.pretrain import DataFacts, PretrainConfig, held_out
from dsad.data import about, combined, dtd, imagenet, mtd, visa
from dsad.data import base as data_base

#: Shipped configs that are for a data set which their ``data.name`` does not tell.
CONFIGS = {"mae_imagenet": "imagenet"}


def count(cfg: PretrainConfig, spec: str, told: int) -> tuple[int | None, int, str]:
    """Samples (None if unknown), categories, and where the numbers come from.

    ``spec`` is the value of ``--config``, ``told`` that of ``--samples``, 0 without it. A data set
    that is there is indexed, and its faults are errors; of the others the published size counts.
    Images that the probe holds out are not among the samples.
    """
    data = cfg.data
    known = published(data, pathlib.Path(spec.partition(":")[0]).stem)
    images, classes = known or (None, max(1, len(data.categories)))
    drawn = data.name.partition(":")[0] == "synthetic"
    if drawn or (data.root and os.path.isdir(os.path.expanduser(data.root))):
        records = combined.training_source(data_base.load(data), data.split).records
        held = held_out(cfg, records)
        facts = DataFacts.of([records[i] for i in held.training] if held else records)
        return told or facts.samples, facts.classes, "--samples" if told else "the data set"
    origin = "its published size" if images else ""
    images = images - cfg.probe.images if images and cfg.probe.every else images
    return told or images, classes, "--samples" if told else origin


def published(data: data_base.DataConfig, config: str = "") -> tuple[int, int] | None:
    """Training images and categories of a published data set; None for others."""
    name = CONFIGS.get(config, data.name)
    if data.split != "train":
        return None
    if name == "imagenet" and not data.categories:
        return imagenet.IMAGES, imagenet.CLASSES
    module, _, part = name.partition(":")
    if module == "dtd" and part in ("", *dtd.SPLITS) and not data.categories:
        return dtd.CLASSES * (dtd.LISTED if part else dtd.EACH), dtd.CLASSES
    if module == "visa" and part in visa.SETUPS:  # those of the 2-class setups with defects
        sizes = {name: sum(row[:2]) for name, row in visa.published(part).items()}
        objects = data.categories or tuple(sizes)
        known_ones = set(objects) <= sizes.keys()
        return (sum(sizes[name] for name in objects), len(objects)) if known_ones else None
    known = about.every().get(name)
    chosen = data.categories or tuple(known.counts if known else ())
    rows = known.counts if known and {"train", "good"} <= set(known.columns) else {}
    if known and chosen and set(chosen) <= rows.keys():
        column = known.columns.index("train")
        return sum(known.counts[c][column] for c in chosen), len(chosen)
    if name == "mtd:random":
        return mtd.RANDOM_SIZES[0], 1
    if name == "mtd:grouped":
        rows = mtd.group_list().items()
        return sum("/MT_Free/" in f"/{p}" and row["split"] == "train" for p, row in rows), 1
    return None
