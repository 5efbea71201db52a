"""UniAD: normal features are reconstructed from jittered ones, of all categories by one network.

You et al., NeurIPS 2022; the network is in ``models.uniad``. The levels are brought to one grid and
concatenated to tokens f of C channels. In training a token gets Gaussian noise of standard
deviation ``jitter`` · ‖f‖ / √C in every channel, and the loss is the mean squared error to the
clean token; the map is the Euclidean norm of the error.

With ``scaled`` each level is first divided by its root mean square over the training images. The
published code takes levels as they are, where the one with the largest values, often the deepest of
a vision transformer, decides loss and map. Its noise is 20 ‖f‖ / C: with other backbones than its
EfficientNet-b4 (C = 272, ``jitter`` 1.21) its strength goes down as 1/√C.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, field
from dsad.core.detection import Inside, Scores, highest
from dsad.core.errors import ConfigError
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Backbone, FeatureMaps, ObjectiveTraits, Scalars, Trainable, Tree
from dsad.detectors._features import DetectorConfig, TrainedDetector, select
from dsad.models import uniad
from dsad.models.uniad import Spec
from dsad.ops.images import per_image
from dsad.ops.resize import match_grid, resize_maps

#: Pixels of a cell at the side (224 for 14 cells) at which the published image score is taken.
CELL = 16


class Config(DetectorConfig):
    """The network and its training, as published; the map is not smoothed.

    Attributes:
      layers: maps to read.
      grid: cells a side to which the maps are brought; 0: those of the first.
      scaled: divide each level by its root mean square; published is False.
      jitter: expected length of the noise on a token, as a share of the token's.
      width: channels of a token inside the network.
      heads: of every attention.
      mlp: channels between the two linear maps of a layer.
      depth: layers of the encoder, and of the decoder.
      neighbourhood: side in cells of the window around a token that it does not see.
      dropout: share of the values that layers set to 0 in training.
      recipe: training; an epoch is one of all categories.
      image_score: "method" is the highest mean of 16 × 16 pixels of the map with 16 pixels a cell,
        as published; "max" the highest pixel, as in ADPretrain.

    """

    layers: tuple[str, ...] = field(("layer1", "layer2", "layer3"), distinct=True, filled=True)
    grid: int = field(14, at_least=0)
    scaled: bool = True
    jitter: float = field(1.21, at_least=0)
    width: int = field(256, at_least=2)
    heads: int = field(8, at_least=1)
    mlp: int = field(1024, at_least=1)
    depth: int = field(4, at_least=1)
    neighbourhood: int = field(7, at_least=1, odd=True)
    dropout: float = field(0.1, at_least=0, below=1)
    recipe: Recipe = Recipe(
        epochs=1000.0,
        batch_size=8,
        optim=OptimConfig(
            lr=1e-4, weight_decay=1e-4, exempt="$^", clip=0.1, schedule="step", milestones=(801.0,)
        ),
    )
    sigma: float = field(0.0, at_least=0)

    def check(self) -> None:
        if self.width % self.heads or self.width % 2:
            expected = f"a number that 2 and the {self.heads} heads divide"
            raise Refused("width", expected, self.width)

    def on_grid(self, features: FeatureMaps) -> list[jax.Array]:
        """The levels (b, gh, gw, C) on one grid."""
        levels = select(features, self.layers)
        grid = (self.grid, self.grid) if self.grid else (levels[0].shape[1], levels[0].shape[2])
        return [match_grid(level, grid) for level in levels]

    def spec(self, levels: list[Any]) -> Spec:
        """The network for such levels; ConfigError if a token of it sees nothing."""
        grid = (levels[0].shape[1], levels[0].shape[2])
        if uniad.neighbour_mask(grid, self.neighbourhood).all(axis=1).any():
            raise ConfigError(
                "config.detector.neighbourhood: expected a window that leaves something of "
                f"{grid[0]} × {grid[1]} cells for every token to see, found {self.neighbourhood}. "
                "Make it smaller, or config.detector.grid larger."
            )
        return Spec(
            channels=sum(x.shape[3] for x in levels), grid=grid, width=self.width,
            heads=self.heads, mlp=self.mlp, depth=self.depth,
            neighbourhood=self.neighbourhood, dropout=self.dropout,
        )  # fmt: skip


class Reconstruction(Trainable):
    """What a training step does; extra is {"squares": (levels,)}, means over the steps so far."""

    traits = ObjectiveTraits()

    def __init__(self, cfg: Config, specs: Tree):
        levels = jax.eval_shape(cfg.on_grid, specs["features"])
        self.cfg, self.spec = cfg, cfg.spec(levels)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """A fresh network, and nothing seen."""
        squares = jnp.ones(len(self.cfg.layers), jnp.float32)
        return {"network": uniad.init(key, self.spec)}, {"squares": squares}

    def views(self, batch: Batch, key: jax.Array) -> Tree:
        """The levels on one grid, ``noise`` (b, cells, C), and ``keys`` (b,) of the dropout."""
        cells, channels = math.prod(self.spec.grid), self.spec.channels

        def keys(name: str) -> jax.Array:
            return rng.sample_keys(rng.named(key, name), batch["epoch"], batch["index"])

        noise = jax.vmap(lambda k: jax.random.normal(k, (cells, channels)))(keys("jitter"))
        levels = self.cfg.on_grid(batch["features"])
        return {"levels": levels, "noise": noise, "keys": keys("dropout")}

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Mean squared error to the clean tokens."""
        # Of whole passes this mean is that of the training images.
        seen = jnp.stack([jnp.mean(jnp.square(x)) for x in views["levels"]])
        share = 1 / (step.astype(jnp.float32) + 1)
        squares = jnp.where(step == 0, seen, extra["squares"] + share * (seen - extra["squares"]))
        tokens = tokens_of(self.cfg, squares, views["levels"])
        length = jnp.sqrt(jnp.mean(jnp.square(tokens), axis=2, keepdims=True))
        jittered = tokens + self.cfg.jitter * length * views["noise"]
        rebuilt = uniad.reconstruct(params["network"], self.spec, jittered, views["keys"])
        return jnp.mean(jnp.square(rebuilt - tokens)), ({**extra, "squares": squares}, {})


