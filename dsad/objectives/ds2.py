"""DS2: dense contrast of two views at two scales with two kinds of positive pairs.

He, Erfani, Gong and Ke, "Learning Transferable Representations for Image Anomaly Localization
Using Dense Pretraining", WACV 2024. It is PixPro (Xie et al., CVPR 2021) on two stages, with a
stricter spatial criterion and one more positive pair per image: the two cells whose backbone
features are most similar. There are no negatives; the keys come from a momentum teacher. With
``negatives`` the same parts make a dense InfoNCE, and DenseCL (Wang et al., CVPR 2021).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, field
from dsad.core.types import EarlierWeights, Objective, ObjectiveTraits, RunInfo, Scalars
from dsad.models import heads, resnet
from dsad.models.family import Preprocessing
from dsad.objectives._dense import (
    Negatives,
    Similarity,
    dense_loss,
    nce_loss,
    pair_loss,
    positive_pairs,
)
from dsad.objectives._segmentation import TermConfig, with_term
from dsad.objectives.encoder import EncoderObjective
from dsad.objectives.teacher import averaged, copied, interleaved, momentum_at
from dsad.ops.contrast import enqueue, make_queue
from dsad.ops.similarity import effective_rank, feature_std, self_attention, unit

__all__ = ["DS2", "Config", "build", "dense_loss", "positive_pairs"]


class Config(Settings, place="objective"):
    """Settings of DS2; the defaults are the paper's method, other values its ablations.

    Attributes:
      arch: ResNet of the encoder, see ``models.backbone``.
      layers: stages with a loss; layer3 and layer4 are the paper's C4 and C5.
      hidden: width of the projection's hidden layer.
      hidden_norm: whether a batch norm follows that layer (DenseCL has none).
      out: values of a projected cell.
      threshold: spatial criterion in cell diagonals; 0 switches it off (PixPro uses 0.7).
      top1: "image" adds the most similar backbone pair of each image as a positive, "cell" the most
        similar key cell of every query cell (as DenseCL matches), "off" nothing.
      top1_similarity: "dot" as published, where one cell of large norm tends to win, or "cosine".
      propagation: whether queries pass through the self-attention of PixPro.
      power: of the similarities in the propagation.
      value_transform: applied to the values of the propagation.
      teacher: "momentum", or "none": keys come from the online network without gradient.
      momentum: of the teacher at step 0; it rises along a half cosine.
      momentum_end: where it rises to.
      momentum_steps: length of that rise, 0 for the run's; the published code's is 5670 where its
        run has 5600.
      negatives: what the positive of a cell is told from, in another loss; ``threshold`` then takes
        only the nearest key cell, or ``top1`` "cell" the most similar one.
      average_directions: average the two directions at each scale, or add them (PixPro).
      zero_init_last: residual branches start at zero, so that every block is the identity at first.
      dtype: compute type of the networks; parameters, statistics and losses stay f32.
      corrupt: a term that segments corruptions with the same encoder.

    """

    arch: str = "resnet18"
    layers: tuple[str, ...] = field(("layer3", "layer4"), distinct=True, filled=True)
    hidden: int = field(4096, at_least=1)
    hidden_norm: bool = True
    out: int = field(256, at_least=1)
    threshold: float = field(0.1, at_least=0)
    top1: Literal["image", "cell", "off"] = "image"
    top1_similarity: Similarity = "dot"
    propagation: bool = True
    power: float = field(2.0, at_least=0)
    value_transform: Literal["identity", "linear", "mlp"] = "linear"
    teacher: Literal["momentum", "none"] = "momentum"
    momentum: float = field(0.99, within=(0, 1))
    momentum_end: float = field(1.0, within=(0, 1))
    momentum_steps: int = field(0, at_least=0)
    negatives: Negatives = Negatives()
    average_directions: bool = True
    zero_init_last: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    view1: ViewConfig = ViewConfig()
    view2: ViewConfig = ViewConfig(blur_probability=0.1)
    corrupt: TermConfig = TermConfig()

    def check(self) -> None:
        if not set(self.layers) <= set(resnet.STRIDES):
            raise Refused("layers", f"some of {tuple(resnet.STRIDES)}", self.layers)
        if self.threshold == 0 and self.top1 == "off":
            raise Refused("threshold", "more than 0 with top1='off'", self.threshold)
        if self.negatives.source != "off":
            one = "A cell told from negatives has one positive."
            if self.top1 == "image":
                raise Refused("top1", "'off' or 'cell' with negatives", self.top1, one)
            if self.top1 == "cell" and self.threshold:
                raise Refused("threshold", "0 with negatives and top1='cell'", self.threshold, one)
            if self.negatives.whole and self.top1 != "cell":
                few = "Whole images are seldom near enough to be spatial pairs."
                raise Refused("top1", "'cell' with negatives.whole", self.top1, few)
        if self.view1.side != self.view2.side:
            cells = "Both grids must have the same cells."
            raise Refused("view2.side", f"view1's {self.view1.side}", self.view2.side, cells)


class DS2(EncoderObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    #: Batch statistics tie the samples of a batch together.
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: Config, run: RunInfo):
        self.cfg = cfg
        self.momentum_steps = cfg.momentum_steps or run.total_steps
        dtype, view = jnp.dtype(cfg.dtype), cfg.view1
        options = {"stages": max(int(name[-1]) for name in cfg.layers)}
        network = resnet.resnet(cfg.arch, **options, zero_init_last=cfg.zero_init_last, dtype=dtype)
        known = Preprocessing(
            mean=view.mean, std=view.std, image_size=view.side, interpolation=view.filter, crop=1.0
        )
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        spec, self.nets = resnet.arch(cfg.arch), {"encoder": network}
        whole, norm = cfg.negatives.whole, "affine" if cfg.hidden_norm else "none"
        #: Weight of the loss by stage; "whole" is the mean of the last stage, a map of one cell.
        self.scales = dict.fromkeys(cfg.layers, 1 - whole) | ({"whole": whole} if whole else {})
        for name in self.scales:
            channels = spec.channels(cfg.layers[-1] if name == "whole" else name)
            self.nets[f"projector_{name}"] = heads.mlp(
                (channels, cfg.hidden, cfg.out), hidden=norm, bias=True, dtype=dtype
            )
        if cfg.propagation and cfg.value_transform == "linear":
            self.nets["value"] = heads.pointwise(cfg.out, cfg.out, dtype)
        elif cfg.propagation and cfg.value_transform == "mlp":
            self.nets["value"] = heads.projector(cfg.out, cfg.out, cfg.out, dtype)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters by network; extra: ``stats``, and with a teacher its weights and stats."""
        made = {n: net.init(rng.named(key, n)) for n, net in self.nets.items()}
        params = {n: m[0] for n, m in made.items()}
        extra: dict[str, Any] = {"stats": {n: m[1] for n, m in made.items()}}
        if self.cfg.negatives.source == "queue":
            extra["queue"] = {
                n: make_queue(rng.named(key, f"queue_{n}"), self.cfg.negatives.queue, self.cfg.out)
                for n in self.scales
            }
        return params, self._with_teacher(params, extra)

    def _with_teacher(self, params: Any, extra: Any) -> Any:
        if self.cfg.teacher == "none":
            return extra
        # The value transform belongs to the query side only.
        own = [n for n in params if n != "value"]
        return {
            **extra,
            "teacher": copied({n: params[n] for n in own}),
            "teacher_stats": copied({n: extra["stats"][n] for n in own}),
        }

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """``view1`` and ``view2``, each {"image": (b, S, S, 3) f32, "box": (b, 4)}."""
        return {
            "view1": make_view(batch, rng.named(key, "view1"), self.cfg.view1),
            "view2": make_view(batch, rng.named(key, "view2"), self.cfg.view2),
        }

    def _branch(self, params: Any, stats: Any, images: jax.Array) -> tuple[Any, Any, Any]:
        """Backbone maps and projections by layer of both views (2b, ...), and new statistics."""
        stats = dict(stats)
        maps, stats["encoder"] = self.nets["encoder"].apply(
            params["encoder"], stats["encoder"], images.astype(self.cfg.dtype), train=True, views=2
        )
        projected = {}
        if "whole" in self.scales:
            mean = jnp.mean(maps[self.cfg.layers[-1]], axis=(1, 2), keepdims=True)
            maps = {**maps, "whole": mean}
        for name in self.scales:
            net = f"projector_{name}"
            out, stats[net] = self.nets[net].apply(
                params[net], stats[net], maps[name], train=True, views=2
            )
            projected[name] = out.astype(jnp.float32)
        return {n: maps[n] for n in self.scales}, projected, stats

    def _queries(self, params: Any, stats: Any, projected: Any) -> tuple[Any, Any]:
        """Unit queries by layer after the propagation, and the new statistics."""
        if not self.cfg.propagation:
            return {n: unit(z) for n, z in projected.items()}, stats
        stats, queries = dict(stats), {}
        for name, z in projected.items():
            values = z
            if "value" in self.nets:
                values, stats["value"] = self.nets["value"].apply(
                    params["value"], stats["value"], z, train=True, views=2
                )
            b, h, w, c = z.shape
            flat = unit(values.astype(jnp.float32)).reshape(b, h * w, c)
            y = self_attention(z.reshape(b, h * w, c), flat, self.cfg.power)
            queries[name] = unit(y).reshape(b, h, w, c)
        return queries, stats

    def _keys(self, params: Any, extra: Any, images: jax.Array) -> tuple[Any, Any, Any]:
        """Maps and projections of both views from the teacher, and its new statistics."""
        momentum = self.cfg.teacher == "momentum"
        weights = jax.lax.stop_gradient(extra["teacher"] if momentum else params)
        stats = extra["teacher_stats"] if momentum else extra["stats"]
        return jax.lax.stop_gradient(self._branch(weights, stats, images))

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Sum over scales of the two directions' losses; without negatives −2 a scale is best."""
        del key, step  # everything random is in the views
        images = interleaved(views["view1"]["image"], views["view2"]["image"])
        boxes = (views["view1"]["box"], views["view2"]["box"])
        maps, projected, stats = self._branch(params, extra["stats"], images)
        queries, stats = self._queries(params, stats, projected)
        key_maps, keys, key_stats = self._keys(params, extra, images)
        total, scalars = self._total(queries, maps, keys, key_maps, boxes, extra)
        flat = projected[self.cfg.layers[-1]][::2].reshape(-1, self.cfg.out)
        scalars |= {"feature_std": feature_std(flat), "effective_rank": effective_rank(flat)}
        new = {**extra, "stats": stats}
        if self.cfg.teacher == "momentum":
            new["teacher_stats"] = key_stats
        if "queue" in extra:
            means = {n: unit(jnp.mean(z, axis=(1, 2))) for n, z in keys.items()}
            new["queue"] = {n: enqueue(q, means[n]) for n, q in extra["queue"].items()}
        return total, (new, jax.lax.stop_gradient(scalars))

    def _total(
        self, queries: Any, maps: Any, keys: Any, key_maps: Any, boxes: Any, extra: Any
    ) -> tuple[jax.Array, Scalars]:
        """The loss, from what the networks gave by stage."""
        total, scalars = jnp.float32(0), {}
        for name, weight in self.scales.items():
            queue = extra["queue"][name]["keys"] if "queue" in extra else None
            value, monitors = self._scale(
                queries[name], maps[name], unit(keys[name]), key_maps[name], boxes, queue
            )
            total += weight * value
            scalars |= {f"{k}_{name}": v for k, v in monitors.items()}
        return total, scalars

    def _pairs(self, maps: jax.Array, key_maps: jax.Array, *boxes: jax.Array) -> Any:
        return positive_pairs(
            maps, key_maps, *boxes, threshold=self.cfg.threshold, top1=self.cfg.top1,
            similarity=self.cfg.top1_similarity, nearest=self.cfg.negatives.source != "off",
        )  # fmt: skip

    def _scale(
        self, queries: jax.Array, maps: jax.Array, keys: jax.Array, key_maps: jax.Array, boxes: Any,
        queue: jax.Array | None,
    ) -> tuple[jax.Array, Scalars]:  # fmt: skip
        """Loss of both directions at one stage, with the number of positives per image."""
        total, counts, empty = jnp.float32(0), [], []
        for q, k in ((0, 1), (1, 0)):
            between = boxes[q], boxes[k]
            pairs, spatial = self._pairs(maps[q::2], key_maps[k::2], *between)
            if self.cfg.negatives.source == "off":
                total += pair_loss(queries[q::2], keys[k::2], pairs)
            else:
                total += nce_loss(
                    queries[q::2], keys[k::2], pairs, between, self.cfg.negatives, queue
                )
            per_image = jnp.sum(spatial, axis=(1, 2), dtype=jnp.float32)
            counts.append(jnp.mean(per_image))
            empty.append(jnp.mean((per_image == 0).astype(jnp.float32)))
        total = total / 2 if self.cfg.average_directions else total
        return total, {
            "loss": total,
            "spatial_pairs": (counts[0] + counts[1]) / 2,
            "without_spatial_pairs": (empty[0] + empty[1]) / 2,
        }

    def after_update(self, params: Any, extra: Any, step: jax.Array) -> Any:
        """Moves the teacher's weights towards the stepped online weights.

        The published code does this before the key forward of the next step, with the same
        weights and momentum, so the order is equal.
        """
        if self.cfg.teacher == "none":
            return extra
        m = momentum_at(step, self.cfg.momentum, self.momentum_steps, self.cfg.momentum_end)
        online = {n: params[n] for n in extra["teacher"]}
        return {**extra, "teacher": averaged(extra["teacher"], online, m)}

    def parts(self, params: Any, extra: Any, views: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Pieces of the loss by name, each (function, arguments), for ``dsad bench step``.

        ``encoder`` and ``losses`` include their backward passes.
        """
        images = interleaved(views["view1"]["image"], views["view2"]["image"])
        boxes = (views["view1"]["box"], views["view2"]["box"])

        def encode(params: Any) -> Any:
            maps, projected, _ = self._branch(params, extra["stats"], images)
            return sum(jnp.mean(z) for z in projected.values()), (maps, projected)

        def losses(value: Any, projected: Any, maps: Any, keys: Any, key_maps: Any) -> jax.Array:
            queries, _ = self._queries({"value": value}, extra["stats"], projected)
            return self._total(queries, maps, keys, key_maps, boxes, extra)[0]

        _, (maps, projected) = jax.jit(encode)(params)
        key_maps, keys, _ = jax.jit(self._keys)(params, extra, images)
        inputs = (params.get("value", {}), projected, maps, keys, key_maps)
        return {
            "encoder": (jax.value_and_grad(encode, has_aux=True), (params,)),
            "teacher": (self._keys, (params, extra, images)),
            "losses": (jax.value_and_grad(losses, argnums=(0, 1)), inputs),
        }

    def pictures(self, params: Any, extra: Any, batch: Batch, key: jax.Array) -> Any:
        """Both views, and their positive pairs at the first stage in colours of view 1's places.

        Most similar pairs are those of the encoder in inference mode, not of the teacher.
        """
        one, two = (views := self.views(batch, key))["view1"], views["view2"]
        name = self.cfg.layers[0]
        first, second = (
            self.features(params, extra, v["image"], (name,))[name] for v in (one, two)
        )
        pairs, _ = self._pairs(first, second, one["box"], two["box"])
        pairs, side = pairs.astype(jnp.float32), one["image"].shape[1]
        cells, place = first.shape[1], jnp.linspace(0.0, 1.0, first.shape[1])
        down, right = (x.reshape(-1) for x in jnp.meshgrid(place, place, indexing="ij"))
        colours = jnp.stack([right, down, 1 - (right + down) / 2], axis=-1)

        def tinted(image: jax.Array, paired: jax.Array, colour: jax.Array) -> jax.Array:
            layers = jnp.concatenate([jnp.broadcast_to(colour, (*paired.shape, 3)),
                                      (paired > 0)[..., None]], axis=-1)  # fmt: skip
            layers = layers.reshape(-1, cells, cells, 4)
            layers = jax.image.resize(layers, (len(image), side, side, 4), "nearest")
            share = 0.6 * layers[..., 3:]
            return (1 - share) * self.pixels(image) + share * layers[..., :3]

        count = jnp.sum(pairs, axis=1)
        of_two = jnp.einsum("bij,ic->bjc", pairs, colours) / jnp.maximum(count, 1)[..., None]
        return {
            "view 1": self.pixels(one["image"]),
            "view 2": self.pixels(two["image"]),
            "positive cells of view 1": tinted(one["image"], jnp.sum(pairs, axis=2), colours[None]),
            "positive cells of view 2": tinted(two["image"], count, of_two),
        }

    def encoder_trees(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The online encoder; stages behind the last layer with a loss do not exist."""
        return params["encoder"], extra["stats"]["encoder"]

    def with_encoder(self, params: Any, extra: Any, trees: tuple[Any, Any]) -> tuple[Any, Any]:
        """Likewise with another encoder; the teacher stays."""
        stats = {**extra["stats"], "encoder": trees[1]}
        return {**params, "encoder": trees[0]}, {**extra, "stats": stats}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """Take an encoder with its statistics; the teacher is copied again."""
        params, extra, report = super().adopt(earlier, params, extra)
        return params, self._with_teacher(params, extra), f"{report}; heads start anew"


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_term(DS2(cfg, run), cfg.corrupt, cfg.dtype)
