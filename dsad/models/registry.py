"""All architectures that ``models.backbone`` knows, by family."""

from dsad.core.config import named
from dsad.models.family import Family
from dsad.models.weights import _family_vit, _names_plain, _names_resnet

FAMILIES: tuple[Family, ...] = (
    _names_resnet.ResNets(),
    _family_vit.ViTs(),
    _names_plain.MobileNet(),
    _names_plain.SqueezeNet(),
)


def archs() -> tuple[str, ...]:
    """Names of all architectures."""
    return tuple(name for family in FAMILIES for name in family.archs)


def family_of(arch: str) -> Family:
    """The family of an architecture; an unknown name lists what exists."""
    return named({name: family for family in FAMILIES for name in family.archs}, arch, "backbone")
