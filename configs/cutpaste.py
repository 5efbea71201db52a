"""CutPaste (Li et al., CVPR 2021), 3-way: ResNet-18 from scratch on normal images.

    dsad pretrain --config=configs/cutpaste.py:mvtec,bottle --config.data.root=MVTEC \
        --workdir=runs/cutpaste-bottle
    dsad evaluate --config=configs/gde.py:cutpaste_aligned --config.data.root=MVTEC \
        --config.data.categories='("bottle",)' \
        --config.backbone=patches:32/4:run:runs/cutpaste-bottle --workdir=runs/cutpaste-bottle-gde

The paper's recipe: 64 px crops of 256 px images, 65,536 updates of 96 inputs (32 images in three
forms), one model per class: name it. Without a class all images train one model. Meant for
accelerators; on a CPU take small: an update of 96 crops takes 6 s on a busy core, 14 GFLOP/s. No
score has been measured with this config yet; published are 96.0 (patches, AUROC of pixels) and 95.2
(whole, of images) on MVTec AD. configs/gde.py:cutpaste_free is for hazelnut, screw and textures,
cutpaste_image for a model of whole images.

Variants, after a colon and joined by commas; any other word is a category of the data set:
    mvtec      MVTec AD, which is also what no variant takes
    mtd        magnetic tiles, grouped split
    synthetic  the procedural data set, needs no file
    small      500 updates: a laptop's size
    whole      256 px whole images instead of crops, for scores of images
    published  the published code: all classes in one model, 96 images (288 inputs) per update
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("cutpaste")
    config.data.name = "mvtec"
    config.data.canvas = 256
    config.batch_size = 32
    config.steps = 65536
    # Decay of all parameters, norms and biases included.
    config.optim.update(
        name="sgd", lr=0.03, momentum=0.9, weight_decay=3e-5, exempt="$^", schedule="cosine",
        min_lr=1e-6,
    )  # fmt: skip
    return apply_variants(
        config,
        variants,
        VARIANTS,
        __file__,
        lambda c, words: c.data.update(categories=tuple(words)),
    )


def _synthetic(config):
    config.data.name = "synthetic"
    config.data.canvas = 128
    config.steps = 300
    config.log_every = 5


def _small(config):
    config.steps = 500
    config.log_every = 5
    config.checkpoint.every = 100


def _whole(config):
    # The largest square: a square image is taken whole.
    config.objective.view.update(side=256, area=(1.0, 1.0))


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.hidden = (32, 16)
    config.objective.view.update(side=32, area=(0.25, 0.25))


VARIANTS = {
    "mvtec": lambda config: config.data.update(name="mvtec"),
    "mtd": lambda config: config.data.update(name="mtd:grouped"),
    "synthetic": _synthetic,
    "small": _small,
    "whole": _whole,
    "published": lambda config: config.update(batch_size=96),
    "smoke": _smoke,
}
