"""DINOv3: its rotary positions by published numbers, its files in three styles, timm beside it."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dsad.core.errors import ConfigError
from dsad.core.tree import count, flatten
from dsad.models import backbone, positions, registry, vit
from dsad.models.weights import _family_vit, export, pretrained
from dsad.models.weights.pretrained import Weights
from dsad.objectives import mae
from tests.models import published

SMALL = {"width": 24, "depth": 2, "heads": 3, "patch": 8, "image": 32}
SIZES = {"small": "vit_small_patch16_dinov3", "gated": "vit_huge_plus_patch16_dinov3"}


def images(height=24, width=32, seed=3):
    shape = (2, height, width, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- positions


def exact(head=64):
    return jnp.asarray(100.0 ** (4 * np.arange(head // 4) / head), jnp.float32)


def test_the_first_cell_has_the_published_angles():
    cos, sin = positions.rotation(exact(), (14, 14), prefix=5)
    assert cos.shape == sin.shape == (5 + 196, 64)
    np.testing.assert_array_equal(cos[:5], 1)
    np.testing.assert_array_equal(sin[:5], 0)
    np.testing.assert_allclose(cos[5, :3], [0.90097, -0.33086, -0.99031], rtol=0, atol=6e-6)
    np.testing.assert_allclose(sin[5, :3], [0.43388, 0.94368, 0.13887], rtol=0, atol=6e-6)
    for t in (cos, sin):  # columns behind rows, and both again; the corner has equal coordinates
        np.testing.assert_array_equal(t[5, :16], t[5, 16:32])
        np.testing.assert_array_equal(t[:, :32], t[:, 32:])


def test_periods_are_those_that_the_weights_hold():
    whole, stored = np.asarray(exact()), positions.periods(64)
    np.testing.assert_allclose(whole[[1, 2, 15]], [1.33352, 1.77828, 74.9894], rtol=1e-5)
    np.testing.assert_array_equal(stored[[0, 1, 2, 15]], [1, 1.3359375, 1.78125, 75])
    assert np.abs(stored / whole - 1).max() == pytest.approx(0.0019, abs=5e-5)
    turned = 2 * np.pi * np.abs(1 / np.float64(stored) - 1 / np.float64(whole))  # at the border
    assert turned.max() == pytest.approx(8.5e-3, abs=5e-5)
    assert (stored.astype(jnp.bfloat16).astype(np.float32) == stored).all()
    assert positions.periods(128).shape == (32,)


def test_both_axes_go_from_end_to_end_by_their_own_length():
    cos, sin = positions.rotation(exact(), (28, 14), prefix=0)
    slow = np.arctan2(sin[:, [15, 31]], cos[:, [15, 31]]) * 74.9894 / (2 * np.pi)
    rows, columns = slow.reshape(28, 14, 2).transpose(2, 0, 1)
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:, :1], (28, 14)), atol=1e-4)
    np.testing.assert_allclose(rows[:, 0], np.linspace(-1 + 1 / 28, 1 - 1 / 28, 28), atol=1e-4)
    np.testing.assert_allclose(columns[0], np.linspace(-1 + 1 / 14, 1 - 1 / 14, 14), atol=1e-4)


def test_products_depend_on_the_difference_of_places_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 64)).astype(np.float32)
    turn = positions.rotation(exact(), (6, 6), prefix=0)
    q, k = (positions.rotated(jnp.broadcast_to(x, (1, 36, 1, 64)), turn)[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T).reshape(6, 6, 6, 6)  # [row, column] of q, then of k
    for dy, dx in ((0, 0), (2, 1), (3, -2)):
        found = [
            products[y, x, y + dy, x + dx]
            for y in range(6 - dy) for x in range(max(0, -dx), min(6, 6 - dx))
        ]  # fmt: skip
        np.testing.assert_allclose(found, found[0], rtol=0, atol=3e-5)  # of about 8
    assert np.ptp(products) > 1
    half = positions.rotated(jnp.ones((1, 36, 1, 64), jnp.bfloat16), turn)
    whole = positions.rotated(jnp.ones((1, 36, 1, 64)), turn)
    assert half.dtype == jnp.bfloat16  # and only rounded to it at the end
    np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))


# --- the network


def loaded(kind="small", **changes):
    arch = SIZES[kind]
    state = published.by_rule(published.dinov3(2, 24, 8, gated=kind == "gated", **changes))
    return arch, state, backbone(arch, Weights(tensors=state, options=SMALL))


def test_the_order_of_registers_and_the_image_s_size_are_free():
    _, state, network = loaded()
    moved = {**state, "reg_token": state["reg_token"][:, [2, 0, 3, 1]]}
    other = backbone(SIZES["small"], Weights(tensors=moved, options=SMALL))
    for size, grid in (((24, 32), (3, 4)), ((56, 8), (7, 1))):
        a, b = (n.only(("block1", "norm1", "cls"))(images(*size)) for n in (network, other))
        assert a["norm1"].shape == (2, *grid, 24)
        for name, values in a.items():
            np.testing.assert_allclose(b[name], values, atol=1e-5)
    flipped = network(images()[:, ::-1, ::-1])["block1"][:, ::-1, ::-1]
    assert np.abs(flipped - network(images())["block1"]).max() > 1e-2  # places matter


def test_published_sizes():
    for size, millions in (
        ("small", 21), ("small_plus", 29), ("base", 86), ("large", 303), ("huge_plus", 840),
        ("7b", 6716),
    ):  # fmt: skip
        found = count(vit.vit(f"vit_{size}_patch16_dinov3").shapes()[0])
        assert found / 1e6 == pytest.approx(millions, abs=0.6)
    assert count(vit.vit("vit_giant_patch14_dinov2").shapes()[0]) / 1e6 == pytest.approx(
        1136, abs=1
    )
    assert vit.arch("vit_7b_patch16_dinov3").blocks.inside == 8192
    with pytest.raises(ConfigError, match=r"6\.7 billion parameters is not drawn at random"):
        jax.eval_shape(vit.vit("vit_7b_patch16_dinov3").init, jax.random.key(0))


def test_what_needs_a_table_of_positions_says_so():
    with pytest.raises(ConfigError, match=r"encoder\.arch: .*fixed positions .*dinov3"):
        mae.EncoderConfig(arch="vit_small_patch16_dinov3").spec(224)
    with pytest.raises(ConfigError, match=r"heads: expected so many .* multiple of 4"):
        dataclasses.replace(vit.arch(SIZES["small"]), heads=64)
    with pytest.raises(ConfigError, match=r"30 × 32 pixels: .* patches of 8"):
        loaded()[2](images(30, 32))


# --- files


#: Names by timm's for an ordinary and a gated MLP, from the table of the three publications.
ORIGINAL = {
    "reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma",
    "fc1_g": "w1", "fc1_x": "w2",
}  # fmt: skip
LIBRARY = {
    "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings", "blocks.": "layer.",
    "attn.proj": "attention.o_proj", "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1", "fc1_g": "gate_proj", "fc1_x": "up_proj",
    "fc1": "up_proj", "fc2": "down_proj", "attn.": "attention.",
}  # fmt: skip


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def original(state, *, gated, biases):
    """The repository's own file, with what it holds besides."""
    table = {**ORIGINAL, "fc2": "w3"} if gated else ORIGINAL
    made = {renamed(n, table): t for n, t in state.items() if not n.endswith("_bias")}
    for name in [n for n in made if n.endswith("attn.qkv.weight")]:
        at = name.removesuffix("qkv.weight")
        parts = [state[f"{at}{x}_bias"] if biases else np.zeros(24, np.float32) for x in "qv"]
        keys = np.full(24, 7, np.float32)  # which the mask leaves out
        made[f"{at}qkv.bias"] = np.concatenate([parts[0], keys, parts[1]])
        made[f"{at}qkv.bias_mask"] = np.repeat(np.float32([1, 0, 1]), 24)
    made["rope_embed.periods"] = np.asarray([1, 10], jnp.bfloat16)
    made["mask_token"] = np.ones((1, 24), np.float32)
    return {**made, "local_cls_norm.weight": np.ones(24, np.float32)}


