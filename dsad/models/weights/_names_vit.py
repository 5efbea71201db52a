"""Vision transformers and MAE decoders under the names of timm, DINOv2, DINOv3 and CLIP.

DeiT and MAE use timm's names. These layouts differ:

- ``timm``; with registers, its table of positions has no row for the class token, whose position
  has been added to the token;
- ``dinov2``: as timm, but every table begins with the class token's row;
- ``clip``: OpenAI's and open_clip's names, with or without ``visual.`` in front;
- ``dinov3``: that repository's names, and ``transformers``: that library's, of DINOv3 alone. For
  timm these are networks of another class, with names of its own. Where files differ in how many
  tensors make up one matrix, they lie one after the other in dsad's: queries, keys and values; the
  gate of a gated MLP and what it gates.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dsad.core.tree import flatten
from dsad.models import positions
from dsad.models.weights import names

Style = Literal["timm", "dinov2", "clip", "dinov3", "transformers"]

_TEXT = "text tower"
#: Knowingly left out: what the blocks' features do not need.
_IGNORED = {
    r"(head|classifier)\.": "classifier",
    r"(dino|ibot)_head\.": "head of its training",
    r"head_dist\.": "classifier of the distillation token",
    r"decoder_": "decoder",
    r"(embeddings\.)?mask_token$": "mask token",
}
#: The same for DINOv3.
_ROPE_IGNORED = {
    r"local_cls_norm\.": "norm of class tokens in training",
    r"blocks\.\d+\.attn\.qkv\.bias_mask$": "which biases count",
}
#: The biases of its queries, keys and values, which are all zero in most files.
_BIASES = re.compile(r"(blocks\.\d+\.attn\.(qkv\.|q_|v_)|layer\.\d+\.attention\.[qv]_proj\.)bias")
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
#: Here a tuple is of tensors that together make up one, "" of one that is zero; "gate" stands for
#: ``fc1`` of a gated MLP.
_ROPE: dict[str, dict[str, str | tuple[str, ...]]] = {
    "timm": {
        **_TIMM, "cls": "cls_token", "registers": "reg_token",
        "blocks/qkv/bias": ("blocks.%d.attn.q_bias", "", "blocks.%d.attn.v_bias"),
        "blocks/gate": ("blocks.%d.mlp.fc1_g", "blocks.%d.mlp.fc1_x"),
        "blocks/scale1/gamma": "blocks.%d.gamma_1", "blocks/scale2/gamma": "blocks.%d.gamma_2",
    },
    "dinov3": {
        **_TIMM, "cls": "cls_token", "registers": "storage_tokens",
        "periods": "rope_embed.periods",
        "blocks/gate": ("blocks.%d.mlp.w1", "blocks.%d.mlp.w2"),
        "blocks/gated": "blocks.%d.mlp.w3",
    },
    "transformers": {
        "cls": "embeddings.cls_token", "registers": "embeddings.register_tokens",
        "patch": "embeddings.patch_embeddings", "norm": "norm",
        "blocks/norm1": "layer.%d.norm1", "blocks/norm2": "layer.%d.norm2",
        "blocks/qkv": tuple(f"layer.%d.attention.{x}_proj" for x in "qkv"),
        "blocks/qkv/bias": ("layer.%d.attention.q_proj.bias", "", "layer.%d.attention.v_proj.bias"),
        "blocks/proj": "layer.%d.attention.o_proj",
        "blocks/fc1": "layer.%d.mlp.up_proj", "blocks/fc2": "layer.%d.mlp.down_proj",
        "blocks/gate": ("layer.%d.mlp.gate_proj", "layer.%d.mlp.up_proj"),
        "blocks/scale1/gamma": "layer.%d.layer_scale1.lambda1",
        "blocks/scale2/gamma": "layer.%d.layer_scale2.lambda1",
    },
}  # fmt: skip
_DECODER = {
    **{k: v.replace("blocks", "decoder_blocks") for k, v in _TIMM.items()},
    "embed": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred",
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight"}
#: What holds the network in the training checkpoints of DINOv2 and DINOv3, and in transformers,
#: whose DINOv3 has only its blocks in one since version 5.
_HOLDERS = re.compile(r"(backbone\.|dinov3_vit\.)?(model\.)?")


def unheld(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by their names inside the module that holds the network, if there is one."""
    found = {_HOLDERS.sub("", name, count=1): tensor for name, tensor in state.items()}
    return found if len(found) == len(state) else dict(state)


