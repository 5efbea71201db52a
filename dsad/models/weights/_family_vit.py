"""The vision transformers of ``vit.ARCHS`` with their weights."""

import dataclasses
import functools
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import listed
from dsad.core.errors import ConfigError
from dsad.core.types import FeatureMaps
from dsad.models import positions, vit
from dsad.models.decoder import Decoder, DecoderConfig
from dsad.models.family import Family, Loaded, OtherArchitecture, Preprocessing
from dsad.models.weights import _names_vit, names
from dsad.models.weights._names_vit import Style

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: Fields of ``vit.Arch`` that a run may change, by the names of timm's arguments.
TIMM_ARGUMENTS = {
    "width": "embed_dim", "depth": "depth", "heads": "num_heads", "patch": "patch_size",
    "image": "img_size", "qkv_bias": "qkv_bias",
}  # fmt: skip
#: What the terms of DINOv3's weights ask of whoever uses them.
DINOV3_TERMS = (
    "DINOv3's weights, and whatever is made from them, are under the DINOv3 License: pass "
    "them on with a copy of it and under no other terms, acknowledge them in publications, no "
    "military, nuclear or ITAR use. https://ai.meta.com/resources/models-and-libraries/dinov3-license"
)


#: What a checkpoint of a masked autoencoder may hold besides.
MAE_IGNORED = {r"head\.": "classifier"}


class ViTs(Family):
    """Vision transformers; ``options`` replace fields of ``vit.Arch``."""

    @property
    def archs(self) -> Collection[str]:
        return vit.ARCHS

    def network(self, arch: str, **options: Any) -> vit.ViT:
        return _network(arch, tuple(sorted(options.items())))

    def fresh(
        self, arch: str, layers: Sequence[str], *, dtype: str, zero_init_last: bool
    ) -> tuple[vit.ViT, dict[str, Any]]:
        options = {"depth": 1 + max(int(name.removeprefix("block")) for name in layers)}
        return vit.ViT(spec_of(arch, options), dtype=dtype), options

    def maps(
        self, network: Any, params: Any, extra: Any, images: Any, layers: tuple[str, ...] | None
    ) -> FeatureMaps:
        if layers is None or vit.CLASS not in layers:
            return network.apply(params, extra, images, layers=layers)[0]
        found, token = network.pooled(params, extra, images, layers)
        return {**found, vit.CLASS: token}

    def run(
        self, network: Any, params: Any, extra: Any, images: Any, *, train: bool, views: int = 1,
        layers: tuple[str, ...] | None = None,
    ) -> tuple[FeatureMaps, jax.Array, Any]:  # fmt: skip
        """As ``Family.run``, with the vectors of ``ViT.pooled``; ``extra`` stays as it is."""
        maps, pooled = network.pooled(params, extra, images, layers)
        return maps, pooled, extra

    def strides(self, arch: str, **options: Any) -> dict[str, int]:
        spec = spec_of(arch, options)
        return dict.fromkeys(vit.layer_names(spec), spec.patch)

    def further(self, arch: str, **options: Any) -> dict[str, int]:
        spec = spec_of(arch, options)
        return dict.fromkeys(vit.norm_names(spec), spec.patch)

    def tokens(self, arch: str, **options: Any) -> tuple[str, ...]:
        return (vit.CLASS,) if spec_of(arch, options).cls else ()

    def channels(self, arch: str, **options: Any) -> int:
        return spec_of(arch, options).width

    def preprocessing(self, arch: str) -> Preprocessing:
        side = vit.arch(arch).image
        known = functools.partial(Preprocessing, image_size=side, interpolation="bicubic")
        if "clip" in arch:
            return known(mean=_CLIP_MEAN, std=_CLIP_STD, crop=1.0)
        if "dinov2" in arch or "dinov3" in arch:
            return known(crop=1.0)
        if arch.startswith(("deit", "mae")):
            return known(crop=0.9 if arch.startswith("deit") else 0.875)
        return known(mean=_HALF, std=_HALF, crop=0.9)

    def terms(self, arch: str) -> str:
        return DINOV3_TERMS if vit.arch(arch).pos == "rope" else ""

    def load(self, arch: str, state: Mapping[str, Any]) -> Loaded:
        _check_names(arch, state)
        _check_activation(arch, state)
        options, state = dict(getattr(state, "options", {})), _names_vit.unheld(state)
        style, prefix = _names_vit.style_of(state)
        rope = vit.arch(arch).pos == "rope"
        if rope:  # the released ones are zero, and timm's names then leave them out
            options.pop("qkv_bias", None)
            options |= {"qkv_bias": True} if _names_vit.has_biases(state) else {}
        spec = spec_of(arch, options)
        side = _side(spec, style, prefix, state)
        if side != spec.image:
            options["image"] = side
        shapes = self.network(arch, **options).shapes()
        _check_style(arch, spec, style)
        ignored = _names_vit.ignored(style, prefix, rope=rope, biases=spec.qkv_bias)
        trees = names.to_trees(
            _names_vit.encoder(shapes, style, prefix=prefix), state, shapes, ignored=ignored,
            what=arch,
        )  # fmt: skip
        if spec.pos == "sincos":
            check_table(state, "pos_embed", dataclasses.replace(spec, **options), arch)
        if terms := self.terms(arch):
            _tell(f"note: {terms}")
        return Loaded(*trees, options, names.left_out(state, ignored))

    def published(self, arch: str, **options: Any) -> tuple[str, dict[str, Any]]:
        # In timm, a masked autoencoder's encoder is an ordinary transformer.
        name = f"{arch.removeprefix('mae_')}_224" if arch.startswith("mae_") else arch
        # DINOv3's L+, which timm has no name for; without the second it would join two matrices.
        gated = {"swiglu_mlp": True, "swiglu_align_to": 8} if "large_plus" in arch else {}
        name = name.replace("large_plus", "large")
        base, own = vit.arch(name), spec_of(arch, options)
        values = {ours: (getattr(base, ours), getattr(own, ours)) for ours in TIMM_ARGUMENTS}
        changed = {TIMM_ARGUMENTS[n]: new for n, (old, new) in values.items() if old != new}
        return name, changed | gated

    def suitable(self, name: str, quick_gelu: bool | None = None) -> tuple[str, ...]:
        if "clip" in name:  # timm's name does not tell the activation, which is checked by itself
            plain = name.replace("_quickgelu", "")
            both = (plain, _quick(plain))
            return both[::-1] if quick_gelu else both
        published = self.published(name)[0]
        return tuple(arch for arch in self.archs if self.published(arch)[0] == published)

    @property
    def formats(self) -> tuple[str, ...]:
        return ("timm",)

    def save(
        self, arch: str, params: Any, extra: Any, form: str, **options: Any
    ) -> dict[str, np.ndarray]:
        """Besides timm's, ``form`` may be any of ``_names_vit.Style`` that suits the network."""
        spec, shapes = spec_of(arch, options), self.network(arch, **options).shapes()
        style: Any = form
        _check_style(arch, spec, style)
        if style == "timm" and spec.registers and spec.pos == "learned":
            params = _names_vit.without_class_row(params)
        prefix = "visual." if style == "clip" else ""
        return names.to_state(_names_vit.encoder(shapes, style, prefix=prefix), params, extra)


