"""SimSiam: two views of an image predict each other, with neither negatives nor a teacher.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment.recipes import MOCO
from dsad.augment.views import ViewConfig
from dsad.core.batch import Batch
from dsad.core.config import field
from dsad.core.types import Objective, RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._spd import SPDConfig, cosine, with_spd
from dsad.objectives._vectors import VectorsConfig, VectorsObjective, check_views, two_views
from dsad.objectives.teacher import interleaved
from dsad.ops.similarity import feature_std


class Config(VectorsConfig, place="objective"):
    """Settings of SimSiam; see ``VectorsConfig`` for the encoder.

    Attributes:
      hidden: widths of the projection's hidden layers.
      out: values of a projection and of a prediction.
      predictor: width of the prediction's hidden layer.
      view1, view2: of each image.
      spd: a second loss that notices local changes.

    """

    hidden: tuple[int, ...] = field((2048, 2048), at_least=1)
    out: int = field(2048, at_least=1)
    predictor: int = field(512, at_least=1)
    view1: ViewConfig = MOCO
    view2: ViewConfig = MOCO
    spd: SPDConfig = SPDConfig()

    def check(self) -> None:
        super().check()
        check_views(self.view1, self.view2)


def simsiam_loss(p: tuple[jax.Array, jax.Array], z: tuple[jax.Array, jax.Array]) -> jax.Array:
    """−½ (cos(p₁, z₂) + cos(p₂, z₁)), mean over the batch; no gradient flows into z.

    Predictions and projections (n, d) of the two views; −1 is perfect agreement.
    """
    z1, z2 = jax.lax.stop_gradient(z)
    return -0.5 * jnp.mean(cosine(p[0], z2) + cosine(p[1], z1))


class SimSiam(VectorsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        super().__init__(cfg, cfg.view1)
        self.cfg, dtype = cfg, jnp.dtype(cfg.dtype)
        widths = (self.width, *cfg.hidden, cfg.out)
        self.heads = {
            "z": heads.mlp(widths, last="plain", dtype=dtype),
            "p": heads.mlp((cfg.out, cfg.predictor, cfg.out), dtype=dtype),
        }

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``view1`` and ``view2`` (b, S, S, 3) f32, normalised."""
        return two_views(batch, key, self.cfg.view1, self.cfg.view2)

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

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Both views."""
        del params, extra
        views = self.views(batch, key)
        return {"view 1": self.pixels(views["view1"]), "view 2": self.pixels(views["view2"])}


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_spd(SimSiam(cfg, run), cfg.spd)
