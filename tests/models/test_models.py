"""Networks against published counts, a plain numpy network, and golden features."""

import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.tree import count
from dsad.models import backbone, conv, resnet
from dsad.models.functional import Functional
from dsad.models.norm import EPSILON, BatchNorm
from dsad.models.resnet import ARCHS
from dsad.models.weights import pretrained
from tests.helpers import ROOT, real_data

COUNTS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "wide_resnet50_2": 66_834_240,
}


def torch_names(arch="resnet18", stages=4, seed=0):
    """A random state dict under torchvision's names and layout, from the published structure."""
    g = np.random.default_rng(seed)
    state = {}

    def conv(name, cout, cin, size):
        scale = np.sqrt(2 / (cin * size * size))
        state[f"{name}.weight"] = g.standard_normal((cout, cin, size, size)).astype("f4") * scale

    def norm(name, channels):
        state[f"{name}.weight"] = g.uniform(0.5, 1.5, channels).astype("f4")
        state[f"{name}.bias"] = g.normal(0, 0.1, channels).astype("f4")
        state[f"{name}.running_mean"] = g.normal(0, 0.1, channels).astype("f4")
        state[f"{name}.running_var"] = g.uniform(0.5, 1.5, channels).astype("f4")
        state[f"{name}.num_batches_tracked"] = np.int64(1)

    conv("conv1", 64, 3, 7), norm("bn1", 64)
    cin = 64
    for stage, blocks in enumerate(ARCHS[arch].blocks[:stages], start=1):
        cout = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            conv(f"{at}.conv1", cout, cin, 3), norm(f"{at}.bn1", cout)
            conv(f"{at}.conv2", cout, cout, 3), norm(f"{at}.bn2", cout)
            if cin != cout:
                conv(f"{at}.downsample.0", cout, cin, 1), norm(f"{at}.downsample.1", cout)
            cin = cout
    return state


