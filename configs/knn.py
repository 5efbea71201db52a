"""Nearest-neighbour localization with the features of any backbone.

    dsad evaluate --config.backbone=run:runs/ds2 --workdir=runs/ds2-knn
    dsad evaluate --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-knn

By default the data are those of the run; every normal training patch is in the bank.

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config("knn"), variants, {"smoke": smoke_evaluation}, __file__)
