"""Vision transformers against a float64 form written from the equations, and published counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from dsad.core import tree
from dsad.core.errors import ConfigError
from dsad.models import positions, transformer, vit
from dsad.models.decoder import Decoder, DecoderConfig, patchify, unpatchify
from dsad.models.draws import uniform_draws

SMALL = vit.Arch(width=24, depth=3, heads=4, patch=4, image=16)
VARIANTS = {
    "plain": SMALL,
    "mae": dataclasses.replace(SMALL, pos="sincos"),
    "distilled": dataclasses.replace(SMALL, distilled=True),
    "dinov2": dataclasses.replace(SMALL, layer_scale=True, registers=2),
    "clip": dataclasses.replace(
        SMALL, pre_norm=True, patch_bias=False, activation="quick_gelu", eps=1e-5
    ),
    "averaged": dataclasses.replace(SMALL, cls=False),
    "dinov3": dataclasses.replace(
        SMALL, width=32, pos="rope", registers=2, layer_scale=True, qkv_bias=False, eps=1e-5
    ),
    "gated": dataclasses.replace(
        SMALL, width=32, pos="rope", registers=1, activation="swiglu", hidden=40
    ),
}


def perturbed(spec, seed=1):
    """A network with random parameters everywhere, norms and LayerScale included."""
    net = vit.ViT(spec)
    params, extra = jax.jit(net.init)(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return net, jax.tree.unflatten(structure, noisy), extra


def norm64(p, x, eps, i=None):
    scale, bias = (np.asarray(p[k], np.float64)[() if i is None else i] for k in ("scale", "bias"))
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + bias


def turned64(x, angles):
    """Channels c and c + d/2 as one complex number, turned about 0."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def angles64(spec, periods, rows, columns):
    """Those of every token: none for the prefix, then rows, then columns."""
    found = [np.zeros(2 * len(periods))] * spec.prefix
    for i in range(rows):
        for j in range(columns):
            places = [-1 + (2 * i + 1) / rows, -1 + (2 * j + 1) / columns]
            found.append(np.concatenate([2 * math.pi * at / periods for at in places]))
    return np.stack(found)


def block64(p, i, x, spec, angles=None):
    def lin(name, y):
        bias = np.array(p[name]["bias"][i], np.float64) if "bias" in p[name] else 0.0
        if name == "qkv" and angles is not None and np.ndim(bias):
            bias[spec.width : 2 * spec.width] = 0  # keys
        return y @ np.asarray(p[name]["kernel"][i], np.float64) + bias

    hd = spec.width // spec.heads
    y = lin("qkv", norm64(p["norm1"], x, spec.eps, i))
    out = np.zeros_like(x)
    for h in range(spec.heads):
        q, k, v = (y[..., j * spec.width + h * hd :][..., :hd] for j in range(3))
        if angles is not None:
            q, k = turned64(q, angles), turned64(k, angles)
        scores = q @ np.swapaxes(k, 1, 2) / math.sqrt(hd)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., h * hd : (h + 1) * hd] = scores / scores.sum(-1, keepdims=True) @ v
    branch = lin("proj", out)
    x = x + (branch * np.asarray(p["scale1"]["gamma"][i]) if spec.layer_scale else branch)
    y = lin("fc1", norm64(p["norm2"], x, spec.eps, i))
    if spec.activation == "gelu":
        y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
    elif spec.activation == "swiglu":
        y = y[..., :40] / (1 + np.exp(-y[..., :40])) * y[..., 40:]
    else:
        y = y / (1 + np.exp(-1.702 * y))
    branch = lin("fc2", y)
    return x + (branch * np.asarray(p["scale2"]["gamma"][i]) if spec.layer_scale else branch)


