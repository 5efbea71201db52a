"""VisA's 2-class protocols: a classifier and a U-Net, trained on from a backbone, with labels.

    dsad evaluate --config=configs/twoclass.py:5shot --config.backbone=run:runs/spd \
        --config.data.name=visa:fewshot --config.data.root=VISA --workdir=runs/spd-5shot
    dsad evaluate --config=configs/twoclass.py:highshot --config.backbone=resnet50 \
        --config.weights=FILE.npz --config.data.name=visa:highshot --config.data.root=VISA \
        --workdir=runs/imagenet-highshot
    dsad evaluate --config=configs/twoclass.py:10shot,mtd --config.backbone=resnet18 \
        --config.weights=FILE.npz --config.data.root=MTD --workdir=runs/imagenet-mtd-10shot
    dsad fit --config=configs/twoclass.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=folder --config.data.normal=GOOD --config.data.abnormal=BAD \
        --config.data.masks=MASKS --out=MODEL

Of every category as many normal and anomalous images are drawn, five times, and the numbers are
mean and deviation over the draws. Where training has no anomalous image they are drawn from the
test images; these, and what is in one group with them, are not tested then. dsad fit tests nothing,
and learns from all of them unless config.shots is set. Beside the usual numbers stand those of
anomalous images alone and those of VisA's code. Two residual networks are
trained for each category and draw: ResNet-18 on MTD at 128 pixels takes a quarter of an hour a draw
on two busy cores, image AUROC 0.540 ± 0.019 with 5 + 5 images and 0.575 ± 0.057 with 10 + 10
(README). VisA is not measured yet.

Variants, after a colon and joined by commas:
    5shot      5 + 5 images of each category, drawn by the seeds 0 to 4; 300 steps
    10shot     10 + 10 images
    highshot   all training images, 30 epochs of batches of 16
    frozen     the encoders keep their weights
    mtd        MTD by groups, at 256 pixels, with anomalous images from its test split
    smoke      a random network on a few small synthetic images, four steps, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("twoclass")
    # At 256 pixels half of the defects of VisA's macaroni2 are gone.
    config.evaluation.update(image_size=512, batch_size=8, further=("anomalous", "visa"))
    return apply_variants(config, variants, VARIANTS, __file__)


def _shots(config, shots):
    config.shots, config.seeds = shots, (0, 1, 2, 3, 4)
    config.detector.recipe.steps = 300


def _highshot(config):
    config.shots = 0
    config.detector.recipe.update(epochs=30.0, batch_size=16)


def _frozen(config):
    config.detector.frozen = True


def _mtd(config):
    config.data.name = "mtd:grouped"
    config.evaluation.image_size = 256


def _smoke(config):
    smoke_evaluation(config)
    config.data.synthetic.update(bad=2)
    config.shots = 2
    config.detector.width = 2
    config.detector.recipe.update(steps=4, batch_size=4)


VARIANTS = {
    "5shot": lambda config: _shots(config, 5), "10shot": lambda config: _shots(config, 10),
    "highshot": _highshot, "frozen": _frozen, "mtd": _mtd, "smoke": _smoke,
}  # fmt: skip
