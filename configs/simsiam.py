"""SimSiam (Chen and He, CVPR 2021): ResNet-50 on ImageNet, with or without SPD.

    dsad pretrain --config=configs/simsiam.py --config.data.root=IMAGENET --workdir=runs/simsiam
    dsad pretrain --config=configs/simsiam.py:spd --config.data.root=IMAGENET --workdir=runs/spd

As published: 100 epochs of 512 images, SGD, rate 0.05 for 256 images, a constant rate for the
predictor; 68.1 % of ImageNet's validation images with a linear classifier. Meant for accelerators
(published with 8 GPUs), and not measured there. Recipes of runs with SPD (Zou et al., ECCV 2022)
are not published: they are those of the method, at a weight of 0.1. Two x86 cores: see small.

Variants, after a colon and joined by commas:
    imagenet   what no variant takes, by name
    spd        with SPD, the loss on triplets with a small local change
    predictor  SPD on predictions, as a third-party code has it
    small      ResNet-18, views of 48 px, 250 steps of 32 images with Adam, whose rate falls for the
               predictor as well: minutes on a laptop, see README
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import (
    apply_variants,
    imagenet_training,
    small_spd,
    small_training,
    smoke_training,
)
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("simsiam")
    imagenet_training(config)
    config.batch_size = 512
    config.epochs = 100.0
    config.optim.update(lr=0.05, groups=((r"^p/", 1.0, 1.0, False),))
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, side):
    for view in (config.objective.view1, config.objective.view2):
        view.side = side
    small_spd(config, side)


def _spd(config):
    config.objective.spd.weight = 0.1


def _predictor(config):
    config.objective.spd.update(weight=0.1, form="predictor")


def _small(config):
    small_training(config)
    _views(config, 48)


def _smoke(config):
    smoke_training(config)
    config.objective.update(arch="resnet18", last="layer2", hidden=(32,), out=16, predictor=8)
    _views(config, 32)


VARIANTS = {
    "imagenet": lambda config: None,
    "spd": _spd,
    "predictor": _predictor,
    "small": _small,
    "smoke": _smoke,
}