def fold(state):
    """Each batch norm multiplied into the convolution in front of it."""
    folded = {}
    for name, kernel in state.items():
        if np.ndim(kernel) != 4:
            continue
        conv = name.removesuffix(".weight")
        norm = conv.replace("downsample.0", "downsample.1").replace("conv", "bn")
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + EPSILON)
        folded[name] = kernel * scale[:, None, None, None]
        folded[f"{conv}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return folded


def images(side=64, seed=3):
    return np.random.default_rng(seed).standard_normal((2, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_parameter_counts_shapes_and_strides(arch):
    network = resnet.resnet(arch)
    params, extra = network.shapes()
    assert count(params) == COUNTS[arch]
    maps, _ = jax.eval_shape(
        lambda p, e, x: network.apply(p, e, x, train=False),
        params, extra, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )  # fmt: skip
    for name, stride in resnet.STRIDES.items():
        side = 224 // stride
        assert maps[name].shape == (1, side, side, ARCHS[arch].channels(name))


def numpy_first_stage(state, x):
    """Stem and first block in float64, written from the published definition."""

    def conv(x, name, stride):
        kernel = state[f"{name}.weight"].astype(np.float64)
        size = kernel.shape[2]
        pad = size // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
        return np.einsum("bhwcij,ocij->bhwo", windows[:, ::stride, ::stride], kernel, optimize=True)

    def norm(x, name):
        var = state[f"{name}.running_var"].astype(np.float64) + 1e-5
        scale = state[f"{name}.weight"] / np.sqrt(var)
        return (x - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]

    x = np.maximum(norm(conv(x.astype(np.float64), "conv1", 2), "bn1"), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
    y = np.maximum(norm(conv(x, "layer1.0.conv1", 1), "layer1.0.bn1"), 0)
    x = np.maximum(norm(conv(y, "layer1.0.conv2", 1), "layer1.0.bn2") + x, 0)
    y = np.maximum(norm(conv(x, "layer1.1.conv1", 1), "layer1.1.bn1"), 0)
    return np.maximum(norm(conv(y, "layer1.1.conv2", 1), "layer1.1.bn2") + x, 0)


def test_the_first_stage_equals_numpy():
    state = torch_names(stages=1)
    maps = backbone("resnet18", state)(images())
    np.testing.assert_allclose(maps["layer1"], numpy_first_stage(state, images()), atol=2e-4)


def test_folded_weights_give_the_same_features():
    state = torch_names(stages=3)
    plain, folded = backbone("resnet18", state), backbone("resnet18", fold(state))
    assert folded.strides == {"layer1": 4, "layer2": 8, "layer3": 16}
    for name, values in plain(images()).items():
        np.testing.assert_allclose(folded(images())[name], values, atol=2e-3, rtol=2e-3)


def test_files_are_read_and_faults_listed(tmp_path):
    state = torch_names(stages=2)
    np.savez(tmp_path / "w.npz", **state)
    loaded = backbone("resnet18", tmp_path / "w.npz")
    np.testing.assert_array_equal(
        loaded(images())["layer2"], backbone("resnet18", state)(images())["layer2"]
    )
    del state["layer2.0.bn2.bias"]
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :3]
    state["layer1.9.conv1.weight"] = np.zeros((1, 1, 1, 1), "f4")
    with pytest.raises(ConfigError) as error:
        backbone("resnet18", state)
    rows = [re.split(r"  +", line.strip()) for line in str(error.value).splitlines()[1:]]
    assert rows == [
        ["tensor", "expected", "found"],
        ["layer1.0.conv1.weight", "(64, 64, 3, 3)", "(64, 3, 3, 3)"],
        ["layer1.9.conv1.weight", "no tensor of resnet18", "(1, 1, 1, 1)"],
        ["layer2.0.bn2.bias", "(128,)", "missing"],
    ]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    for path, text in (("w.npz", "not a readable"), ("gone.npz", "no such file"),
                       ("pickled.npz", "not a readable")):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            backbone("resnet18", tmp_path / path)
    with pytest.raises(ConfigError, match="torchvision ResNet names"):
        backbone("resnet18", {"blocks.0.attn.qkv.weight": np.zeros(3)})
    with pytest.raises(ConfigError, match="Did you mean 'resnet18'"):
        backbone("resnet8")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(ConfigError, match=re.escape(".npz")):
        pretrained.read(tmp_path / "w.h5")


@pytest.mark.slow
def test_a_backbone_is_a_pytree_and_random_weights_follow_the_seed():
    one, same, other = (backbone("resnet18", seed=s) for s in (0, 0, 1))
    call = jax.jit(lambda b, x: b(x)["layer1"])
    a, b, c = (call(x, images()) for x in (one, same, other))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert call._cache_size() == 2  # the seed is in the static description


def test_initialisation_is_the_published_one():
    params, _ = jax.jit(resnet.resnet("resnet18", zero_init_last=True).init)(jax.random.key(0))
    kernel = np.asarray(params["layer3_block1"]["conv1"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    assert not params["layer3_block1"]["norm2"]["scale"].any()
    assert (params["layer3_block1"]["norm1"]["scale"] == 1).all()


# --- real and golden data


def test_imagenet_weights_load_and_layer4_is_refused():
    from dsad.core.detection import FeatureBatch
    from dsad.core.types import silent
    from dsad.detectors import knn

    path = real_data("weights", "resnet18_in1k_folded_l1l3_fp16.npz")
    network = backbone("resnet18", path)
    maps = network(images(224))
    assert {n: m.shape[1:] for n, m in maps.items()} == {
        "layer1": (56, 56, 64), "layer2": (28, 28, 128), "layer3": (14, 14, 256),
    }  # fmt: skip
    detector = knn.build(knn.Config(layers=("layer3", "layer4")))
    batch = FeatureBatch(maps, np.ones(2, bool), "x", np.arange(2))
    with pytest.raises(ConfigError, match=r"layer4.*layer1, layer2, layer3"):
        detector.fit([batch], mesh=None, key=jax.random.key(0), progress=silent)


def test_golden_features():
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("golden outputs are absent")
    shapes = json.loads((folder / "backbones_shapes.json").read_text())["resnet18"]
    state = {}
    for name, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype="f4")
        if name.endswith("running_var"):
            n = 1 + 0.1 * np.abs(n)
        elif name.endswith(("running_mean", "bias")):
            n = 0.05 * n
        elif n.ndim == 1:
            n = 1 + 0.1 * n
        elif not name.endswith("num_batches_tracked"):
            n = n / np.sqrt(np.prod(shape[1:]))
        state[name] = n.astype(np.float32)
    x = np.random.default_rng(7).standard_normal((2, 3, 224, 224), dtype=np.float32)
    golden = np.load(folder / "backbones.npz")
    for name, values in backbone("resnet18", state)(x.transpose(0, 2, 3, 1)).items():
        a = np.asarray(values).transpose(0, 3, 1, 2)
        want = golden[f"resnet18/{name}"]
        got = a[:, :: a.shape[1] // 16, :: a.shape[2] // 7, :: a.shape[2] // 7]
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
        np.testing.assert_allclose(
            [a.mean(), a.std()], golden[f"resnet18/{name}/meanstd"], rtol=1e-5
        )


# --- building blocks


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (3, 2), (4, 2), (2, 2)])
def test_products_equal_the_convolution_with_its_gradients(side, stride):
    size = 3
    g = np.random.default_rng(side)
    x = jnp.asarray(g.standard_normal((2, side, side, 3)), jnp.float32)
    kernel = jnp.asarray(g.standard_normal((size, size, 3, 4)), jnp.float32)
    pad = size // 2

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def ours(x, kernel):
        return conv._as_products(x, kernel, stride)

    cotangent = jnp.asarray(g.standard_normal(plain(x, kernel).shape), jnp.float32)
    for f in (plain, ours):
        assert f(x, kernel).shape == cotangent.shape
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-4)
    want, got = (jax.vjp(f, x, kernel)[1](cotangent) for f in (plain, ours))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_batch_norm_keeps_the_views_apart():
    """Two views in one call equal two calls in turn, outputs and running statistics."""
    norm = Functional(lambda rngs: BatchNorm(3, dtype=jnp.float32, rngs=rngs))
    params, extra = norm.init(jax.random.key(0))
    params = {"scale": np.array([1, 2, 0.5], "f4"), "bias": np.array([0, 1, -1], "f4")}
    g = np.random.default_rng(0)
    views = [g.normal(m, s, (4, 5, 5, 3)).astype(np.float32) for m, s in ((0, 1), (3, 2))]
    together = np.stack(views, axis=1).reshape(8, 5, 5, 3)
    out, new = norm.apply(params, extra, together, train=True, views=2)
    running = {"mean": np.zeros(3), "var": np.ones(3)}
    for i, view in enumerate(views):
        x = view.astype(np.float64)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        want = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
        np.testing.assert_allclose(out[i::2], want, atol=2e-5)
        running["mean"] = 0.9 * running["mean"] + 0.1 * mean
        running["var"] = 0.9 * running["var"] + 0.1 * var
    for name, value in running.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-5)
    still, same = norm.apply(params, new, together, train=False)
    want = (together - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    np.testing.assert_allclose(still, want * params["scale"] + params["bias"], atol=1e-4)
    np.testing.assert_array_equal(same["mean"], new["mean"])


def test_weights_of_another_architecture_say_whose_they_are():
    with pytest.raises(ConfigError, match="The tensors are those of resnet18"):
        backbone("wide_resnet50_2", torch_names(stages=2))


def test_a_backbone_is_shown_without_its_weights():
    shown = repr(backbone("resnet18"))
    assert "resnet18" in shown
    assert len(shown) < 1000
