"""Segmentation of one's own corruptions: an encoder learns to see where its images were changed.

Small shapes are painted into random crops of normal images, and a light head on the encoder's maps
tells, pixel by pixel, which ones were changed. Labels cost nothing, and every pixel has one.
"""

from typing import Any, Literal

import jax

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, listed
from dsad.core.types import ObjectiveTraits, RunInfo, Scalars
from dsad.models import registry
from dsad.models.family import Preprocessing
from dsad.objectives._segmentation import Segmentation, SegmentationConfig, map_shapes
from dsad.objectives.encoder import EncoderObjective


class Config(SegmentationConfig, place="objective"):
    """Settings of the method; see ``SegmentationConfig`` for the rest.

    Attributes:
      arch: architecture of the encoder, see ``models.backbone``; it ends behind the deepest of
        ``layers``.
      zero_init_last: residual branches of a ResNet start at zero.
      dtype: compute type of the networks; parameters, statistics and the loss stay f32.

    """

    arch: str = "resnet18"
    zero_init_last: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        super().check()
        known = registry.family_of(self.arch).strides(self.arch)
        if not set(self.layers) <= set(known):
            raise Refused("layers", f"some of {listed(known)}", self.layers)


class Corrupt(EncoderObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    #: Batch statistics, and fillings from another image, tie the samples of a batch together.
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        self.cfg, view = cfg, cfg.view
        network, options = registry.family_of(cfg.arch).fresh(
            cfg.arch, cfg.layers, dtype=cfg.dtype, zero_init_last=cfg.zero_init_last
        )
        known = Preprocessing(
            mean=view.mean, std=view.std, image_size=view.side, interpolation=view.filter, crop=1.0
        )
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        self.segmentation = Segmentation(cfg, map_shapes(self, view.side), cfg.dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """``encoder`` and ``head``; extra: their batch statistics, where they have any."""
        networks = {"encoder": self.encoder, "head": self.segmentation.head}
        trees = {name: net.init(rng.named(key, name)) for name, net in networks.items()}
        return {n: t[0] for n, t in trees.items()}, {n: t[1] for n, t in trees.items()}

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """``image`` (b, S, S, 3) f32, normalised, and ``label`` (b, S, S) bool."""
        return self.segmentation.views(batch, key)

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Mean weighted cross-entropy of the pixels."""
        del key, step  # everything random is in the views
        maps, new = self.embed(params, extra, views["image"], train=True, layers=self.cfg.layers)
        loss, (stats, scalars) = self.segmentation.loss(
            params["head"], extra["head"], maps, views["label"]
        )
        return loss, ({**new, "head": stats}, scalars)

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Corrupted views, where they were changed, and where the head says so."""
        head = params["head"], extra["head"]
        return self.segmentation.pictures(self, (params, extra), head, batch, key)


def build(cfg: Config, run: RunInfo) -> Corrupt:
    """The objective for a run."""
    return Corrupt(cfg, run)
