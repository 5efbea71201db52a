"""DS2's second stage: PCA and a Ledoit-Wolf Gaussian of 32 × 32 patches, 4 pixels apart.

    dsad evaluate --config=configs/gde.py:mvtec_objects --config.data.root=MVTEC \
        --config.backbone=patches:32/4:run:runs/ds2 --workdir=runs/ds2-gde
    dsad evaluate --config=configs/gde.py:mtd \
        --config.backbone=patches:32/4:resnet18 --config.weights=FILE.npz \
        --config.data.root=MTD --workdir=runs/mtd-gde

An image of 256 pixels is 3,249 small forward passes: about the work of 66 images of 224 pixels.
The map comes out of the detector at full size, without further smoothing.

Variants, after a colon: the published models by data set, one Gaussian per position for aligned
classes (200 components), one for all positions otherwise (500); at most 350 normal images.
    mvtec_objects   nine objects of MVTec AD, per position
    mvtec_textures  carpet, grid, leather, tile, wood: one Gaussian
    toothbrush      of MVTec AD, 60 images: per position, 50 components
    mtd             magnetic tiles, random split: one Gaussian, 1,000 images (there are fewer)
    loco_aligned    breakfast_box, juice_bottle, pushpins of MVTec LOCO, per position
    loco_free       screw_bag, splicing_connectors of MVTec LOCO: one Gaussian
    ksdd2           one Gaussian, 1,000 images
    cutpaste_aligned  CutPaste on MVTec AD: its eight aligned classes, per position, no PCA
    cutpaste_free   its other seven, one Gaussian each, no PCA
    cutpaste_image  one Gaussian of whole images, scores of images only; with any other variant
    smoke           a random network on a few small synthetic images, in seconds
loco_aligned, loco_free, ksdd2 and cutpaste_image leave config.data.name to you.
"""

import functools

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config

OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "transistor", "zipper",
)  # fmt: skip
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
#: CutPaste has other classes per position than DS2.
FREE = ("hazelnut", "screw", *TEXTURES)
ALIGNED = (*sorted({*OBJECTS, "toothbrush"} - {*FREE}),)


def get_config(variants: str = ""):
    config = default_config("gde")
    config.backbone = "patches:32/4:resnet18"
    config.evaluation.image_size = 256
    config.evaluation.batch_size = 8
    return apply_variants(config, variants, VARIANTS, __file__)


def _model(row, config):
    name, categories, per_position, components, images = row
    config.data.name = name or config.data.name
    config.data.categories = categories
    config.detector.update(per_position=per_position, components=components, images=images)


def _image(config):
    # One patch, the whole image.
    config.backbone = "patches:256/256:resnet18"
    config.detector.update(patch=256, stride=256, per_position=False, components=0, images=0)


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "patches:32/8:resnet18"
    config.detector.update(stride=8, components=2)


#: Data set, categories, per position, components, images.
PUBLISHED = {
    "mvtec_objects": ("mvtec", OBJECTS, True, 200, 350),
    "mvtec_textures": ("mvtec", TEXTURES, False, 500, 350),
    "toothbrush": ("mvtec", ("toothbrush",), True, 50, 350),
    "loco_aligned": ("", ("breakfast_box", "juice_bottle", "pushpins"), True, 200, 350),
    "loco_free": ("", ("screw_bag", "splicing_connectors"), False, 500, 350),
    "ksdd2": ("", (), False, 500, 1000),
    "mtd": ("mtd:random", (), False, 500, 1000),
    "cutpaste_aligned": ("mvtec", ALIGNED, True, 0, 0),
    "cutpaste_free": ("mvtec", FREE, False, 0, 0),
}
VARIANTS = {
    **{name: functools.partial(_model, row) for name, row in PUBLISHED.items()},
    "cutpaste_image": _image,
    "smoke": _smoke,
}
