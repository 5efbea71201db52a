"""MoCo v2 (Chen et al., 2020): ResNet-50 on ImageNet, with or without SPD.

    dsad pretrain --config=configs/mocov2.py --config.data.root=IMAGENET --workdir=runs/mocov2
    dsad pretrain --config=configs/mocov2.py:spd --config.data.root=IMAGENET --workdir=runs/spd

As published: 200 epochs of 256 images, SGD at 0.03 along a cosine, a queue of 65,536 keys: 53 hours
on 8 V100 GPUs; 67.5 % of ImageNet's validation images with a linear classifier, 71.1 % after 800
epochs. Meant for accelerators, and not measured there. Recipes of runs with SPD (Zou et al., ECCV
2022) are not published: they are those of the method, at a weight of 0.1.

A queue that is too long for one device lies on all of them with
    --config.objective.split_queue --config.mesh.rules='(("queue/keys$","data+fsdp,-"),)'
Images of few categories, such as MVTec AD, are told from those of other categories alone with
    --config.objective.class_aware

Variants, after a colon and joined by commas:
    imagenet   what no variant takes, by name
    spd        with SPD, the loss on triplets with a small local change
    turned     DistAug (Sohn et al., ICLR 2021): images turned by quarters, and views as in DS2's
               code: crops of at least half of the image, all four jitters 0.4
    small      ResNet-18, views of 48 px, 250 steps of 32 images with Adam, 4,096 keys: minutes
               on a laptop; not measured
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
    config = default_config("mocov2")
    imagenet_training(config)
    config.epochs = 200.0
    config.optim.lr = 0.03
    config.objective.zero_init_last = False
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, **values):
    for view in (config.objective.view1, config.objective.view2):
        view.update(values)


def _spd(config):
    config.objective.spd.weight = 0.1


def _turned(config):
    config.objective.turned = True
    _views(config, area=(0.5, 1.0), jitter=(0.4, 0.4, 0.4, 0.4))


def _small(config):
    small_training(config)
    # A key encoder that far behind would hardly leave its start within some hundred steps.
    config.objective.update(hidden=(512,), queue=4096, momentum=0.99)
    _views(config, side=48)
    small_spd(config, 48)


def _smoke(config):
    smoke_training(config)
    config.objective.update(arch="resnet18", last="layer2", hidden=(32,), out=16, queue=32)
    _views(config, side=32)
    small_spd(config, 32)


VARIANTS = {
    "imagenet": lambda config: None,
    "spd": _spd,
    "turned": _turned,
    "small": _small,
    "smoke": _smoke,
}
