"""CFLOW: the density of normal features at every position (Gudovskiy et al., WACV 2022).

A conditional normalising flow per level, see ``models.flow``, is trained on the vectors of normal
images, with a code of their position as the condition. With ll the logarithm of the density,
divided by the number of channels, the loss of a level is the mean of softplus(-ll), and the map is
Σ over the levels of 1 - exp(ll - top), on the grid of the first one.

``top`` is the largest ll of the images that the detector is fitted on. The published code takes
that of the test images, so that there the weights of the levels, and with them every score, depend
on which images are tested; a map here can be negative, where an image is more likely than any of
those. All levels take part in every step: Adam is elementwise, so that each is trained as if alone
(the published optimiser moves all levels three times a step). An epoch ends in no smaller batch.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import field
from dsad.core.detection import FeatureSource, Inside, Scores, highest
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import (
    Backbone,
    FeatureMaps,
    ObjectiveTraits,
    Progress,
    Scalars,
    Trainable,
    Tree,
)
from dsad.detectors._features import DetectorConfig, TrainedDetector, select
from dsad.models import flow
from dsad.models.flow import Clamp, FlowSpec
from dsad.ops.images import per_image
from dsad.ops.resize import resize_maps

#: Numbers that tell a position.
CONDITION = 128


class Config(DetectorConfig):
    """The flows and their training; as published there is no smoothing.

    Attributes:
      layers: maps to read, a flow each.
      blocks: of every flow.
      clamp: bound on a block's scaling, "plain" as in the version of FrEIA that the published code
        names, "scaled" as in later ones; see ``models.flow``.
      tokens: vectors of each level in a step, equally many of every image of the batch, drawn
        anew in every epoch; 0: all. Published are 256, with one step after another until the
        batch's vectors are used up, and 4096 (ADPretrain).
      recipe: training; clipping would tie the levels to each other.

    """

    layers: tuple[str, ...] = field(("layer2", "layer3", "layer4"), distinct=True, filled=True)
    blocks: int = field(8, at_least=1)
    clamp: Clamp = "plain"
    tokens: int = field(4096, at_least=0)
    recipe: Recipe = Recipe(
        epochs=200.0,
        batch_size=16,
        optim=OptimConfig(
            lr=2e-4,
            schedule="cosine",
            warmup_epochs=16.0,
            warmup_multiplier=10.0,
            min_lr=2e-7,
            hold_epochs=8.0,
        ),
    )
    sigma: float = field(0.0, at_least=0)
    image_score: Literal["method", "max", "top"] = "max"

    def spec(self, channels: int) -> FlowSpec:
        """The flow of a level."""
        return FlowSpec(
            channels=channels, condition=CONDITION, blocks=self.blocks, clamp=self.clamp
        )


class Flows(Trainable):
    """What a training step does; parameters are {"flows": {layer: ...}}."""

    traits = ObjectiveTraits()

    def __init__(self, cfg: Config, specs: Tree):
        shapes = select(specs["features"], cfg.layers)
        self.cfg, self.shapes = cfg, {n: x.shape for n, x in zip(cfg.layers, shapes, strict=True)}

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Flows that hardly change their inputs' lengths, and their rotations."""
        drawn = {
            name: flow.init_flow(rng.named(key, name), self.cfg.spec(shape[-1]))
            for name, shape in self.shapes.items()
        }
        flows = {name: params for name, (params, _) in drawn.items()}
        return {"flows": flows}, {"rotations": {name: r for name, (_, r) in drawn.items()}}

    def views(self, batch: Batch, key: jax.Array) -> Tree:
        """By level the cells (b, t) that are trained on, and their vectors (b, t, C)."""
        views = {}
        for name, (images, height, width, channels) in self.shapes.items():
            cells = height * width
            taken = max(1, min(self.cfg.tokens // images or cells, cells))
            keys = rng.sample_keys(rng.named(key, name), batch["epoch"], batch["index"])
            ranks = jax.vmap(lambda k, n=cells: jax.random.uniform(k, (n,)))(keys)
            places = lax.top_k(ranks, taken)[1]
            vectors = batch["features"][name].reshape(-1, cells, channels)
            views[name] = places, jnp.take_along_axis(vectors, places[:, :, None], axis=1)
        return views

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """The sum over the levels of the mean of softplus(-ll)."""
        losses = {}
        for name, (_, height, width, channels) in self.shapes.items():
            places, vectors = views[name]
            code = jnp.asarray(flow.position_code(CONDITION, (height, width)))
            ll = flow.log_likelihood(
                params["flows"][name], extra["rotations"][name], self.cfg.spec(channels),
                vectors.reshape(-1, channels), code[places.reshape(-1)],
            )  # fmt: skip
            losses[name] = jnp.mean(jax.nn.softplus(-ll))
        return jnp.sum(jnp.stack(list(losses.values()))), (extra, losses)


class Cflow(TrainedDetector[Config]):
    """The detector; its state is {"flows", "rotations": {layer: ...}, "tops": (levels,)}."""

    _positions = True

    def objective(self, specs: Tree, backbone: Backbone | None) -> Trainable:
        """The flows of all levels."""
        return Flows(self.config, specs)

    def fit(
        self,
        source: FeatureSource,
        *,
        mesh: Mesh | None,
        key: jax.Array,
        progress: Progress,
        trained: Tree | None = None,
    ) -> Tree:
        """What was trained, and the largest ll of every level in one more pass over ``source``.

        Raises ConfigError without trained parameters, and DataError for broken features.
        """
        state = super().fit(source, mesh=mesh, key=key, progress=progress, trained=trained)
        tops = np.full(len(self.layers), -np.inf, np.float32)
        for cells in self._cells(source, functools.partial(_densities, self, mesh, state)):
            tops = np.maximum(tops, [level.max() for level in cells.values])
        return {**state, "tops": jnp.asarray(tops, jnp.float32)}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw) of the first layer's grid; image (b,): its maximum."""
        levels = self._densities(state, features, mesh)
        shares = [jnp.expm1(ll - state["tops"][i]) for i, ll in enumerate(levels)]
        grid = (shares[0].shape[1], shares[0].shape[2])
        same = [m if m.shape[1:] == grid else resize_maps(m, grid, True) for m in shares]
        maps = -sum(same[1:], start=same[0])
        return Scores(map=maps, image=highest(maps, inside))

    def _densities(self, state: Tree, features: FeatureMaps, mesh: Any) -> list[jax.Array]:
        """Ll (b, h, w) of every level, image by image: the batch's size changes nothing."""

        def of_image(state: Tree, image: list[jax.Array]) -> list[jax.Array]:
            levels = []
            for name, level in zip(self.layers, image, strict=True):
                height, width, channels = level.shape
                code = jnp.asarray(flow.position_code(CONDITION, (height, width)))
                ll = flow.log_likelihood(
                    state["flows"][name], state["rotations"][name], self.config.spec(channels),
                    level.reshape(-1, channels), code,
                )  # fmt: skip
                levels.append(ll.reshape(height, width))
            return levels

        return per_image(of_image, state, select(features, self.layers), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _densities(
    detector: Cflow, mesh: Mesh | None, state: Tree, features: FeatureMaps
) -> list[jax.Array]:
    """Compiled once per configuration and shapes, not once per fit."""
    return detector._densities(state, features, mesh)


build = Cflow
