"""Frozen features with masks and companions: what differs from normal cells, learnt as defects."""

import jax
import jax.numpy as jnp
import optax

from dsad.core import rng
from dsad.core.batch import Companions, Needs
from dsad.core.config import Settings, field
from dsad.core.types import ObjectiveTraits
from dsad.models.decoder import patchify
from tests.contracts.objectives.common import Case

PATCH = 8


class Config(Settings, place="objective"):
    width: int = field(12, at_least=1)
    noise: float = field(0.01, at_least=0)


class Frozen:
    traits = ObjectiveTraits(
        needs=Needs(mask=True, companions=Companions(count=2, images=False)), couples_batch=True
    )
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, cfg, run):
        self.cfg = cfg

    def init(self, key):
        projection = jax.random.normal(key, (3 * PATCH**2, self.cfg.width)) / 3 / PATCH**2
        params = {"kernel": jnp.zeros((self.cfg.width,)), "bias": jnp.zeros(())}
        return params, {"projection": projection, "centre": jnp.zeros((self.cfg.width,))}

    def _cells(self, extra, images):
        b, height, width, _ = images.shape
        cells = patchify(images.astype(jnp.float32), PATCH) @ extra["projection"]
        return cells.reshape(b, height // PATCH, width // PATCH, -1)

    def prepare(self, params, extra, passes):
        cells = [batch["features"]["cells"] for batch in passes()]
        return {**extra, "centre": jnp.mean(jnp.concatenate(cells), axis=(0, 1, 2))}

    def per_sample(self, params, extra, batch):
        return {"cells": self._cells(extra, batch["image"])}

    def views(self, batch, key):
        cells, references = batch["features"]["cells"], batch["references"]
        valid = references["valid"][:, :, None, None, None]
        normal = jnp.sum(jnp.where(valid, references["features"]["cells"], 0), axis=1)
        residual = cells - normal / jnp.maximum(jnp.sum(valid, axis=1), 1)
        keys = rng.sample_keys(rng.named(key, "noise"), batch["epoch"], batch["index"])
        noise = jax.vmap(lambda k: jax.random.normal(k, residual.shape[1:]))(keys)
        defect = jnp.max(patchify(batch["mask"][..., None], PATCH), axis=-1).reshape(
            cells.shape[:3]
        )
        weight = batch["masked"][:, None, None] * jnp.where(defect > 0, 4.0, 1.0)
        residual += self.cfg.noise * noise
        return {"residual": residual, "defect": defect, "weight": weight}

    def loss(self, params, extra, views, *, key, step):
        moved = views["residual"] + 1e-3 * extra["centre"][None, None, None]
        logits = jnp.abs(moved) @ params["kernel"] + params["bias"]
        each = optax.sigmoid_binary_cross_entropy(logits, views["defect"].astype(jnp.float32))
        return jnp.sum(views["weight"] * each) / jnp.sum(views["weight"]), (extra, {})

    def after_update(self, params, extra, step):
        return extra

    def adopt(self, earlier, params, extra):
        return params, extra, "nothing"

    def features(self, params, extra, images, layers=None):
        return {"cells": self._cells(extra, images)}


build = Frozen
CASE = Case(config={}, fixed_views=("defect", "weight"))
