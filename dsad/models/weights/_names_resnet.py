"""ResNets under torchvision's names, which timm uses too."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.models import resnet
from dsad.models.family import Family, Loaded, Preprocessing
from dsad.models.functional import Functional
from dsad.models.norm import EPSILON
from dsad.models.weights import names

#: Knowingly left out.
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


def stages(state: Mapping[str, Any]) -> int:
    """How many stages (1 to 4) the tensors cover, from their names."""
    found = {int(m[1]) for name in state if (m := re.match(r"layer(\d)\.", name))}
    if not found or found != set(range(1, max(found) + 1)) or "conv1.weight" not in state:
        raise ConfigError(
            "weights: expected torchvision ResNet names (conv1.weight, layer1.0.conv1.weight, ..); "
            f"found {', '.join(sorted(state)[:4])}, ... ({len(state)} tensors)."
        )
    return max(found)


class ResNets(Family):
    """``resnet.ARCHS``; weights may end after any stage, whose maps then do not exist."""

    @property
    def archs(self) -> Collection[str]:
        return resnet.ARCHS

    def network(self, arch: str, *, stages: int = 4) -> Functional:
        return resnet.resnet(arch, stages=stages)

    def fresh(
        self, arch: str, layers: Sequence[str], *, dtype: str, zero_init_last: bool
    ) -> tuple[Functional, dict[str, Any]]:
        options = {"stages": max(int(name[-1]) for name in layers)}
        network = resnet.resnet(
            arch, **options, zero_init_last=zero_init_last, dtype=jnp.dtype(dtype)
        )
        return network, options

    def strides(self, arch: str, *, stages: int = 4) -> dict[str, int]:
        return {f"layer{s}": resnet.STRIDES[f"layer{s}"] for s in range(1, stages + 1)}

    def preprocessing(self, arch: str) -> Preprocessing:
        return Preprocessing()

    def load(self, arch: str, state: Mapping[str, Any]) -> Loaded:
        options = {"stages": stages(state)}
        shapes = self.network(arch, **options).shapes()
        folded = "bn1.weight" not in state
        trees = names.to_trees(
            entries(shapes, folded=folded), state, shapes, ignored=IGNORED, what=arch
        )
        return Loaded(*trees, options, names.left_out(state, IGNORED))

    def check_complete(self, arch: str, *, stages: int = 4) -> None:
        if stages < 4:
            raise ConfigError(
                f"{arch}: these weights end after layer{stages}, so no other library can load "
                "them. Export weights with layer1 to layer4."
            )

    @property
    def formats(self) -> tuple[str, ...]:
        return ("timm", "torchvision")  # the same names

    def save(
        self, arch: str, params: Any, extra: Any, form: str, *, stages: int = 4
    ) -> dict[str, np.ndarray]:
        return names.to_state(entries(self.network(arch, stages=stages).shapes()), params, extra)