def spec_of(arch: str, options: Mapping[str, Any]) -> vit.Arch:
    """The architecture with some fields replaced; unknown ones are refused."""
    if unknown := sorted(set(options) - set(TIMM_ARGUMENTS)):
        raise ConfigError(
            f"{arch}: cannot change {listed(unknown)}; expected some of {listed(TIMM_ARGUMENTS)}."
        )
    return dataclasses.replace(vit.arch(arch), **options)


@functools.cache
def _tell(text: str) -> None:
    """Say something to the user, once."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def _network(arch: str, options: tuple[tuple[str, Any], ...]) -> vit.ViT:
    return vit.ViT(spec_of(arch, dict(options)))


def _check_names(arch: str, state: Mapping[str, Any]) -> None:
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state) or any(
        ".self_attn.q_proj." in name for name in state
    ):
        raise ConfigError(
            f"weights do not fit {arch}: these are the names of the library transformers, which "
            "dsad reads of DINOv3 alone. The same weights are published in timm's names, such as "
            "hf:timm/vit_small_patch14_dinov2.lvd142m, hf:timm/vit_base_patch16_224.mae (for "
            "mae_vit_base_patch16) and hf:timm/vit_base_patch16_clip_224.openai (for "
            "vit_base_patch16_clip_quickgelu_224)."
        )


def _quick(plain: str) -> str:
    return plain.replace("_clip_", "_clip_quickgelu_")


def _check_activation(arch: str, state: Mapping[str, Any]) -> None:
    """No shape tells QuickGELU from GELU, and the wrong one gives plausible features."""
    quick, own = getattr(state, "quick_gelu", None), vit.arch(arch).activation == "quick_gelu"
    if "clip" in arch and quick is not None and quick != own:
        other = arch.replace("_quickgelu", "") if own else _quick(arch)
        raise OtherArchitecture(
            f"weights {getattr(state, 'source', '')}: by their config they were trained with "
            f"{'QuickGELU' if quick else 'GELU'}, which {arch} does not have. Use {other}."
        )


def _check_style(arch: str, spec: vit.Arch, style: Style) -> None:
    rope, whose = spec.pos == "rope", ""
    if style == "clip" and (spec.distilled or spec.registers or not spec.pre_norm):
        whose = "CLIP"
    elif style in ("dinov3", "transformers") and not rope:
        whose = "DINOv3"
    elif style == "dinov2" and rope:
        whose = "DINOv2"
    if whose:
        raise ConfigError(f"{arch}: {whose}'s names do not fit it; is {arch} the right one?")


def _side(spec: vit.Arch, style: Style, prefix: str, state: Mapping[str, Any]) -> int:
    """Side in pixels of the images that a file's table of positions is made for."""
    name = f"{prefix}positional_embedding" if style == "clip" else "pos_embed"
    if name not in state:
        return spec.image
    shape = np.shape(state[name])
    rows = shape[-2] if len(shape) >= 2 else 0
    cells = rows - (0 if style == "timm" and spec.registers else spec.table_prefix)
    side = math.isqrt(max(cells, 0))
    # Another count is a fault that the table of faults shows.
    return side * spec.patch if side and side * side == cells else spec.image


