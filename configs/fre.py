"""FRE: reconstruction error of a linear subspace of the normal features.

    dsad evaluate --config=configs/fre.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-fre
    dsad evaluate --config=configs/fre.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-fre

The published settings: whole maps of layer 3 at 256 pixels, pooled by 2, 97 % of the variance, no
smoothing. For textures: --config.detector.mode=patch.

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("fre")
    config.evaluation.image_size = 256
    config.evaluation.align_corners = False
    return apply_variants(config, variants, {"smoke": smoke_evaluation}, __file__)
