"""A queue in extra and a momentum teacher: MoCo v2 in small."""

import jax
import jax.numpy as jnp

from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.config import Settings, field
from dsad.core.types import ObjectiveTraits
from dsad.models import heads, resnet
from dsad.models.family import Preprocessing
from dsad.objectives.encoder import EncoderObjective
from dsad.objectives.teacher import averaged, copied
from dsad.ops.contrast import enqueue, info_nce, make_queue
from dsad.ops.similarity import unit
from tests.contracts.objectives.common import CROP, Case


class Config(Settings, place="objective"):
    width: int = field(16, at_least=1)
    size: int = field(32, at_least=1)
    momentum: float = field(0.99, within=(0, 1))
    view: ViewConfig = CROP


class Queue(EncoderObjective):
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg, run):
        network = resnet.resnet("resnet18", stages=1)
        known = Preprocessing(image_size=cfg.view.side, crop=1.0)
        super().__init__("resnet18", network, options={"stages": 1}, preprocessing=known)
        self.cfg, self.head = cfg, heads.mlp((64, 32, cfg.width), hidden="none")

    def init(self, key):
        encoder, stats = self.encoder.init(rng.named(key, "encoder"))
        head, _ = self.head.init(rng.named(key, "head"))
        params = {"encoder": encoder, "head": head}
        queue = make_queue(rng.named(key, "queue"), self.cfg.size, self.cfg.width)
        teacher = {"params": copied(params), "encoder": copied(stats)}
        return params, {"encoder": stats, "teacher": teacher, "queue": queue}

    def views(self, batch, key):
        names = ("query", "key")
        return {n: make_view(batch, rng.named(key, n), self.cfg.view)["image"] for n in names}

    def embed(self, params, extra, images, *, train, **options):
        found, extra = super().embed(params, extra, images, train=train, **options)
        z, _ = self.head.apply(params["head"], {}, found["pooled"], train=train)
        return {**found, "z": unit(z)}, extra

    def loss(self, params, extra, views, *, key, step):
        teacher, queue = extra["teacher"], extra["queue"]
        query, extra = self.embed(params, extra, views["query"], train=True)
        keys, after = self.embed(teacher["params"], teacher, views["key"], train=True)
        loss = info_nce(query["z"], keys["z"], negatives=queue["keys"], temperature=0.2)
        queue, after = jax.lax.stop_gradient((enqueue(queue, keys["z"]), after))
        return loss, ({**extra, "teacher": after, "queue": queue}, {})

    def after_update(self, params, extra, step):
        teacher = extra["teacher"]
        moved = averaged(teacher["params"], params, jnp.float32(self.cfg.momentum))
        return {**extra, "teacher": {**teacher, "params": moved}}


build = Queue
CASE = Case(
    config={},
    warm_up=4,
    collectives=frozenset({"all-reduce", "all-gather"}),
    summed=2.0,
)
