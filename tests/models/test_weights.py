"""Published weights of every family, in and out: features, strictness, bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.core.types import RunInfo
from dsad.models import backbone, registry, vit
from dsad.models.decoder import DecoderConfig
from dsad.models.weights import names, pretrained
from dsad.models.weights.pretrained import Weights
from tests.helpers import ROOT
from tests.models import published

SMALL = {"width": 24, "depth": 2, "heads": 3, "patch": 8, "image": 32}
CLIP = "vit_base_patch16_clip_224"
REG = "vit_small_patch14_reg4_dinov2"

#: Architecture, and the names and shapes of its weights at the size of SMALL.
FAMILIES = {
    "vit": ("vit_base_patch16_224", published.timm_vit(2, 24, 8, 4, classes=5)),
    "deit": ("deit_small_patch16_224", published.timm_vit(2, 24, 8, 4, classes=5)),
    "deit-distilled": (
        "deit_small_distilled_patch16_224",
        published.timm_vit(2, 24, 8, 4, distilled=True, classes=5),
    ),
    "dinov2": (
        "vit_small_patch14_dinov2", published.timm_vit(2, 24, 8, 4, layer_scale=True, hub=True),
    ),
    "dinov2-timm": (
        "vit_small_patch14_dinov2", published.timm_vit(2, 24, 8, 4, layer_scale=True),
    ),
    "dinov2-registers": (
        REG, published.timm_vit(2, 24, 8, 4, layer_scale=True, registers=4, hub=True),
    ),
    "dinov2-registers-timm": (
        REG, published.timm_vit(2, 24, 8, 4, layer_scale=True, registers=4),
    ),
    "clip": (CLIP, published.clip(2, 24, 8, 4)),
    "clip-quickgelu": ("vit_base_patch16_clip_quickgelu_224", published.clip(2, 24, 8, 4)),
    "clip-tower": (CLIP, published.clip(2, 24, 8, 4, text=False, prefix="")),
    "clip-timm": (
        CLIP, published.timm_vit(2, 24, 8, 4, pre_norm=True, patch_bias=False, classes=5),
    ),
    "mae": ("mae_vit_base_patch16", published.mae(2, 24, 8, 4)),
    "mae-visualisation": (
        "mae_vit_base_patch16", published.mae(2, 24, 8, 4, decoder=(1, 16)),
    ),
}  # fmt: skip
#: The form in which a family's own names are written.
FORMS = {"dinov2": "dinov2", "dinov2-registers": "dinov2", "clip": "clip",
         "clip-quickgelu": "clip"}  # fmt: skip


def weights(family, **fields):
    arch, shapes = FAMILIES[family]
    state = published.by_rule(shapes)
    tensors = published.with_sines(state) if arch.startswith("mae") else state
    return Weights(tensors=tensors, options=SMALL, **fields)


def images(side=32, seed=3):
    return np.random.default_rng(seed).standard_normal((2, side, side, 3)).astype(np.float32)


# --- features, against float64 numpy on the published tensors


class Numpy:
    """A vision transformer in float64, from the equations, on timm's or CLIP's tensors."""

    def __init__(self, state, arch, heads):
        self.t = {n: np.asarray(v, np.float64) for n, v in state.items()}
        self.spec, self.heads = vit.ARCHS[arch], heads
        self.clip = "visual.conv1.weight" in state

    def norm(self, x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = (x - mean) / np.sqrt(var + (1e-5 if self.spec.pre_norm else 1e-6))
        return x * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def dense(self, x, weight, bias):
        return x @ self.t[weight].T + self.t[bias]

    def attention(self, x, qkv, out):
        y = self.dense(x, *qkv)
        q, k, v = np.split(y, 3, axis=-1)
        mixed = []
        for at in np.split(np.arange(q.shape[-1]), self.heads):
            score = np.exp(q[..., at] @ k[..., at].swapaxes(1, 2) / np.sqrt(len(at)))
            mixed.append(score / score.sum(-1, keepdims=True) @ v[..., at])
        return self.dense(np.concatenate(mixed, -1), *out)

    def block(self, x, i):
        at, names = f"blocks.{i}", ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        qkv, out = (f"{at}.attn.qkv.", f"{at}.attn.proj.")
        if self.clip:
            at = f"visual.transformer.resblocks.{i}"
            names = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
            qkv, out = (f"{at}.attn.in_proj_", f"{at}.attn.out_proj.")
        n1, n2, up, down = (f"{at}.{name}" for name in names)
        y = self.attention(self.norm(x, n1), *((f"{m}weight", f"{m}bias") for m in (qkv, out)))
        x = x + y * self.t.get(f"{at}.ls1.gamma", 1.0)
        h = self.dense(self.norm(x, n2), f"{up}.weight", f"{up}.bias")
        if self.spec.activation == "quick_gelu":
            h = h / (1 + np.exp(-1.702 * h))
        else:
            h = h * 0.5 * (1 + erf(h / np.sqrt(2)))
        y = self.dense(h, f"{down}.weight", f"{down}.bias")
        return x + y * self.t.get(f"{at}.ls2.gamma", 1.0)

    def __call__(self, x, depth):
        kernel = self.t["visual.conv1.weight" if self.clip else "patch_embed.proj.weight"]
        p = kernel.shape[-1]
        b, side = x.shape[0], x.shape[1] // p
        cut = x.astype(np.float64).reshape(b, side, p, side, p, 3)
        x = np.einsum("bhpwqc,dcpq->bhwd", cut, kernel).reshape(b, side * side, -1)
        x = x + self.t.get("patch_embed.proj.bias", 0.0)
        x = self.prefixed(x, b)
        if self.spec.pre_norm:
            x = self.norm(x, "visual.ln_pre" if self.clip else "norm_pre")
        maps = {}
        for i in range(depth):
            x = self.block(x, i)
            maps[f"block{i}"] = x[:, -side * side :].reshape(b, side, side, -1)
        return maps

    def prefixed(self, x, b):
        t, every = self.t, lambda v: np.broadcast_to(v, (b, *v.shape[-2:]))
        if self.clip:
            cls, pos = t["visual.class_embedding"][None], t["visual.positional_embedding"]
            return np.concatenate([every(cls), x], 1) + pos
        front = [every(t[n]) for n in ("cls_token", "dist_token") if n in t]
        if "reg_token" in t:  # timm: positions belong to the patches alone
            return np.concatenate([*front, every(t["reg_token"]), x + t["pos_embed"]], 1)
        x = np.concatenate([*front, x], 1) + t["pos_embed"]
        if "register_tokens" in t:  # DINOv2: registers come after the positions were added
            x = np.concatenate([x[:, :1], every(t["register_tokens"]), x[:, 1:]], 1)
        return x


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"clip-tower"}))
def test_features_equal_float64_numpy_on_the_published_tensors(family):
    arch, _ = FAMILIES[family]
    state = weights(family)
    maps = backbone(arch, state)(images())
    want = Numpy(state, arch, SMALL["heads"])(images(), SMALL["depth"])
    assert maps.keys() == want.keys() == {"block0", "block1"}
    for name, values in want.items():
        np.testing.assert_allclose(maps[name], values, atol=2e-4, rtol=2e-4)


def test_an_image_tower_alone_is_the_tower_of_the_whole_clip():
    whole = weights("clip")
    tower = {n.removeprefix("visual."): t for n, t in whole.items() if n.startswith("visual.")}
    one, two = backbone(CLIP, whole), backbone(CLIP, Weights(tensors=tower, options=SMALL))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert dict(one.left_out).keys() == {"projection to the joint space", "text tower",
                                         "temperature"}  # fmt: skip
    assert len(dict(one.left_out)["text tower"]) == 2 * 12 + 5
    assert two.left_out == (("projection to the joint space", ("proj",)),)


# --- bits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_in_out_in_is_the_identity_bit_for_bit(family):
    arch, shapes = FAMILIES[family]
    state = weights(family)
    known = registry.family_of(arch)
    first = known.load(arch, state)
    form = FORMS.get(family, "clip" if family == "clip-tower" else "timm")
    written = known.save(arch, first.params, first.extra, form, **first.options)
    used = set(shapes) - {n for group in first.left_out.values() for n in group}
    if family == "clip-tower":
        written = {n.removeprefix("visual."): t for n, t in written.items()}
    assert set(written) == used
    for name, tensor in written.items():
        assert tensor.shape == tuple(shapes[name])
        assert tensor.tobytes() == state[name].tobytes(), name
    again = known.load(arch, Weights(tensors=written, options=SMALL))
    assert_same_bits((first.params, first.extra), (again.params, again.extra))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_residual_networks_in_out_in_bit_for_bit(arch):
    shapes = published.resnet(arch)
    if arch != "resnet18":  # a stage of each kind of block is enough
        shapes = {n: s for n, s in shapes.items() if not n.startswith(("layer3", "layer4"))}
    state = published.by_rule(shapes)
    known = registry.family_of(arch)
    first = known.load(arch, state)
    assert first.left_out == {"classifier": ("fc.weight", "fc.bias")}
    shape = known.network(arch, **first.options).shapes()
    from dsad.models.weights import _names_resnet

    written = names.to_state(_names_resnet.entries(shape), first.params, first.extra)
    assert {n: t.shape for n, t in written.items()} == {
        n: tuple(s) for n, s in shapes.items() if not n.startswith("fc.")
    }
    for name, tensor in written.items():
        assert tensor.tobytes() == state[name].tobytes(), name


def test_folded_weights_are_written_complete_and_read_back_the_same():
    complete = published.by_rule(published.resnet())
    folded = {}
    for name, kernel in complete.items():
        if kernel.ndim == 4:
            folded[name] = kernel
            folded[name.replace(".weight", ".bias")] = kernel[:, 0, 0, 0].copy()
    known = registry.family_of("resnet18")
    first = known.load("resnet18", folded)
    written = known.save("resnet18", first.params, first.extra, "torchvision", stages=4)
    assert written.keys() == {n for n in complete if not n.startswith("fc.")}
    again = known.load("resnet18", written)
    assert_same_bits((first.params, first.extra), (again.params, again.extra))


def test_an_incomplete_network_is_not_exported():
    state = {n: t for n, t in published.by_rule(published.resnet()).items() if "layer4" not in n}
    known = registry.family_of("resnet18")
    options = known.load("resnet18", state).options
    with pytest.raises(ConfigError, match=r"end after layer3"):
        known.check_complete("resnet18", **options)
    known.check_complete("resnet18", stages=4)


def test_registers_in_timms_form_have_the_class_position_in_the_token():
    """DINOv2's own file written for timm: another split of one sum, the same network."""
    known = registry.family_of(REG)
    state = weights("dinov2-registers")
    first = known.load(REG, state)
    written = known.save(REG, first.params, first.extra, "timm", **first.options)
    assert {n: t.shape for n, t in written.items()} == {
        n: tuple(s) for n, s in FAMILIES["dinov2-registers-timm"][1].items()
    }
    np.testing.assert_array_equal(
        written["cls_token"], state["cls_token"] + state["pos_embed"][:, :1]
    )
    other = backbone(REG, Weights(tensors=written, options=SMALL))(images())
    for name, values in backbone(REG, state)(images()).items():
        np.testing.assert_array_equal(other[name], values)
    again = known.load(REG, Weights(tensors=written, options=SMALL))
    twice = known.save(REG, again.params, again.extra, "timm", **again.options)
    assert all(twice[n].tobytes() == t.tobytes() for n, t in written.items())


