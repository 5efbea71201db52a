"""PatchCore on the features of any backbone: 10 % greedy coreset, distance to the nearest row.

    dsad evaluate --config=configs/patchcore.py --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-patchcore

Variants: ``patchcore.py:published`` takes what the public code does differently from the paper
(pooling to 1,024, zeros beyond borders, projection to 128, ten starts, squared distances).
"""

from dsad.assembly.evaluate import default_config


def get_config(variant: str = ""):
    if variant not in ("", "published"):
        raise ValueError(f"variant {variant!r}: expected none or 'published'")
    config = default_config("patchcore")
    if variant == "published":
        config.detector.pooling = "published"
        config.detector.zero_borders = True
        config.detector.projection_dim = 128
        config.detector.start = "published"
        config.detector.score = "squared"
    return config
