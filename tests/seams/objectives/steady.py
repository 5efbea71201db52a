"""A regulariser of any host: its pooled vectors are to be those of the mirrored image."""

from typing import Any

import jax.numpy as jnp

from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.config import Settings, field
from dsad.objectives.teacher import interleaved
from tests.contracts.objectives.common import CROP, Case
from tests.seams.objectives import queue


class Config(Settings, place="objective"):
    weight: float = field(1.0, at_least=0)
    view: ViewConfig = CROP


class Steady:
    """With weight 0 the host is left as it is, to the last bit."""

    def __init__(self, cfg, host):
        self.cfg, self.host = cfg, host
        self.traits, self.mean, self.std = host.traits, host.mean, host.std
        self.init, self.after_update, self.features = host.init, host.after_update, host.features
        self.adopt, self.prepare, self.embed = host.adopt, host.prepare, host.embed
        for offer in ("encoder_weights", "stage_facts", "read_tensors", "per_sample"):
            if offer in dir(host):
                setattr(self, offer, getattr(host, offer))

    def views(self, batch, key):
        views = self.host.views(batch, key)
        if not self.cfg.weight:
            return views
        return {
            **views,
            "steady": make_view(batch, rng.named(key, "steady"), self.cfg.view)["image"],
        }

    def loss(self, params, extra, views, *, key, step):
        loss, (extra, scalars) = self.host.loss(params, extra, views, key=key, step=step)
        if not self.cfg.weight:
            return loss, (extra, scalars)
        both = interleaved(views["steady"], views["steady"][:, :, ::-1])
        found, extra = self.host.embed(params, extra, both, train=True, views=2)
        pooled = found["pooled"].reshape(-1, 2, found["pooled"].shape[-1])
        term = jnp.mean(jnp.square(pooled[:, 0] - pooled[:, 1]))
        return loss + self.cfg.weight * term, (extra, {**scalars, "steady": term})


def build(cfg, run, host: Any = None):
    return Steady(cfg, host or queue.build(queue.Config(), run))


CASE = Case(
    config={},
    warm_up=4,
    collectives=queue.CASE.collectives,
    summed=4.0,
)
