"""SimSiam: two views of an image predict each other, with neither negatives nor a teacher.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsad.core.config import field
from dsad.core.types import Objective, RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._spd import SPDConfig, cosine, with_spd
from dsad.objectives._vectors import TwoViewsConfig, TwoViewsObjective
from dsad.objectives.teacher import interleaved
from dsad.ops.similarity import feature_std


class Config(TwoViewsConfig, place="objective"):
    """Settings of SimSiam; see ``TwoViewsConfig`` for encoder and views.

    Attributes:
      hidden: widths of the projection's hidden layers.
      out: values of a projection and of a prediction.
      predictor: width of the prediction's hidden layer.
      spd: a second loss that notices local changes.

    """

    hidden: tuple[int, ...] = field((2048, 2048), at_least=1)
    out: int = field(2048, at_least=1)
    predictor: int = field(512, at_least=1)
    spd: SPDConfig = SPDConfig()


def simsiam_loss(p: tuple[jax.Array, jax.Array], z: tuple[jax.Array, jax.Array]) -> jax.Array:
    """−½ (cos(p₁, z₂) + cos(p₂, z₁)), mean over the batch; no gradient flows into z.

    Predictions and projections (n, d) of the two views; −1 is perfect agreement.
    """
    z1, z2 = jax.lax.stop_gradient(z)
    return -0.5 * jnp.mean(cosine(p[0], z2) + cosine(p[1], z1))


class SimSiam(TwoViewsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        super().__init__(cfg)
        self.cfg, dtype = cfg, jnp.dtype(cfg.dtype)
        widths = (self.width, *cfg.hidden, cfg.out)
        self.heads = {
            "z": heads.mlp(widths, last="plain", dtype=dtype),
            "p": heads.mlp((cfg.out, cfg.predictor, cfg.out), dtype=dtype),
        }

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """See ``simsiam_loss``; each view has batch statistics of its own, as published."""
        del key, step  # everything random is in the views
        images = interleaved(views["view1"], views["view2"])
        vectors, extra = self.embed(params, extra, images, train=True, views=2)
        z, p = vectors["z"], vectors["p"]
        loss = simsiam_loss((p[::2], p[1::2]), (z[::2], z[1::2]))
        return loss, (extra, jax.lax.stop_gradient({"feature_std": feature_std(z[::2])}))


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_spd(SimSiam(cfg, run), cfg.spd)
