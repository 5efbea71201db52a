"""MAE: a masked autoencoder on the normal images.

He, Chen, Xie, Li, Dollár and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR
2022. The encoder sees the patches that are kept and nothing else; a narrow decoder puts a learned
token at every hidden place and predicts its pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng, tree
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, field
from dsad.core.errors import ConfigError
from dsad.core.types import EarlierWeights, Objective, RunInfo, Scalars
from dsad.models import transformer, vit
from dsad.models.decoder import Decoder, DecoderConfig, patchify, unpatchify
from dsad.models.family import Encoder, Preprocessing
from dsad.models.transformer import Remat
from dsad.models.weights.pretrained import mae_trees
from dsad.objectives._segmentation import TermConfig, with_term
from dsad.objectives.encoder import EncoderObjective, check_facts

#: Random crop and flip: MAE needs no other augmentation, and colour changes harm it.
CROP = ViewConfig(area=(0.2, 1.0), jitter_probability=0.0, blur_probability=0.0, filter="bicubic")


class EncoderConfig(Settings, place="objective.encoder"):
    """A vision transformer with fixed positions.

    Attributes:
      arch: one of ``models.vit.ARCHS`` named ``mae_vit_*``.
      width, depth, heads, patch: replace those of ``arch`` where they are not 0: channels, blocks,
        attention heads, side of a patch in pixels.

    """

    arch: str = "mae_vit_base_patch16"
    width: int = field(0, at_least=0)
    depth: int = field(0, at_least=0)
    heads: int = field(0, at_least=0)
    patch: int = field(0, at_least=0)

    def spec(self, side: int) -> vit.Arch:
        """The architecture for square images of ``side`` pixels."""
        changed = {k: v for k, v in dataclasses.asdict(self).items() if k != "arch" and v}
        found = vit.arch(self.arch)
        if found.pos != "sincos" or not found.cls or found.prefix != 1:
            fitting = (n for n, a in vit.ARCHS.items() if a.pos == "sincos")
            expected = "a transformer with fixed positions and a class token alone"
            raise Refused("encoder.arch", f"{expected} ({', '.join(fitting)})", self.arch)
        return dataclasses.replace(found, image=side, **changed)


class Config(Settings, place="objective"):
    """Settings of MAE; the defaults are the paper's.

    Attributes:
      mask_ratio: share of the patches that is hidden.
      norm_pix: predict each patch normalised by its own mean and deviation; better features, but
        absolute brightness is lost, so detectors that use the reconstruction want it off.
      adopt_decoder: of ``init_from``: "strict" wants the same number of blocks, "leading" takes
        the first ones where the other has more (ISSTAD: 6 of 8), "none" starts a fresh decoder.
      adopt_check: "strict" refuses an earlier stage whose tensors fit but were trained to mean
        something else (other heads, normalisation, kind of target); "shapes" lets it pass.
      remat: what blocks keep for the backward pass, see ``models.transformer.POLICIES``.
      dtype: compute type of the networks, also of what runs between their blocks; parameters,
        norms, softmax and the loss stay f32.
      corrupt: a term that segments corruptions with the same encoder, which sees all patches.

    """

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: float = field(0.75, at_least=0, below=1)
    norm_pix: bool = False
    adopt_decoder: Literal["strict", "leading", "none"] = "strict"
    adopt_check: Literal["strict", "shapes"] = "strict"
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    view: ViewConfig = CROP
    corrupt: TermConfig = TermConfig()

    def check(self) -> None:
        cells = self.encoder.spec(self.view.side).grid ** 2
        if self.mask_ratio and not 0 < kept_count(cells, self.mask_ratio) < cells:
            expected = f"a share that leaves some of {cells} patches to see and some to hide"
            raise Refused("mask_ratio", expected, self.mask_ratio)

    @property
    def arch(self) -> str:
        """Name of the encoder's architecture."""
        return self.encoder.arch


def kept_count(cells: int, ratio: float) -> int:
    """Patches that stay visible: floor(cells · (1 − ratio)), safe from rounding."""
    return int(cells * (1.0 - ratio) + 1e-9)


def random_masking(noise: jax.Array, keep: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Who is kept, and the way back, from noise (b, n).

    Returns ``kept`` (b, keep), the patches of smallest noise in ascending order; ``restore`` (b, n)
    with restore[order[i]] = i; ``mask`` (b, n) f32, 1 on hidden patches in natural order.
    """
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return order[:, :keep], restore, (restore >= keep).astype(jnp.float32)


def patch_targets(images: jax.Array, patch: int, norm_pix: bool) -> jax.Array:
    """What is predicted: patches (b, n, patch² · 3) f32 of normalised images.

    With ``norm_pix`` each patch is brought to mean 0 and variance 1, as published with the
    unbiased variance plus 1e-6.
    """
    target = patchify(images.astype(jnp.float32), patch)
    if not norm_pix:
        return target
    mean = jnp.mean(target, axis=-1, keepdims=True)
    var = jnp.var(target, axis=-1, keepdims=True, ddof=1)
    return (target - mean) * jax.lax.rsqrt(var + 1e-6)


def masked_loss(pred: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error per patch, averaged over the hidden patches of the batch."""
    each = jnp.mean(jnp.square(pred.astype(jnp.float32) - target), axis=-1)
    return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1.0)


