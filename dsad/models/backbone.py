"""A network with its weights as one callable pytree: what detectors and users hold."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsad.core.types import FeatureMaps
from dsad.models import pretrained, resnet
from dsad.models.functional import Functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "extra"],
    meta_fields=["arch", "stages", "mean", "std", "description"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """Frozen network in inference mode; a pytree, so it can be an argument of a jitted function.

    Call it with normalised RGB images (b, H, W, 3), that is ``(pixels / 255 - mean) / std``; it
    returns ``layer1`` to ``layer4``, each (b, h, w, channels). ``description`` names the weights.
    """

    params: Any
    extra: Any
    arch: str
    stages: int = 4
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    description: str = ""

    @property
    def strides(self) -> dict[str, int]:
        """Input pixels per cell of each feature map."""
        return {f"layer{s}": resnet.STRIDES[f"layer{s}"] for s in range(1, self.stages + 1)}

    def __call__(self, images: jax.Array) -> FeatureMaps:
        network = _network(self.arch, self.stages)
        maps, _ = network.apply(self.params, self.extra, jnp.asarray(images), train=False)
        return maps


@functools.cache
def _network(arch: str, stages: int) -> Functional:
    return resnet.resnet(arch, stages=stages)


def backbone(
    arch: str,
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Backbone:
    """A backbone with random or published weights.

    Args:
      arch: ``resnet18``, ``resnet34``, ``resnet50`` or ``wide_resnet50_2``.
      weights: None for random weights (He et al.'s fan-out normal, norm scales 1), a ``.npz`` file
        or a mapping of arrays under torchvision's names. Folded files are recognised. Stages that
        the weights lack do not exist in the result, so asking for their maps is refused.
      seed: of the random weights.

    Raises:
      ConfigError: unknown architecture, or tensors that are missing, left over or misshapen.

    """
    resnet.arch(arch)
    if weights is None:
        params, extra = jax.jit(_network(arch, 4).init)(jax.random.key(seed))
        return Backbone(params=params, extra=extra, arch=arch, description=f"random, seed {seed}")
    if isinstance(weights, Mapping):
        state, name = weights, "given arrays"
    else:
        state, name = pretrained.read(os.fspath(weights)), os.path.basename(os.fspath(weights))
    params, extra, stages = pretrained.resnet_trees(arch, state)
    return Backbone(params=params, extra=extra, arch=arch, stages=stages, description=name)
