"""Dinomaly: a decoder with linear attention reconstructs the blocks of a vision transformer.

    dsad evaluate --config=configs/dinomaly.py --config.backbone=run:runs/mae \
        --workdir=runs/mae-dinomaly
    dsad evaluate --config=configs/dinomaly.py:mvtec --config.weights=FILE.safetensors \
        --config.data.root=MVTEC --workdir=runs/dinov2-dinomaly

Published training: 10,000 steps of 16 images of all categories, StableAdamW from 2e-3 to 2e-4. It
needs an accelerator and has not been run here. Features of all images are held on the host: 8
blocks of 28 × 28 tokens of a ViT-B are 19 MB an image, 70 GB for MVTec AD; fewer layers, smaller
images or one category at a time (--config.one_for_all=False) need less.

Variants, after a colon:
    mvtec   MVTec AD as published, but for the crop of 392 pixels out of 448: images are brought to
            392 pixels as a whole. DINOv2 with registers, ViT-B/14. Untested. Published are 99.6
            (image) and 98.4 (pixel AUROC).
    large   the layers of ViT-L
    smoke   a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("dinomaly")
    config.one_for_all = True
    config.evaluation.align_corners = True
    return apply_variants(config, variants, VARIANTS, __file__)


def _mvtec(config):
    config.backbone = "vit_base_patch14_reg4_dinov2"
    config.data.name = "mvtec"
    config.evaluation.image_size = 392


def _large(config):
    config.detector.layers = tuple(f"block{i}" for i in range(4, 19, 2))


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "vit_tiny_patch16_224"
    config.detector.update(layers=("block1", "block2"), groups=2)
    config.detector.recipe.update(steps=4, batch_size=8)


VARIANTS = {"mvtec": _mvtec, "large": _large, "smoke": _smoke}
