"""Vision transformers (Dosovitskiy et al. 2021) and their published variants in one class.

ViT and DeiT (with and without the distillation token), DINOv2 (LayerScale, registers), the image
towers of CLIP (norm before the blocks, QuickGELU, no bias at the patches) and masked autoencoders
(fixed positions). Names are timm's where timm has the model; ``mae_vit_*`` are MAE's.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import Refused, Settings, field, named
from dsad.core.errors import ConfigError
from dsad.core.types import FeatureMaps
from dsad.models import positions, transformer
from dsad.models.decoder import patchify
from dsad.models.draws import Draws, normal, uniform_draws
from dsad.models.positions import Rule
from dsad.models.transformer import Activation, BlockSpec, Remat

_MAP = re.compile(r"(block|norm)(\d+)")
#: Names the class token beside the feature maps.
CLASS = "cls"


class Arch(Settings, place="vision transformer"):
    """What tells one vision transformer from another.

    Attributes:
      width: channels of a token; ``depth`` blocks, ``heads`` attention heads.
      patch: side of a patch in pixels.
      image: side in pixels of the image that the position table is made for.
      cls: whether a class token precedes the patches; ``distilled``: and a distillation token.
      registers: further learned tokens, which have no position (Darcet et al. 2024).
      pos: whether positions are learned or the fixed sine-cosine table.
      pos_prefix: whether the table begins with rows for the class and distillation tokens.
      pre_norm: a norm before the blocks (CLIP).
      patch_bias: whether the patch embedding has a bias.
      rule: how positions are resampled to another grid.

    """

    width: int = field(at_least=1)
    depth: int = field(at_least=1)
    heads: int = field(at_least=1)
    patch: int = field(16, at_least=1)
    image: int = field(224, at_least=1)
    cls: bool = True
    distilled: bool = False
    registers: int = field(0, at_least=0)
    pos: str = "learned"
    pos_prefix: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    activation: Activation = "gelu"
    eps: float = 1e-6
    rule: Rule = "antialias"

    def check(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise Refused("width", f"a number that its {self.heads} heads and 4 divide", self.width)
        if self.image % self.patch or self.image < self.patch:
            sides = f"a multiple of the patch's {self.patch} pixels"
            raise Refused("image", sides, self.image)

    @property
    def grid(self) -> int:
        """Patches a side of the image that the position table is made for."""
        return self.image // self.patch

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return int(self.cls) + int(self.distilled) + self.registers

    @property
    def table_prefix(self) -> int:
        """Rows of the position table before those of the patches."""
        return int(self.cls) + int(self.distilled) if self.pos_prefix else 0

    @property
    def blocks(self) -> BlockSpec:
        """The shape of the stacked blocks."""
        return BlockSpec(
            width=self.width, depth=self.depth, heads=self.heads, activation=self.activation,
            layer_scale=self.layer_scale, eps=self.eps,
        )  # fmt: skip


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}


def _archs() -> dict[str, Arch]:
    made = {}
    for size, patch in (("tiny", 16), ("small", 16), ("base", 16), ("large", 16), ("huge", 14)):
        made[f"vit_{size}_patch{patch}_224"] = Arch(**_SIZES[size], patch=patch)
        made[f"mae_vit_{size}_patch{patch}"] = Arch(
            **_SIZES[size], patch=patch, pos="sincos", rule="plain"
        )
    made["vit_base_patch32_224"] = Arch(**_SIZES["base"], patch=32)
    made["vit_small_patch32_224"] = Arch(**_SIZES["small"], patch=32)
    for size in ("tiny", "small", "base"):
        deit = Arch(**_SIZES[size], rule="plain")
        made[f"deit_{size}_patch16_224"] = deit
        made[f"deit_{size}_distilled_patch16_224"] = dataclasses.replace(deit, distilled=True)
    for size in ("small", "base", "large"):
        dino = Arch(**_SIZES[size], patch=14, image=518, layer_scale=True, rule="offset")
        made[f"vit_{size}_patch14_dinov2"] = dino
        made[f"vit_{size}_patch14_reg4_dinov2"] = dataclasses.replace(
            dino, registers=4, rule="antialias"
        )
    for size, patch, side in (
        ("base", 32, 224), ("base", 16, 224), ("large", 14, 224), ("large", 14, 336),
        ("huge", 14, 224),
    ):  # fmt: skip
        clip = Arch(
            **_SIZES[size], patch=patch, image=side, pre_norm=True, patch_bias=False, eps=1e-5
        )
        made[f"vit_{size}_patch{patch}_clip_{side}"] = clip
        made[f"vit_{size}_patch{patch}_clip_quickgelu_{side}"] = dataclasses.replace(
            clip, activation="quick_gelu"
        )
    return made


ARCHS = _archs()


def arch(name: str) -> Arch:
    """The architecture called ``name``; an unknown name lists what exists."""
    return named(ARCHS, name, "vision transformer")


def changes(name: str, spec: Arch) -> dict[str, Any]:
    """The fields in which ``spec`` differs from the architecture called ``name``."""
    base = arch(name)
    fields = (f.name for f in dataclasses.fields(Arch))
    return {f: getattr(spec, f) for f in fields if getattr(spec, f) != getattr(base, f)}


def layer_names(spec: Arch) -> tuple[str, ...]:
    """The feature maps of an architecture, first block first."""
    return tuple(f"block{i}" for i in range(spec.depth))


def norm_names(spec: Arch) -> tuple[str, ...]:
    """Maps beside those, for who asks: every block's output behind the network's final norm."""
    return tuple(f"norm{i}" for i in range(spec.depth))


class ViT:
    """A vision transformer as pure functions: ``init``, ``shapes``, ``apply``.

    ``dtype`` is the compute type; parameters, norms and softmax stay f32. ``remat``: see
    ``transformer.POLICIES``.
    """

    def __init__(self, spec: Arch, *, dtype: Any = jnp.float32, remat: Remat = "none") -> None:
        self.spec, self.dtype = spec, jnp.dtype(dtype)
        self.remat: Remat = remat

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh (params, extra) by MAE's rules; extra holds a fixed position table."""
        params, s = uniform_draws(key, self._fresh), self.spec
        if s.pos != "sincos":
            return params, {}
        table = positions.sincos_table(s.width, (s.grid, s.grid), s.table_prefix)
        return params, {"pos": jnp.asarray(table)}

    def _fresh(self, draws: Draws) -> Any:
        s, d = self.spec, self.spec.width
        pixels = 3 * s.patch**2

        def small(*shape: int) -> jax.Array:
            return 0.02 * normal(draws.take(shape))

        kernel = transformer.xavier(draws, (s.patch, s.patch, 3, d), pixels, d)
        params: dict[str, Any] = {
            "patch": {"kernel": kernel},
            "blocks": transformer.init_blocks(draws, s.blocks),
            "norm": transformer.norm_params(d),
        }
        if s.patch_bias:
            params["patch"]["bias"] = np.float32(1 / np.sqrt(pixels)) * draws.take((d,))
        if s.cls:
            params["cls"] = small(d)
        if s.distilled:
            params["dist"] = small(d)
        if s.registers:
            params["registers"] = small(s.registers, d)
        if s.pre_norm:
            params["pre_norm"] = transformer.norm_params(d)
        if s.pos == "learned":
            params["pos"] = small(s.table_prefix + s.grid**2, d)
        return params

    @functools.cache  # noqa: B019 - networks are few and live as long as the program
    def shapes(self) -> tuple[Any, Any]:
        """(params, extra) as nested dicts of ``ShapeDtypeStruct``."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def grid(self, images: jax.Array) -> tuple[int, int]:
        """Patches (rows, columns) of images (b, H, W, 3); ConfigError if they do not fit."""
        height, width = images.shape[1:3]
        patch = self.spec.patch
        if height % patch or width % patch or not height or not width:
            raise ConfigError(
                f"images of {height} × {width} pixels: expected sides that are multiples of the "
                f"vision transformer's patches of {patch}. Set --config.evaluation.image_size "
                f"(or the view's side) to {max(1, round(height / patch)) * patch}."
            )
        return height // patch, width // patch

    def embed(self, params: Any, extra: Any, images: jax.Array) -> jax.Array:
        """Patch tokens (b, rows · columns, d) with their positions, row by row."""
        grid = self.grid(images)
        # Patches do not overlap, so the convolution is a product of matrices.
        x = patchify(images.astype(self.dtype), self.spec.patch)
        kernel = params["patch"]["kernel"].reshape(-1, self.spec.width)
        x = jnp.einsum("bnk,kd->bnd", x, kernel.astype(x.dtype))
        if "bias" in params["patch"]:
            x = x + params["patch"]["bias"].astype(x.dtype)[None, None, :]
        table = self.table(params, extra, grid)
        return x + table[self.spec.table_prefix :].astype(x.dtype)[None]

    def table(self, params: Any, extra: Any, grid: tuple[int, int]) -> jax.Array:
        """The position table (prefix + cells, d) for a grid."""
        s = self.spec
        own = params["pos"] if s.pos == "learned" else extra["pos"]
        return positions.resample_table(own, (s.grid, s.grid), grid, s.table_prefix, s.rule)

    def with_prefix(self, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
        """Class, distillation and register tokens in front of patch tokens (b, n, d)."""
        s = self.spec
        own = params["pos"] if s.pos == "learned" else extra["pos"]
        rows = [params[name][None] for name in ("cls", "dist") if name in params]
        if rows:
            first = jnp.concatenate(rows)
            first = first + own[: len(rows)] if s.table_prefix else first
            rows = [first]
        if s.registers:
            rows.append(params["registers"])
        if not rows:
            return tokens
        front = jnp.concatenate(rows).astype(tokens.dtype)[None]
        front = jnp.broadcast_to(front, (tokens.shape[0], *front.shape[1:]))
        return jnp.concatenate([front, tokens], axis=1)

    def encode(self, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
        """Patch tokens (b, n, d), any subset in any order, to (b, prefix + n, d) after the norm."""
        x = self._start(params, extra, tokens)
        x, _ = transformer.scan_blocks(params["blocks"], x, self.spec.blocks, remat=self.remat)
        return transformer.layer_norm(params["norm"], x, self.spec.eps)

    def apply(
        self,
        params: Any,
        extra: Any,
        images: jax.Array,
        *,
        train: bool = False,
        views: int = 1,
        layers: Sequence[str] | None = None,
    ) -> tuple[FeatureMaps, Any]:
        """Patch tokens after blocks as maps (b, rows, columns, d), prefix tokens removed.

        ``block0`` is the output of the first block as it is, ``norm0`` the same behind the final
        norm; ``layers`` None are all of ``layer_names``. Names that no block has are left out, as a
        backbone tells its caller what exists. Layer norms see one token each, so that training and
        ``views`` change nothing.
        """
        del train, views
        asked = self._asked(layers)
        outputs = self._outputs(params, extra, images, None if layers is None else asked.values())
        return self._maps(params, outputs, images, asked), extra

    def pooled(
        self, params: Any, extra: Any, images: jax.Array, layers: Sequence[str] | None = None
    ) -> tuple[FeatureMaps, jax.Array]:
        """The maps of ``apply``, and one vector an image (b, d) f32, behind the final norm.

        It is the class token where there is one, else the mean of the patch tokens.
        """
        s, last, asked = self.spec, self.spec.depth - 1, self._asked(layers)
        taps = None if layers is None else (*asked.values(), last)
        outputs = self._outputs(params, extra, images, taps)
        tokens = outputs[last][:, :1] if s.cls else outputs[last][:, s.prefix :]
        tokens = transformer.layer_norm(params["norm"], tokens, s.eps).astype(jnp.float32)
        return self._maps(params, outputs, images, asked), jnp.mean(tokens, axis=1)

    def _asked(self, layers: Sequence[str] | None) -> dict[str, int]:
        """The block that each of these maps is of."""
        found = map(_MAP.fullmatch, layer_names(self.spec) if layers is None else layers)
        return {m[0]: i for m in found if m and (i := int(m[2])) < self.spec.depth}

    def _outputs(
        self, params: Any, extra: Any, images: jax.Array, taps: Collection[int] | None
    ) -> dict[int, jax.Array]:
        x = self._start(params, extra, self.embed(params, extra, images))
        return transformer.tap_blocks(params["blocks"], x, self.spec.blocks, taps, self.remat)

    def _maps(
        self, params: Any, outputs: dict[int, jax.Array], images: jax.Array, asked: dict[str, int]
    ) -> FeatureMaps:
        s = self.spec
        shape, made = (images.shape[0], *self.grid(images), s.width), {}
        for name, i in asked.items():
            x = outputs[i][:, s.prefix :]
            if name.startswith("norm"):
                x = transformer.layer_norm(params["norm"], x, s.eps)
            made[name] = x.reshape(shape)
        return made

    def _start(self, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
        x, spec = self.with_prefix(params, extra, tokens), self.spec
        return transformer.layer_norm(params["pre_norm"], x, spec.eps) if spec.pre_norm else x


@functools.cache
def vit(name: str, dtype: str = "float32", remat: Remat = "none") -> ViT:
    """The network of a published architecture."""
    return ViT(arch(name), dtype=dtype, remat=remat)
