"""ProtoAD: cosine distance to prototypes of the normal cells, found by clustering.

    dsad evaluate --config=configs/protoad.py --config.backbone=run:runs/ds2 \
        --workdir=runs/ds2-protoad
    dsad evaluate --config=configs/protoad.py --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-protoad

The published features: layers 1 to 3 at 224 pixels. How far the published prototypes were clustered
is not stated; here each image is clustered two levels deep, then all of them one level.

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("protoad")
    config.evaluation.image_size = 224
    config.evaluation.align_corners = False
    return apply_variants(config, variants, {"smoke": smoke_evaluation}, __file__)