def library(state):
    """The file of the library transformers."""
    made = {}
    for name, tensor in state.items():
        if name.endswith("qkv.weight"):
            for x, part in zip("qkv", np.split(tensor, 3), strict=True):
                made[renamed(name, LIBRARY).replace("qkv", f"{x}_proj")] = part
        else:
            name = name.replace("q_bias", "q_proj.bias").replace("v_bias", "v_proj.bias")
            made[renamed(name, LIBRARY)] = tensor
    return {**made, "embeddings.mask_token": np.ones((1, 1, 24), np.float32)}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_three_styles_of_names_give_one_tree_and_come_back(kind, biases, tmp_path):
    arch, state, network = loaded(kind, biases=biases)
    gated, family = kind == "gated", registry.family_of(SIZES[kind])
    files = {
        "timm": state, "dinov3": original(state, gated=gated, biases=biases),
        "transformers": library(state),
    }  # fmt: skip
    assert ("qkv_bias", True) in network.options or not biases
    for form, tensors in files.items():
        path = tmp_path / f"{form}.safetensors"
        safetensors.numpy.save_file(tensors, path)
        np.savez(path.with_suffix(".npz"), **{n: np.float32(t) for n, t in tensors.items()})
        for file in (path, path.with_suffix(".npz")):
            read = safetensors.numpy.load_file(file) if file == path else dict(np.load(file))
            found = family.load(arch, Weights(tensors=read, options=SMALL))
            own = flatten((network.params, network.extra))
            for name, leaf in flatten((found.params, found.extra)).items():
                np.testing.assert_array_equal(leaf, own.pop(name), err_msg=name)
            assert not own
        written = family.save(arch, found.params, found.extra, form, **found.options)
        left = {n for group in found.left_out.values() for n in group}
        assert written.keys() == tensors.keys() - left
        for name, tensor in written.items():
            want = np.array(tensors[name], np.float32)
            if name.endswith("qkv.bias"):
                want[24:48] = 0
            np.testing.assert_array_equal(tensor, want, err_msg=name)
    assert network(images())["block1"].shape == (2, 3, 4, 24)


