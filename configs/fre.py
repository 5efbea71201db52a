"""FRE: reconstruction error of a linear subspace of the normal features.

    dsad evaluate --config=configs/fre.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-fre
    dsad evaluate --config=configs/fre.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/imagenet-fre

The published settings: whole maps of layer 3 at 256 pixels, pooled by 2, 97 % of the variance, no
smoothing. For textures: --config.detector.mode=patch.
"""

from dsad.assembly.evaluate import default_config


def get_config():
    config = default_config("fre")
    config.evaluation.image_size = 256
    config.evaluation.align_corners = False
    config.evaluation.sigma = 0.0
    return config