def assert_same_bits(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert np.asarray(leaf).dtype == np.float32
        assert np.asarray(leaf).tobytes() == np.asarray(b[path]).tobytes(), path


# --- masked autoencoders


def test_masked_autoencoders_with_and_without_decoder():
    state = published.with_sines(published.by_rule(published.mae(2, 24, 8, 4, decoder=(3, 16))))
    spec = vit.Arch(width=24, depth=2, heads=3, patch=8, image=224, pos="sincos")
    params, extra = pretrained.mae_trees(spec, state)
    assert params.keys() == extra.keys() == {"encoder", "decoder"}
    assert params["decoder"]["blocks"]["qkv"]["kernel"].shape == (3, 16, 48)
    np.testing.assert_array_equal(
        params["decoder"]["head"]["kernel"], state["decoder_pred.weight"].T
    )
    np.testing.assert_array_equal(extra["decoder"]["pos"], state["decoder_pos_embed"][0])
    written = published.mae_state(spec, params, extra)
    assert written.keys() == state.keys()
    assert all(written[n].tobytes() == t.tobytes() for n, t in state.items())
    assert_same_bits((params, extra), pretrained.mae_trees(spec, written))
    only = {n: t for n, t in state.items() if not n.startswith("decoder_") and n != "mask_token"}
    params, extra = pretrained.mae_trees(spec, only)
    assert params.keys() == extra.keys() == {"encoder"}
    assert published.mae_state(spec, params, extra).keys() == only.keys()


def test_masked_autoencoders_are_strict():
    spec = vit.Arch(width=24, depth=2, heads=3, patch=8, image=32, pos="sincos")
    state = published.by_rule(published.mae(2, 24, 8, 4, decoder=(3, 16)))
    with pytest.raises(ConfigError, match=r"decoder_blocks\.2\.norm1\.weight +no tensor of"):
        pretrained.mae_trees(spec, state, DecoderConfig(width=16, depth=2, heads=2))
    del state["decoder_blocks.1.attn.qkv.bias"], state["mask_token"]
    with pytest.raises(ConfigError, match=r"(?s)decoder_blocks\.1.*mask_token.*missing"):
        pretrained.mae_trees(spec, state)
    with pytest.raises(ConfigError, match="mae_vit_base_patch16"):
        pretrained.mae_trees("vit_base_patch16_224", state)


# --- strictness


def test_missing_left_over_and_misshapen_tensors_come_together():
    state = dict(weights("vit"))
    del state["blocks.1.norm2.bias"]
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T
    state["fc_norm.weight"] = np.zeros(24, "f4")
    with pytest.raises(ConfigError) as error:
        backbone("vit_base_patch16_224", Weights(tensors=state, options=SMALL))
    lines = [line.split() for line in str(error.value).splitlines()]
    assert lines[2:] == [
        ["blocks.0.attn.qkv.weight", "(72,", "24)", "(24,", "72)"],
        ["blocks.1.norm2.bias", "(24,)", "missing"],
        ["fc_norm.weight", "no", "tensor", "of", "vit_base_patch16_224", "(24,)"],
    ]


def test_weights_of_another_kind_get_one_line_instead_of_a_table():
    with pytest.raises(ConfigError, match=r"names such as .*pos_embed.*found conv1"):
        backbone("vit_tiny_patch16_224", published.by_rule({"conv1.weight": (4, 3, 2, 2)}))
    with pytest.raises(ConfigError, match="torchvision ResNet names"):
        backbone("resnet18", weights("vit"))
    other = {"vit.embeddings.patch_embeddings.projection.weight": np.zeros(1)}
    with pytest.raises(ConfigError, match="library transformers.*hf:timm/"):
        backbone("vit_base_patch16_224", other)
    with pytest.raises(ConfigError, match="CLIP's names do not fit"):
        backbone("vit_base_patch16_224", weights("clip"))


def test_a_block_too_many_of_a_tower_alone_is_left_over():
    _, shapes = FAMILIES["clip-tower"]
    more = published.clip(3, 24, 8, 4, text=False, prefix="")
    assert set(shapes) < set(more)
    with pytest.raises(ConfigError, match=r"transformer\.resblocks\.2\.ln_1\.bias +no tensor"):
        backbone(CLIP, Weights(tensors=published.by_rule(more), options=SMALL))


def test_the_wrong_activation_of_clip_is_refused():
    for quick, arch, other in (
        (True, CLIP, "vit_base_patch16_clip_quickgelu_224"),
        (False, "vit_base_patch16_clip_quickgelu_224", CLIP),
    ):
        with pytest.raises(ConfigError, match=f"Use {other}"):
            backbone(arch, weights("clip", quick_gelu=quick))
        backbone(other, weights("clip", quick_gelu=quick))


def test_unknown_changes_of_an_architecture_are_refused():
    with pytest.raises(ConfigError, match=r"cannot change activation; expected some of depth"):
        backbone("vit_tiny_patch16_224", Weights(tensors={}, options={"activation": "gelu"}))


# --- the backbone around it


def test_statistics_come_from_the_weights_else_from_the_publication():
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    for family, mean, size in (
        ("vit", half, 32), ("deit", imagenet, 32), ("mae", imagenet, 32), ("dinov2", imagenet, 32),
        ("clip", (0.48145466, 0.4578275, 0.40821073), 32),
    ):  # fmt: skip
        arch, _ = FAMILIES[family]
        found = backbone(arch, weights(family))
        assert (found.mean, found.image_size) == (mean, size)
        assert found.interpolation == "bicubic"
    assert registry.family_of("resnet18").preprocessing("resnet18").interpolation == "bilinear"
    assert registry.family_of(REG).preprocessing(REG).image_size == 518
    said = backbone(
        "vit_base_patch16_224",
        weights("vit", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0), input_size=64,
                interpolation="lanczos"),
    )  # fmt: skip
    assert (said.mean, said.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert (said.image_size, said.interpolation) == (64, "lanczos")


def test_the_table_of_positions_tells_the_image_size():
    state = dict(weights("vit"))
    state["pos_embed"] = np.zeros((1, 1 + 6 * 6, 24), "f4")
    found = backbone("vit_base_patch16_224", Weights(tensors=state, options=SMALL))
    assert dict(found.options)["image"] == found.image_size == 48
    state["pos_embed"] = np.zeros((1, 1 + 35, 24), "f4")
    with pytest.raises(ConfigError, match=r"pos_embed +\(1, 17, 24\) +\(1, 36, 24\)"):
        backbone("vit_base_patch16_224", Weights(tensors=state, options=SMALL))


def test_only_computes_the_maps_that_are_asked_for():
    found = backbone("vit_base_patch16_224", weights("vit"))
    one = found.only(("block1",))
    assert one.strides == {"block1": 8}
    run = jax.jit(lambda b, x: b(x))
    maps = run(one, images())
    np.testing.assert_allclose(maps["block1"], run(found, images())["block1"], atol=1e-5)
    assert maps.keys() == {"block1"}
    with pytest.raises(ConfigError, match=r"no feature map 'block7'.*block0, block1"):
        found.only(("block1", "block7"))
    plain = backbone("resnet18", published.by_rule(published.resnet()))
    assert run(plain.only(("layer2",)), images()).keys() == {"layer2"}


def test_every_architecture_builds_and_is_known():
    with pytest.raises(ConfigError, match="Did you mean 'vit_tiny_patch16_224'"):
        backbone("vit_tiny_patch16")
    tiny = backbone("vit_tiny_patch16_224", seed=1)
    assert tiny(images(32))["block11"].shape == (2, 2, 2, 192)
    for arch in registry.archs():
        known = registry.family_of(arch)
        assert known.strides(arch)
        assert known.preprocessing(arch).image_size >= 224


# --- golden outputs


def golden(name):
    path = ROOT.parent / "shared" / "golden" / name
    if not path.exists():
        pytest.skip("golden outputs are absent")
    return path


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_golden_transformer_features(arch):
    shapes = json.loads(golden("backbones_shapes.json").read_text())[arch]
    x = np.random.default_rng(7).standard_normal((2, 3, 224, 224), dtype=np.float32)
    want = np.load(golden("backbones.npz"))
    layers = tuple(f"block{i}" for i in (2, 5, 8, 11))
    found = backbone(arch, published.by_rule(shapes)).only(layers)
    assert {n for _, group in found.left_out for n in group} == {
        n for n in shapes if n.startswith("head")
    }
    for name, values in found(x.transpose(0, 2, 3, 1)).items():
        tokens = np.asarray(values).reshape(2, 196, 192)
        single = want[f"{arch}/{name}"]
        np.testing.assert_allclose(
            tokens[:, ::8, ::8], single, rtol=2e-3, atol=2e-3 * np.abs(single).max()
        )
        np.testing.assert_allclose(
            [tokens.mean(), tokens.std()], want[f"{arch}/{name}/meanstd"], rtol=1e-5
        )


def test_golden_masked_autoencoder():
    from dsad.objectives import mae

    shapes = json.loads(golden("mae_shapes.json").read_text())
    want = {n.removeprefix("mae/"): v for n, v in np.load(golden("mae.npz")).items()}
    state = published.by_rule(shapes)
    state["pos_embed"], state["decoder_pos_embed"] = want["pos_embed"], want["decoder_pos_embed"]
    encoder = mae.EncoderConfig(arch="mae_vit_base_patch16", width=48, depth=2, heads=4, patch=8)
    for norm_pix in (False, True):
        cfg = mae.Config(
            encoder=encoder, decoder=DecoderConfig(width=32, depth=2, heads=4), norm_pix=norm_pix,
            view=mae.ViewConfig(side=32),
        )  # fmt: skip
        objective = mae.build(cfg, RunInfo(total_steps=1, batch_size=3, samples=3, classes=1))
        params, extra = pretrained.mae_trees(objective.encoder.spec, state, cfg.decoder)
        views = {"image": jnp.asarray(want["input"].transpose(0, 2, 3, 1)),
                 "noise": jnp.asarray(want["noise"])}  # fmt: skip
        latent, restore, mask = jax.jit(objective.encode)(params, extra, views)
        np.testing.assert_allclose(latent, want["latent"], rtol=2e-3, atol=2e-4)
        np.testing.assert_array_equal(restore, want["ids_restore"])
        np.testing.assert_array_equal(mask, want["mask"])
        pred = jax.jit(objective.decode)(params, extra, latent, restore)
        np.testing.assert_allclose(pred, want["pred"], rtol=2e-3, atol=2e-4)
        keys = {"key": jax.random.key(0), "step": jnp.int32(0)}
        loss, _ = jax.jit(objective.loss)(params, extra, views, **keys)
        assert float(loss) == pytest.approx(float(want[f"loss/norm_pix={norm_pix}"]), rel=1e-5)


def test_golden_residual_features():
    shapes = json.loads(golden("backbones_shapes.json").read_text())["resnet18"]
    x = np.random.default_rng(7).standard_normal((2, 3, 224, 224), dtype=np.float32)
    want = np.load(golden("backbones.npz"))
    found = backbone("resnet18", published.by_rule(shapes))(x.transpose(0, 2, 3, 1))
    for name, values in found.items():
        maps = np.asarray(values).transpose(0, 3, 1, 2)
        single = want[f"resnet18/{name}"]
        _, c, h, w = maps.shape
        np.testing.assert_allclose(
            maps[:, :: c // 16, :: h // 7, :: w // 7],
            single,
            rtol=2e-3,
            atol=2e-3 * np.abs(single).max(),
        )
        np.testing.assert_allclose(
            [maps.mean(), maps.std()], want[f"resnet18/{name}/meanstd"], rtol=1e-5
        )
