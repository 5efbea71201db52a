"""What SimpleNet and GLASS share: patch features, an adaptor, a discriminator of cells."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core import rng
from dsad.core.config import field
from dsad.core.types import FeatureMaps, Tree
from dsad.detectors._features import TrainedDetector
from dsad.detectors._patches import PatchConfig, patch_features
from dsad.models import heads

C = TypeVar("C", bound=Any)
#: What a state holds, and where ``fresh`` has it.
PARTS = ("adaptor", "discriminator", "statistics")


class HeadConfig(PatchConfig):
    """Which features are told apart, and by how large a network.

    Attributes:
      hidden: channels of the discriminator.

    """

    hidden: int = field(1024, at_least=1)


class Discriminating(TrainedDetector[C]):
    """A detector whose state is {"adaptor", "discriminator", "statistics"} as trained."""

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Cell descriptors (b, gh, gw, d) before the adaptor, on the grid of the first layer."""
        return patch_features(features, self.config)


def fresh(key: jax.Array, channels: int, hidden: int, *, adaptor: bool = True) -> tuple[Tree, Tree]:
    """Parameters {"adaptor", "discriminator"} and extra {"statistics"} to start from.

    The adaptor is a linear map without bias: the norm behind it would take that away again.
    """
    network = heads.discriminator(channels, hidden)
    params, statistics = network.init(rng.named(key, "discriminator"))
    params = {"discriminator": params}
    if adaptor:
        drawn = jax.random.normal(rng.named(key, "adaptor"), (channels, channels))
        params["adaptor"] = {"kernel": drawn / math.sqrt(channels)}
    return params, {"statistics": statistics}


def adapted(params: Tree, cells: jax.Array) -> jax.Array:
    """Cells (..., d) behind the adaptor, if there is one."""
    return cells @ params["adaptor"]["kernel"] if "adaptor" in params else cells


def hidden(params: Tree, cells: jax.Array) -> jax.Array:
    """What the discriminator makes of adapted cells (..., d) before its norm."""
    return _network(params).apply(params["discriminator"], {}, cells, method="hidden")[0]


def logits(
    params: Tree, statistics: Tree, parts: Sequence[jax.Array], *, train: bool
) -> tuple[list[jax.Array], Tree]:
    """Logits (b, n, ...) of each of ``hidden`` (b, n, ..., h), and new batch statistics.

    With ``train`` all parts are normalised together. They are joined along the rows of an image, so
    that the batch stays split over devices as it is.
    """
    scores, statistics = _network(params).apply(
        params["discriminator"], statistics, jnp.concatenate(parts, axis=1), method="judge",
        train=train,
    )  # fmt: skip
    ends = np.cumsum([x.shape[1] for x in parts])[:-1]
    return jnp.split(scores, ends, axis=1), statistics


def judged(state: Tree, cells: jax.Array) -> jax.Array:
    """Logits (b, gh, gw) of cells (b, gh, gw, d) before the adaptor, by what was trained."""
    found = hidden(state, adapted(state, cells))
    return logits(state, state["statistics"], [found], train=False)[0][0]


def _network(params: Tree) -> heads.Functional:
    return heads.discriminator(*jnp.shape(params["discriminator"]["conv1"]["kernel"]))
