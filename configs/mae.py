"""MAE (He et al., CVPR 2022) on the normal images of a data set; the first stage of ISSTAD.

    dsad pretrain --config=configs/mae.py:isstad,bottle --config.data.root=MVTEC \
        --config.init_from=WEIGHTS --workdir=runs/mae-bottle

WEIGHTS is a published checkpoint of encoder and decoder, as a file or hf:owner/name, or a run.
ISSTAD's stage is meant for one GPU; on a CPU take the variant small. For ImageNet see
configs/mae_imagenet.py.

Variants, after a colon and joined by commas; any other word is a category of the data set:
    tiny, base, large, huge   size of the encoder; large without
    isstad     ISSTAD's first stage: 305 epochs of 20 images, 6 decoder blocks, peak rate 7.8e-5
    small      ViT-Ti and a narrow decoder from scratch, 80 epochs of 16: a laptop's size
    mtd        magnetic tiles, grouped split; with small 15 epochs
    synthetic  the procedural data set, needs no file
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("mae")
    config.data.name = "mvtec"
    config.data.canvas = 512
    config.optim.update(
        name="adamw", lr=1.5e-4, lr_batch=256, momentum=0.9, b2=0.95, weight_decay=0.05,
        schedule="cosine", min_lr=0.0, warmup_epochs=40.0, warmup_multiplier=0.0,
    )  # fmt: skip
    config.epochs = 800.0
    _size(config, "large")
    return apply_variants(
        config,
        variants,
        VARIANTS,
        __file__,
        lambda c, words: c.data.update(categories=tuple(words)),
    )


def _size(config, name):
    patch = 14 if name == "huge" else 16
    config.objective.encoder.arch = f"mae_vit_{name}_patch{patch}"


def _isstad(config):
    # The rate rule is that of the published code's defaults, 1e-3 for 256 images.
    config.batch_size = 20
    config.epochs = 305.0
    config.optim.lr = 1e-3
    config.objective.decoder.depth = 6
    # The published checkpoints have 8 decoder blocks; the last two are left out.
    config.objective.adopt_decoder = "leading"


def _small(config):
    _size(config, "tiny")
    config.batch_size = 16
    config.epochs = 80.0
    config.optim.lr = 5e-4
    config.optim.lr_batch = 0
    config.optim.warmup_epochs = 5.0
    config.data.canvas = 256
    config.objective.decoder.update(width=192, depth=4, heads=6)
    config.checkpoint.every = 200


def _mtd(config):
    config.data.name = "mtd:grouped"
    if config.batch_size == 16:  # small: three times the images of a category of MVTec AD
        config.epochs, config.optim.warmup_epochs = 15.0, 1.0


def _synthetic(config):
    _small(config)
    config.data.name = "synthetic"
    config.data.canvas = 128
    config.objective.encoder.patch = 8
    config.objective.view.side = 64


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.encoder.update(width=48, depth=2, heads=4)
    config.objective.decoder.update(width=32, depth=2, heads=4)
    config.objective.view.side = 32


VARIANTS = {
    "tiny": lambda config: _size(config, "tiny"),
    "base": lambda config: _size(config, "base"),
    "large": lambda config: _size(config, "large"),
    "huge": lambda config: _size(config, "huge"),
    "isstad": _isstad,
    "small": _small,
    "mtd": _mtd,
    "synthetic": _synthetic,
    "smoke": _smoke,
}
