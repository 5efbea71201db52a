"""Nearest-neighbour localization with the features of any backbone.

    dsad evaluate --config.backbone=run:runs/ds2 --workdir=runs/ds2-knn
    dsad evaluate --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-knn

By default the data are those of the run; every normal training patch is in the bank.
"""

from dsad.assembly.evaluate import default_config


def get_config():
    return default_config("knn")
