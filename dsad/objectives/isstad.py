"""ISSTAD, second stage: a frozen masked autoencoder learns to repair and to find corruptions.

Jin et al., "ISSTAD: Incremental self-supervised learning based on transformer for anomaly
detection and localization", arXiv 2303.17354. The first stage is the objective ``mae`` on the
normal images of one category; its run is this one's ``init_from``. The encoder is frozen, the
decoder grows, whole images are corrupted at random, and every decoder block classifies each pixel
as normal or corrupted while the last one also paints the image.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.color import normalize
from dsad.augment.crops import whole_images
from dsad.augment.isstad_corruption import CorruptionConfig, corrupt
from dsad.augment.views import IMAGENET_MEAN, IMAGENET_STD
from dsad.core import rng, tree
from dsad.core.batch import Batch, Needs
from dsad.core.config import Settings, field
from dsad.core.errors import ConfigError
from dsad.core.types import EarlierWeights, FeatureMaps, ObjectiveTraits, RunInfo, Scalars
from dsad.models import transformer, vit
from dsad.models.decoder import Decoder, DecoderConfig, patchify, unpatchify
from dsad.models.draws import uniform_draws
from dsad.models.family import Encoder, Preprocessing
from dsad.models.transformer import Remat
from dsad.objectives.encoder import EncoderObjective, check_facts
from dsad.objectives.mae import EncoderConfig, mae_tensors
from dsad.ops.ssim import ssim

#: Maps that the second stage adds to those of its encoder.
PIXEL_MAPS = ("probability", "error", "reconstruction")


class Config(Settings, place="objective"):
    """Settings of the second stage; encoder and decoder as in the first, with more blocks.

    Attributes:
      side: pixels of the square working images, that of the first stage.
      decoder: depth counts old and new blocks; the first ones start from the first stage.
      corruption: how training images are corrupted.
      permute: "shuffle" hands the encoder's tokens to the decoder in a random order that is never
        undone, as the published code does, in training and in tests; "none" keeps them in place.
      permutations: with "shuffle", test maps are means over so many fixed random orders.
      target: what the reconstruction and similarity terms compare with: "clean", the paper's claim,
        or "input", the corrupted image, as the published code does.
      normalisation: "shared" feeds the encoder what the first stage fed it; "published" feeds it
        pixels in [−1, 1] although it was trained on ImageNet-standardised ones.
      ssim_range: "unit" compares pixels in [0, 1], for which the constants of the similarity are
        made; "signed", as published, pixels in [−1, 1].
      class_weights: of normal and of corrupted pixels in the cross-entropy.
      reconstruction, similarity: weights of these terms beside the cross-entropy's 1.
      mean, std: the first stage's normalisation of pixels in [0, 1].
      adopt_check: "strict" refuses a first stage with another number of heads, side, normalisation
        or kind of target than these settings; "shapes" lets it pass.
      remat, dtype: as in ``mae``.

    """

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig(depth=12)
    side: int = field(224, within=(16, 2048))
    corruption: CorruptionConfig = CorruptionConfig()
    permute: Literal["none", "shuffle"] = "none"
    permutations: int = field(4, at_least=1)
    target: Literal["clean", "input"] = "clean"
    normalisation: Literal["shared", "published"] = "shared"
    ssim_range: Literal["unit", "signed"] = "unit"
    class_weights: tuple[float, float] = field((3.0, 1.0), above=0)
    reconstruction: float = field(0.5, at_least=0)
    similarity: float = field(0.1, at_least=0)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = field(IMAGENET_STD, above=0)
    adopt_check: Literal["strict", "shapes"] = "strict"
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        self.encoder.spec(self.side)

    @property
    def arch(self) -> str:
        """Name of the encoder's architecture."""
        return self.encoder.arch


def pixel_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: tuple[float, float]
) -> jax.Array:
    """Weighted cross-entropy of logits (..., 2) and bool labels (...): Σ w(y) nll / Σ w(y)."""
    each = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.where(labels, each[..., 1], each[..., 0])
    weight = jnp.where(labels, jnp.float32(weights[1]), jnp.float32(weights[0]))
    return jnp.sum(weight * nll) / jnp.sum(weight)


