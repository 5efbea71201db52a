"""PaDiM: a Gaussian of the features of normal images at every position.

    dsad evaluate --config=configs/padim.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-padim
    dsad evaluate --config=configs/padim.py --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-padim

The published ResNet-18 settings: 100 of the 448 channels of layers 1 to 3, corner-aligned
upsampling, Gaussian smoothing of 4 pixels. All channels, exactly:

    --config.detector.channels=0

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("padim")
    config.evaluation.align_corners = True
    return apply_variants(config, variants, {"smoke": smoke_evaluation}, __file__)
