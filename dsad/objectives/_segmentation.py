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
from dsad.core.types import (
    EarlierWeights,
    FeatureMaps,
    HasPictures,
    Objective,
    ReadsTensors,
    Scalars,
    Trainable,
)
from dsad.models import heads
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


class WithTerm(Trainable):
    """A host whose encoder segments corruptions as well; its own views and loss stay as they are.

    What the host offers, it still offers, but for ``parts`` and the cost that it states, which are
    not those of the whole. Batch statistics follow the host's views, then the corrupted ones.
    """

    def __init__(self, host: EncoderObjective, cfg: TermConfig, dtype: Any) -> None:
        self.host, self.cfg = host, cfg
        maps = map_shapes(host, cfg.view.side)
        if not set(cfg.layers) <= set(maps):
            raise Refused(f"{_TERM}.layers", f"some of {listed(maps)}", cfg.layers)
        for name in ("mean", "std"):
            if (value := getattr(cfg.view, name)) != (expected := getattr(host, name)):
                raise Refused(f"{_TERM}.view.{name}", f"the method's {expected}", value)
        self.term = Segmentation(cfg, maps, dtype)
        self.traits = dataclasses.replace(host.traits, couples_batch=True)
        self.mean, self.std, self.stage_facts = host.mean, host.std, host.stage_facts
        self.features, self.embed, self.prepare = host.features, host.embed, host.prepare
        self.encoder_weights, self.after_update = host.encoder_weights, host.after_update
        if isinstance(host, ReadsTensors):
            self.read_tensors = host.read_tensors

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """The host's, and the head beside them."""
        params, extra = self.host.init(key)
        head, stats = self.term.head.init(rng.named(key, HEAD))
        return {**params, HEAD: head}, {**extra, HEAD: stats}

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """The host's, and ``corruption``, see ``Segmentation.views``."""
        return {
            **self.host.views(batch, key),
            "corruption": self.term.views(batch, rng.named(key, "corruption")),
        }

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """The host's loss and ``weight`` times the term, which is logged by itself."""
        total, (new, scalars) = self.host.loss(params, extra, views, key=key, step=step)
        corrupted = views["corruption"]
        maps, new = self.host.embed(
            params, new, corrupted["image"], train=True, layers=self.cfg.layers
        )
        term, (stats, more) = self.term.loss(params[HEAD], extra[HEAD], maps, corrupted["label"])
        scalars |= {f"corruption_{n}": v for n, v in more.items()}
        scalars["corruption_loss"] = jax.lax.stop_gradient(term)
        return total + self.cfg.weight * term, ({**new, HEAD: stats}, scalars)

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The host's, if it has some, and the term's."""
        shown = {}
        if isinstance(self.host, HasPictures):
            shown = self.host.pictures(params, extra, batch, key)
        return shown | self.term.pictures(
            self.host, (params, extra), (params[HEAD], extra[HEAD]), batch,
            rng.named(key, "corruption"),
        )  # fmt: skip

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """As the host does; the head starts anew."""
        alone = ({n: v for n, v in tree.items() if n != HEAD} for tree in (params, extra))
        taken, held, report = self.host.adopt(earlier, *alone)
        return {**taken, HEAD: params[HEAD]}, {**held, HEAD: extra[HEAD]}, report


def with_term(host: EncoderObjective, cfg: TermConfig, dtype: Any) -> Objective:
    """The host itself at weight 0, else with the term beside its loss."""
    return WithTerm(host, cfg, dtype) if cfg.weight else host


def map_shapes(objective: EncoderObjective, side: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the encoder's maps of one square image."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    network = objective.encoder
    return jax.eval_shape(
        lambda p, e, x: objective.family.maps(network, p, e, x, None), *network.shapes(), image
    )