def forward64(spec, params, extra, images):
    """Outputs of every block with all tokens, from the definition."""
    rows, columns, p = images.shape[1] // spec.patch, images.shape[2] // spec.patch, spec.patch
    kernel = np.asarray(params["patch"]["kernel"], np.float64)
    tokens = np.zeros((len(images), rows * columns, spec.width))
    for y in range(rows):
        for x in range(columns):
            piece = images[:, y * p : (y + 1) * p, x * p : (x + 1) * p].astype(np.float64)
            tokens[:, y * columns + x] = np.einsum("bijc,ijcd->bd", piece, kernel)
    tokens += np.asarray(params["patch"].get("bias", 0.0))
    angles, pos = None, np.zeros((spec.prefix + rows * columns, spec.width))
    if spec.pos == "rope":
        angles = angles64(spec, np.asarray(extra["periods"], np.float64), rows, columns)
    else:
        table = params["pos"] if spec.pos == "learned" else extra["pos"]
        grids = (spec.grid, spec.grid), (rows, columns)
        resampled = positions.resample_table(table, *grids, spec.table_prefix, spec.rule)
        pos = np.asarray(resampled, np.float64)
    front = [np.asarray(params[n], np.float64) for n in ("cls", "dist") if n in params]
    tokens = tokens + pos[-rows * columns :]
    first = [f + pos[i] for i, f in enumerate(front)]
    first += [np.asarray(r, np.float64) for r in params.get("registers", [])]
    lead = [np.broadcast_to(r, (len(images), 1, spec.width)) for r in first]
    x = np.concatenate([*lead, tokens], axis=1)
    if spec.pre_norm:
        x = norm64(params["pre_norm"], x, spec.eps)
    found = []
    for i in range(spec.depth):
        x = block64(params["blocks"], i, x, spec, angles)
        found.append(x)
    return found


OBLONG = ("dinov2", "clip", "dinov3")


@pytest.mark.parametrize(
    ("name", "side"), [*((name, 16) for name in VARIANTS), *((name, 24) for name in OBLONG)]
)
def test_equals_its_definition_in_float64(name, side):
    spec = VARIANTS[name]
    net, params, extra = perturbed(spec)
    images = np.random.default_rng(0).standard_normal((2, side, 16, 3)).astype(np.float32)
    maps, _ = jax.jit(net.apply)(params, extra, images)
    expected = forward64(spec, params, extra, images)
    assert list(maps) == list(vit.layer_names(spec))
    for i, x in enumerate(expected):
        want = x[:, spec.prefix :].reshape(2, side // 4, 4, -1)
        np.testing.assert_allclose(maps[f"block{i}"], want, atol=2e-4)
    if spec.pos == "rope":
        with pytest.raises(ConfigError, match=r"rotary positions .* some of their patches"):
            net.encode(params, extra, net.embed(params, extra, images))
        return
    latent = net.encode(params, extra, net.embed(params, extra, images))
    want = norm64(params["norm"], expected[-1], spec.eps)
    np.testing.assert_allclose(latent, want, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_the_library_s(dtype):
    g = np.random.default_rng(0)
    q, k, v = (jnp.asarray(g.standard_normal((2, 7, 3, 8)), dtype) for _ in range(3))
    want = np.asarray(jax.nn.dot_product_attention(q, k, v), np.float32)
    found = transformer.attention(q, k, v)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float32), want, atol=1e-5 if dtype == "float32" else 0.02
    )


def test_asked_blocks_are_those_of_the_whole_run():
    net, params, extra = perturbed(SMALL)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    every, _ = net.apply(params, extra, images)
    some, _ = net.apply(params, extra, images, layers=("block2", "block0", "block9"))
    assert set(some) == {"block0", "block2"}
    for name, value in some.items():
        np.testing.assert_allclose(value, every[name], atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "gated"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat, name):
    spec = VARIANTS[name]
    _, params, extra = perturbed(spec)
    images = np.random.default_rng(0).standard_normal((2, 16, 8, 3)).astype(np.float32)

    def grads(remat):
        net = vit.ViT(spec, remat=remat)

        def loss(p):
            maps, _ = net.apply(p, extra, images, layers=("norm2",))
            return jnp.sum(jnp.sin(maps["norm2"]))

        return jax.jit(jax.grad(loss))(params)

    plain, again = tree.flatten(grads("none")), tree.flatten(grads(remat))
    largest = max(np.abs(g).max() for g in plain.values())
    for path, g in plain.items():
        np.testing.assert_allclose(again[path], g, atol=1e-5 * largest, err_msg=path)


