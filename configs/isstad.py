"""ISSTAD (Jin et al., 2023), second stage: one model per category, after a first stage of MAE.

    dsad pretrain --config=configs/mae.py:isstad,bottle --config.data.root=MVTEC \
        --workdir=runs/mae-bottle
    dsad pretrain --config=configs/isstad.py:mvtec,bottle --config.data.root=MVTEC \
        --config.init_from=runs/mae-bottle --workdir=runs/isstad-bottle
    dsad evaluate --config=configs/isstad_detector.py --config.backbone=run:runs/isstad-bottle \
        --workdir=runs/isstad-bottle-maps

200 epochs of 16 images; AdamW at 1e-3, a cosine per epoch that reaches 1e-6 after 30 epochs and
rises again. Meant for one GPU (published: about an hour per category); on a CPU take small.

Variants, after a colon and joined by commas:
    mvtec, loco, visa, mpdd   whose table of corruptions applies to the category named after it
    ext        the tables of the second published code (MVTec AD only; VisA and MPDD have no other)
    CATEGORY   train on this category, corrupted as its table says
    like_CATEGORY   the table's row alone, for data whose category has another name
    published  the quirks of the published code: tokens in random order, corrupted input as target,
               another normalisation than the first stage's, unchanged regions labelled, boxes
               moved from the image's left and top border
    small      after configs/mae.py:small: ViT-Ti, 8 narrow decoder blocks, 40 epochs
    mtd        magnetic tiles, grouped split; with small 14 epochs
    synthetic  the procedural data set, needs no file, after configs/mae.py:synthetic
    smoke      a few steps on small synthetic images, after configs/mae.py:smoke
"""

import json
import pathlib

from dsad.assembly.configs import apply_variants, smoke_training, unknown_word
from dsad.assembly.pretrain import default_config
from dsad.core.errors import ConfigError

TABLES = pathlib.Path(__file__).parent / "isstad_tables.json"
SETS = ("mvtec", "loco", "visa", "mpdd")


def get_config(variants: str = ""):
    config = default_config("isstad")
    config.data.name = "mvtec"
    config.data.canvas = 1024
    config.batch_size = 16
    config.epochs = 200.0
    config.optim.update(
        name="adamw", lr=1e-3, lr_batch=0, momentum=0.9, b2=0.95, weight_decay=0.05,
        schedule="periodic", period_epochs=30.0, min_lr=1e-6, warmup_epochs=0.0,
        warmup_multiplier=100.0,
    )  # fmt: skip
    config.objective.encoder.arch = "mae_vit_large_patch16"
    return apply_variants(config, variants, VARIANTS, __file__, _categories)


def _categories(config, words):
    """The categories among the words, and the settings of their rows in the tables."""
    sets = [s for s in SETS if s in words] or ["mvtec"]
    if len(sets) > 1:
        raise ConfigError(f"configs/isstad.py: expected one of {SETS}, found {sets}.")
    tables = json.loads(TABLES.read_text(encoding="utf-8"))
    releases = tables[sets[0]]
    release = "ext" if "ext" in words or "main" not in releases else "main"
    if release not in releases:
        raise ConfigError(f"configs/isstad.py: {sets[0]} has no table {release!r}.")
    rows = releases[release]
    names = [w for w in words if w not in (*SETS, "ext")]
    for name in names:
        key = name.removeprefix("like_")
        if key not in rows:
            known = (*VARIANTS, *SETS, "ext", *rows)
            raise unknown_word(__file__, name, known, f"variant or category of {sets[0]}")
        row = {**tables["default"], **rows[key]}
        for field in ("kind", "most_draw", "n_max", "limit_box", "remove_background"):
            config.objective.corruption[field] = row[field]
        config.epochs = float(row["epochs"])
    config.data.categories = tuple(n for n in names if not n.startswith("like_"))


def _published(config):
    config.objective.permute = "shuffle"
    config.objective.target = "input"
    config.objective.normalisation = "published"
    config.objective.ssim_range = "signed"
    config.objective.corruption.update(label="mask", box="published")


def _small(config):
    config.objective.encoder.arch = "mae_vit_tiny_patch16"
    config.objective.decoder.update(width=192, depth=8, heads=6)
    config.data.canvas = 256
    config.epochs = 40.0
    # One descent: at this length the rate would end on its way up.
    config.optim.update(schedule="cosine", warmup_epochs=2.0, warmup_multiplier=0.0)
    config.checkpoint.every = 200


def _mtd(config):
    config.data.name = "mtd:grouped"
    # Tiles are cut to a few hundred pixels; the method's lengths are those of whole photographs.
    config.objective.corruption.original_side = 1024.0
    if config.objective.encoder.arch == "mae_vit_tiny_patch16":
        config.epochs, config.optim.warmup_epochs = 14.0, 1.0


def _synthetic(config):
    _small(config)
    config.data.name = "synthetic"
    config.data.canvas = 128
    config.objective.encoder.patch = 8
    config.objective.side = 64
    # Lengths of the method are those of photographs.
    config.objective.corruption.original_side = 1024.0


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.encoder.update(width=48, depth=2, heads=4)
    config.objective.decoder.update(width=32, depth=3, heads=4)
    config.objective.side = 32


VARIANTS = {
    "published": _published,
    "small": _small,
    "mtd": _mtd,
    "synthetic": _synthetic,
    "smoke": _smoke,
}
