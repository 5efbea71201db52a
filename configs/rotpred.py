"""RotPred (Gidaris et al., ICLR 2018), as the code of DS2 (He et al., WACV 2024) compares with it.

    dsad pretrain --config=configs/rotpred.py --config.data.root=MVTEC --workdir=runs/rotpred
    dsad pretrain --config=configs/rotpred.py:mtd --config.data.root=data/mtd \
        --workdir=runs/rotpred-mtd

ResNet-18 from scratch on the normal images of all categories of MVTec AD, with the schedule of
configs/ds2.py (400 epochs of 256 images, LARS): a recipe of its own is not published. Meant for
accelerators; on a CPU begin with small. No score has been measured with this config, on any
hardware, and none is published.

Variants, after a colon and joined by commas:
    small      96 px views, batches of 32, 24 epochs, Adam at 1e-3: a laptop's size
    mtd        magnetic tiles, grouped split, at the size of small
    synthetic  the procedural data set, needs no file
    published  every image is turned by the same angle in all epochs
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("rotpred")
    config.data.name = "mvtec"
    config.data.canvas = 512
    config.optim.update(
        name="lars", lr=2.0, lr_batch=256, weight_decay=1e-5, schedule="step", min_lr=1e-6,
        warmup_epochs=5.0, warmup_multiplier=100.0, milestones=(120.0, 160.0, 200.0),
    )  # fmt: skip
    return apply_variants(config, variants, VARIANTS, __file__)


def _adam(config):
    config.optim.update(
        name="adamw", lr=1e-3, lr_batch=0, weight_decay=0.0, schedule="cosine", warmup_epochs=2.0
    )


def _small(config):
    _adam(config)
    config.data.canvas = 256
    config.batch_size = 32
    config.epochs = 24.0
    config.log_every = 5
    config.checkpoint.every = 100
    config.checkpoint.permanent = 100
    config.objective.view.update(side=96, blur_side=224)


def _mtd(config):
    _small(config)
    config.data.name = "mtd:grouped"


def _synthetic(config):
    _adam(config)
    config.data.name = "synthetic"
    config.data.canvas = 128
    config.batch_size = 32
    config.epochs = 20.0
    config.objective.view.side = 64


def _published(config):
    config.objective.fixed_classes = True


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.update(last="layer2", cells=(16, 8), hidden=(32, 16, 16))
    config.objective.view.side = 32


VARIANTS = {
    "small": _small,
    "mtd": _mtd,
    "synthetic": _synthetic,
    "published": _published,
    "smoke": _smoke,
}
