"""ResNets under torchvision's names, which timm uses too."""

import re
from typing import Any

from dsad.core.tree import flatten
from dsad.models import names
from dsad.models.norm import EPSILON

IGNORED = {r"fc\.": "classifier", r".*num_batches_tracked$": "batch counters"}

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def entries(shapes: tuple[Any, Any], *, folded: bool = False) -> list[names.Entry]:
    """The mapping of ``resnet.resnet(..).shapes()``.

    In a *folded* file each batch norm has been multiplied into its convolution, which then has a
    bias. The norm becomes mean 0, variance 1 - eps, scale 1 and shift = bias, so that the same
    network computes it exactly. Folded weights are written back under the complete names.
    """
    found = []
    for kind, tree in zip(("params", "extra"), shapes, strict=True):
        for path, spec in flatten(tree).items():
            where = f"{kind}/{path}"
            if folded and "norm" in path:
                found.append(_folded(where, path, spec.shape))
            else:
                layout = names.CONV if path.endswith("kernel") else names.SAME
                found.append(names.one(where, _published(path), layout))
    return found


def _published(path: str) -> str:
    """``layer1_block0/down_norm/scale`` as ``layer1.0.downsample.1.weight``."""
    *modules, leaf = path.split("/")
    module = re.sub(r"_block(\d+)", r".\1", ".".join(modules))
    module = module.replace("down_conv", "downsample.0").replace("down_norm", "downsample.1")
    return f"{module.replace('norm', 'bn')}.{_LEAVES.get(leaf, leaf)}"


def _folded(where: str, path: str, shape: tuple[int, ...]) -> names.Entry:
    leaf = path.rsplit("/", 1)[1]
    if leaf == "bias":
        return names.one(where, _published(path.replace("norm", "conv")))
    return names.constant(where, {"scale": 1.0, "mean": 0.0, "var": 1.0 - EPSILON}[leaf], shape)
