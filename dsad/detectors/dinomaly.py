"""Dinomaly: a vision transformer's blocks, reconstructed by linear attention.

Guo et al., CVPR 2025, arXiv 2405.14325.
The mean of the layers passes a bottleneck with dropout and as many decoder blocks as there are
layers, whose attention has no softmax and so can hardly copy single tokens. Layers and, in reverse
order, decoder blocks are averaged in groups; with e and d the two means of a group,

    loss  mean over the groups and images of 1 - cos(e, d), e and d of all cells as one vector each
    map   mean over the groups of 1 - cos(e, d), cell by cell

In training the gradient is weakened where the reconstruction is already good: of all cells of a
batch, at the share ``easy`` with the smallest distance. Class and register tokens, which the
published network carries along and drops at its end, are no part of feature maps.

The published map, at 256 pixels, is smoothed by 5 × 5 weights of a Gaussian of sigma 4: they spread
as one of 1.38 pixels, which are 2.1 of the network's input of 392.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, field
from dsad.core.detection import Inside, Scores, highest
from dsad.core.errors import ConfigError
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Backbone, FeatureMaps, ObjectiveTraits, Scalars, Trainable, Tree
from dsad.detectors._features import DetectorConfig, TrainedDetector, select
from dsad.models import transformer
from dsad.models.draws import Draws, uniform_draws
from dsad.models.transformer import BlockSpec, dropout, folded
from dsad.ops.images import per_image
from dsad.ops.similarity import unit


class Config(DetectorConfig):
    """The network and its training, as published.

    Attributes:
      layers: maps of one size; published are blocks 2 to 9 of 12, and of 24 (ViT-L) every other one
        from 4 to 18, counted from 0.
      groups: that the layers, in their order, are averaged in.
      heads: of the attention; 0: one for every 64 channels.
      mlp: width of the hidden layers, as a multiple of the channels.
      dropout: share of values set to 0, of the bottleneck's input, hidden layer and output.
      easy: share of the cells whose gradient is weakened.
      ramp: step in which that share is reached, along a line from 0.
      easy_gradient: factor on their gradient.
      recipe: training; the warm-up is that of 100 steps for MVTec AD's 3629 images.

    """

    layers: tuple[str, ...] = field(
        tuple(f"block{i}" for i in range(2, 10)), distinct=True, filled=True
    )
    groups: int = field(2, at_least=1)
    heads: int = field(0, at_least=0)
    mlp: int = field(4, at_least=1)
    dropout: float = field(0.2, at_least=0, below=1)
    easy: float = field(0.9, at_least=0, below=1)
    easy_gradient: float = field(0.1, at_least=0)
    ramp: int = field(1000, at_least=1)
    recipe: Recipe = Recipe(
        steps=10_000,
        batch_size=16,
        optim=OptimConfig(
            name="stableadamw", lr=2e-3, weight_decay=1e-4, exempt="$^", clip=0.1,
            schedule="cosine", warmup_epochs=0.44, min_lr=2e-4,
        ),
    )  # fmt: skip
    sigma: float = field(2.1, at_least=0)
    image_score: Literal["method", "max", "top"] = "top"

    def check(self) -> None:
        if len(self.layers) % self.groups:
            expected = f"a number that divides the {len(self.layers)} layers"
            raise Refused("groups", expected, self.groups)

    def blocks(self, channels: int) -> BlockSpec:
        """The decoder for tokens of so many channels; ConfigError if the heads do not divide it."""
        heads = self.heads or max(1, channels // 64)
        if channels % heads:
            raise ConfigError(
                f"config.detector.heads: expected a number that divides the {channels} channels, "
                f"found {heads}."
            )
        return BlockSpec(
            width=channels, depth=len(self.layers), heads=heads, mlp=self.mlp, eps=1e-8,
            attention="linear",
        )  # fmt: skip

    def grouped(self, levels: jax.Array) -> jax.Array:
        """Means (groups, b, cells, C) of outputs (layers, b, cells, C)."""
        return jnp.mean(levels.reshape(self.groups, -1, *levels.shape[1:]), axis=1)


def tokens_of(features: FeatureMaps, layers: tuple[str, ...]) -> jax.Array:
    """The layers as tokens (layers, b, cells, C); ConfigError if their sizes differ."""
    maps = select(features, layers)
    if len({x.shape[1:] for x in maps}) > 1:
        sizes = ", ".join(f"{n} {x.shape[1:]}" for n, x in zip(layers, maps, strict=True))
        raise ConfigError(
            "config.detector.layers: expected maps of one size, such as those of a vision "
            f"transformer's blocks, found {sizes}. Name others, or choose another backbone."
        )
    b, height, width, channels = maps[0].shape
    return jnp.stack(maps).reshape(len(layers), b, height * width, channels)


def init(key: jax.Array, cfg: Config, channels: int) -> Tree:
    """{"bottleneck", "blocks"}: weights of standard deviation 0.01, within three of it."""

    def build(draws: Draws) -> Tree:
        hidden = cfg.mlp * channels
        return {
            "bottleneck": {
                "fc1": transformer.linear_params(draws, channels, hidden),
                "fc2": transformer.linear_params(draws, hidden, channels),
            },
            "blocks": transformer.init_blocks(draws, cfg.blocks(channels)),
        }

    def drawn(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel"):
            return x
        return 0.01 * jax.random.truncated_normal(rng.named(key, name), -3.0, 3.0, x.shape)

    return jax.tree.map_with_path(drawn, uniform_draws(key, build))


def decode(params: Tree, cfg: Config, tokens: jax.Array, keys: jax.Array | None) -> jax.Array:
    """What the layers (layers, b, cells, C) are rebuilt as, by group (groups, b, cells, C).

    ``keys`` (b,) draw the dropout, None: none.
    """

    def thinned(x: jax.Array, place: int) -> jax.Array:
        return dropout(x, folded(keys, place), cfg.dropout)

    p = params["bottleneck"]
    x = thinned(jnp.mean(tokens, axis=0), 0)
    x = thinned(jax.nn.gelu(transformer.linear(p["fc1"], x), approximate=False), 1)
    x = thinned(transformer.linear(p["fc2"], x), 2)
    blocks = cfg.blocks(x.shape[2])
    _, outputs = transformer.scan_blocks(params["blocks"], x, blocks, each=lambda y: y)
    return cfg.grouped(outputs[::-1])


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cos of the vectors along the last axis; small angles keep their digits."""
    return 0.5 * jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1)


