"""RotPred: by how much a copy of an image was turned, told beside the image as it was.

The prediction of turns is by Gidaris et al., "Unsupervised Representation Learning by Predicting
Image Rotations", ICLR 2018; this is the form that the code of DS2 (He et al., WACV 2024) compares
with: the copy, whose colours change too, is compared with the image cell by cell.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment import turns
from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import field
from dsad.core.types import RunInfo, Scalars
from dsad.models import heads
from dsad.objectives._vectors import VectorsConfig, VectorsObjective
from dsad.objectives.teacher import interleaved
from dsad.ops.similarity import unit

#: DS2's first view, less often blurred, and with grey and solarizing, which DS2's views never have.
TURNED = ViewConfig(blur_probability=0.5, grey_probability=0.2, solarize_probability=0.3)
#: Images that the encoder sees of each one: two crops, and a turned copy of either.
SEEN = ("view1", "turned1", "view2", "turned2")


class Config(VectorsConfig, place="objective"):
    """Settings of RotPred; see ``VectorsConfig`` for the encoder.

    Attributes:
      cells: widths of the two linear maps of every cell, a batch norm and a ReLU between them.
      hidden: widths of the layers on all cells of a pair; the last has neither norm nor ReLU.
      temperature: what the logits, divided by their norm, are divided by.
      fixed_classes: every image is turned by the same angle in all epochs, as the code of DS2 has
        it, so that there are no more turns than images.
      view: of both crops. Colours change in the turned copies alone.

    """

    arch: str = "resnet18"
    cells: tuple[int, int] = field((256, 64), at_least=1)
    hidden: tuple[int, ...] = field((1024, 512, 512), at_least=1)
    temperature: float = field(0.2, above=0)
    fixed_classes: bool = False
    view: ViewConfig = TURNED


def turned(images: jax.Array, quarters: jax.Array) -> jax.Array:
    """Square images (b, S, S, c), each turned counter-clockwise ``quarters`` (b,) times."""
    size = jnp.full((len(images), 2), images.shape[1], jnp.int32)
    return turns.turned({"image": images, "size": size}, quarters)["image"]


def rotation_loss(
    logits: jax.Array, quarters: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of unit logits / temperature, and which are right (n,) bool.

    Logits (n, 4) of the classes ``quarters`` (n,): even the surest logits leave ln(1 + 3e⁻⁵) = 0.02
    at (1, 0, 0, 0) and a temperature of 0.2.
    """
    each = jax.nn.log_softmax(unit(logits.astype(jnp.float32)) / temperature, axis=-1)
    loss = -jnp.mean(jnp.take_along_axis(each, quarters[:, None], axis=1))
    return loss, jnp.argmax(each, axis=-1) == quarters


class RotPred(VectorsObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        super().__init__(cfg, cfg.view)
        self.cfg, dtype, side = cfg, jnp.dtype(cfg.dtype), cfg.view.side
        trees, image = self.encoder.shapes(), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        maps = jax.eval_shape(lambda p, e, x: self.family.maps(self.encoder, p, e, x, None),
                              *trees, image)  # fmt: skip
        #: The map that the head reads, the deepest one.
        self.layer = cfg.last or [*self.family.strides(cfg.arch)][-1]
        *_, height, width, channels = maps[self.layer].shape
        flat = 2 * height * width * cfg.cells[-1]
        self.nets = {
            "cells": heads.mlp((channels, *cfg.cells), dtype=dtype),
            "pair": heads.mlp((flat, *cfg.hidden), dtype=dtype),
            "logits": heads.mlp((cfg.hidden[-1], turns.TURNS), dtype=dtype),
        }

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters and statistics of ``encoder`` and of the head's ``cells, pair, logits``."""
        params, extra = super().init(key)
        for name, net in self.nets.items():
            params[name], extra[name] = net.init(rng.named(key, name))
        return params, extra

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """The images of ``SEEN`` (b, S, S, 3) f32, normalised, and ``quarters`` (b,) int32.

        A turned copy has the crop and the flip of its view: the draws of both have the same key.
        """
        view = self.cfg.view
        plain = dataclasses.replace(
            view, jitter_probability=0.0, blur_probability=0.0, grey_probability=0.0,
            solarize_probability=0.0,
        )  # fmt: skip
        quarters = self._quarters(batch, key)
        images = {}
        for number in (1, 2):
            draws = rng.named(key, f"view{number}")
            images[f"view{number}"] = make_view(batch, draws, plain)["image"]
            images[f"turned{number}"] = turned(make_view(batch, draws, view)["image"], quarters)
        return {**images, "quarters": quarters}

    def _quarters(self, batch: Batch, key: jax.Array) -> jax.Array:
        epoch = batch["epoch"] * 0 if self.cfg.fixed_classes else batch["epoch"]
        return turns.draw_turns({**batch, "epoch": epoch}, key)

    def logits(self, params: Any, extra: Any, views: Any) -> tuple[jax.Array, Any]:
        """(2b, 4) f32, those of both views of an image next to each other, and the new extra.

        Each of the four images has batch statistics of its own.
        """
        images = interleaved(*(views[name] for name in SEEN))
        maps, extra = self.embed(
            params, extra, images, train=True, views=len(SEEN), layers=(self.layer,)
        )
        x, stats = maps[self.layer], {}
        x, stats["cells"] = self._apply("cells", params, extra, x, len(SEEN))
        x = x.reshape(-1, 2 * math.prod(x.shape[1:]))  # a view and its turned copy, side by side
        for name in ("pair", "logits"):
            x, stats[name] = self._apply(name, params, extra, x, 2)
        return x.astype(jnp.float32), {**extra, **stats}

    def _apply(
        self, name: str, params: Any, extra: Any, x: jax.Array, views: int
    ) -> tuple[jax.Array, Any]:
        return self.nets[name].apply(params[name], extra[name], x, train=True, views=views)

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """The mean of ``rotation_loss`` over both views."""
        del key, step  # everything random is in the views
        logits, extra = self.logits(params, extra, views)
        quarters = jnp.repeat(views["quarters"], 2)
        loss, right = rotation_loss(logits, quarters, self.cfg.temperature)
        first, second = (jnp.mean(right[i::2], dtype=jnp.float32) for i in (0, 1))
        accuracies = {"accuracy": (first + second) / 2, "accuracy1": first, "accuracy2": second}
        return loss, (extra, accuracies)

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Both views, and their turned copies."""
        del params, extra
        views = self.views(batch, key)
        names = {"view1": "view 1", "turned1": "turned 1", "view2": "view 2", "turned2": "turned 2"}
        return {shown: self.pixels(views[name]) for name, shown in names.items()}


def build(cfg: Config, run: RunInfo) -> RotPred:
    """The objective for a run."""
    return RotPred(cfg, run)
