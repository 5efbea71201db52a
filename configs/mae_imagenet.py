"""MAE (He et al., CVPR 2022) on ImageNet-1K: the published pretraining recipe.

    dsad pretrain --config=configs/mae_imagenet.py:large --config.data.root=IMAGENET/train \
        --workdir=gs://BUCKET/mae-large

IMAGENET/train holds a folder for each class; any other folder of images will do as well.
1.28 million images, 4096 a step, 800 epochs (1600 for the published final models), 40 of warm-up,
AdamW (0.9, 0.95), weight decay 0.05, peak rate 1.5e-4 · 4096 / 256 = 2.4e-3, random resized crop
and flip. Published cost of ViT-L: 15.4 hours on 128 TPU v3 cores. Not measured with dsad.

Variants, after a colon and joined by commas; bf16 compute in all:
    base, large, huge   size of the encoder; large without
    norm_pix   targets normalised per patch, as the published final models (better features, but no
               absolute brightness)
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("mae")
    config.data.name = "folder"
    config.data.cache = "none"
    config.data.canvas = 512
    # A handful of ImageNet's files are CMYK, and a mislabelled one may have transparency.
    config.data.lossy = ("CMYK", "RGBA")
    config.batch_size = 4096
    config.epochs = 800.0
    config.log_every = 50
    config.optim.update(
        name="adamw", lr=1.5e-4, lr_batch=256, momentum=0.9, b2=0.95, weight_decay=0.05,
        schedule="cosine", min_lr=0.0, warmup_epochs=40.0, warmup_multiplier=0.0,
    )  # fmt: skip
    config.objective.dtype = "bfloat16"
    config.objective.remat = "dots"
    _size(config, "large")
    return apply_variants(config, variants, VARIANTS, __file__)


def _size(config, name):
    patch = 14 if name == "huge" else 16
    config.objective.encoder.arch = f"mae_vit_{name}_patch{patch}"


def _norm_pix(config):
    config.objective.norm_pix = True


def _smoke(config):
    smoke_training(config)
    config.objective.encoder.update(width=48, depth=2, heads=4, patch=8)
    config.objective.decoder.update(width=32, depth=2, heads=4)
    config.objective.view.side = 32


VARIANTS = {
    "base": lambda config: _size(config, "base"),
    "large": lambda config: _size(config, "large"),
    "huge": lambda config: _size(config, "huge"),
    "norm_pix": _norm_pix,
    "smoke": _smoke,
}
