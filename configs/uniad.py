"""UniAD: one transformer reconstructs the features of all categories.

    dsad evaluate --config=configs/uniad.py --config.backbone=run:runs/ds2 --workdir=runs/ds2-uniad
    dsad evaluate --config=configs/uniad.py:mvtec --config.weights=FILE.npz \
        --config.data.root=MVTEC --workdir=runs/imagenet-uniad

Published network and training: width 256, 4 + 4 layers, 14 × 14 tokens, 1000 passes in batches of
8, AdamW at 1e-4. The published backbone, EfficientNet-b4, is not there: this takes stages 1 to 3 of
ResNet-18, each divided by its root mean square. Features of all categories are held on the host:
1.4 MB an image for these stages at 224 pixels. The published length needs an accelerator; it has
not been run here. Variant small with ImageNet's ResNet-18 on the bottles of MVTec AD alone, from
copies of 256 pixels: 314 steps, five and a half minutes of CPU time, image AUROC 0.989, pixel
AUROC 0.977, AUPRO 0.927; one seed.

Variants, after a colon:
    mvtec      MVTec AD
    published  levels as they are, of stages 1 to 4 where the backbone has them; untested
    adpretrain the sizes of ADPretrain's release: width 512, 16 × 16 tokens of four blocks of a
               vision transformer, the highest pixel as the image's score; untested
    small      half the width and depth, 12 passes at ten times the rate, which falls along a
               cosine: for one category and ResNet-18 on two cores
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("uniad")
    config.one_for_all = True
    config.evaluation.align_corners = True
    return apply_variants(config, variants, VARIANTS, __file__)


def _mvtec(config):
    config.data.name = "mvtec"


def _published(config):
    config.detector.update(layers=("layer1", "layer2", "layer3", "layer4"), scaled=False)


def _adpretrain(config):
    config.detector.update(
        layers=("block2", "block5", "block8", "block11"), grid=16, scaled=False, width=512,
        mlp=2048, image_score="max",
    )  # fmt: skip
    # 20 ‖f‖ / C for the 3072 channels of four blocks of a ViT-B.
    config.detector.jitter = 0.361


def _small(config):
    config.detector.update(width=128, mlp=512, depth=2)
    config.detector.recipe.epochs = 12.0
    config.detector.recipe.optim.update(lr=1e-3, schedule="cosine", warmup_epochs=1.0)


def _smoke(config):
    smoke_evaluation(config)
    config.detector.update(grid=4, neighbourhood=3, width=16, heads=2, mlp=32, depth=1)
    config.detector.recipe.update(steps=4, batch_size=8)


VARIANTS = {
    "mvtec": _mvtec, "published": _published, "adpretrain": _adpretrain, "small": _small,
    "smoke": _smoke,
}  # fmt: skip
