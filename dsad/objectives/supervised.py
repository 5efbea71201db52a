"""Classification of images by their labels: the usual pretraining, as a host of SPD."""

from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment.recipes import SUPERVISED
from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import field
from dsad.core.errors import ConfigError
from dsad.core.types import Objective, RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._spd import SPDConfig, with_spd
from dsad.objectives._vectors import VectorsConfig, VectorsObjective


class Config(VectorsConfig, place="objective"):
    """Settings; see ``VectorsConfig`` for the encoder. Labels are the data set's categories.

    Attributes:
      smoothing: share of the target that is spread over all classes.
      view: of each image.
      spd: a second loss that notices local changes.

    """

    smoothing: float = field(0.0, at_least=0, below=1)
    view: ViewConfig = SUPERVISED
    spd: SPDConfig = SPDConfig(form="classifier")


def cross_entropy(logits: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy of logits (n, classes) and labels (n,) int32."""
    each = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    right = jnp.take_along_axis(each, label[:, None], axis=-1)[:, 0]
    return -jnp.mean((1 - smoothing) * right + smoothing * jnp.mean(each, axis=-1))


class Supervised(VectorsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        if run.classes < 2:
            raise ConfigError(
                f"objective supervised: expected data of at least 2 categories, which are its "
                f"labels; found {run.classes}. Name more with config.data.categories, or take a "
                "data set with a folder per class, such as imagenet, or a method without labels."
            )
        super().__init__(cfg, cfg.view)
        self.cfg, self.classes = cfg, run.classes
        self.heads = {"logits": heads.mlp((self.width, run.classes), dtype=jnp.dtype(cfg.dtype))}

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``image`` (b, S, S, 3) f32, normalised, and ``label`` (b,) int32."""
        image = make_view(batch, rng.named(key, "view"), self.cfg.view)["image"]
        return {"image": image, "label": batch["category"]}

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """See ``cross_entropy``; ``accuracy`` is that on the batch."""
        del key, step  # everything random is in the views
        vectors, extra = self.embed(params, extra, views["image"], train=True)
        logits, label = vectors["logits"], views["label"]
        right = jnp.mean(jnp.argmax(logits, axis=-1) == label, dtype=jnp.float32)
        loss = cross_entropy(logits, label, self.cfg.smoothing)
        return loss, (extra, {"accuracy": jax.lax.stop_gradient(right)})

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The view."""
        del params, extra
        return {"view": self.pixels(self.views(batch, key)["image"])}


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_spd(Supervised(cfg, run), cfg.spd)