def test_biases_that_are_zero_are_left_out_and_others_count():
    arch, state, plain = loaded()
    zeros = published.by_rule(published.dinov3(2, 24, 8, biases=True))
    zeros = {n: t * (not n.endswith(("q_bias", "v_bias"))) for n, t in zeros.items()}
    found = backbone(arch, Weights(tensors=zeros, options=SMALL))
    assert len(dict(found.left_out)["biases, all zero"]) == 4
    np.testing.assert_array_equal(found(images())["block1"], plain(images())["block1"])
    assert registry.family_of(arch).published(arch, **dict(found.options))[1].keys() == {
        "embed_dim", "depth", "num_heads", "patch_size", "img_size"
    }  # fmt: skip
    _, _, biased = loaded(biases=True)
    assert np.abs(biased(images())["block1"] - plain(images())["block1"]).max() > 1e-3
    del state["blocks.1.gamma_2"]
    state["blocks.1.attn.k_bias"] = np.ones(24, np.float32)
    with pytest.raises(
        ConfigError, match=r"(?s)blocks\.1\.attn\.k_bias +no tensor .*gamma_2.*miss"
    ):
        backbone(arch, Weights(tensors=state, options=SMALL))


def test_stored_periods_are_used():
    arch, state, network = loaded()
    tensors = original(state, gated=False, biases=False)
    tensors["rope_embed.periods"] = np.float32([1, 9])
    other = backbone(arch, Weights(tensors=tensors, options=SMALL))
    np.testing.assert_array_equal(other.extra["periods"], [1, 9])
    assert np.abs(other(images())["block1"] - network(images())["block1"]).max() > 1e-4


