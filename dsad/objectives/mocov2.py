"""MoCo v2: an image's key of a momentum encoder is told from the keys of a long queue.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; Chen et
al., "Improved Baselines with Momentum Contrastive Learning", 2020.

Published codes shuffle the keys' images over the devices, so that the statistics of a device's
batch norms do not tell which query a key belongs to. Here the statistics of queries are those of
all queries of the global batch, and those of keys are those of all its keys: there are no parts
that a key could be recognised by, and nothing is shuffled. A key depends neither on the order of
the batch nor on the number of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment.turns import random_turns
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, field
from dsad.core.errors import ConfigError
from dsad.core.types import EarlierWeights, Objective, RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._spd import SPDConfig, with_spd
from dsad.objectives._vectors import TwoViewsConfig, TwoViewsObjective
from dsad.objectives.teacher import averaged, copied, interleaved
from dsad.ops.contrast import enqueue, info_nce, make_queue
from dsad.ops.similarity import feature_std, unit


class Config(TwoViewsConfig, place="objective"):
    """Settings of MoCo v2; see ``TwoViewsConfig`` for encoder and views.

    Attributes:
      hidden: widths of the projection's hidden layers, which no norm follows.
      out: values of a projection.
      momentum: of the key encoder, its projection included.
      queue: number of keys that are negatives; at least the batch size.
      split_queue: devices compare all queries with their part of the queue, for a queue that
        ``config.mesh.rules=(("queue/keys$", "data+fsdp,-"),)`` splits; the loss is the same.
      temperature: of the similarities.
      symmetric: the sum of both directions, each view query and key by turns; keys of ``view1``
        enter the queue. Without, ``view1`` is the query and ``view2`` the key.
      class_aware: keys of the sample's own category are no negatives.
      turned: every image is turned by 0 to 3 quarters before its views, see ``augment.turns``;
        with ``class_aware`` each turn of a category is a class.
      spd: a second loss that notices local changes; its vectors never enter the queue.

    """

    hidden: tuple[int, ...] = field((2048,), at_least=1)
    out: int = field(128, at_least=1)
    momentum: float = field(0.999, within=(0, 1))
    queue: int = field(65536, at_least=1)
    split_queue: bool = False
    temperature: float = field(0.2, above=0)
    symmetric: bool = False
    class_aware: bool = False
    turned: bool = False
    spd: SPDConfig = SPDConfig()


class MoCoV2(TwoViewsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        if cfg.class_aware and run.classes < 2 and not cfg.turned:
            raise ConfigError(
                "objective mocov2: expected data of at least 2 categories with class_aware, which "
                f"leaves no negatives within one; found {run.classes}. Take other data or set "
                "config.objective.class_aware=False."
            )
        if cfg.queue < run.batch_size:
            raise Refused(
                "config.objective.queue", f"at least config.batch_size, {run.batch_size}", cfg.queue
            )
        super().__init__(cfg)
        self.cfg, self.classes = cfg, run.classes
        widths = (self.width, *cfg.hidden, cfg.out)
        self.heads = {"z": heads.mlp(widths, hidden="none", dtype=jnp.dtype(cfg.dtype))}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters; extra: statistics, ``teacher`` and ``queue``."""
        params, extra = super().init(key)
        queue = make_queue(rng.named(key, "queue"), self.cfg.queue, self.cfg.out)
        return params, {**self._with_teacher(params, extra), "queue": queue}

    def _with_teacher(self, params: Any, extra: Any) -> Any:
        """Extra with ``teacher``: a copy of all parameters and their statistics."""
        stats = {name: extra[name] for name in params}
        return {**extra, "teacher": copied({"params": params, **stats})}

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``view1``, ``view2`` (b, S, S, 3) f32, normalised; ``label`` (b,) if ``class_aware``."""
        label = batch["category"]
        if self.cfg.turned:
            batch, turns = random_turns(batch, key)
            label = label + self.classes * turns
        views = super().views(batch, key)
        return {**views, "label": label} if self.cfg.class_aware else views

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """InfoNCE of queries with their keys and the queue, see ``ops.contrast.info_nce``.

        Each view has batch statistics of its own, and so have queries and keys.
        """
        del key, step  # everything random is in the views
        teacher, queue, label = extra["teacher"], extra["queue"], views.get("label")
        one, two = views["view1"], views["view2"]
        count = 2 if self.cfg.symmetric else 1
        asked, answering = (interleaved(one, two),) * 2 if self.cfg.symmetric else (one, two)
        vectors, extra = self.embed(params, extra, asked, train=True, views=count)
        keys, after = jax.lax.stop_gradient(
            self.embed(teacher["params"], teacher, answering, train=True, views=count)
        )
        q, k = unit(vectors["z"]), unit(keys["z"])
        excluded = None if label is None else label[:, None] == queue["labels"][None, :]

        def told(q: jax.Array, k: jax.Array) -> jax.Array:
            return info_nce(
                q, k, temperature=self.cfg.temperature, negatives=queue["keys"],
                excluded=excluded, split=self.cfg.split_queue,
            )  # fmt: skip

        loss = told(q[::2], k[1::2]) + told(q[1::2], k[::2]) if self.cfg.symmetric else told(q, k)
        queue = enqueue(queue, k[::count], label)
        new = {**extra, "teacher": after, "queue": queue}
        return loss, (new, jax.lax.stop_gradient({"feature_std": feature_std(vectors["z"])}))

    def after_update(self, params: Any, extra: Any, step: jax.Array) -> Any:
        """Moves the key encoder towards the stepped query encoder.

        The published code does so before the keys of the next step, with the same weights.
        """
        del step
        teacher = extra["teacher"]
        online = {name: params[name] for name in teacher["params"]}
        moved = averaged(teacher["params"], online, self.cfg.momentum)
        return {**extra, "teacher": {**teacher, "params": moved}}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """Take an encoder with its statistics; the key encoder is copied again."""
        params, extra, report = super().adopt(earlier, params, extra)
        return params, self._with_teacher(params, extra), report


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_spd(MoCoV2(cfg, run), cfg.spd)
