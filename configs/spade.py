"""SPADE: nearest normal images by pooled features, then nearest cells among theirs.

    dsad evaluate --config=configs/spade.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-spade
    dsad evaluate --config=configs/spade.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-spade

The published settings: cells of layers 1 to 3, images by layer 4, K = 50. Weights without layer 4
need --config.detector.pooled=layer3.

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("spade")
    config.evaluation.image_size = 224
    config.evaluation.align_corners = False
    return apply_variants(config, variants, {"smoke": smoke_evaluation}, __file__)
