"""ADPretrain: residual features of a frozen encoder, told apart by angle and by norm.

Yao et al., "ADPretrain: Advancing industrial anomaly detection via anomaly representation
pretraining", NeurIPS 2025, arXiv 2511.05245. From every cell of the encoder's maps the most similar
cell of a few normal images of the same product and camera is subtracted; a projector per level
learns, with the defects of the training images, to bring what is left of normal cells onto a small
shell and that of defects out of it (``ops.residual``). Detectors use the projectors through
``projected:RUN:BACKBONE``; the maps of a run itself are those of the frozen encoder.

The released code differs from the correct behaviour in places that are no switches: it normalises
views and references differently, keeps weights and moments in bfloat16, in which the learned
references hardly move, and picks its checkpoints on test data. Here the last one counts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.augment.color import normalize
from dsad.augment.corruptions import corrupt_shapes
from dsad.augment.crops import whole_images
from dsad.augment.views import change_look
from dsad.core import hosts, rng
from dsad.core.batch import Batch, Companions, Needs
from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.core.types import EarlierWeights, FeatureMaps, ObjectiveTraits, Passes, RunInfo, Scalars
from dsad.models import registry
from dsad.models.draws import uniform_draws
from dsad.models.projector import init_projector, project
from dsad.models.transformer import POLICIES
from dsad.objectives._adpretrain import Config
from dsad.objectives._segmentation import map_shapes
from dsad.objectives.encoder import EncoderObjective
from dsad.ops import residual as ops
from dsad.ops.resize import match_grid


class ADPretrain(EncoderObjective):
    """The method with its encoder in every step; see ``core.types.Objective`` for the contract."""

    def __init__(self, cfg: Config, run: RunInfo) -> None:
        del run
        self.cfg, family = cfg, registry.family_of(cfg.arch)
        network, options = family.fresh(cfg.arch, cfg.layers, dtype=cfg.dtype, zero_init_last=False)
        known = dataclasses.replace(family.preprocessing(cfg.arch), image_size=cfg.side, crop=1.0)
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        shapes = map_shapes(self, cfg.side)
        self.widths = {n: shapes[n].shape[-1] for n in cfg.layers}
        #: Cells (h, w) of every map as its projector sees it.
        self.grids = {n: self._grid(shapes[n]) for n in cfg.layers}
        for name, width in self.widths.items():
            if width % cfg.heads:
                expected = f"a divisor of the {width} channels of {name}"
                raise Refused("config.objective.heads", expected, cfg.heads)
        real, every_step = cfg.anomalies == "real", cfg.encode == "every_step"
        companions = Companions(
            count=max(cfg.references), same=("category", "camera"), images=every_step,
            features=() if every_step else cfg.layers,
        )  # fmt: skip
        self.traits = ObjectiveTraits(
            needs=Needs(label=real, mask=real, normal=not real, companions=companions),
            couples_batch=True,  # negatives, and means over the cells that violate
            source="weights of the frozen encoder",
        )

    @property
    def tokens(self) -> int:
        """Most cells of a map a side."""
        return self.cfg.tokens

    def projectors(self, params: Any) -> Mapping[str, Any]:
        """Parameters by layer."""
        return params["projectors"]

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """``projectors`` by layer; extra: the ``encoder``, its ``tables``, a ``centre`` a layer."""
        cfg = self.cfg
        encoder, tables = self.encoder.init(rng.named(key, "encoder"))
        made = {
            name: uniform_draws(
                rng.named(key, name),
                functools.partial(
                    init_projector, width=width, references=cfg.slots, heads=cfg.heads
                ),
            )
            for name, width in self.widths.items()
        }
        centre = {name: jnp.zeros((width,), jnp.float32) for name, width in self.widths.items()}
        return {"projectors": made}, {"encoder": encoder, "tables": tables, "centre": centre}

    def encoder_trees(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The frozen encoder."""
        del params
        return extra["encoder"], extra["tables"]

    def with_encoder(self, params: Any, extra: Any, trees: tuple[Any, Any]) -> tuple[Any, Any]:
        """Likewise with another encoder."""
        return params, {**extra, "encoder": trees[0], "tables": trees[1]}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """The encoder, frozen; its pixels have to be those that the weights were trained on."""
        params, extra, report = super().adopt(earlier, params, extra)
        there = earlier.encoder.preprocessing
        if not np.allclose([there.mean, there.std], [self.mean, self.std]):
            raise ConfigError(
                f"config.init_from: {earlier.origin} wants pixels with mean {there.mean} and "
                f"deviation {there.std}; those of {self.arch} here have {self.mean} and "
                f"{self.std}. Take weights that were trained on such pixels."
            )
        return params, extra, f"{report}, frozen"

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """What ``loss`` takes.

        ``pair`` (b, 2, S, S, 3) and ``references`` (b, r, S, S, 3), normalised; ``valid`` (b, r);
        ``angle_label`` and ``norm_label`` {layer: (b, h, w) bool}, ``counted`` (b,) bool.
        """
        first, second, mask = self._pair(batch, key)
        pair = jnp.stack([normalize(x, self.mean, self.std) for x in (first, second)], axis=1)
        return {"pair": pair, "references": self._normal(batch), **self._labels(batch, mask)}

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Angle loss + norm loss of either view, summed over the levels."""
        del step
        pair, references = self._encoded(extra, views)
        return self._trained(params, extra, views, pair, references, key)

    def _encoded(self, extra: Any, views: Any) -> tuple[FeatureMaps, FeatureMaps]:
        """Maps {layer: (b, 2, h, w, c)} of the views and (b, r, h, w, c) of the references."""
        return self._maps_of_each(extra, views["pair"]), self._maps_of_each(
            extra, views["references"]
        )

    def _trained(
        self, params: Any, extra: Any, views: Any, pair: FeatureMaps, references: FeatureMaps,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:  # fmt: skip
        """The loss from maps; see ``loss``."""
        cfg = self.cfg
        counts = jnp.asarray(cfg.references, jnp.int32)
        count = jax.random.choice(rng.named(key, "references"), counts)
        valid = views["valid"] & (jnp.arange(views["valid"].shape[1]) < count)[None]
        counted = views["counted"] & jnp.any(valid, axis=1)
        angles, norms, centre = [], [], {}
        at: dict[str, list[jax.Array]] = {"normal_radius": [], "defect_radius": []}
        for name in cfg.layers:
            cells = self._projected(params["projectors"][name], pair[name], references[name], valid)
            b, _, n, _ = cells.shape
            first, second = (cells[:, v].reshape(b * n, -1) for v in range(2))
            used = jnp.repeat(counted, n)
            bad = {k: views[f"{k}_label"][name].reshape(-1) for k in ("angle", "norm")}
            angle = functools.partial(ops.angle_loss, temperature=cfg.temperature)
            angles.append(angle(first, second, extra["centre"][name], bad["angle"], used))
            for view in (first, second):
                norms.append(
                    ops.norm_loss(
                        view, bad["norm"], used, shell=cfg.shell, margin=cfg.margin, form=cfg.radius
                    )
                )
            centre[name] = self._centre(extra["centre"][name], first, used & ~bad["norm"])
            distance = ops.radius(first, cfg.radius)
            at["normal_radius"].append(ops.mean_of(distance, used & ~bad["norm"]))
            at["defect_radius"].append(ops.mean_of(distance, used & bad["norm"]))
        angle, norm = (jnp.sum(jnp.stack(values)) for values in (angles, norms))
        scalars = {
            "angle": angle,
            "norm": norm,
            **{k: jnp.mean(jnp.stack(v)) for k, v in at.items()},
        }
        loss = cfg.angle * angle + cfg.norm * norm
        return loss, ({**extra, "centre": centre}, jax.lax.stop_gradient(scalars))

    def _centre(self, centre: jax.Array, cells: jax.Array, normal: jax.Array) -> jax.Array:
        """The centre, moved towards the mean of projected normal cells if it is to move."""
        keep = self.cfg.centre_momentum
        if not keep:
            return centre
        cells = jax.lax.stop_gradient(cells.astype(jnp.float32))
        total = jnp.sum(jnp.where(normal[:, None], cells, 0.0), axis=0)
        mean = total / jnp.maximum(jnp.sum(normal, dtype=jnp.float32), 1.0)
        return jnp.where(jnp.any(normal), keep * centre + (1 - keep) * mean, centre)

    def _projected(
        self, p: Any, pair: jax.Array, references: jax.Array, valid: jax.Array
    ) -> jax.Array:
        """Projected residual cells (b, 2, n, c) of maps (b, 2, h, w, c)."""
        b, v, h, w, c = pair.shape
        # What was matched is data.
        left = jax.lax.stop_gradient(_residual(pair, references, valid))
        function = project
        if self.cfg.remat != "none":
            function = jax.checkpoint(project, policy=POLICIES[self.cfg.remat])
        cells = left.astype(self.cfg.dtype).reshape(b * v, h * w, c)
        return function(p, cells).reshape(b, v, h * w, c)

    def prepare(self, params: Any, extra: Any, passes: Passes) -> Any:
        """``centre``: the mean raw residual cell of the normal images, one exact pass."""
        sums = {name: np.zeros(width) for name, width in self.widths.items()}
        count = 0.0
        function = jax.jit(self._residual_sums)
        for batch in passes():
            totals, cells = function(extra, batch)
            count += float(hosts.whole(cells))
            for name, total in totals.items():
                sums[name] += np.float64(hosts.whole(total))
        if not count:
            raise ConfigError(
                "config.data.split: expected normal images that have another normal image of their "
                "category and camera as a reference, found none. Set config.data.split to all."
            )
        means = {name: total / count / np.prod(self.grids[name]) for name, total in sums.items()}
        return {**extra, "centre": {n: jnp.asarray(x, jnp.float32) for n, x in means.items()}}

    def _grid(self, shape: jax.ShapeDtypeStruct) -> tuple[int, int]:
        pooled = jax.eval_shape(lambda x: ops.pooled(x, self.cfg.tokens), shape)
        return pooled.shape[1], pooled.shape[2]

    def _residual_sums(self, extra: Any, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
        """Sums (c,) of the residual cells of normal images that have references; their number."""
        few = self.cfg.centre_references
        references = batch["references"]
        valid = references["valid"][:, :few]
        used = jnp.any(valid, axis=1)
        if "label" in batch:
            used &= batch["label"] == 0
        plain, normal = self._plain(extra, batch)
        totals = {}
        for name in self.cfg.layers:
            left = _residual(plain[name][:, None], normal[name][:, :few], valid)
            totals[name] = jnp.sum(
                jnp.where(used[:, None, None, None, None], left, 0.0), (0, 1, 2, 3)
            )
        return totals, jnp.sum(used, dtype=jnp.float32)

    def _plain(self, extra: Any, batch: Batch) -> tuple[FeatureMaps, FeatureMaps]:
        """Maps (b, h, w, c) of the images as they are, and (b, r, h, w, c) of their references."""
        images = normalize(whole_images(batch, self.cfg.side), self.mean, self.std)
        return self._maps(extra, images), self._maps_of_each(extra, self._normal(batch))

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Images, which of their cells are defects, and how far out the projectors put each."""
        cfg, views = self.cfg, self.views(batch, key)
        pair, references = self._encoded(extra, views)
        size = (cfg.side, cfg.side)
        bad, out = [], []
        for name in cfg.layers:
            levels = params["projectors"][name], pair[name], references[name], views["valid"]
            at = ops.radius(self._projected(*levels)[:, 0], cfg.radius)
            label = views["norm_label"][name].astype(jnp.float32)
            bad.append(match_grid(label[..., None], size, "nearest"))
            at = at.reshape(label.shape) / (cfg.shell + cfg.margin)
            out.append(match_grid(at[..., None], size, "nearest"))
        told = {"defect cells": bad, "radius, white at that of defects": out}
        grey = {n: jnp.repeat(sum(x) / len(x), 3, axis=-1) for n, x in told.items()}
        return {"image": self._shown(batch, key)} | grey

    def _shown(self, batch: Batch, key: jax.Array) -> jax.Array:
        """The first views (b, S, S, 3) in [0, 1]."""
        return self._pair(batch, key)[0]

    def parts(self, params: Any, extra: Any, views: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The frozen encoder, and the rest with its backward pass, for ``dsad bench step``."""
        pair, references = jax.jit(self._encoded)(extra, views)
        return {
            "encoder": (self._encoded, (extra, views)),
            "projectors and losses": (self._slopes, (params, extra, views, pair, references)),
        }

    def _slopes(self, params: Any, extra: Any, views: Any, pair: Any, references: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return self._trained(params, extra, views, pair, references, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(params)

    def _maps(self, extra: Any, images: jax.Array) -> FeatureMaps:
        """Maps of the frozen encoder as the projectors see them, f32, of normalised images."""
        maps = self.features({}, extra, images, self.cfg.layers)
        return jax.lax.stop_gradient({n: ops.pooled(m, self.cfg.tokens) for n, m in maps.items()})

    def _maps_of_each(self, extra: Any, images: jax.Array) -> FeatureMaps:
        """Those of images (b, r, S, S, 3), {layer: (b, r, h, w, c)}."""
        maps = self._maps(extra, images.reshape(-1, *images.shape[2:]))
        return {name: m.reshape(*images.shape[:2], *m.shape[1:]) for name, m in maps.items()}

    def _pair(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Two views (b, S, S, 3) in [0, 1] of every image, and their mask (b, S, S)."""
        cfg = self.cfg

        def keys(name: str) -> jax.Array:
            return rng.sample_keys(rng.named(key, name), batch["epoch"], batch["index"])

        images = whole_images(batch, cfg.side)
        if cfg.anomalies == "real":
            mask = sampled_mask(batch["mask"], batch["size"], cfg.side)
        else:
            images, mask = corrupt_shapes(images, images, keys("anomalies"), cfg.shapes)
        first = images
        if not cfg.plain:
            first = change_look(images, lambda name: keys(f"first {name}"), cfg.look)
        return first, change_look(images, lambda name: keys(f"second {name}"), cfg.look), mask

    def _normal(self, batch: Batch) -> jax.Array:
        """The references as they are, (b, r, S, S, 3), normalised."""
        references = batch["references"]
        b, r = references["valid"].shape
        flat = {
            n: references[n].reshape(b * r, *references[n].shape[2:]) for n in ("image", "size")
        }
        images = normalize(whole_images(flat, self.cfg.side), self.mean, self.std)
        return images.reshape(b, r, *images.shape[1:])

    def _labels(self, batch: Batch, mask: jax.Array) -> dict[str, Any]:
        """Labels by layer, which references are there, and which images are known."""
        cfg, counted = self.cfg, jnp.ones(batch["index"].shape, bool)
        if cfg.anomalies == "real":
            counted = (batch["masked"] > 0) | (batch["label"] == 0)
        angle, norm = {}, {}
        for name, grid in self.grids.items():
            released, area = cfg.labels == "released", cfg.side**2 / np.prod(grid)
            pixels = cfg.defect_pixels * (14**2 / area if released else 1.0)
            angle[name] = ops.token_labels(mask, grid, pixels=pixels)
            norm[name] = ops.corner_labels(mask, grid) if released else angle[name]
        return {
            "angle_label": angle, "norm_label": norm, "counted": counted,
            "valid": batch["references"]["valid"],
        }  # fmt: skip


class Stored(ADPretrain):
    """The method with maps that are computed once.

    Kept are those of every image as it is, ``LAYER``, and of the two views of each of its variants,
    ``LAYER.VARIANT.VIEW``, but for a first view that is the image as it is; of synthetic anomalies
    also ``mask.VARIANT``. Which variant a step sees is drawn for every sample and epoch.
    """

    def per_sample(self, params: Any, extra: Any, batch: Batch) -> dict[str, jax.Array]:
        """Maps of the encoder, see the class; the variants are the same for every run."""
        del params
        cfg, kept = self.cfg, {}

        def keep(name: str, images: jax.Array) -> None:
            maps = self._maps(extra, normalize(images, self.mean, self.std))
            kept.update({f"{n}{name}": m.astype(cfg.stored) for n, m in maps.items()})

        keep("", whole_images(batch, cfg.side))
        for i in range(cfg.variants):
            first, second, mask = self._variant(batch, i)
            if not self._first_is_plain:
                keep(f".{i}.0", first)
            keep(f".{i}.1", second)
            if cfg.anomalies == "synthetic":
                kept[f"mask.{i}"] = mask.astype(jnp.uint8)
        return kept

    @property
    def _first_is_plain(self) -> bool:
        return self.cfg.plain and self.cfg.anomalies == "real"

    def _variant(self, batch: Batch, number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        once = {**batch, "epoch": jnp.zeros_like(batch["epoch"])}
        return self._pair(once, rng.named(jax.random.key(0), f"variant {number}"))

    def _drawn(self, batch: Batch, key: jax.Array, variants: list[jax.Array]) -> jax.Array:
        """Of arrays (b, ...), one a variant, that of each sample's."""
        keys = rng.sample_keys(rng.named(key, "variant"), batch["epoch"], batch["index"])
        draw = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(variants)))
        chosen = draw(keys).reshape(-1, *(1,) * (variants[0].ndim - 1))
        return functools.reduce(
            lambda x, i: jnp.where(chosen == i, variants[i], x),
            range(1, len(variants)),
            variants[0],
        )

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """As those of the method, but ``pair`` and ``references`` are maps by layer."""
        cfg, maps = self.cfg, batch["features"]

        def view(name: str, number: int) -> jax.Array:
            if number == 0 and self._first_is_plain:
                return maps[name]
            each = [maps[f"{name}.{i}.{number}"] for i in range(cfg.variants)]
            return self._drawn(batch, key, each)

        if cfg.anomalies == "real":
            mask = sampled_mask(batch["mask"], batch["size"], cfg.side)
        else:
            mask = self._drawn(batch, key, [maps[f"mask.{i}"] for i in range(cfg.variants)])
        return {
            "pair": {n: jnp.stack([view(n, 0), view(n, 1)], axis=1) for n in cfg.layers},
            "references": {n: batch["references"]["features"][n] for n in cfg.layers},
            **self._labels(batch, mask),
        }

    def _encoded(self, extra: Any, views: Any) -> tuple[FeatureMaps, FeatureMaps]:
        del extra
        return views["pair"], views["references"]

    def _plain(self, extra: Any, batch: Batch) -> tuple[FeatureMaps, FeatureMaps]:
        del extra
        maps, references = batch["features"], batch["references"]["features"]
        return {n: maps[n] for n in self.cfg.layers}, {n: references[n] for n in self.cfg.layers}

    def _shown(self, batch: Batch, key: jax.Array) -> jax.Array:
        each = [self._variant(batch, i)[0] for i in range(self.cfg.variants)]
        return self._drawn(batch, key, each)

    def parts(self, params: Any, extra: Any, views: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The projectors and the losses; the encoder is no part of a step."""
        made = super().parts(params, extra, views)
        return {name: part for name, part in made.items() if name != "encoder"}


def sampled_mask(masks: jax.Array, size: jax.Array, side: int) -> jax.Array:
    """The masks (b, H, W) of canvases, stretched like the images: the pixel each centre is in."""

    def axis(pixels: jax.Array) -> jax.Array:
        return ((jnp.arange(side, dtype=jnp.int32) * 2 + 1) * pixels // (2 * side)).astype(
            jnp.int32
        )

    def one(mask: jax.Array, size: jax.Array) -> jax.Array:
        return mask[axis(size[0])[:, None], axis(size[1])[None, :]]

    return jax.vmap(one)(masks, size)


def _residual(maps: jax.Array, references: jax.Array, valid: jax.Array) -> jax.Array:
    """Residual cells of maps (b, v, h, w, c) by references (b, r, h, w, c)."""
    b, _, _, _, c = maps.shape
    r, cells = references.shape[1], references.shape[2] * references.shape[3]
    usable = jnp.broadcast_to(valid[:, :, None], (b, r, cells)).reshape(b, r * cells)
    left = ops.residual(maps.reshape(b, -1, c), references.reshape(b, -1, c), usable)
    return left.reshape(maps.shape)


def build(cfg: Config, run: RunInfo) -> ADPretrain:
    """The objective for a run."""
    return (Stored if cfg.encode == "once" else ADPretrain)(cfg, run)
