"""GLASS: a discriminator of normal features and of anomalies made by gradient ascent and on images.

    dsad evaluate --config=configs/glass.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-glass
    dsad evaluate --config=configs/glass.py:mvtec --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-glass

640 epochs of batches of 8, 20 ascent steps in each, half-pixel upsampling: hours on a GPU. The
hypothesis follows from the spectrum of the mean image, textures are procedural (published:
photographs of the set DTD), there are no foreground masks, and the state of the last step is
measured; the published numbers are of the best epoch on the test set.

Variants, after a colon and joined by commas:
    mvtec      288 pixels, as published (toothbrush and wood there: the middle of 329)
    published  what the public code does differently: pooling to 1,536, zeros beyond borders
    adpretrain as ADPretrain trains it on projected features: 224 pixels, no adaptor, less noise,
               hypersphere
    smoke      a random network on a few small synthetic images, two steps, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config("glass"), variants, VARIANTS, __file__)


def _mvtec(config):
    config.evaluation.image_size = 288


def _published(config):
    config.detector.update(
        pooling="published", level_dim=1536, pooled_dim=1536, zero_borders=True
    )  # fmt: skip


def _adpretrain(config):
    config.evaluation.image_size = 224
    config.detector.update(adaptor=False, noise=0.005, hypothesis="hypersphere")


def _smoke(config):
    smoke_evaluation(config)
    config.detector.hidden = 16
    config.detector.recipe.update(steps=2, batch_size=8)


VARIANTS = {"mvtec": _mvtec, "published": _published, "adpretrain": _adpretrain, "smoke": _smoke}
