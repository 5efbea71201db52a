"""PatchCore on the features of any backbone: 10 % greedy coreset, distance to the nearest row.

    dsad evaluate --config=configs/patchcore.py --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.name=mvtec --config.data.root=MVTEC \
        --workdir=runs/imagenet-patchcore
    dsad evaluate --config=configs/patchcore.py --config.data.name=folder \
        --config.data.normal=pics/good --config.data.abnormal=pics/bad --workdir=runs/pics

Variants, after a colon and joined by commas:
    published  what the public code does differently from the paper: pooling to 1,024, zeros beyond
               borders, projection to 128, ten starts, squared distances
    mvtec_ad2  MVTec AD 2 and its protocol: SegF1 and ClassF1 at one threshold of each of three
               rules, set by its validation images (needs --config.data.root)
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, mvtec_ad2_evaluation, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config("patchcore"), variants, VARIANTS, __file__)


def _published(config):
    config.detector.update(
        pooling="published", zero_borders=True, projection_dim=128, start="published",
        score="squared",
    )  # fmt: skip


VARIANTS = {
    "published": _published, "mvtec_ad2": mvtec_ad2_evaluation, "smoke": smoke_evaluation,
}  # fmt: skip