def mae_networks(
    spec: vit.Arch, state: Mapping[str, Any], decoder: DecoderConfig | None
) -> tuple[vit.ViT, Decoder | None]:
    """Encoder and decoder that fit a checkpoint of a masked autoencoder.

    ``decoder`` None takes width and depth from the tensors; without any there is no decoder. The
    number of attention heads has no part in the tensors.
    """
    if spec.pos != "sincos" or spec.prefix != 1 or not spec.cls:
        raise ConfigError(
            "masked autoencoder: expected an encoder with fixed positions and a class token alone: "
            f"{listed(n for n, a in vit.ARCHS.items() if a.pos == 'sincos')}."
        )
    spec = dataclasses.replace(spec, image=_side(spec, "timm", "", state))
    own = [name for name in state if name.startswith("decoder_")]
    if decoder is None and own:
        blocks = {name.split(".")[1] for name in own if name.startswith("decoder_blocks.")}
        width = np.shape(state.get("decoder_embed.bias", np.zeros(0)))
        if not blocks or len(width) != 1 or not width[0] or width[0] % 4:
            raise ConfigError(
                "weights: expected the decoder of a masked autoencoder (decoder_embed.bias, "
                f"decoder_blocks.0.norm1.weight, ..), found {listed(own[:3])}, ..."
            )
        decoder = DecoderConfig(width=width[0], depth=len(blocks), heads=1)
    encoder = vit.ViT(spec)
    if decoder is None:
        return encoder, None
    return encoder, Decoder(decoder, source=spec.width, patch=spec.patch, grid=spec.grid)


def check_table(state: Mapping[str, Any], name: str, spec: vit.Arch, what: str) -> None:
    """Only the table tells a supervised transformer from the encoder of a masked autoencoder."""
    found = np.asarray(state[name])
    width, half = found.shape[-1], float(jnp.finfo(found.dtype).eps)  # a file may be f16 or bf16
    want = positions.sincos_table(width, (spec.grid, spec.grid), spec.table_prefix)
    gap, allowed = np.abs(found[0].astype(np.float32) - want).max(), max(1e-4, half)
    if not gap <= allowed:  # nor is NaN
        raise ConfigError(
            f"weights do not fit {what}: {name}: expected the fixed sine-cosine table of "
            f"{spec.grid} × {spec.grid} cells within {allowed:.0e}, found one that differs by up "
            f"to {gap:.3g}. These are not the weights of a masked autoencoder with fixed "
            "positions. Learned positions need another architecture, such as vit_*, or deit_* for "
            "DeiT; start a masked autoencoder from a checkpoint of its own kind, such as "
            "hf:timm/vit_base_patch16_224.mae."
        )


def mae_entries(encoder: vit.ViT, decoder: Decoder | None) -> tuple[list[names.Entry], Any]:
    """The mapping of both networks, under ``encoder`` and ``decoder``, and their shapes."""
    parts = {"encoder": (_names_vit.encoder(encoder.shapes(), "timm"), encoder.shapes())}
    if decoder is not None:
        parts["decoder"] = (_names_vit.decoder(decoder.shapes()), decoder.shapes())
    entries = [e for name, (found, _) in parts.items() for e in names.under(found, name)]
    shapes = tuple({name: both[i] for name, (_, both) in parts.items()} for i in range(2))
    return entries, shapes
