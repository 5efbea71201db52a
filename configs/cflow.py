"""CFLOW-AD: a conditional normalising flow of the features of every level.

    dsad evaluate --config=configs/cflow.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-cflow
    dsad evaluate --config=configs/cflow.py --config.backbone=wide_resnet50_2 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-cflow

Published network and length: 8 blocks, 200 passes over the images, Adam at 2e-4, corner-aligned
upsampling, no smoothing, highest pixel as the image's score. A step takes 4096 vectors of each
level from 16 images (ADPretrain's number; CFLOW's own is 256). Published numbers are the best of 25
tests on the test images; here the last step counts. WideResNet-50 needs an accelerator;
the published length has not been run here. Variant small with ImageNet's ResNet-18 on the bottles
of MVTec AD, from copies of 256 pixels: 131 steps, four minutes of CPU time, image AUROC 0.988,
pixel AUROC 0.974, AUPRO 0.924; one seed.

Variants, after a colon:
    mvtec    256 pixels, as published for most categories (128 and 512 for others); untested
    small    stages 2 and 3 and 10 passes at five times the rate, for ResNet-18 on two cores
    smoke    a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("cflow")
    config.evaluation.align_corners = True
    return apply_variants(config, variants, VARIANTS, __file__)


def _mvtec(config):
    config.evaluation.image_size = 256


def _small(config):
    config.detector.layers = ("layer2", "layer3")
    config.detector.recipe.epochs = 10.0
    config.detector.recipe.optim.update(lr=1e-3, warmup_epochs=0.8, hold_epochs=0.4)


def _smoke(config):
    smoke_evaluation(config)
    config.detector.update(layers=("layer3",), blocks=2)
    config.detector.recipe.update(steps=4, batch_size=8)


VARIANTS = {"mvtec": _mvtec, "small": _small, "smoke": _smoke}