def test_encoder_treats_patch_tokens_alike():
    net, params, extra = perturbed(SMALL)
    tokens = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
    order = np.random.default_rng(1).permutation(9)
    straight = net.encode(params, extra, tokens)
    moved = net.encode(params, extra, tokens[:, order])
    np.testing.assert_allclose(moved[:, 1:], np.asarray(straight)[:, 1:][:, order], atol=1e-5)
    np.testing.assert_allclose(moved[:, 0], straight[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_bfloat16_keeps_parameters_and_stays_close(name):
    _, params, extra = perturbed(VARIANTS[name])
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    whole, _ = vit.ViT(VARIANTS[name]).apply(params, extra, images)
    half, _ = vit.ViT(VARIANTS[name], dtype="bfloat16").apply(params, extra, images)
    assert half["block2"].dtype == jnp.bfloat16
    gap = np.abs(np.asarray(half["block2"], np.float32) - whole["block2"]).mean()
    assert gap < 0.03 * np.abs(whole["block2"]).mean()


class TestPublishedSizes:
    def test_encoder_parameters_without_positions(self):
        counts = {"base": 85_647_360, "large": 303_099_904, "huge": 630_435_840}
        for size, expected in counts.items():
            name = f"mae_vit_{size}_patch{14 if size == 'huge' else 16}"
            assert tree.count(vit.vit(name).shapes()[0]) == expected

    def test_decoder_parameters(self):
        for source, patch, expected in (
            (768, 16, 26_008_320), (1024, 16, 26_139_392), (1280, 14, 26_178_124),
        ):  # fmt: skip
            decoder = Decoder(DecoderConfig(), source=source, patch=patch, grid=224 // patch)
            assert tree.count(decoder.shapes()[0]) == expected

    def test_one_block(self):
        for width, expected in ((768, 7_087_872), (1024, 12_596_224), (512, 3_152_384)):
            spec = transformer.BlockSpec(width=width, depth=1, heads=8)
            shapes = jax.eval_shape(
                lambda k, s=spec: uniform_draws(k, lambda d: transformer.init_blocks(d, s)),
                jax.random.key(0),
            )
            assert tree.count(shapes) == expected

    def test_fixed_tables_are_no_parameters(self):
        params, extra = vit.vit("mae_vit_large_patch16").shapes()
        assert "pos" not in params
        assert extra["pos"].shape == (197, 1024)

    def test_timm_shapes(self):
        """152 tensors of vit_tiny: 12 blocks of 12, and 8 outside, 2 of which are the head."""
        assert (
            tree.count(vit.vit("vit_tiny_patch16_224").shapes()[0]) == 5_717_416 - 192_000 - 1_000
        )
        reg = vit.vit("vit_small_patch14_reg4_dinov2").shapes()[0]
        assert reg["registers"].shape == (4, 384)
        assert reg["pos"].shape == (1 + 37**2, 384)


def test_initial_weights_follow_mae():
    spec = dataclasses.replace(vit.arch("mae_vit_large_patch16"), depth=1)
    params, _ = vit.ViT(spec).init(jax.random.key(0))
    qkv, kernel = params["blocks"]["qkv"]["kernel"], params["patch"]["kernel"]
    assert 0.0382 < np.abs(qkv).max() <= 0.03828
    assert 0.0577 < np.abs(kernel).max() <= 0.05787
    for name in ("qkv", "proj", "fc1", "fc2"):
        assert not np.any(params["blocks"][name]["bias"])
    assert 0.03 < np.abs(params["patch"]["bias"]).max() <= 1 / math.sqrt(768)
    assert np.std(params["cls"]) == pytest.approx(0.02, rel=0.1)


class TestPositions:
    def test_published_values(self):
        table = positions.sincos_table(1024, (14, 14))
        assert table.shape == (197, 1024)
        assert not table[0].any()
        np.testing.assert_array_equal(table[1], np.tile(np.repeat([0.0, 1.0], 256), 2))
        assert table[2, 0] == pytest.approx(0.841471, abs=1e-6)
        assert table[2, 512] == 0
        assert table[15, 0] == 0
        assert table[15, 512] == pytest.approx(0.841471, abs=1e-6)
        np.testing.assert_allclose((table[1:].astype(np.float64) ** 2).sum(1), 512, rtol=1e-6)

    @pytest.mark.parametrize("rule", ["plain", "antialias", "offset"])
    @pytest.mark.parametrize(
        ("source", "target"), [(5, (8, 8)), (9, (4, 4)), (37, (16, 16)), (16, (10, 21))]
    )
    def test_resampling_equals_torch(self, rule, source, target):
        torch = pytest.importorskip("torch", reason="torch is the oracle of bicubic resampling")
        cells = np.random.default_rng(0).standard_normal((source, source, 3)).astype(np.float32)
        image = torch.from_numpy(cells).permute(2, 0, 1)[None]
        options = {"mode": "bicubic", "align_corners": False}
        if rule == "offset":
            scale = tuple((n + 0.1) / source for n in target)
            want = torch.nn.functional.interpolate(image, scale_factor=scale, **options)
        else:
            options["antialias"] = rule == "antialias"
            want = torch.nn.functional.interpolate(image, target, **options)
        table = np.concatenate([np.ones((1, 3), np.float32), cells.reshape(-1, 3)])
        made = positions.resample_table(table, (source,) * 2, target, 1, rule)
        np.testing.assert_array_equal(made[0], 1)
        want = want[0].permute(1, 2, 0).reshape(-1, 3).numpy()
        np.testing.assert_allclose(made[1:], want, atol=1e-5)

    def test_resampling_follows_the_kernels(self):
        """Weights by hand: doubling a row puts samples a quarter cell from their neighbours."""
        a = -0.75
        near = lambda t: ((a + 2) * t - (a + 3)) * t * t + 1  # noqa: E731
        far = lambda t: a * (((t - 5) * t + 8) * t - 4)  # noqa: E731
        row = positions.cubic_weights(6, 12, "plain")[5]  # centre 2.25 in cells
        np.testing.assert_allclose(
            row, [0, far(1.25), near(0.25), near(0.75), far(1.75), 0], atol=1e-7
        )
        halved = positions.cubic_weights(8, 4, "antialias")
        # Twice two cells on either side of the centre 3 (in cells): the ends are out of reach.
        np.testing.assert_array_equal(halved[1] != 0, np.abs(np.arange(8) + 0.5 - 3) < 4)
        np.testing.assert_allclose(halved.sum(1), 1, atol=1e-6)
        # Halving with a kernel twice as wide: the two cells next to the centre weigh alike.
        assert halved[1][2] == pytest.approx(halved[1][3])
        offset = positions.cubic_weights(37, 16, "offset")
        first = 0.5 * 37 / 16.1 - 0.5
        assert offset[0].argmax() == round(first)
        ramp = offset @ np.arange(37.0)
        np.testing.assert_allclose(ramp[:4], [0.5552, 2.9248, 5.2925, 7.5327], atol=1e-4)
        np.testing.assert_allclose(ramp[-1], 35.1711, atol=1e-4)
        plain = positions.cubic_weights(37, 16, "plain") @ np.arange(37.0)
        np.testing.assert_allclose(plain[:2], [0.5628, 2.9546], atol=1e-4)

    def test_table_for_other_sizes_and_misfits(self):
        net, params, extra = perturbed(VARIANTS["dinov2"])
        images = np.zeros((1, 24, 16, 3), np.float32)
        maps, _ = net.apply(params, extra, images)
        assert maps["block0"].shape == (1, 6, 4, 24)
        with pytest.raises(
            ConfigError, match=r"30 × 16 pixels.*multiples of.*patches of 4.* to 32"
        ):
            net.apply(params, extra, np.zeros((1, 30, 16, 3), np.float32))


def test_patches_round_trip_and_their_order():
    y, x, c = np.meshgrid(np.arange(32), np.arange(48), np.arange(3), indexing="ij")
    images = (1000 * y + 10 * x + c)[None].astype(np.float32)
    patches = patchify(jnp.asarray(images), 16)
    assert patches.shape == (1, 6, 768)
    assert (patches[0, 0, 3], patches[0, 0, 48], patches[0, 0, 1]) == (10, 1000, 1)
    assert patches[0, 1, 0] == 160
    np.testing.assert_array_equal(unpatchify(patches, 16, (2, 3)), images)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"heads": 5}, "width: expected a number that its 5 heads .*, found 24"),
        ({"image": 18}, r"multiple of the patch's 4"),
    ],
)
def test_impossible_shapes_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("key", ["width", "depth", "heads", "patch", "image"])
def test_sizes_that_are_not_positive_are_refused_by_name(key):
    for value in (0, -4, True, 8.0):
        with pytest.raises(ConfigError, match=rf"{key}: expected an integer >= 1, found {value!r}"):
            dataclasses.replace(SMALL, **{key: value})
    with pytest.raises(ConfigError, match="registers: expected an integer >= 0, found -1"):
        dataclasses.replace(SMALL, registers=-1)


def test_unknown_architecture_lists_what_exists():
    with pytest.raises(ConfigError, match=r"Did you mean 'mae_vit_base_patch16'.*Known: .*dinov2"):
        vit.arch("mae_vit_base")
