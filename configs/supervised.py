"""Training with labels: ResNet-50 on ImageNet, with or without SPD.

    dsad pretrain --config=configs/supervised.py --config.data.root=IMAGENET --workdir=runs/labels
    dsad pretrain --config=configs/supervised.py:spd --config.data.root=IMAGENET --workdir=runs/spd

The usual recipe: 90 epochs of 256 images, SGD at 0.1, a tenth of it from epochs 30, 60 and 80 on;
about 76 % of ImageNet's validation images. Meant for accelerators, and not measured there. SPD
(Zou et al., ECCV 2022) is here, as published, a linear unit that tells images with a small local
change from those without; its layer and weight are not published: the mean of layer4, and 0.1.

Variants, after a colon and joined by commas:
    imagenet   what no variant takes, by name
    spd        with SPD
    small      ResNet-18, views of 48 px, 250 steps of 32 images with Adam: minutes on a laptop, see
               README
    smoke      a few steps on small synthetic images, whose classes are the labels
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
    config = default_config("supervised")
    imagenet_training(config)
    config.epochs = 90.0
    config.objective.zero_init_last = False
    config.optim.update(lr=0.1, schedule="step", milestones=(30.0, 60.0, 80.0))
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, side):
    config.objective.view.side = side
    small_spd(config, side)


def _spd(config):
    config.objective.spd.weight = 0.1


def _small(config):
    small_training(config)
    config.objective.zero_init_last = True  # as it was measured
    _views(config, 48)


def _smoke(config):
    smoke_training(config)
    config.objective.update(arch="resnet18", last="layer2")
    _views(config, 32)


VARIANTS = {
    "imagenet": lambda config: None,
    "spd": _spd,
    "small": _small,
    "smoke": _smoke,
}
