"""SimpleNet: a discriminator of normal cells and cells with noise, trained on frozen features.

    dsad evaluate --config=configs/simplenet.py --config.backbone=run:runs/ds2 \
        --workdir=runs/ds2-simplenet
    dsad evaluate --config=configs/simplenet.py:mvtec --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-simplenet

160 epochs of batches of 8, AdamW, half-pixel upsampling. The state of the last step is measured;
the published numbers are of the best epoch on the test set.

Variants, after a colon and joined by commas:
    mvtec      the published 288 pixels (published: the middle of 329; there is no centre crop here)
    published  what the public code does differently: noise of 0.015 whatever the features' scale,
               pooling to 1,536, zeros beyond borders
    smoke      a random network on a few small synthetic images, four steps, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config("simplenet"), variants, VARIANTS, __file__)


def _mvtec(config):
    config.evaluation.image_size = 288


def _published(config):
    config.detector.update(
        noise=0.015, noise_unit="absolute", pooling="published", level_dim=1536, pooled_dim=1536,
        zero_borders=True,
    )  # fmt: skip


def _smoke(config):
    smoke_evaluation(config)
    config.detector.hidden = 16
    config.detector.recipe.update(steps=4, batch_size=8)


VARIANTS = {"mvtec": _mvtec, "published": _published, "smoke": _smoke}
