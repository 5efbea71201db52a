"""ADPretrain (Yao et al., NeurIPS 2025): projectors of residual features of a frozen encoder.

    dsad pretrain --config=configs/adpretrain.py:realiad --config.data.root=REALIAD \
        --config.init_from=hf:timm/vit_large_patch14_dinov2.lvd142m --workdir=runs/adpretrain
    dsad pretrain --config=configs/adpretrain.py:mtd --config.data.root=MTD \
        --config.init_from=FILE.npz --workdir=runs/adpretrain-mtd
    dsad evaluate --config=configs/patchcore.py --config.weights=FILE.npz \
        --config.backbone=projected:runs/adpretrain-mtd:resnet18 --config.data.name=mvtec \
        --config.data.root=MVTEC --workdir=runs/adpretrain-mtd-patchcore

The encoder is that of ``init_from`` and stays as it is; the projectors learn from images with
defects and masks. Published: Real-IAD, 10 epochs of 32 images, Adam at 1e-4 divided by 10 after
epochs 7 and 9, on one GPU with 24 GB; not measured here (weights and data are not at hand). Its
weight decay is part of the gradient, here it is beside it (AdamW). Anomalies drawn into normal
images instead: --config.objective.anomalies=synthetic --config.data.split=train.

Variants, after a colon and joined by commas:
    realiad    DINOv2 ViT-L/14, all images of Real-IAD, encoded in every step; one accelerator per
               eight images, see launch/README.md
    released   as the released code: both views changed, labels by patch and by corner pixel
    mtd        magnetic tiles with their defects (grouped split), ResNet-18 to layer3, maps kept in
               memory (1.1 GB); 17 minutes of processor time on x86
    mobilenetv2 behind mtd: that encoder, also to layer3
    synthetic  the procedural data set, needs no file
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("adpretrain")
    config.data.split = "all"
    config.data.canvas = 224
    config.batch_size = 32
    config.epochs = 10.0
    config.optim.update(
        name="adamw", lr=1e-4, lr_batch=0, b2=0.999, weight_decay=5e-4, exempt="$^",
        schedule="step", milestones=(7.0, 9.0), gamma=0.1,
    )  # fmt: skip
    return apply_variants(config, variants, VARIANTS, __file__)


def _realiad(config):
    config.data.name = "realiad"
    config.data.cache = "none"
    config.objective.update(
        arch="vit_large_patch14_dinov2", layers=("block5", "block11", "block17", "block23"),
        encode="every_step", dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.checkpoint.every = 500


def _released(config):
    config.objective.update(plain=False, labels="released", encode="every_step")


def _resnet(config):
    config.objective.update(
        arch="resnet18",
        layers=("layer1", "layer2", "layer3"),
        slots=256,
        heads=4,
        tokens=28,
        references=(1, 2, 4),
        stored="float16",
    )


def _mtd(config):
    _resnet(config)
    config.data.name = "mtd:grouped"
    config.data.cache = "host"
    config.batch_size = 8
    config.steps = 400
    # The lowest loss in training of 3e-4, 1e-3 and 3e-3.
    config.optim.update(schedule="cosine", lr=3e-3, milestones=())
    config.log_every = 10
    config.checkpoint.every = 100


def _mobilenetv2(config):
    config.objective.arch = "mobilenet_v2"


def _synthetic(config):
    _resnet(config)
    config.data.name = "synthetic"
    config.init_from = "random"
    config.objective.side = 128
    config.data.canvas = 128
    config.batch_size = 16
    config.steps = 100


def _smoke(config):
    _resnet(config)
    smoke_training(config)
    config.init_from = "random"
    config.data.categories = ("tiles",)
    config.data.synthetic.update(good=4, bad=1)
    config.objective.update(
        side=64, layers=("layer1", "layer2"), slots=16, references=(1, 2), tokens=8
    )


VARIANTS = {
    "realiad": _realiad,
    "released": _released,
    "mtd": _mtd,
    "mobilenetv2": _mobilenetv2,
    "synthetic": _synthetic,
    "smoke": _smoke,
}
