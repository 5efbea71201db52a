"""Names and shapes of published weights, written from the publications, and weights by rule."""

import dataclasses
import zlib

import numpy as np

from dsad.models import vit
from dsad.models.decoder import Decoder, DecoderConfig
from dsad.models.weights import _family_vit, names


def by_rule(shapes):
    """Every tensor drawn from its name, as the golden files' README says."""
    return {name: tensor_by_rule(name, tuple(shape)) for name, shape in shapes.items()}


def with_sines(state):
    """The same tensors with the fixed positions of a masked autoencoder: columns, then rows."""
    made = dict(state)
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        rows, width = state[name].shape[1:]
        side, table = int((rows - 1) ** 0.5), np.zeros((1, rows, width), np.float32)
        for cell in range(side**2):
            for part, at in enumerate((cell % side, cell // side)):
                for k in range(width // 4):
                    angle = at * 10000.0 ** (-4 * k / width)
                    first = part * width // 2 + k
                    table[0, 1 + cell, first] = np.sin(angle)
                    table[0, 1 + cell, first + width // 4] = np.cos(angle)
        made[name] = table
    return made


def mae_state(spec, params, extra):
    """The tensors of a visualisation checkpoint of these trees; undoes ``mae_trees``."""
    grid = int((extra["encoder"]["pos"].shape[0] - spec.table_prefix) ** 0.5)
    spec, decoder = dataclasses.replace(spec, image=grid * spec.patch), None
    if "decoder" in params:
        depth, width = params["decoder"]["blocks"]["norm1"]["scale"].shape
        cfg = DecoderConfig(width=width, depth=depth, heads=1)
        decoder = Decoder(cfg, source=spec.width, patch=spec.patch, grid=spec.grid)
    entries, _ = _family_vit.mae_entries(vit.ViT(spec), decoder)
    return names.to_state(entries, params, extra)


def tensor_by_rule(name, shape):
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    last = name.rpartition(".")[2]
    if last == "running_var":
        return (1 + 0.1 * np.abs(n)).astype(np.float32)
    if last == "running_mean" or name.endswith("bias"):
        return (0.05 * n).astype(np.float32)
    if (last == "weight" and n.ndim == 1) or last.startswith("gamma"):
        return (1 + 0.1 * n).astype(np.float32)
    if name in ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token",
                "register_tokens", "decoder_pos_embed"):  # fmt: skip
        scale = 1 / np.sqrt(np.prod(shape[1:])) if name == "dist_token" else 0.02
        return (scale * n).astype(np.float32)
    return (n / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def blocks(depth, width, name="blocks", layer_scale=False):
    """timm's transformer blocks."""
    d, shapes = width, {}
    for i in range(depth):
        at = f"{name}.{i}"
        shapes |= {f"{at}.norm1.weight": (d,), f"{at}.norm1.bias": (d,)}
        shapes |= {f"{at}.attn.qkv.weight": (3 * d, d), f"{at}.attn.qkv.bias": (3 * d,)}
        shapes |= {f"{at}.attn.proj.weight": (d, d), f"{at}.attn.proj.bias": (d,)}
        shapes |= {f"{at}.norm2.weight": (d,), f"{at}.norm2.bias": (d,)}
        shapes |= {f"{at}.mlp.fc1.weight": (4 * d, d), f"{at}.mlp.fc1.bias": (4 * d,)}
        shapes |= {f"{at}.mlp.fc2.weight": (d, 4 * d), f"{at}.mlp.fc2.bias": (d,)}
        if layer_scale:
            shapes |= {f"{at}.ls1.gamma": (d,), f"{at}.ls2.gamma": (d,)}
    return shapes


def timm_vit(
    depth, width, patch, grid, *, distilled=False, registers=0, layer_scale=False, pre_norm=False,
    patch_bias=True, classes=0, hub=False,
):  # fmt: skip
    """A vision transformer in timm; ``hub`` as DINOv2's own repository names and shapes it."""
    d = width
    # timm's table has no rows for prefix tokens where there are registers.
    rows = grid**2 + (0 if registers and not hub else 1 + distilled)
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, rows, d)}
    if distilled:
        shapes["dist_token"] = (1, 1, d)
    if registers:
        shapes["register_tokens" if hub else "reg_token"] = (1, registers, d)
    if hub:
        shapes["mask_token"] = (1, d)
    shapes["patch_embed.proj.weight"] = (d, 3, patch, patch)
    if patch_bias:
        shapes["patch_embed.proj.bias"] = (d,)
    if pre_norm:
        shapes |= {"norm_pre.weight": (d,), "norm_pre.bias": (d,)}
    shapes |= blocks(depth, d, layer_scale=layer_scale)
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    for head in ["head", "head_dist"][: (1 + distilled) if classes else 0]:
        shapes |= {f"{head}.weight": (classes, d), f"{head}.bias": (classes,)}
    return shapes


def dinov3(depth, width, patch, *, gated=False, biases=False):
    """DINOv3 in timm's names, where queries and values have a bias or not."""
    d, shapes = width, {"cls_token": (1, 1, width), "reg_token": (1, 4, width)}
    shapes |= {"patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,)}
    for name, shape in blocks(depth, d).items():
        if name.endswith("qkv.bias"):
            both = (name.replace("qkv.", f"{x}_") for x in "qv")
            shapes |= dict.fromkeys(both, (d,)) if biases else {}
        elif gated and ".fc1." in name:
            shapes |= {name.replace("fc1", f"fc1_{x}"): shape for x in "gx"}
        else:
            shapes[name] = shape
    shapes |= {f"blocks.{i}.gamma_{k}": (d,) for i in range(depth) for k in (1, 2)}
    return {**shapes, "norm.weight": (d,), "norm.bias": (d,)}


def clip(depth, width, patch, grid, *, text=True, prefix="visual."):
    """OpenAI's CLIP with a vision transformer; without ``text`` the image tower alone."""
    d = width
    shapes = {"class_embedding": (d,), "positional_embedding": (grid**2 + 1, d), "proj": (d, 8),
              "conv1.weight": (d, 3, patch, patch)}  # fmt: skip
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    shapes |= _clip_blocks(depth, d)
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if text:
        shapes |= {"positional_embedding": (5, 16), "text_projection": (16, 8), "logit_scale": (),
                   "token_embedding.weight": (9, 16), "ln_final.weight": (16,),
                   "ln_final.bias": (16,)}  # fmt: skip
        shapes |= _clip_blocks(2, 16)
    return shapes


def _clip_blocks(depth, d):
    shapes = {}
    for i in range(depth):
        at = f"transformer.resblocks.{i}"
        shapes |= {f"{at}.attn.in_proj_weight": (3 * d, d), f"{at}.attn.in_proj_bias": (3 * d,)}
        shapes |= {f"{at}.attn.out_proj.weight": (d, d), f"{at}.attn.out_proj.bias": (d,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}.{norm}.weight": (d,), f"{at}.{norm}.bias": (d,)}
        shapes |= {f"{at}.mlp.c_fc.weight": (4 * d, d), f"{at}.mlp.c_fc.bias": (4 * d,)}
        shapes |= {f"{at}.mlp.c_proj.weight": (d, 4 * d), f"{at}.mlp.c_proj.bias": (d,)}
    return shapes


def mae(depth, width, patch, grid, *, decoder=None):
    """A masked autoencoder's checkpoint; ``decoder`` is (depth, width) in visualisation files."""
    shapes = timm_vit(depth, width, patch, grid)
    if decoder:
        n, d = decoder
        shapes |= {"mask_token": (1, 1, d), "decoder_pos_embed": (1, grid**2 + 1, d),
                   "decoder_embed.weight": (d, width), "decoder_embed.bias": (d,)}  # fmt: skip
        shapes |= blocks(n, d, "decoder_blocks")
        shapes |= {"decoder_norm.weight": (d,), "decoder_norm.bias": (d,),
                   "decoder_pred.weight": (3 * patch**2, d),
                   "decoder_pred.bias": (3 * patch**2,)}  # fmt: skip
    return shapes


def resnet(arch="resnet18", classes=1000):
    """torchvision's residual networks."""
    plans = {"resnet18": ((2, 2, 2, 2), False, 1), "resnet34": ((3, 4, 6, 3), False, 1),
             "resnet50": ((3, 4, 6, 3), True, 1),
             "wide_resnet50_2": ((3, 4, 6, 3), True, 2)}  # fmt: skip
    counts, bottleneck, wide = plans[arch]
    shapes = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
    cin = 64
    for stage, count in enumerate(counts, start=1):
        base = 64 * 2 ** (stage - 1)
        cout = 4 * base if bottleneck else base
        for i in range(count):
            at = f"layer{stage}.{i}"
            sizes = [(cin, base, 3), (base, base, 3)]
            if bottleneck:
                sizes = [
                    (cin, base * wide, 1),
                    (base * wide, base * wide, 3),
                    (base * wide, cout, 1),
                ]
            for k, (a, b, size) in enumerate(sizes, start=1):
                shapes[f"{at}.conv{k}.weight"] = (b, a, size, size)
                shapes |= _norm(f"{at}.bn{k}", b)
            if i == 0 and (stage > 1 or bottleneck):
                shapes[f"{at}.downsample.0.weight"] = (cout, cin, 1, 1)
                shapes |= _norm(f"{at}.downsample.1", cout)
            cin = cout
    if classes:
        shapes |= {"fc.weight": (classes, cin), "fc.bias": (classes,)}
    return shapes


def _norm(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves}
