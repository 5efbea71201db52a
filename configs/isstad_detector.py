"""The scores of ISSTAD on the maps of its trained network; the run comes from configs/isstad.py.

    dsad evaluate --config=configs/isstad_detector.py --config.backbone=run:runs/isstad \
        --workdir=runs/isstad-scores
    dsad evaluate --config=configs/isstad_detector.py:visa --config.data.name=mvtec \
        --config.data.root=VISA --config.backbone=run:runs/isstad/{category} --workdir=runs/visa-w

As published: 224 pixels, Pixel_Ham and Image_Ham, smoothed by the detector itself. The newest
checkpoint of the run is scored; the published numbers are the best of all epochs on the test set.

Variants, after a colon:
    alpha      Pixel_alpha and Image_alpha
    max        Pixel_MAX and Image_Ham
    weighted   Pixel_Ham and Image_W, with q = 0.1 and a = b = 1
    mvtec, visa, mpdd
               like weighted, with the published q, a and b of each category of the data set. No
               validation set chose them: they were tuned on the test images.
    smoke      a few small synthetic images, in seconds; after two runs, of seconds as well:
        dsad pretrain --config=configs/mae.py:smoke --workdir=runs/a
        dsad pretrain --config=configs/isstad.py:smoke --config.init_from=runs/a --workdir=runs/b
        dsad evaluate --config=configs/isstad_detector.py:smoke --config.backbone=run:runs/b \
            --workdir=runs/c
The first code multiplies the map by 255, which changes no number: --config.detector.scale=255.
"""

import functools
import json
import pathlib

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config

KEYS = ("q", "a", "b")


def get_config(variants: str = ""):
    config = default_config("isstad")
    config.evaluation.image_size = 0  # that of the run: 224 as published
    return apply_variants(config, variants, VARIANTS, __file__)


def _scores(config, pixel, image):
    config.detector.update(pixel=pixel, image=image)


def _published(config, dataset):
    _scores(config, "product", "weighted")
    shared, rows = table(dataset)
    config.detector.update(**shared, exponents=rows)


def _smoke(config):
    smoke_evaluation(config)
    config.weights = ""  # those of a run
    config.evaluation.image_size = 0


def table(dataset: str):
    """q, a and b of a data set, and a row (category, q, a, b) for every category with others.

    Those of the second code, "ext": the first has no weighted score.
    """
    path = pathlib.Path(__file__).with_name("isstad_tables.json")
    tables = json.loads(path.read_text(encoding="utf-8"))
    found, default = tables[dataset]["ext"], tables["default"]
    shared = tuple(float(default[k]) for k in KEYS)
    rows = {c: tuple(float(own.get(k, default[k])) for k in KEYS) for c, own in found.items()}
    differing = ((c, *row) for c, row in sorted(rows.items()) if row != shared)
    return dict(zip(KEYS, shared, strict=True)), tuple(differing)


VARIANTS = {
    "alpha": functools.partial(_scores, pixel="alpha", image="alpha"),
    "max": functools.partial(_scores, pixel="max", image="product"),
    "weighted": functools.partial(_scores, pixel="product", image="weighted"),
    **{name: functools.partial(_published, dataset=name) for name in ("mpdd", "mvtec", "visa")},
    "smoke": _smoke,
}
