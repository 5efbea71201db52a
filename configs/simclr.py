"""SimCLR (Chen et al., ICML 2020): ResNet-50 on ImageNet, with or without SPD.

    dsad pretrain --config=configs/simclr.py --config.data.root=IMAGENET --workdir=runs/simclr
    dsad pretrain --config=configs/simclr.py:spd --config.data.root=IMAGENET --workdir=runs/spd

As published: 1000 epochs of 4096 images, LARS at 0.3 for 256 images (4.8), 10 epochs of warm-up,
then a cosine; 69.3 % of ImageNet's validation images with a linear classifier, after some 15 hours
on 128 TPU v3 cores (1.5 for 100 epochs). Meant for accelerators, and not measured there. Smaller
batches have fewer negatives and get weaker: 256 images and 1000 epochs is a run for fewer devices.
Recipes of runs with SPD (Zou et al., ECCV 2022) are not published: they are those of the method, at
a weight of 0.1.

Variants, after a colon and joined by commas:
    imagenet   what no variant takes, by name
    spd        with SPD, the loss on triplets with a small local change
    turned     DistAug (Sohn et al., ICLR 2021): images turned by quarters; as in DS2's code a head
               of seven layers of 512 (its last layer has a norm here), crops of at least half of
               the image, all four jitters 0.4
    small      ResNet-18, views of 48 px, 250 steps of 32 images with Adam: minutes on a laptop; not
               measured
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
    config = default_config("simclr")
    imagenet_training(config)
    config.batch_size = 4096
    config.epochs = 1000.0
    config.optim.update(
        name="lars", lr=0.3, lr_batch=256, weight_decay=1e-6, exempt=r"(bias|scale|gamma)$",
        warmup_epochs=10.0,
    )  # fmt: skip
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, **values):
    for view in (config.objective.view1, config.objective.view2):
        view.update(values)


def _spd(config):
    config.objective.spd.weight = 0.1


def _turned(config):
    config.objective.update(turned=True, hidden=(512,) * 7)
    _views(config, area=(0.5, 1.0), jitter=(0.4, 0.4, 0.4, 0.4))


def _small(config):
    small_training(config)
    config.objective.hidden = (512,)
    _views(config, side=48)
    small_spd(config, 48)


def _smoke(config):
    smoke_training(config)
    config.objective.update(arch="resnet18", last="layer2", hidden=(32,), out=16)
    config.optim.warmup_epochs = 1.0
    _views(config, side=32)
    small_spd(config, 32)


VARIANTS = {
    "imagenet": lambda config: None,
    "spd": _spd,
    "turned": _turned,
    "small": _small,
    "smoke": _smoke,
}
