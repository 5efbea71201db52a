"""SimCLR: a view of an image is told from those of all other images of the batch by its partner.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment.recipes import SIMCLR
from dsad.augment.turns import random_turns
from dsad.augment.views import ViewConfig
from dsad.core.batch import Batch
from dsad.core.config import field
from dsad.core.types import Objective, RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._spd import SPDConfig, with_spd
from dsad.objectives._vectors import TwoViewsConfig, TwoViewsObjective
from dsad.objectives.teacher import interleaved
from dsad.ops.contrast import nt_xent
from dsad.ops.similarity import feature_std, unit


class Config(TwoViewsConfig, place="objective"):
    """Settings of SimCLR; see ``TwoViewsConfig`` for encoder and views.

    Attributes:
      hidden: widths of the projection's hidden layers.
      out: values of a projection.
      temperature: of the similarities.
      turned: every image is turned by 0 to 3 quarters before its views, see ``augment.turns``.
      spd: a second loss that notices local changes.

    """

    hidden: tuple[int, ...] = field((2048,), at_least=1)
    out: int = field(128, at_least=1)
    temperature: float = field(0.1, above=0)
    turned: bool = False
    view1: ViewConfig = SIMCLR
    view2: ViewConfig = SIMCLR
    spd: SPDConfig = SPDConfig()


class SimCLR(TwoViewsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method.

    A batch norm follows every layer of the projection; the last one of the published code has a
    scale and no shift, here it has both. That code's loss is the sum of both directions, twice the
    mean that the paper has and that this is.
    """

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        super().__init__(cfg)
        self.cfg = cfg
        widths = (self.width, *cfg.hidden, cfg.out)
        self.heads = {"z": heads.mlp(widths, last="affine", dtype=jnp.dtype(cfg.dtype))}

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``view1`` and ``view2`` (b, S, S, 3) f32, normalised."""
        if self.cfg.turned:
            batch, _ = random_turns(batch, key)
        return super().views(batch, key)

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """See ``ops.contrast.nt_xent``; batch norms see both views as one batch, as published."""
        del key, step  # everything random is in the views
        images = interleaved(views["view1"], views["view2"])
        vectors, extra = self.embed(params, extra, images, train=True)
        z = vectors["z"]
        loss = nt_xent(unit(z[::2]), unit(z[1::2]), temperature=self.cfg.temperature)
        return loss, (extra, jax.lax.stop_gradient({"feature_std": feature_std(z[::2])}))


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_spd(SimCLR(cfg, run), cfg.spd)
