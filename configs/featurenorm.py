"""FeatureNorm: the length of residual or projected features, without any training.

    dsad evaluate --config=configs/featurenorm.py --config.backbone=residual:resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --config.shots=8 --workdir=runs/residual-norm

As published (ADPretrain): bilinear upsampling with aligned corners, Gaussian smoothing of 4 pixels,
the maximum of the smoothed map as image score, 224 pixels, 8 normal images to compare with. On the
backbone's own features (--config.backbone=resnet18) it is the baseline of that table, near chance.

Variant smoke: a random network on a few small synthetic images, in seconds.
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("featurenorm")
    config.evaluation.image_size = 224
    config.evaluation.align_corners = True
    return apply_variants(config, variants, {"smoke": smoke_evaluation}, __file__)