def hard_only(rebuilt: jax.Array, target: jax.Array, easy: jax.Array, factor: float) -> jax.Array:
    """``rebuilt`` (b, cells, C), whose gradient is multiplied by ``factor`` where it is good.

    That is where a cell is nearer to ``target`` than the share 1 - ``easy`` of the batch's cells.
    """
    distances = jax.lax.stop_gradient(distance(rebuilt, target))
    count = distances.size
    hard = jnp.maximum(1, jnp.floor(count * (1 - easy)).astype(jnp.int32))
    threshold = jnp.sort(distances.reshape(-1))[count - hard]
    weight = jnp.where(distances < threshold, jnp.float32(factor), 1)[:, :, None]
    return weight * rebuilt + (1 - weight) * jax.lax.stop_gradient(rebuilt)


class Decoder(Trainable):
    """What a training step does."""

    #: Which cells are easy depends on all images of a batch.
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: Config, specs: Tree):
        def tokens(features: FeatureMaps) -> jax.Array:
            return tokens_of(features, cfg.layers)

        self.cfg = cfg
        self.channels = jax.eval_shape(tokens, specs["features"]).shape[-1]
        cfg.blocks(self.channels)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """A fresh network; nothing else."""
        return init(key, self.cfg, self.channels), {}

    def views(self, batch: Batch, key: jax.Array) -> Tree:
        """``tokens`` (layers, b, cells, C), and ``keys`` (b,) of the dropout."""
        keys = rng.sample_keys(rng.named(key, "dropout"), batch["epoch"], batch["index"])
        return {"tokens": tokens_of(batch["features"], self.cfg.layers), "keys": keys}

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Mean distance of whole maps, with weakened gradients of easy cells."""
        cfg, tokens = self.cfg, views["tokens"]
        easy = cfg.easy * jnp.minimum(step.astype(jnp.float32) / cfg.ramp, 1)
        losses = []
        groups = zip(cfg.grouped(tokens), decode(params, cfg, tokens, views["keys"]), strict=True)
        for target, rebuilt in groups:
            rebuilt = hard_only(rebuilt, target, easy, cfg.easy_gradient)
            whole = (x.reshape(x.shape[0], -1) for x in (rebuilt, target))
            losses.append(jnp.mean(distance(*whole)))
        return jnp.mean(jnp.stack(losses)), (extra, {"easy": easy})


class Dinomaly(TrainedDetector[Config]):
    """The detector; its state is {"bottleneck", "blocks"}."""

    def objective(self, specs: Tree, backbone: Backbone | None) -> Trainable:
        """The reconstruction of these layers; ConfigError if they are not of one size."""
        return Decoder(self.config, specs)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw) of 1 - cos; image (b,): its maximum."""
        cfg = self.config

        def of_image(state: Tree, image: FeatureMaps) -> jax.Array:
            tokens = tokens_of({name: x[None] for name, x in image.items()}, cfg.layers)
            distances = distance(cfg.grouped(tokens), decode(state, cfg, tokens, None))
            return jnp.mean(distances, axis=0).reshape(image[cfg.layers[0]].shape[:2])

        images = dict(zip(cfg.layers, select(features, cfg.layers), strict=True))
        maps = per_image(of_image, state, images, mesh)
        return Scores(map=maps, image=highest(maps, inside))


build = Dinomaly
