"""Segmentation of an encoder's own corruptions: a small head, its loss, and the term of a host."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.augment.color import normalize
from dsad.augment.corruptions import ShapesConfig, corrupt_shapes
from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, field, listed
from dsad.core.errors import ConfigError
from dsad.core.types import FeatureMaps, Objective, Scalars
from dsad.models import heads
from dsad.objectives._term import Term, WithTerm, check_pixels
from dsad.objectives.encoder import EncoderObjective
from dsad.ops.resize import match_grid, resize_maps

#: Where a host keeps the head.
HEAD = "corruption_head"
_TERM = "config.objective.corrupt"


class SegmentationConfig(Settings, place="objective"):
    """How corruptions are segmented.

    Attributes:
      layers: maps that the head sees, brought to the grid of the finest.
      width: channels of the head's hidden layer.
      positive_weight: of changed pixels in the cross-entropy.

    """

    layers: tuple[str, ...] = field(("layer2", "layer3"), distinct=True, filled=True)
    width: int = field(64, at_least=1)
    positive_weight: float = field(4.0, above=0)
    view: ViewConfig = ViewConfig(
        side=96, area=(0.2, 1.0), jitter_probability=0.0, blur_probability=0.0
    )
    shapes: ShapesConfig = ShapesConfig()

    def check(self) -> None:
        self.shapes.fits(self.view.side)


class TermConfig(SegmentationConfig, place="objective.corrupt"):
    """The same as a term beside the loss of another method, on views of its own.

    Attributes:
      weight: of the term; 0 leaves the method as it is.

    """

    weight: float = field(0.0, at_least=0)


def segmentation_loss(logits: jax.Array, labels: jax.Array, positive_weight: float) -> jax.Array:
    """Mean cross-entropy of logits and labels (1: changed), those of changed pixels weighted.

    Arrays are of one shape; the mean is over all values, not over their weights.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    weighted = positive_weight * labels * jax.nn.softplus(-logits)
    return jnp.mean(weighted + (1 - labels) * jax.nn.softplus(logits))


class Segmentation:
    """A head on maps of the shapes ``maps`` (b, h, w, c), by layer, with views and a loss."""

    def __init__(self, cfg: SegmentationConfig, maps: Mapping[str, Any], dtype: Any) -> None:
        self.cfg = cfg
        channels = sum(maps[name].shape[-1] for name in cfg.layers)
        self.head = heads.mlp((channels, cfg.width, 1), dtype=dtype)

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """``image`` (b, S, S, 3) f32, normalised, and ``label`` (b, S, S) bool.

        The other image of each is the one before it in the batch, whose order is drawn anew in
        every epoch: on any mesh the same, and only one image leaves each device.
        """
        cfg = self.cfg
        if len(batch["index"]) == 1 and "other" in cfg.shapes.sources:
            raise ConfigError(
                "shapes.sources: expected no 'other' with batches of a single image, found "
                f"{cfg.shapes.sources}. Take a larger batch, or 'own' and 'noise' alone."
            )
        plain = dataclasses.replace(cfg.view, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        images = make_view(batch, rng.named(key, "view"), plain)["image"]
        keys = rng.sample_keys(rng.named(key, "corruptions"), batch["epoch"], batch["index"])
        images, label = corrupt_shapes(images, jnp.roll(images, 1, axis=0), keys, cfg.shapes)
        return {"image": normalize(images, cfg.view.mean, cfg.view.std), "label": label}

    def logits(self, params: Any, stats: Any, maps: FeatureMaps) -> tuple[jax.Array, Any]:
        """Logits (b, S, S) of a change in the view's pixels, and new batch statistics."""
        rows, columns = max(maps[name].shape[1:3] for name in self.cfg.layers)
        aligned = [match_grid(maps[name], (rows, columns)) for name in self.cfg.layers]
        joined = jnp.concatenate(aligned, axis=-1)
        out, stats = self.head.apply(params, stats, joined, train=True)
        side = self.cfg.view.side
        return resize_maps(out[..., 0], (side, side)), stats

    def loss(
        self, params: Any, stats: Any, maps: FeatureMaps, label: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Scalar loss, then the head's new batch statistics, and scalars to log.

        ``iou``: of the pixels called changed and those that are; ``changed``: their share.
        """
        logits, stats = self.logits(params, stats, maps)
        loss = segmentation_loss(logits, label, self.cfg.positive_weight)
        called = logits > 0
        both, either = (jnp.sum(x, dtype=jnp.float32) for x in (called & label, called | label))
        changed = jnp.mean(label, dtype=jnp.float32)
        scalars = {"iou": both / jnp.maximum(either, 1), "changed": changed}
        return loss, (stats, jax.lax.stop_gradient(scalars))

    def pictures(
        self, host: EncoderObjective, trees: tuple[Any, Any], head: tuple[Any, Any], batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """For ``HasPictures``: corrupted views, where they were changed, where the head says so.

        ``trees`` are the host's params and extra, ``head`` those of the head.
        """
        views = self.views(batch, key)
        maps, _ = host.embed(*trees, views["image"], train=True, layers=self.cfg.layers)
        logits, _ = self.logits(*head, maps)
        told = {"changed pixels": views["label"], "changes seen": jax.nn.sigmoid(logits)}
        grey = {n: jnp.repeat(x[..., None].astype(jnp.float32), 3, -1) for n, x in told.items()}
        return {"corrupted view": host.pixels(views["image"])} | grey


class CorruptionTerm(Term):
    """The same as a term of a host; its views are normalised as the host's."""

    name, head_name = "corruption", HEAD

    def __init__(self, host: EncoderObjective, cfg: TermConfig, dtype: Any) -> None:
        maps = map_shapes(host, cfg.view.side)
        if not set(cfg.layers) <= set(maps):
            raise Refused(f"{_TERM}.layers", f"some of {listed(maps)}", cfg.layers)
        check_pixels(host, cfg.view, f"{_TERM}.view")
        self.segmentation = Segmentation(cfg, maps, dtype)
        self.head = self.segmentation.head

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """See ``Segmentation.views``."""
        return self.segmentation.views(batch, key)

    def loss(
        self, host: EncoderObjective, trees: tuple[Any, Any], head: tuple[Any, Any], views: Any
    ) -> tuple[jax.Array, Any, Any, Scalars]:
        """See ``Segmentation.loss``."""
        layers = self.segmentation.cfg.layers
        maps, extra = host.embed(*trees, views["image"], train=True, layers=layers)
        loss, (stats, scalars) = self.segmentation.loss(*head, maps, views["label"])
        return loss, extra, stats, scalars

    def pictures(
        self, host: EncoderObjective, trees: tuple[Any, Any], head: tuple[Any, Any], batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """See ``Segmentation.pictures``."""
        return self.segmentation.pictures(host, trees, head, batch, key)


def with_term(host: EncoderObjective, cfg: TermConfig, dtype: Any) -> Objective:
    """The host itself at weight 0, else with the term beside its loss."""
    if not cfg.weight:
        return host
    return WithTerm(host, CorruptionTerm(host, cfg, dtype), cfg.weight)


def map_shapes(objective: EncoderObjective, side: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the encoder's maps of one square image."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    network = objective.encoder
    return jax.eval_shape(
        lambda p, e, x: objective.family.maps(network, p, e, x, None), *network.shapes(), image
    )
