"""SqueezeNet 1.1 against float64 numpy that works as Caffe does, and its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.tree import count, flatten
from dsad.models import backbone, squeezenet
from dsad.models.weights._names_plain import SqueezeNet
from tests.helpers import real_data

#: Input channels, squeezed channels and channels of each expansion, written out.
FIRES = {2: (64, 16, 64), 3: (128, 16, 64), 4: (128, 32, 128), 5: (256, 32, 128),
         6: (256, 48, 192), 7: (384, 48, 192), 8: (384, 64, 256), 9: (512, 64, 256)}  # fmt: skip


def caffe_state(seed=0):
    """Random tensors under Caffe's names; pixels of 0 to 255 come in."""
    g = np.random.default_rng(seed)
    state = {}

    def layer(name, cout, cin, size, gain=2.0):
        kernel = np.sqrt(gain / (cin * size * size)) * g.standard_normal((cout, cin, size, size))
        state[f"{name}.weight"] = kernel.astype("f4")
        state[f"{name}.bias"] = g.normal(0, 0.1, cout).astype("f4")

    layer("conv1", 64, 3, 3, gain=2 / 70**2)
    for number, (cin, squeeze, expand) in FIRES.items():
        layer(f"fire{number}.squeeze1x1", squeeze, cin, 1)
        layer(f"fire{number}.expand1x1", expand, squeeze, 1)
        layer(f"fire{number}.expand3x3", expand, squeeze, 3)
    return state


def read(state):
    """(params, extra) of a file's tensors."""
    loaded = SqueezeNet().load("squeezenet1_1", state)
    return loaded.params, loaded.extra


def caffe_network(state, rgb):
    """Maps in float64 of uint8 RGB images, from Caffe's preprocessing and layer definitions."""

    def conv(x, name, stride=1, pad=0):
        kernel = state[f"{name}.weight"].astype(np.float64)
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(1, 2))
        windows = windows[:, ::stride, ::stride]
        out = np.einsum("bhwcij,ocij->bhwo", windows, kernel, optimize=True)
        return np.maximum(out + state[f"{name}.bias"], 0)

    def pool(x):
        cells = [int(np.ceil((side - 3) / 2)) + 1 for side in x.shape[1:3]]
        out = np.empty((len(x), *cells, x.shape[3]))
        for i in range(cells[0]):
            for j in range(cells[1]):
                out[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
        return out

    x = rgb[..., ::-1].astype(np.float64) - [103.939, 116.779, 123.68]
    x, maps = conv(x, "conv1", stride=2), {}
    for number in FIRES:
        x = pool(x) if number in (2, 4, 6) else x
        x = conv(x, f"fire{number}.squeeze1x1")
        wide = conv(x, f"fire{number}.expand3x3", pad=1)
        x = np.concatenate([conv(x, f"fire{number}.expand1x1"), wide], axis=-1)
        maps[number] = x
    return {"layer1": maps[3], "layer2": maps[5], "layer3": maps[9]}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 59), (17, 18)])
def test_maps_equal_caffe_in_numpy(height, width):
    """At 64 windows fit exactly; at 33, 59, 17 and 18 last windows hang over the border."""
    rgb = np.random.default_rng(1).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    state = caffe_state()
    want = caffe_network(state, rgb)
    x = ((rgb.astype(np.float32) / 255) - squeezenet.MEAN) / squeezenet.STD
    params, extra = read(state)
    maps, none = jax.jit(squeezenet.squeezenet1_1().apply)(params, extra, x.astype("f4"))
    assert none == extra == {}
    assert set(maps) == set(want)
    for (name, values), depth in zip(sorted(maps.items()), (128, 256, 512), strict=True):
        assert values.shape == want[name].shape
        assert values.shape[-1] == depth
        np.testing.assert_allclose(values, want[name], atol=1e-4 * np.abs(want[name]).max())


def test_parameter_count_is_the_published_one():
    """1,235,496 with the classifier of 512 · 1000 + 1000."""
    assert count(squeezenet.squeezenet1_1().shapes()[0]) == 1_235_496 - 513_000


@pytest.mark.parametrize(("side", "cells"), [(224, (55, 27, 13)), (227, (56, 28, 14))])
def test_sides_of_the_maps(side, cells):
    """227 px is the size of training; Caffe's blobs of pool1, pool3 and pool5 have these sides."""
    network = squeezenet.squeezenet1_1()
    maps, _ = jax.eval_shape(
        network.apply, *network.shapes(), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    )
    assert tuple(m.shape[1] for m in maps.values()) == cells


def test_images_without_a_cell_are_refused():
    params, extra = read(caffe_state())
    with pytest.raises(ConfigError, match=r"at least 17 × 17 pixels, found 64 × 16"):
        squeezenet.squeezenet1_1().apply(params, extra, np.zeros((1, 64, 16, 3), np.float32))


def test_bfloat16_computes_the_same_network():
    params, extra = read(caffe_state())
    images = 70 * np.random.default_rng(2).standard_normal((1, 64, 64, 3)).astype("f4")

    def layer1(dtype):
        apply = squeezenet.squeezenet1_1(dtype=dtype).apply
        return jax.jit(lambda x: apply(params, extra, x)[0]["layer1"])(images)

    f32, bf16 = layer1(jnp.float32), layer1(jnp.bfloat16)
    assert bf16.dtype == jnp.bfloat16
    assert np.linalg.norm(bf16.astype("f4") - f32) < 0.03 * np.linalg.norm(f32)


def check_round_trip(state):
    first = read(state)
    written = SqueezeNet().save("squeezenet1_1", *first, "plain")
    assert set(written) == set(state)
    for name, tensor in written.items():
        assert tensor.tobytes() == np.ascontiguousarray(state[name]).tobytes(), name
    again = read(written)
    for (path, a), b in zip(flatten(first).items(), flatten(again).values(), strict=True):
        assert a.tobytes() == b.tobytes(), path


def test_in_out_in_keeps_every_bit_and_turns_the_first_kernel():
    state = caffe_state()
    check_round_trip(state)
    kernel = read(state)[0]["conv1"]["kernel"]
    assert kernel[2, 1, 0, 7] == state["conv1.weight"][7, 2, 2, 1]  # red is Caffe's channel 2


def test_the_real_file_keeps_every_bit():
    with np.load(real_data("weights", "squeezenet11_in1k_notop.npz")) as archive:
        check_round_trip(dict(archive))


def test_faults_are_listed_and_the_classifier_is_left_out():
    state = {**caffe_state(), "conv10.weight": np.zeros((1000, 512, 1, 1), "f4")}
    network = backbone("squeezenet1_1", state)
    assert network.left_out == (("classifier", ("conv10.weight",)),)
    assert network.strides == {"layer1": 4, "layer2": 8, "layer3": 16}
    assert (network.mean, network.std) == (squeezenet.MEAN, squeezenet.STD)
    del state["fire9.expand3x3.bias"]
    state["fire2.squeeze1x1.weight"] = state["fire2.squeeze1x1.weight"].transpose(2, 3, 1, 0)
    state["fire10.squeeze1x1.bias"] = np.zeros(3, "f4")
    with pytest.raises(ConfigError, match="weights do not fit squeezenet1_1") as error:
        read(state)
    rows = [" ".join(line.split()) for line in str(error.value).splitlines()[2:]]
    assert rows == [
        "fire10.squeeze1x1.bias no tensor of squeezenet1_1 (3,)",
        "fire2.squeeze1x1.weight (16, 64, 1, 1) (1, 1, 64, 16)",
        "fire9.expand3x3.bias (256,) missing",
    ]
