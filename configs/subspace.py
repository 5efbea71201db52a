"""SubspaceAD: what 99 % of the variance of normal tokens does not explain.

    dsad evaluate --config=configs/subspace.py:large --config.weights=FILE.safetensors \
        --config.data.name=mvtec --config.data.root=MVTEC --config.shots=4 --workdir=runs/subspace

DINOv2 with registers at 672 pixels; references in 31 rotations, mirrored beyond their borders,
where the published code draws 30 random ones with black corners. ViT-B/14 without a variant. Other
networks: --config.detector.depth=BLOCKS, or --config.detector.layers="('layer3',)" for a ResNet.

Variants, after a colon and joined by commas:
    large      ViT-L/14, blocks 13 to 17
    giant      ViT-g/14, blocks 22 to 28
    published  giant; maps of 672 pixels under the code's kernel of 3 × 3, whose highest 4,515 are
               the image score. Unlike the code: the rotations, of which it has none for transistor,
               and which differ between its passes for mean and covariance; shots are dsad's own
               draw; images are resized bilinearly, not bicubically; numbers are of the pixels of
               the images, and AUPRO is exact
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.evaluate import default_config


def get_config(variants: str = ""):
    config = default_config("subspace")
    config.backbone = "vit_base_patch14_reg4_dinov2"
    config.support.rotations = 31
    config.evaluation.image_size = 672
    return apply_variants(config, variants, VARIANTS, __file__)


def _large(config):
    config.backbone = "vit_large_patch14_reg4_dinov2"
    config.detector.depth = 24


def _giant(config):
    config.backbone = "vit_giant_patch14_reg4_dinov2"
    config.detector.depth = 40


def _published(config):
    _giant(config)
    config.detector.update(map_rule="published", sigma=0.0)


def _smoke(config):
    smoke_evaluation(config)
    config.backbone = "vit_tiny_patch16_224"
    config.support.rotations = 3
    config.detector.depth = 12


VARIANTS = {"large": _large, "giant": _giant, "published": _published, "smoke": _smoke}