def tokens_of(cfg: Config, squares: jax.Array, levels: list[jax.Array]) -> jax.Array:
    """Tokens (b, cells, C) of levels with these mean ``squares`` (levels,)."""
    if cfg.scaled:
        scales = lax.rsqrt(jnp.maximum(squares, 1e-12))
        levels = [x * scales[i] for i, x in enumerate(levels)]
    joined = jnp.concatenate(levels, axis=3)
    return joined.reshape(joined.shape[0], -1, joined.shape[3])


class UniAD(TrainedDetector[Config]):
    """The detector; its state is {"network", "squares": (levels,)}."""

    _positions = True

    def objective(self, specs: Tree, backbone: Backbone | None) -> Trainable:
        """The reconstruction of tokens on the grid of these features."""
        return Reconstruction(self.config, specs)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw) of norms of the errors; image (b,), see ``Config.image_score``."""

        def of_image(state: Tree, image: FeatureMaps) -> jax.Array:
            levels = self.config.on_grid({name: x[None] for name, x in image.items()})
            spec = self.config.spec(levels)
            tokens = tokens_of(self.config, state["squares"], levels)
            error = uniad.reconstruct(state["network"], spec, tokens) - tokens
            return jnp.sqrt(jnp.sum(jnp.square(error), axis=2)).reshape(spec.grid)

        images = dict(zip(self.layers, select(features, self.layers), strict=True))
        maps = per_image(of_image, state, images, mesh)
        return Scores(map=maps, image=pooled_maximum(maps, inside))


def pooled_maximum(maps: jax.Array, inside: Inside = None) -> jax.Array:
    """The highest mean (b,) of 16 × 16 pixels of maps (b, h, w) with 16 pixels a cell."""
    pixels = resize_maps(maps, (CELL * maps.shape[1], CELL * maps.shape[2]), True)
    window = (1, CELL, CELL)
    sums = lax.reduce_window(pixels, np.float32(0), lax.add, window, (1, 1, 1), "VALID")
    return highest(sums, inside) / CELL**2


build = UniAD
