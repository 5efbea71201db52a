"""RAD: every cell against its place, and those beside it, in the most similar normal images.

    dsad evaluate --config=configs/rad.py --config.weights=FILE.safetensors \
        --config.data.name=mvtec --config.data.root=MVTEC --workdir=runs/rad

DINOv2 ViT-B/14 with registers at 448 pixels, a bank for each category; 150 images and a window of 3
× 3 for any data set. Larger networks: --config.detector.layers="('norm7','norm13','norm19',
'norm23')". A network without class token and final norm, such as a ResNet:
--config.detector.layers="('layer2','layer3')" --config.detector.retrieval=layer4. A bank that does
not fit: --config.detector.storage=bfloat16, or --config.detector.gallery_images=N.

Variants, after a colon and joined by commas:
    published  DINOv3 ViT-B/16, the middle 448 pixels of 512, one bank for all categories (17.5 GB
               for MVTec AD, in bfloat16; the code's is of float32), maps of 256 pixels whose blur
               dims the borders, image scores of their 655 highest. Unlike the code: numbers are of
               the pixels of the images, not of 256 with masks that are wider by resizing; AUPRO is
               exact, not of 200 thresholds
    visa, realiad, adam3d
               images and radius as published for these data sets, where they were chosen by test
               results
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("rad")
    config.backbone = "vit_base_patch14_reg4_dinov2"
    config.evaluation.image_size = 448
    return apply_variants(config, variants, VARIANTS, __file__)


def _published(config):
    config.backbone = "vit_base_patch16_dinov3"
    config.one_for_all = True
    config.evaluation.crop = 0.875
    config.detector.update(
        storage="bfloat16", map_rule="published", sigma=0.0, image_score="method"
    )


def _tuned(name, neighbours, radius):
    def change(config):
        config.data.name = name
        config.detector.update(neighbours=neighbours, radius=radius)

    return change


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "vit_tiny_patch16_224"


VARIANTS = {
    "published": _published, "visa": _tuned("visa", 900, 2), "realiad": _tuned("realiad", 900, 0),
    "adam3d": _tuned("adam3d", 48, 1), "smoke": _smoke,
}  # fmt: skip