def style_of(state: Mapping[str, Any]) -> tuple[Style, str]:
    """The layout that tensors are named in, and what stands in front of each name."""
    for prefix in ("visual.", ""):
        if f"{prefix}class_embedding" in state:
            return "clip", prefix
    if "storage_tokens" in state:
        return "dinov3", ""
    if "embeddings.register_tokens" in state:
        return "transformers", ""
    hub = "register_tokens" in state or "blocks.0.mlp.w12.weight" in state
    return ("dinov2" if hub else "timm"), ""


def has_biases(state: Mapping[str, Any]) -> bool:
    """Whether queries or values of DINOv3's weights have a bias that is not zero."""
    for name in filter(_BIASES.fullmatch, state):
        bias = np.asarray(state[name], np.float32).reshape(-1)
        third = len(bias) // 3 if ".qkv." in name else 0
        if np.any(bias[:third]) or np.any(bias[2 * third :]):
            return True
    return False


def ignored(style: Style, prefix: str, *, rope: bool, biases: bool) -> dict[str, str]:
    """What files of a layout hold besides, for ``names.to_trees``."""
    if rope:
        zero = {} if biases else {_BIASES.pattern + "$": "biases, all zero"}
        return {**_IGNORED, **_ROPE_IGNORED, **zero}
    if style != "clip":
        return _IGNORED
    # A tower alone has no text tower, so that a block too many is not taken for a part of one.
    return _CLIP_IGNORED if prefix else {r"proj$": "projection to the joint space"}


def encoder(shapes: tuple[Any, Any], style: Style, *, prefix: str = "") -> list[names.Entry]:
    """The mapping of ``ViT.shapes()``; ``prefix`` stands in front of every published name."""
    blocks = shapes[0]["blocks"]
    gated = blocks["fc1"]["kernel"].shape[2] > blocks["fc2"]["kernel"].shape[1]
    if "periods" in shapes[1]:
        return [_rotary(path, spec.shape, style, gated) for path, spec in _leaves(shapes)]
    modules = _CLIP if style == "clip" else _TIMM
    if gated and style == "dinov2":
        fused = {"blocks/fc1": "blocks.%d.mlp.w12", "blocks/fc2": "blocks.%d.mlp.w3"}
        modules = {**modules, **fused}
    found = []
    for path, spec in _leaves(shapes):
        module, _, leaf = path.partition("/")[2].rpartition("/")
        if module:
            found.append(_weight(path, prefix + modules[module], leaf, spec.shape))
        elif style == "clip":
            found.append(names.one(path, f"{prefix}{_CLIP_TABLES[leaf]}"))
        else:
            found.append(_table(path, leaf, style, registers="registers" in shapes[0]))
    return found


def _rotary(path: str, shape: tuple[int, ...], style: Style, gated: bool) -> names.Entry:
    """A leaf of DINOv3; its tensors by block, and by the parts that lie one after the other."""
    table, rest = _ROPE[style], path.partition("/")[2]
    if rest == "periods" and rest not in table:
        made = positions.periods(4 * shape[0])
        return names.Entry(path, (), lambda _: made, lambda _: ())
    module, _, leaf = rest.rpartition("/")
    if rest == "blocks/qkv/bias" and rest not in table:
        layout = names.Layout(_without_keys, lambda x: x)
        return names.stacked(path, [f"blocks.{i}.attn.qkv.bias" for i in range(shape[0])], layout)
    if rest in table:
        found, suffix = table[rest], ""
    else:
        other = {"blocks/fc1": "blocks/gate", "blocks/fc2": "blocks/gated"}.get(module, "")
        module = other if gated and other in table else module
        found, suffix = table[module], f".{_LEAVES.get(leaf, leaf)}"
    if isinstance(found, tuple):
        layout = names.DENSE if leaf == "kernel" else names.SAME
        parts = [part and part + suffix for part in found]
        return names.split(path, parts, shape[0], layout)
    if rest in ("cls", "registers"):
        return names.one(path, found, names.TOKEN if rest == "cls" else names.TABLE)
    return _weight(path, found, leaf, shape) if suffix else _named(path, found, shape)


def _named(path: str, name: str, shape: tuple[int, ...]) -> names.Entry:
    """A leaf whose whole name is given, of one module or of a stack of them."""
    if "%d" in name:
        return names.stacked(path, [name % i for i in range(shape[0])])
    return names.one(path, name)


def _without_keys(bias: np.ndarray) -> np.ndarray:
    """The joint bias whose middle third does not count, whatever a file holds there."""
    third = len(bias) // 3
    return np.concatenate([bias[:third], np.zeros_like(bias[:third]), bias[2 * third :]])


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
