"""A head, trained by gradient, tells cells from noised ones: SimpleNet in small."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import Scores
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import ObjectiveTraits, Trainable
from dsad.detectors._features import DetectorConfig, FeatureDetector, joined
from tests.contracts.detectors import common


class Config(DetectorConfig, place="detector"):
    layers: tuple[str, ...] = field(("layer2", "layer3"), distinct=True, filled=True)
    on: Literal["features", "images"] = "features"
    recipe: Recipe = Recipe(steps=40, batch_size=8, optim=OptimConfig(lr=0.1))


def logits_of(state, cells):
    return jnp.square(cells - state["centre"][None, None, None]) @ state["kernel"] + state["bias"]


class Head(Trainable):
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg, specs, backbone):
        self.cfg = cfg
        self.shape = jax.eval_shape(self.cells, specs, backbone).shape

    def cells(self, batch, network):
        if network is None:
            return joined(batch["features"], self.cfg.layers)
        return joined(network(batch["image"], batch["index"]), self.cfg.layers)

    def init(self, key):
        zeros = jnp.zeros(self.shape[-1])
        return {"kernel": zeros, "bias": jnp.zeros(())}, {"centre": zeros}

    def views(self, batch, key):
        keys = rng.sample_keys(key, batch["epoch"], batch["index"])
        return {**batch, "noise": jax.vmap(lambda k: jax.random.normal(k, self.shape[1:]))(keys)}

    def loss(self, params, extra, views, *, key, step):
        cells = self.cells(views, extra.get("backbone"))
        mean = jnp.mean(cells, (0, 1, 2))
        centre = jnp.where(step == 0, mean, 0.9 * extra["centre"] + 0.1 * mean)
        extra = {**extra, "centre": centre}
        real, noised = (logits_of(params | extra, x) for x in (cells, cells + 3 * views["noise"]))
        return jnp.mean(jax.nn.softplus(real) + jax.nn.softplus(-noised)), (extra, {})


class Linear(FeatureDetector[Config]):
    traits = property(lambda x: dataclasses.replace(super().traits, trains_on=x.config.on))
    recipe = property(lambda self: self.config.recipe)

    def objective(self, specs, backbone):
        return Head(self.config, specs, backbone)

    def score(self, state, features, *, mesh=None):
        maps = logits_of(state, joined(features, self.layers))
        return Scores(map=maps, image=jnp.max(maps, axis=(1, 2)))


build = Linear
CONFIGS = [{}]


def oracle(config, state, test):
    gaps = common.joined(test, neighbourhood=1) - np.float64(state["centre"])
    maps = gaps**2 @ np.float64(state["kernel"]) + np.float64(state["bias"])
    return maps, maps.max((1, 2))