class MAE(EncoderObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    def __init__(self, cfg: Config, run: RunInfo):
        del run
        self.cfg, view = cfg, cfg.view
        spec = cfg.encoder.spec(view.side)
        known = Preprocessing(
            mean=view.mean, std=view.std, image_size=view.side, interpolation=view.filter, crop=1.0
        )
        network = vit.ViT(spec, dtype=cfg.dtype, remat=cfg.remat)
        options = vit.changes(cfg.arch, spec)
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        self.keep = kept_count(spec.grid**2, cfg.mask_ratio)
        self.decoder = Decoder(
            cfg.decoder, source=spec.width, patch=spec.patch, grid=spec.grid, dtype=cfg.dtype,
            remat=cfg.remat,
        )  # fmt: skip

    @property
    def flops_per_image(self) -> int:
        """Of the matrix products of a training step; the backward pass costs twice the forward."""
        spec, cells = self.encoder.spec, self.encoder.spec.grid**2
        pixels, width = 3 * spec.patch**2, self.cfg.decoder.width
        linear = cells * pixels * spec.width + (self.keep + 1) * spec.width * width
        linear += cells * width * pixels
        blocks = transformer.forward_flops(spec.blocks, self.keep + 1)
        return 3 * (2 * linear + blocks + transformer.forward_flops(self.decoder.blocks, cells + 1))

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """``encoder`` and ``decoder``; extra: their fixed position tables."""
        encoder, table = self.encoder.init(rng.named(key, "encoder"))
        decoder, decoder_table = self.decoder.init(rng.named(key, "decoder"))
        return (
            {"encoder": encoder, "decoder": decoder},
            {"encoder": table, "decoder": decoder_table},
        )

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """``image`` (b, S, S, 3) f32 and ``noise`` (b, n), whose smallest values are kept."""
        made = make_view(batch, rng.named(key, "view"), self.cfg.view)
        keys = rng.sample_keys(rng.named(key, "mask"), batch["epoch"], batch["index"])
        cells = self.encoder.spec.grid**2
        noise = jax.vmap(lambda k: jax.random.uniform(k, (cells,), jnp.float32))(keys)
        return {"image": made["image"], "noise": noise}

    def encode(self, params: Any, extra: Any, views: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Latent (b, 1 + kept, D) of the kept patches, ``restore`` and ``mask`` (b, n)."""
        tokens = self.encoder.embed(params["encoder"], extra["encoder"], views["image"])
        kept, restore, mask = random_masking(views["noise"], self.keep)
        tokens = jnp.take_along_axis(tokens, kept[:, :, None], axis=1)
        return self.encoder.encode(params["encoder"], extra["encoder"], tokens), restore, mask

    def decode(self, params: Any, extra: Any, latent: jax.Array, restore: jax.Array) -> jax.Array:
        """Predicted patches (b, n, patch² · 3) in natural order."""
        p, side = params["decoder"], self.encoder.spec.grid
        x = self.decoder.embed(p, latent)
        b, n = restore.shape
        hidden = p["mask_token"].astype(x.dtype)[None, None, :]
        hidden = jnp.broadcast_to(hidden, (b, n - self.keep, x.shape[2]))
        shuffled = jnp.concatenate([x[:, 1:], hidden], axis=1)
        natural = jnp.take_along_axis(shuffled, restore[:, :, None], axis=1)
        x = jnp.concatenate([x[:, :1], natural], axis=1)
        x, _ = self.decoder.run(p, self.decoder.placed(extra["decoder"], x, (side, side)))
        return self.decoder.pixels(p, x)

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Mean squared error of the hidden patches, in units of the normalised pixels."""
        del key, step  # everything random is in the views
        latent, restore, mask = self.encode(params, extra, views)
        pred = self.decode(params, extra, latent, restore)
        target = patch_targets(views["image"], self.encoder.spec.patch, self.cfg.norm_pix)
        loss = masked_loss(pred, target, mask)
        # The error of predicting each batch's mean: below 1, more than that has been learnt.
        spread = masked_loss(jnp.zeros_like(pred) + jnp.mean(target), target, mask)
        scalars = {"unexplained": loss / jnp.maximum(spread, 1e-12)}
        return loss, (extra, jax.lax.stop_gradient(scalars))

    def parts(self, params: Any, extra: Any, views: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Pieces of the loss by name, each (function, arguments), for ``dsad bench step``.

        ``encoder`` and ``decoder`` include their backward passes.
        """

        def encode(encoder: Any) -> jax.Array:
            latent = self.encode({"encoder": encoder}, extra, views)[0]
            return jnp.sum(jnp.square(latent.astype(jnp.float32)))

        def decode(decoder: Any, latent: jax.Array, restore: jax.Array, mask: jax.Array) -> Any:
            pred = self.decode({"decoder": decoder}, extra, latent, restore)
            target = patch_targets(views["image"], self.encoder.spec.patch, self.cfg.norm_pix)
            return masked_loss(pred, target, mask)

        inputs = jax.jit(self.encode)(params, extra, views)
        return {
            "encoder": (jax.value_and_grad(encode), (params["encoder"],)),
            "decoder": (jax.value_and_grad(decode, argnums=(0, 1)), (params["decoder"], *inputs)),
        }

    def pictures(self, params: Any, extra: Any, batch: Batch, key: jax.Array) -> Any:
        """The view, what the encoder sees of it, and the view with its hidden patches predicted."""
        views, patch = self.views(batch, key), self.encoder.spec.patch
        latent, restore, mask = self.encode(params, extra, views)
        pred = self.decode(params, extra, latent, restore).astype(jnp.float32)
        target = patch_targets(views["image"], patch, False)
        if self.cfg.norm_pix:  # each patch gets its own mean and deviation back
            spread = jnp.sqrt(jnp.var(target, axis=-1, keepdims=True, ddof=1) + 1e-6)
            pred = pred * spread + jnp.mean(target, axis=-1, keepdims=True)
        hidden, grid = mask[:, :, None], (self.encoder.spec.grid,) * 2

        def filled(patches: jax.Array) -> jax.Array:
            return unpatchify((1 - hidden) * target + hidden * patches, patch, grid)

        return {
            "input": self.pixels(views["image"]),
            "seen by the encoder": self.pixels(filled(jnp.zeros_like(pred))),
            "hidden patches predicted": self.pixels(filled(pred)),
        }

    @property
    def stage_facts(self) -> dict[str, Any]:
        """What a later stage has to share with this one, and no tensor's shape tells."""
        heads = {"encoder.heads": self.encoder.spec.heads, "decoder.heads": self.cfg.decoder.heads}
        return {**super().stage_facts, **heads, "norm_pix": self.cfg.norm_pix}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """Take the encoder, and the decoder where there is one, of another MAE."""
        params, extra, report = super().adopt(earlier, params, extra)
        decoder = earlier.params.get("decoder")
        fresh = decoder is None or self.cfg.adopt_decoder == "none"
        if self.cfg.adopt_check == "strict":
            # Another side is no fault: the positions are computed, and everything trains on.
            shared = ["encoder.heads", "mean", "std"]
            shared += [] if fresh else ["decoder.heads", "norm_pix"]
            check_facts(earlier, self.stage_facts, shared)
        if decoder is None or fresh:
            return params, extra, f"{report}; the decoder starts anew"
        depth = self.cfg.decoder.depth
        others = jax.tree.leaves(decoder["blocks"])[0].shape[0]
        if self.cfg.adopt_decoder == "leading" and others > depth:
            decoder = {**decoder, "blocks": jax.tree.map(lambda x: x[:depth], decoder["blocks"])}
            report += f"; the first {depth} of {others} decoder blocks"
        if lines := tree.diff(params["decoder"], decoder):
            raise ConfigError(
                "config.init_from: the decoder found does not fit "
                "(config.objective.adopt_decoder='leading' takes the first blocks of a deeper one, "
                "'none' starts anew):\n  " + "\n  ".join(lines)
            )
        report += f"; decoder: {len(jax.tree.leaves(decoder))} tensors"
        return {**params, "decoder": decoder}, extra, report

    def read_tensors(self, tensors: Mapping[str, Any]) -> tuple[Encoder, Any, Any]:
        """Encoder and decoder of a published masked autoencoder."""
        return mae_tensors(self, tensors)


def mae_tensors(
    objective: EncoderObjective, tensors: Mapping[str, Any]
) -> tuple[Encoder, Any, Any]:
    """For ``ReadsTensors``: the encoder, and all that the tensors hold.

    Raises ConfigError with a table of what does not fit.
    """
    params, extra = mae_trees(objective.encoder.spec, tensors)
    trees = params["encoder"], extra["encoder"]
    known, options = objective.preprocessing, objective.options
    return Encoder(objective.arch, options, *trees, known), params, extra


def build(cfg: Config, run: RunInfo) -> Objective:
    """The objective for a run."""
    return with_term(MAE(cfg, run), cfg.corrupt, cfg.dtype)
