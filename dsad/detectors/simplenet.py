"""SimpleNet: a small network tells normal cells from the same cells with noise added.

Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023.
A linear adaptor takes the patch features f of frozen maps to q, a discriminator D learns D(q) high
and D(q + n) low by the hinge loss, and a cell's score is -D(q). Only the state of the last step is
kept; the published code keeps the epoch with the best AUROC on the test images.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import Inside, Scores, highest
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Backbone, FeatureMaps, ObjectiveTraits, Scalars, Trainable, Tree
from dsad.detectors._discriminator import (
    Discriminating,
    HeadConfig,
    adapted,
    fresh,
    hidden,
    judged,
    logits,
)

#: The adaptor's rate and decay; the discriminator's are 2e-4 and 1e-5. All parameters decay.
OPTIM = OptimConfig(
    lr=1e-4, weight_decay=0.01, exempt="$^", groups=(("^discriminator", 2.0, 1e-3, True),)
)


class Config(HeadConfig):
    """Which features are told from noised ones, and how.

    Attributes:
      noise: standard deviation of the noise on an adapted cell.
      noise_unit: "std" counts it in each channel's own standard deviation over the batch, which
        suits any backbone; "absolute" as published, where 0.015 is about 0.1 "std" of an ImageNet
        ResNet's layers 2 and 3.
      margin: of the hinge loss: mean of max(0, margin - D(q)) plus that of
        max(0, margin + D(q + n)).
      recipe: of the training. The published code has the discriminator's decay in its gradient,
        here it is beside it (AdamW).

    """

    noise: float = field(0.1, at_least=0)
    noise_unit: Literal["std", "absolute"] = "std"
    margin: float = field(0.5, above=0)
    recipe: Recipe = Recipe(epochs=160.0, batch_size=8, optim=OPTIM)


class SimpleNet(Discriminating[Config]):
    """The detector; its state is {"adaptor", "discriminator", "statistics"}."""

    def objective(self, specs: Tree, backbone: Backbone | None) -> Trainable:
        """The hinge loss on batches of feature maps."""
        return Hinge(self, specs)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): -D; image (b,): its maximum."""
        maps = -judged(state, self.embed(features))
        return Scores(map=maps, image=highest(maps, inside))


class Hinge(Trainable):
    """What the steps of SimpleNet do."""

    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, detector: SimpleNet, specs: Tree) -> None:
        self.detector, self.config = detector, detector.config
        self.shape = jax.eval_shape(detector.embed, specs["features"]).shape

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Adaptor, discriminator, and its batch statistics."""
        return fresh(key, self.shape[-1], self.config.hidden)

    def views(self, batch: Any, key: jax.Array) -> Tree:
        """``cells`` (b, gh, gw, d) before the adaptor, and standard normal ``noise`` likewise."""
        keys = rng.sample_keys(key, batch["epoch"], batch["index"])
        noise = jax.vmap(lambda k: jax.random.normal(k, self.shape[1:]))(keys)
        return {"cells": self.detector.embed(batch["features"]), "noise": noise}

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Hinge loss; normal and noised cells share the discriminator's batch statistics."""
        cfg = self.config
        normal = adapted(params, views["cells"])
        unit = jnp.float32(1)
        if cfg.noise_unit == "std":
            unit = jnp.std(normal, axis=(0, 1, 2), keepdims=True)
        noised = normal + cfg.noise * jax.lax.stop_gradient(unit) * views["noise"]
        pair = [hidden(params, cells) for cells in (normal, noised)]
        (high, low), statistics = logits(params, extra["statistics"], pair, train=True)
        parts = {
            "normal": jnp.mean(jax.nn.relu(cfg.margin - high)),
            "noised": jnp.mean(jax.nn.relu(cfg.margin + low)),
        }
        return parts["normal"] + parts["noised"], ({**extra, "statistics": statistics}, parts)


build = SimpleNet
