"""Which repository of the hub has the ImageNet weights that people mean, per architecture.

The ResNets are torchvision's first ones, which PatchCore, PaDiM and SPADE are published with.
"""

from dsad.core.config import listed
from dsad.core.errors import ConfigError

#: Repositories of timm by what follows the architecture in their names.
_TAGS = {
    "tv_in1k": ("resnet18", "resnet34", "resnet50", "wide_resnet50_2"),
    "fb_in1k": tuple(
        f"deit_{size}_{kind}patch16_224"
        for size in ("tiny", "small", "base")
        for kind in ("", "distilled_")
    ),
    "augreg2_in21k_ft_in1k": ("vit_base_patch16_224",),
    "augreg_in21k_ft_in1k": (
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch32_224",
        "vit_base_patch32_224", "vit_large_patch16_224",
    ),
}  # fmt: skip
_REPOSITORIES = {arch: f"hf:timm/{arch}.{tag}" for tag, archs in _TAGS.items() for arch in archs}


def repository(arch: str) -> str:
    """As ``pretrained.read`` takes it; raises ConfigError where none is meant by all."""
    if arch not in _REPOSITORIES:
        raise ConfigError(
            f"weights=imagenet: none are agreed upon for {arch}; name a file or "
            f"hf:owner/name. There are some for: {listed(_REPOSITORIES)}."
        )
    return _REPOSITORIES[arch]