class ISSTAD(EncoderObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo):
        del run
        self.cfg = cfg
        self.traits = ObjectiveTraits(
            needs=Needs(facts=cfg.corruption.facts),
            # The weighted mean over the pixels of a batch is not the mean of its parts' means.
            couples_batch=True,
            # The frozen encoder comes from somewhere.
            source="a run of the objective mae on the same images, or weights of a published MAE",
        )
        half = (0.5, 0.5, 0.5)
        mean, std = (half, half) if cfg.normalisation == "published" else (cfg.mean, cfg.std)
        known = Preprocessing(
            mean=mean, std=std, image_size=cfg.side, interpolation="bilinear", crop=1.0
        )
        spec = cfg.encoder.spec(cfg.side)
        network, options = vit.ViT(spec, dtype=cfg.dtype, remat="none"), vit.changes(cfg.arch, spec)
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        self.patch = spec.patch
        self.decoder = Decoder(
            cfg.decoder, source=spec.width, patch=spec.patch, grid=spec.grid, masked=False,
            dtype=cfg.dtype, remat=cfg.remat,
        )  # fmt: skip

    @property
    def flops_per_image(self) -> int:
        """Of the matrix products of a training step; the frozen encoder has no backward pass."""
        spec, cells = self.encoder.spec, self.encoder.spec.grid**2
        pixels, width, depth = self.patch**2, self.cfg.decoder.width, self.cfg.decoder.depth
        encoder = 2 * cells * 3 * pixels * spec.width
        encoder += transformer.forward_flops(spec.blocks, cells + 1)
        linear = (cells + 1) * spec.width * width + cells * width * pixels * (3 + 2 * depth)
        decoder = 2 * linear + transformer.forward_flops(self.decoder.blocks, cells + 1)
        return encoder + 3 * decoder

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """The decoder and ``classes``, the pixel classifier; extra: the encoder and the tables."""
        encoder, table = self.encoder.init(rng.named(key, "encoder"))
        params, decoder_table = self.decoder.init(rng.named(key, "decoder"))
        width, outputs = self.cfg.decoder.width, 2 * self.patch**2
        classes = uniform_draws(
            rng.named(key, "classes"), lambda d: transformer.linear_params(d, width, outputs)
        )
        extra = {"encoder": encoder, "encoder_table": table, "decoder_table": decoder_table}
        return {"decoder": params, "classes": classes}, extra

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """``image`` corrupted and ``clean`` (b, S, S, 3) normalised, ``label`` (b, S, S) bool.

        With ``permute`` also ``noise`` (b, n), whose ranks are the order of the tokens.
        """
        clean = whole_images(batch, self.cfg.side)

        def keys(name: str) -> jax.Array:
            return rng.sample_keys(rng.named(key, name), batch["epoch"], batch["index"])

        facts = batch["facts"]
        image, label = corrupt(
            clean, keys("corruption"), self.cfg.corruption,
            size=facts["original_size"], box=facts.get(self.cfg.corruption.box_fact),
        )  # fmt: skip
        made = {
            "image": normalize(image, self.mean, self.std),
            "clean": normalize(clean, self.mean, self.std),
            "label": label,
        }
        if self.cfg.permute == "shuffle":
            cells = self.encoder.spec.grid**2
            draw = jax.vmap(lambda k: jax.random.uniform(k, (cells,), jnp.float32))
            made["noise"] = draw(keys("permutation"))
        return made

    def encode(self, extra: Any, images: jax.Array) -> jax.Array:
        """Tokens (b, 1 + n, D) of the frozen encoder, in natural order, without gradient."""
        weights, table = extra["encoder"], extra["encoder_table"]
        tokens = self.encoder.embed(weights, table, images)
        return jax.lax.stop_gradient(self.encoder.encode(weights, table, tokens))

    def _decode(
        self, params: Any, extra: Any, h: jax.Array, order: Any, grid: tuple[int, int], each: Any
    ) -> tuple[jax.Array, Any]:
        """Predicted patches (b, n, patch² · 3), and ``each`` of every block's class logits.

        The encoder treats its tokens alike, so permuting them afterwards is the same.
        """
        if order is not None:
            moved = jnp.take_along_axis(h[:, 1:], order[:, :, None], axis=1)
            h = jnp.concatenate([h[:, :1], moved], axis=1)
        p = params["decoder"]
        x = self.decoder.placed(extra["decoder_table"], self.decoder.embed(p, h), grid)

        def classified(y: jax.Array) -> Any:
            # On the raw output of every block, before the decoder's norm.
            logits = transformer.linear(params["classes"], y[:, 1:]).astype(jnp.float32)
            return each(logits.reshape(*logits.shape[:2], self.patch**2, 2))

        x, found = self.decoder.run(p, x, classified)
        return self.decoder.pixels(p, x), found

    def _unit(self, images: jax.Array) -> jax.Array:
        """Normalised images as pixels in [0, 1]."""
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (self.mean, self.std))
        return images.astype(jnp.float32) * std + mean

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Mean cross-entropy of the blocks + 0.5 squared error + 0.1 (1 − SSIM).

        The squared error is that of pixels in [−1, 1], whatever the networks' normalisation.
        """
        del key, step  # everything random is in the views
        cfg, side = self.cfg, self.encoder.spec.grid
        grid = (side, side)
        labels = patchify(views["label"][..., None], self.patch)
        order = jnp.argsort(views["noise"], axis=1) if cfg.permute == "shuffle" else None

        def each(logits: jax.Array) -> Any:
            p = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)[..., 1]
            sums = jnp.sum(p * labels), jnp.sum(p * ~labels)
            return pixel_cross_entropy(logits, labels, cfg.class_weights), *sums

        h = self.encode(extra, views["image"])
        pred, (ce, hits, alarms) = self._decode(params, extra, h, order, grid, each)
        painted = self._unit(unpatchify(pred, self.patch, grid))
        target = self._unit(views["clean" if cfg.target == "clean" else "image"])
        error = jnp.mean(jnp.square(2.0 * (painted - target)))
        signed = cfg.ssim_range == "signed"
        alike = ssim(2 * painted - 1, 2 * target - 1) if signed else ssim(painted, target)
        loss = jnp.mean(ce) + cfg.reconstruction * error + cfg.similarity * (1.0 - alike)
        share = jnp.sum(labels, dtype=jnp.float32)
        scalars = {
            "cross_entropy": jnp.mean(ce),
            "reconstruction_error": error,
            "ssim": alike,
            "corrupted_share": share / labels.size,
            "p_corrupted": jnp.mean(hits) / jnp.maximum(share, 1.0),
            "p_normal": jnp.mean(alarms) / jnp.maximum(labels.size - share, 1.0),
        }
        return loss, (extra, jax.lax.stop_gradient(scalars))

    def parts(self, params: Any, extra: Any, views: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Pieces of the loss by name for ``dsad bench step``; all but the encoder are the rest."""
        return {"encoder": (self.encode, (extra, views["image"]))}

    def encoder_trees(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The frozen encoder."""
        del params
        return extra["encoder"], extra["encoder_table"]

    def with_encoder(self, params: Any, extra: Any, trees: tuple[Any, Any]) -> tuple[Any, Any]:
        """Likewise with another encoder."""
        return params, {**extra, "encoder": trees[0], "encoder_table": trees[1]}

    @property
    def stage_facts(self) -> dict[str, Any]:
        """What the first stage has to share with this one, and no tensor's shape tells."""
        heads = {"encoder.heads": self.encoder.spec.heads, "decoder.heads": self.cfg.decoder.heads}
        shared = {"mean": self.cfg.mean, "std": self.cfg.std, "norm_pix": False}
        return {**super().stage_facts, **heads, **shared}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """The encoder, frozen, and the decoder of a masked autoencoder; further blocks are new."""
        if "classes" in earlier.params:
            raise ConfigError(
                "config.init_from: found a second stage; continue it with --resume in its own "
                f"directory, or name its first stage: {self.traits.source}."
            )
        params, extra, report = super().adopt(earlier, params, extra)
        if self.cfg.adopt_check == "strict":
            check_facts(earlier, self.stage_facts, self.stage_facts)
        found = earlier.params.get("decoder")
        if found is None:
            raise ConfigError(
                "config.init_from: expected a masked autoencoder with its decoder, found an "
                "encoder alone."
            )
        own, depth = dict(params["decoder"]), self.cfg.decoder.depth
        found = {k: v for k, v in found.items() if k != "mask_token"}  # nothing is hidden here
        others = jax.tree.leaves(found["blocks"])[0].shape[0]
        if others > depth:
            raise ConfigError(
                f"config.objective.decoder.depth: expected at least the {others} blocks of the "
                f"first stage, found {depth}; the decoder grows."
            )
        first = {**own, "blocks": jax.tree.map(lambda x: x[:others], own["blocks"])}
        if lines := tree.diff(first, found):
            raise ConfigError(
                "config.init_from: the decoder found does not fit:\n  " + "\n  ".join(lines)
            )
        grown = jax.tree.map(
            # What was read lies on the host: arrays of one device do not mix with those of a mesh.
            lambda old, new: jnp.concatenate([old, new[others:]]),
            found["blocks"], own["blocks"],
        )  # fmt: skip
        params = {**params, "decoder": {**found, "blocks": grown}}
        report += f", frozen; decoder: {others} blocks taken over, {depth - others} new"
        return params, extra, report

    def read_tensors(self, tensors: Mapping[str, Any]) -> tuple[Encoder, Any, Any]:
        """Encoder and decoder of a published masked autoencoder."""
        return mae_tensors(self, tensors)

    def features(
        self, params: Any, extra: Any, images: jax.Array, layers: tuple[str, ...] | None = None
    ) -> FeatureMaps:
        """The encoder's maps ``block0`` ..., and the pixel maps of the second stage.

        ``probability`` (b, H, W, 1): of corruption, the mean over the blocks; ``error``
        (b, H, W, 1): squared difference of reconstruction and image, pixels in [−1, 1], mean over
        channels; ``reconstruction`` (b, H, W, 3): pixels in [0, 1]. The encoder runs once for all
        permutations.
        """
        wanted = (*vit.layer_names(self.encoder.spec), *PIXEL_MAPS) if layers is None else layers
        maps: FeatureMaps = {}
        if blocks := tuple(n for n in wanted if n not in PIXEL_MAPS):
            maps = super().features(params, extra, images, blocks)
        if any(n in PIXEL_MAPS for n in wanted):
            pixel = self._pixel_maps(params, extra, images)
            maps |= {n: m for n, m in pixel.items() if n in wanted}
        return maps

    def _pixel_maps(self, params: Any, extra: Any, images: jax.Array) -> FeatureMaps:
        grid = self.encoder.grid(images)
        h, truth = self.encode(extra, images), self._unit(images)

        def one(order: Any) -> tuple[jax.Array, jax.Array]:
            pred, p = self._decode(
                params, extra, h, order, grid, lambda logits: jax.nn.softmax(logits)[..., 1]
            )
            painted = self._unit(unpatchify(pred, self.patch, grid))
            return unpatchify(jnp.mean(p, axis=0), self.patch, grid), painted

        if self.cfg.permute == "none":
            p, painted = one(None)
            error = _error(painted, truth)
        else:
            keys = jax.random.split(jax.random.key(0), self.cfg.permutations)
            orders = jax.vmap(lambda k: jax.random.permutation(k, h.shape[1] - 1))(keys)

            def each(order: jax.Array) -> Any:
                p, painted = one(jnp.broadcast_to(order[None], (h.shape[0], order.shape[0])))
                return p, painted, _error(painted, truth)

            every = jax.lax.map(each, orders)
            p, painted, error = (jnp.mean(x, axis=0) for x in every)
        return {"probability": p, "error": error, "reconstruction": jnp.clip(painted, 0.0, 1.0)}


def _error(painted: jax.Array, truth: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(2.0 * (painted - truth)), axis=-1, keepdims=True)


def build(cfg: Config, run: RunInfo) -> ISSTAD:
    """The objective for a run."""
    return ISSTAD(cfg, run)
