"""Vision transformers and MAE decoders under published names: timm's, DINOv2's and CLIP's.

DeiT and MAE use timm's names. Three layouts differ:

- ``timm``; with registers, its table of positions has no row for the class token, whose position
  has been added to the token;
- ``dinov2``: as timm, but every table begins with the class token's row;
- ``clip``: OpenAI's and open_clip's names, with or without ``visual.`` in front.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dsad.core.tree import flatten
from dsad.models.weights import names

Style = Literal["timm", "dinov2", "clip"]

_TEXT = "text tower"
#: Knowingly left out: what the blocks' features do not need.
_IGNORED = {
    r"head\.": "classifier",
    r"head_dist\.": "classifier of the distillation token",
    r"decoder_": "decoder",
    r"mask_token$": "mask token",
}
#: The same for a whole CLIP, whose image tower stands under ``visual.``.
_CLIP_IGNORED = {
    r"visual\.proj$": "projection to the joint space",
    r"(transformer|token_embedding|ln_final|text)\.": _TEXT,
    r"(positional_embedding|text_projection)$": _TEXT,
    r"logit_(scale|bias)$": "temperature",
    r"(input_resolution|context_length|vocab_size)$": "sizes",
}

#: Published modules by dsad's; %d is the block.
_TIMM = {
    "patch": "patch_embed.proj", "pre_norm": "norm_pre", "norm": "norm",
    "blocks/norm1": "blocks.%d.norm1", "blocks/norm2": "blocks.%d.norm2",
    "blocks/qkv": "blocks.%d.attn.qkv", "blocks/proj": "blocks.%d.attn.proj",
    "blocks/fc1": "blocks.%d.mlp.fc1", "blocks/fc2": "blocks.%d.mlp.fc2",
    "blocks/scale1": "blocks.%d.ls1", "blocks/scale2": "blocks.%d.ls2",
}  # fmt: skip
_CLIP = {
    "patch": "conv1", "pre_norm": "ln_pre", "norm": "ln_post",
    "blocks/norm1": "transformer.resblocks.%d.ln_1",
    "blocks/norm2": "transformer.resblocks.%d.ln_2",
    "blocks/qkv": "transformer.resblocks.%d.attn.in_proj_",
    "blocks/proj": "transformer.resblocks.%d.attn.out_proj",
    "blocks/fc1": "transformer.resblocks.%d.mlp.c_fc",
    "blocks/fc2": "transformer.resblocks.%d.mlp.c_proj",
    "blocks/scale1": "transformer.resblocks.%d.ls_1",
    "blocks/scale2": "transformer.resblocks.%d.ls_2",
}  # fmt: skip
_DECODER = {
    **{k: v.replace("blocks", "decoder_blocks") for k, v in _TIMM.items()},
    "embed": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred",
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight"}


def style_of(state: Mapping[str, Any]) -> tuple[Style, str]:
    """The layout that tensors are named in, and what stands in front of each name."""
    for prefix in ("visual.", ""):
        if f"{prefix}class_embedding" in state:
            return "clip", prefix
    return ("dinov2" if "register_tokens" in state else "timm"), ""


def ignored(style: Style, prefix: str) -> dict[str, str]:
    """What files of a layout hold besides, for ``names.to_trees``."""
    if style != "clip":
        return _IGNORED
    # A tower alone has no text tower, so that a block too many is not taken for a part of one.
    return _CLIP_IGNORED if prefix else {r"proj$": "projection to the joint space"}


def encoder(shapes: tuple[Any, Any], style: Style, *, prefix: str = "") -> list[names.Entry]:
    """The mapping of ``ViT.shapes()``; ``prefix`` stands in front of every published name."""
    found = []
    for path, spec in _leaves(shapes):
        module, _, leaf = path.partition("/")[2].rpartition("/")
        if module:
            modules = _CLIP if style == "clip" else _TIMM
            found.append(_weight(path, prefix + modules[module], leaf, spec.shape))
        elif style == "clip":
            found.append(names.one(path, f"{prefix}{_CLIP_TABLES[leaf]}"))
        else:
            found.append(_table(path, leaf, style, registers="registers" in shapes[0]))
    return found


_CLIP_TABLES = {"cls": "class_embedding", "pos": "positional_embedding"}


def _table(path: str, leaf: str, style: Style, *, registers: bool) -> names.Entry:
    if leaf == "pos":
        if style == "timm" and registers:
            return names.Entry(
                path, ("pos_embed",),
                lambda t: np.concatenate([np.zeros_like(t[0][0, :1]), t[0][0]]),
                lambda x: [x[None, 1:]],
            )  # fmt: skip
        return names.one(path, "pos_embed", names.TABLE)
    if leaf == "registers":
        return names.one(path, "reg_token" if style == "timm" else "register_tokens", names.TABLE)
    return names.one(path, {"cls": "cls_token", "dist": "dist_token"}[leaf], names.TOKEN)


def decoder(shapes: tuple[Any, Any]) -> list[names.Entry]:
    """The mapping of ``Decoder.shapes()`` to the names in MAE's visualisation checkpoints."""
    found = []
    for path, spec in _leaves(shapes):
        module, _, leaf = path.partition("/")[2].rpartition("/")
        if module:
            found.append(_weight(path, _DECODER[module], leaf, spec.shape))
        elif leaf == "mask_token":
            found.append(names.one(path, "mask_token", names.TOKEN))
        else:
            found.append(names.one(path, "decoder_pos_embed", names.TABLE))
    return found


def without_class_row(params: Any) -> Any:
    """The same network with the class token's position added to the token: timm with registers."""
    row = np.asarray(params["pos"][0])
    # Adding 0 would turn a token's -0 into 0, and a second export would differ from the first.
    cls = np.where(row == 0, params["cls"], np.asarray(params["cls"]) + row)
    pos = np.concatenate([np.zeros_like(row)[None], np.asarray(params["pos"])[1:]])
    return {**params, "cls": cls, "pos": pos}


def _leaves(shapes: tuple[Any, Any]) -> Sequence[tuple[str, Any]]:
    return list(flatten({"params": shapes[0], "extra": shapes[1]}).items())


def _weight(path: str, module: str, leaf: str, shape: tuple[int, ...]) -> names.Entry:
    """A kernel, bias, norm scale or LayerScale, of one module or of a stack of them."""
    # torch's attention has no module between itself and its joint matrix.
    name = module + ("" if module.endswith("_") else ".") + _LEAVES.get(leaf, leaf)
    stacked = "%d" in module
    layout = names.SAME
    if leaf == "kernel":
        layout = names.CONV if len(shape) == 4 else names.DENSE
    if stacked:
        return names.stacked(path, [name % i for i in range(shape[0])], layout)
    return names.one(path, name, layout)