def test_names_of_another_kind_are_refused():
    _, state, _ = loaded()
    for tensors in (original(state, gated=False, biases=False), library(state)):
        for arch in ("vit_small_patch16_224", "resnet18"):
            with pytest.raises(ConfigError, match=r"The tensors are those of .*_small_.*dinov3"):
                backbone(arch, Weights(tensors=tensors, options=SMALL))
    hub = published.timm_vit(2, 24, 8, 4, layer_scale=True, registers=4, hub=True)
    with pytest.raises(ConfigError, match="DINOv2's names do not fit it"):
        backbone(SIZES["small"], Weights(tensors=published.by_rule(hub), options=SMALL))


def held(tensors, by, also=(), only=""):
    """The tensors inside a module of a larger program, which has others besides."""
    inside = {by * n.startswith(only) + n: t for n, t in tensors.items()}
    return inside | {n: np.ones((2, 2), np.float32) for n in also}


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("dinov3", {"by": "backbone.", "also": ("dino_head.mlp.0.weight", "ibot_head.a.weight")}),
        ("timm", {"by": "model."}),
        ("transformers", {"by": "model."}),
        ("transformers", {"by": "model.", "only": "layer."}),
        ("transformers", {"by": "dinov3_vit.", "also": ("classifier.weight",)}),
    ],
)
def test_a_network_inside_another_module_is_found(form, more):
    arch, state, network = loaded(biases=True)
    files = {"timm": state, "transformers": library(state)}
    files["dinov3"] = original(state, gated=False, biases=True)
    options = dict(network.options)
    found = registry.family_of(arch).load(
        arch, Weights(tensors=held(files[form], **more), options=options)
    )
    own = flatten((network.params, network.extra))
    for name, leaf in flatten((found.params, found.extra)).items():
        np.testing.assert_array_equal(leaf, own.pop(name), err_msg=name)
    left = {n for group in found.left_out.values() for n in group}
    assert left >= set(more.get("also", ()))
    both = {**files[form], **held(files[form], "model.")}
    with pytest.raises(ConfigError, match=r"model\.\S+ +no tensor"):
        backbone(arch, Weights(tensors=both, options=options))


