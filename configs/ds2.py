"""DS2 (He et al., WACV 2024): ResNet-18 from scratch on the normal images of MVTec AD.

The published recipe: all 15 categories together (3,629 images), 400 epochs of 256 images.

    dsad pretrain --config=configs/ds2.py --config.data.root=MVTEC --workdir=runs/ds2

Meant for accelerators; on a CPU begin with the variant small.

Variants, after a colon and joined by commas:
    small      96 px views, batches of 32, 24 epochs: a laptop's size
    fine       with small or mtd: 112 px views, loss on layer2 and layer3, 36 epochs
    mtd        magnetic tiles, grouped split, at the size of small
    synthetic  the procedural data set, needs no file
    pixpro     PixPro (Xie et al., CVPR 2021) as the DS2 code compares with it: layer4 only,
               threshold 0.7, no most-similar pair
    pixpro_published  PixPro with its own numbers: solarization 0.2, base rate 1.0, cosine, 100
               epochs of 1,024 images; the encoder stays ResNet-18
    adam       Adam at 1e-3 in place of LARS
    infonce    InfoNCE of cells against those of all other images and far ones, with Adam at 1e-3;
               without small, layer3 has 50,176² similarities, 10 GB split over the devices
    published  the quirks of the published code: schedule, coordinates, teacher momentum; images
               keep their up to 1,024 pixels, of which --config.data.cache=host spares the devices
               11 GB
    corrupt    with a second loss: the encoder also segments corruptions, see configs/corrupt.py
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("ds2")
    config.data.name = "mvtec"
    config.data.canvas = 512
    config.optim.update(
        name="lars", lr=2.0, lr_batch=256, weight_decay=1e-5, schedule="step", min_lr=1e-6,
        warmup_epochs=5.0, warmup_multiplier=100.0, milestones=(120.0, 160.0, 200.0),
    )  # fmt: skip
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, **values):
    for view in (config.objective.view1, config.objective.view2):
        view.update(values)


def _small(config):
    config.data.canvas = 256
    config.batch_size = 32
    config.epochs = 24.0
    # The published rate rule gives 0.25 for 32 images. Four times as much collapses within an
    # epoch (effective rank of layer4's projections near 2 from step 30 on, magnetic tiles), but
    # 0.25 falls to about 3 within 100 steps as well.
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 2.0
    config.objective.hidden = 1024
    config.log_every = 5
    config.checkpoint.every = 100
    config.checkpoint.permanent = 100
    _views(config, side=96)


def _fine(config):
    # At 112 px layer2 and layer3 have the 14 and 7 cells a side that layer3 and layer4 have at the
    # published 224 px, so that the threshold gives as many positive pairs; blur follows the size.
    config.objective.layers = ("layer2", "layer3")
    _views(config, side=112, blur_side=224)
    config.epochs = 36.0
    config.optim.warmup_epochs = 4.0


def _mtd(config):
    _small(config)
    config.data.name = "mtd:grouped"


def _synthetic(config):
    config.data.name = "synthetic"
    config.data.canvas = 128
    config.batch_size = 32
    config.epochs = 20.0
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 2.0
    config.objective.hidden = 512
    _views(config, side=64)


def _pixpro(config):
    config.objective.layers = ("layer4",)
    config.objective.threshold = 0.7
    config.objective.top1 = "off"
    config.objective.average_directions = False
    # BYOL's two recipes.
    _views(config, grey_probability=0.2)
    config.objective.view2.solarize_probability = 0.5


def _pixpro_published(config):
    _pixpro(config)
    config.objective.view2.solarize_probability = 0.2
    config.optim.update(lr=1.0, schedule="cosine")
    config.batch_size = 1024
    config.epochs = 100.0


def _adam(config):
    config.optim.update(name="adamw", lr=1e-3, lr_batch=0, weight_decay=0.0)


def _infonce(config):
    _adam(config)
    config.objective.update(threshold=0.5, top1="off", propagation=False)
    config.objective.negatives.source = "batch"


def _published(config):
    config.optim.published_schedule = True
    config.objective.momentum_steps = 5670
    config.data.canvas = 1024
    _views(config, coordinates="centres")


def _corrupt(config):
    _adam(config)  # rates of LARS hardly move a head
    # Of the encoder's maps those that detectors read.
    config.objective.corrupt.update(weight=1.0, layers=("layer2", "layer3"))


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.update(hidden=32, out=16)
    _views(config, side=32)
    config.objective.corrupt.view.side = 64


VARIANTS = {
    "published": _published,
    "small": _small,
    "mtd": _mtd,
    "synthetic": _synthetic,
    "fine": _fine,
    "pixpro": _pixpro,
    "pixpro_published": _pixpro_published,
    "adam": _adam,
    "infonce": _infonce,
    "corrupt": _corrupt,
    "smoke": _smoke,
}
