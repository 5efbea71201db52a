"""SuperADD: several blocks of windows at high resolution, banks thinned by density, lines closed.

    dsad evaluate --config=configs/superadd.py --config.weights=FILE.safetensors \
        --config.data.name=mvtec_ad2 --config.data.root=MVTEC_AD2 --workdir=runs/superadd

DINOv3 ViT-B/16 in windows of 640 pixels of images at 0.625 of their size; training images in a
brightness of 0.8 to 1.2. Masks at a threshold of the 95th percentile are closed along lines, with
lengths of MVTec AD 2's pictures, whose maps the published code has at a quarter of their sides.
Larger networks: --config.detector.depth=BLOCKS; a ResNet:
--config.detector.layers="('layer2','layer3')". Unlike the published code: images are resized
bilinearly, not bicubically; where a data set has validation images these set the threshold, else an
eighth of the training images drawn by hash, not every eighth.

Variants, after a colon and joined by commas:
    published  DINOv3 ViT-H+/16, distances divided by the channels, and the partial AUROC of the
               published tables
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("superadd")
    config.backbone = "vit_base_patch16_dinov3"
    config.support.brightness = 0.2
    config.evaluation.update(
        image_size=640, resize="windows", overlap=128, scale=0.625, batch_size=8,
        false_alarm_rate=0.05, holdout=8, decisions=("superadd", "bound"),
    )  # fmt: skip
    # 26 and 1 pixel of a map of a quarter of the sides.
    config.evaluation.morphology.update(lines=104, gate=0.8, fill_holes=True, erosion=4)
    return apply_variants(config, variants, VARIANTS, __file__)


def _published(config):
    config.backbone = "vit_huge_plus_patch16_dinov3"
    config.detector.update(depth=32, unit="channels")
    config.evaluation.further = ("partial",)


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "vit_tiny_patch16_224"
    config.detector.update(depth=12, bank_rows=10)
    config.evaluation.update(image_size=32, overlap=8)


VARIANTS = {"published": _published, "smoke": _smoke}
