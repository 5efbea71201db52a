"""MuSc: the test images score each other; no training image and no label is used.

    dsad evaluate --config=configs/musc.py --config.backbone=run:runs/mae --workdir=runs/mae-musc
    dsad evaluate --config=configs/musc.py:published --config.weights=FILE.safetensors \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/clip-musc
    dsad evaluate --config=configs/musc.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.detector.layers="('layer2','layer3')" --config.detector.similar=mean \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-musc

What it finds is of use for these images alone: there is no model to keep. Its time grows with the
square of the number of images (--config.detector.subsets splits them at random).

Variants, after a colon:
    published  the code's settings: CLIP ViT-L/14 of 336 pixels at 518, blocks 5, 11, 17 and 23,
               aligned corners, image scores from 0 to 1. Its class tokens are projected before
               their cosines, these are not. Of DINO it takes their products as they are:
               --config.detector.raw_vectors=True. Untested. Published for MVTec AD are 97.8
               (image) and 97.3 (pixel AUROC).
    large      the blocks of a ViT-L
    visa       the numbers of like images for VisA, of whose categories each has more test images
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config("musc"), variants, VARIANTS, __file__)


def _large(config):
    config.detector.layers = ("block5", "block11", "block17", "block23")


def _published(config):
    _large(config)
    config.backbone = "vit_large_patch14_clip_quickgelu_336"
    config.detector.scaled = True
    config.evaluation.image_size = 518
    config.evaluation.align_corners = True


def _visa(config):
    config.detector.neighbours = (1, 8, 9)


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "vit_tiny_patch16_224"
    config.detector.layers = ("block1", "block2")


VARIANTS = {"published": _published, "large": _large, "visa": _visa, "smoke": _smoke}