def test_torch_files_of_releases_and_trainings(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    arch, state, network = loaded()
    tensors = {
        n: torch.from_numpy(np.array(t, np.float32))
        for n, t in original(state, gated=False, biases=False).items()
    }
    tensors["rope_embed.periods"] = tensors["rope_embed.periods"].bfloat16()
    for n in tensors:
        if n.endswith("bias_mask"):
            tensors[n] = torch.full_like(tensors[n], torch.nan)  # as before it is filled
    training = held(tensors, "backbone.") | {"dino_head.last.weight": torch.ones(2, 2)}
    for value, key in (
        (tensors, ""), ({"model": tensors, "iteration": 3}, ""), ({"teacher": training}, ""),
        ({"student": training, "teacher": training}, "#teacher"),
    ):  # fmt: skip
        torch.save(value, tmp_path / "w.pth")
        read = pretrained.read(f"{tmp_path / 'w.pth'}{key}")
        found = backbone(arch, dataclasses.replace(read, options=SMALL))
        np.testing.assert_array_equal(found(images())["block1"], network(images())["block1"])


S, REG = "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"
MISTAKES = {
    "S into B": ("vit_base_patch16_dinov3", S, published.dinov3(12, 384, 16)),
    "S into S+": ("vit_small_plus_patch16_dinov3", S, published.dinov3(12, 384, 16)),
    "S+ into S": (
        S, "vit_small_plus_patch16_dinov3", published.dinov3(12, 384, 16, gated=True),
    ),
    "DINOv2 into DINOv3": (
        S, REG, published.timm_vit(12, 384, 14, 37, layer_scale=True, registers=4, hub=True),
    ),
    "DINOv3 into DINOv2": (REG, S, published.dinov3(12, 384, 16)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_named_with_the_architecture_that_fits(mistake, tmp_path):
    arch, right, shapes = MISTAKES[mistake]
    file = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file({n: np.zeros(s, np.float16) for n, s in shapes.items()}, file)
    with pytest.raises(ConfigError) as error:
        backbone(arch, file)
    first, *rows, last = str(error.value).splitlines()
    assert first.startswith("mine.safetensors: ")
    assert arch in first
    assert last == f"The tensors are those of {right}."
    assert len(rows) <= 30  # blocks that tell the same are one row


def test_the_terms_travel_with_what_is_exported(tmp_path):
    for name, network in (("a", loaded()[2]), ("b", backbone("resnet18"))):
        written = export.write(network, tmp_path / name, form=("timm", "torchvision")[name == "b"])
        config = json.loads(written["config.json"].read_text())
        with safetensors.safe_open(written["model.safetensors"], "np") as file:
            held = file.metadata()
        terms = [config["dsad"].get("licence"), held.get("licence")]
        assert terms == [_family_vit.DINOV3_TERMS if name == "a" else None] * 2
        assert held["format"] == "pt"


def test_the_licence_is_told_once(capsys):
    _family_vit._tell.cache_clear()
    loaded()
    assert "DINOv3 License" in capsys.readouterr().err
    loaded()
    backbone("vit_small_patch16_dinov3")  # at random
    assert not capsys.readouterr().err


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_g_in_both_styles(registers):
    """Its repository's file and timm's differ in names, and in where the class position lies."""
    arch = "vit_giant_patch14_" + ("reg4_" if registers else "") + "dinov2"
    shapes = published.timm_vit(2, 24, 8, 4, layer_scale=True, registers=registers, hub=True)
    for name in shapes:
        if ".fc1." in name:
            shapes[name] = (8192, *shapes[name][1:])
        elif name.endswith("fc2.weight"):
            shapes[name] = (24, 4096)
    own = {renamed(n, {"fc1": "w12", "fc2": "w3"}): n for n in shapes}
    tensors = {n: published.tensor_by_rule(n, shapes[timm]) for n, timm in own.items()}
    found = backbone(arch, Weights(tensors=tensors, options=SMALL))
    family = registry.family_of(arch)
    written = family.save(arch, found.params, found.extra, "timm", **dict(found.options))
    for name, timm in own.items():
        if ".mlp." in name:
            np.testing.assert_array_equal(written[timm], tensors[name])
    again = backbone(arch, Weights(tensors=written, options=SMALL))
    maps = found(images())
    for name, values in again(images()).items():
        np.testing.assert_array_equal(maps[name], values)
    back = family.save(arch, found.params, found.extra, "dinov2", **dict(found.options))
    assert back.keys() == tensors.keys() - {"mask_token"}


# --- other implementations


#: Made by timm 1.0.31 with torch 2.13 in float32: networks ``vit_{size}_patch16_dinov3`` with
#: ``num_classes=0`` and weights by ``published.tensor_by_rule`` of timm's names, and their
#: ``rope.periods`` rounded to bfloat16, which timm does not do by itself. The input is
#: default_rng(7).standard_normal((1, 3, h, w)). ``forward_intermediates(norm=False)``: of maps
#: (C, h, w) a[:: C // 6, ::5, ::4], and mean and deviation of all; its last output, which is
#: behind the norm: the class token's and the patches', likewise.
GOLDEN = pathlib.Path(__file__).with_name("dinov3.npz")


@pytest.mark.parametrize(
    "size", ["small", "small_plus", pytest.param("base", marks=pytest.mark.slow)]
)
def test_timm_computes_the_same(size):
    arch, want = f"vit_{size}_patch16_dinov3", np.load(GOLDEN)
    width = vit.arch(arch).width
    shapes = published.dinov3(12, width, 16, gated="plus" in size)
    network = backbone(arch, published.by_rule(shapes))
    layers = ("block0", "block11", "norm11", "cls")
    run = jax.jit(lambda n, x: n(x))
    for h, w in ((224, 224), (224, 160)):
        x = np.random.default_rng(7).standard_normal((1, 3, h, w), dtype=np.float32)
        maps = run(network.only(layers), x.transpose(0, 2, 3, 1))
        for name in layers:
            found, key = np.asarray(maps[name])[0], f"{size}/{h}x{w}/{name}"
            if name != "cls":
                found = found.transpose(2, 0, 1)
            if name.startswith("block"):
                np.testing.assert_allclose(
                    [found.mean(), found.std()], want[f"{key}/meanstd"], rtol=1e-4, atol=1e-5
                )
            cut = (slice(None, None, width // 6), *(slice(None, None, n) for n in (5, 4)))
            found = found[cut[: found.ndim]]
            scale = np.abs(want[key]).max()
            np.testing.assert_allclose(found, want[key], rtol=1e-4, atol=3e-5 * scale, err_msg=key)


#: Likewise of these networks at the size of SMALL, some of timm's under ``_qkvb`` and others with
#: ``dynamic_img_size=True``: the map of the last block. That of DINOv2 without registers has its
#: table resampled by torch before, as its repository does, and not as timm.
ASPECTS = GOLDEN.with_name("aspects.npz")
TABLES = {
    "vit_small_patch14_dinov2": {"layer_scale": True},
    "vit_small_patch14_reg4_dinov2": {"layer_scale": True, "registers": 4},
    "vit_base_patch16_clip_224": {"pre_norm": True, "patch_bias": False},
    "vit_base_patch16_clip_quickgelu_224": {"pre_norm": True, "patch_bias": False},
    "vit_small_patch16_dinov3_qkvb": {"biases": True},
    "vit_small_plus_patch16_dinov3_qkvb": {"biases": True, "gated": True},
}


@pytest.mark.parametrize("name", TABLES)
def test_timm_computes_the_same_at_any_aspect(name):
    arch, rope = name.removesuffix("_qkvb"), "dinov3" in name
    shapes = published.dinov3(2, 24, 8, **TABLES[name]) if rope else published.timm_vit(
        2, 24, 8, 4, **TABLES[name]
    )  # fmt: skip
    state, want = published.by_rule(shapes), np.load(ASPECTS)
    network = backbone(arch, Weights(tensors=state, options=SMALL)).only(("block1",))
    for h, w in ((40, 24), (24, 64)):
        x = np.random.default_rng(7).standard_normal((1, 3, h, w), dtype=np.float32)
        found = network(x.transpose(0, 2, 3, 1))["block1"][0].transpose(2, 0, 1)
        np.testing.assert_allclose(found, want[f"{name}/{h}x{w}"], rtol=1e-4, atol=1e-5)
    if rope:  # as strictly as they came
        family = registry.family_of(arch)
        back = family.save(arch, network.params, network.extra, "timm", **dict(network.options))
        assert back.keys() == state.keys()
        for key, tensor in back.items():
            np.testing.assert_array_equal(tensor, state[key], err_msg=key)


#: Published float32 outputs behind the norm for image 000000039769 of COCO's val2017, at 224
#: pixels: of the class token, and of the first patch.
OUTPUTS = {
    "small": (
        (0.46356, -0.41561, 0.40824, -0.12661, -0.28664),
        (-0.03875, -0.25090, -0.01639, -0.45547, 0.57158),
    ),
    "base": ((1.03464, -0.18061, -0.34102, -0.06638, -0.01138), ()),
}


@pytest.mark.parametrize("size", OUTPUTS)
def test_published_outputs(size):
    """DSAD_DINOV3 is a folder of the licensed weights, {size}.safetensors, and 000000039769.jpg."""
    folder = pathlib.Path(os.environ.get("DSAD_DINOV3", ""))
    weights, picture = folder / f"{size}.safetensors", folder / "000000039769.jpg"
    if not os.environ.get("DSAD_DINOV3") or not (weights.exists() and picture.exists()):
        pytest.skip("DSAD_DINOV3 names no folder with the licensed weights and the image")
    from PIL import Image

    network = backbone(f"vit_{size}_patch16_dinov3", weights)
    small = Image.open(picture).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    pixels = (np.asarray(small, np.float32) / 255 - network.mean) / network.std
    found = network.only(("cls", "norm11"))(pixels[None].astype(np.float32))
    token, patch = OUTPUTS[size]
    np.testing.assert_allclose(found["cls"][0, :5], token, atol=0.02)
    np.testing.assert_allclose(found["norm11"][0, 0, 0, : len(patch)], patch, atol=0.02)
