"""MobileNetV2 against float64 numpy, published counts, and real photos with the real weights."""

import csv
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsad.core.errors import ConfigError
from dsad.core.tree import count, flatten
from dsad.models import backbone, conv, mobilenet
from dsad.models.weights._names_plain import MobileNet
from tests.helpers import real_data

#: Input channels, expanded channels, output channels and stride of each block, written out.
BLOCKS = [
    (32, 32, 16, 1),
    (16, 96, 24, 2), (24, 144, 24, 1),
    (24, 144, 32, 2), (32, 192, 32, 1), (32, 192, 32, 1),
    (32, 192, 64, 2), (64, 384, 64, 1), (64, 384, 64, 1), (64, 384, 64, 1),
    (64, 384, 96, 1), (96, 576, 96, 1), (96, 576, 96, 1),
    (96, 576, 160, 2), (160, 960, 160, 1), (160, 960, 160, 1),
    (160, 960, 320, 1),
]  # fmt: skip
LAST = {2: "layer1", 5: "layer2", 12: "layer3", 16: "layer4"}


def int8_state(seed=0):
    """Random tensors in the form of the int8 file, with activations of order one to ten."""
    g = np.random.default_rng(seed)
    state = {}

    def layer(name, cout, cin, size, gain=2.0):
        fan_in = cin * size * size
        state[f"{name}.weight_q"] = g.integers(-127, 128, (cout, cin, size, size)).astype(np.int8)
        scale = np.sqrt(gain / fan_in) / 73 * g.uniform(0.5, 1.5, cout)
        state[f"{name}.scale"] = scale.astype(np.float32)
        state[f"{name}.bias"] = g.normal(0, 0.3, cout).astype(np.float32)

    layer("stem", 32, 3, 3)
    for i, (cin, mid, cout, _) in enumerate(BLOCKS):
        if i:
            layer(f"block{i}.expand", mid, cin, 1)
        layer(f"block{i}.dw", mid, 1, 3, gain=4.0)
        layer(f"block{i}.project", cout, mid, 1, gain=1.0)
    layer("head", 1280, 320, 1), layer("classifier", 1001, 1280, 1)
    return state


def read(state):
    """(params, extra) of a file's tensors."""
    loaded = MobileNet().load("mobilenet_v2", state)
    return loaded.params, loaded.extra


def images(height, width, seed=3):
    pixels = np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3))
    return pixels.astype(np.float32)


def numpy_network(state, x):
    """Maps and class scores in float64, written from the paper's table and TensorFlow's padding."""
    clipped = []

    def same(x, size, stride):
        pads = []
        for side in x.shape[1:3]:
            total = max(size - (side % stride or stride), 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
        return windows[:, ::stride, ::stride]

    def conv(x, name, stride=1):
        scale = state[f"{name}.scale"].astype(np.float64)
        kernel = state[f"{name}.weight_q"] * scale.reshape(-1, 1, 1, 1)
        windows = same(x, kernel.shape[2], stride)
        rule = "bhwcij,cij->bhwc" if kernel.shape[1] == 1 else "bhwcij,ocij->bhwo"
        kernel = kernel[:, 0] if kernel.shape[1] == 1 else kernel
        return np.einsum(rule, windows, kernel, optimize=True) + state[f"{name}.bias"]

    def relu6(x):
        clipped.append((x > 6).mean())
        return np.minimum(np.maximum(x, 0), 6)

    x, maps = relu6(conv(x.astype(np.float64), "stem", 2)), {}
    for i, (cin, _, cout, stride) in enumerate(BLOCKS):
        y = relu6(conv(x, f"block{i}.expand")) if i else x
        y = conv(relu6(conv(y, f"block{i}.dw", stride)), f"block{i}.project")
        x = x + y if stride == 1 and cin == cout else y
        if i in LAST:
            maps[LAST[i]] = x
    pooled = relu6(conv(x, "head")).mean((1, 2), keepdims=True)
    assert min(clipped[1:]) > 0  # the bound of 6 takes part
    return maps, conv(pooled, "classifier")[:, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 54)])
def test_maps_and_class_scores_equal_numpy(height, width):
    """Sides that are even and odd before each stride of 2, so zeros come on one side or on both."""
    state, x = int8_state(), images(height, width)
    params, extra = read(state)
    maps, none = jax.jit(mobilenet.mobilenet_v2().apply)(params, extra, x)
    assert none == extra == {}
    want, scores = numpy_network(state, x)
    assert set(maps) == set(want)
    channels, strides = (24, 32, 96, 320), (4, 8, 16, 32)
    for name, depth, stride in zip(sorted(maps), channels, strides, strict=True):
        cells = tuple(-(-side // stride) for side in (height, width))
        assert maps[name].shape == (2, *cells, depth)
        np.testing.assert_allclose(maps[name], want[name], atol=1e-4 * np.abs(want[name]).max())
    found = jax.jit(mobilenet.logits)(params, x)
    np.testing.assert_allclose(found, scores, atol=1e-4 * np.abs(scores).max())


def test_parameter_count_is_the_published_one():
    """Keras counts 3,538,984: four numbers per norm channel where a folded layer has one bias.

    17,056 channels have a norm; the background class adds a row of 1,281.
    """
    params, _ = mobilenet.mobilenet_v2().shapes()
    assert count(params) == 3_538_984 - 3 * 17_056 + 1_281


@pytest.mark.slow
def test_random_weights_keep_the_signal():
    params, extra = jax.jit(mobilenet.mobilenet_v2().init)(jax.random.key(0))
    maps, _ = jax.jit(mobilenet.mobilenet_v2().apply)(params, extra, images(64, 64))
    for name, values in maps.items():
        assert 0.3 < float(values.std()) < 6, name


def test_bfloat16_computes_the_same_network():
    params, extra = read(int8_state())

    def layer2(dtype):
        apply = mobilenet.mobilenet_v2(dtype=dtype).apply
        return jax.jit(lambda x: apply(params, extra, x)[0]["layer2"])(images(64, 64))

    f32, bf16 = layer2(jnp.float32), layer2(jnp.bfloat16)
    assert bf16.dtype == jnp.bfloat16
    assert np.linalg.norm(bf16.astype("f4") - f32) < 0.03 * np.linalg.norm(f32)


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (5, 2), (6, 2)])
def test_depthwise_equals_the_grouped_convolution_with_its_gradients(side, stride):
    g = np.random.default_rng(side)
    x = jnp.asarray(g.standard_normal((2, side, side + 1, 5)), jnp.float32)
    kernel = jnp.asarray(g.standard_normal((3, 3, 1, 5)), jnp.float32)

    def grouped(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=5,
        )  # fmt: skip

    want, pull = jax.vjp(grouped, x, kernel)
    got, ours = jax.vjp(lambda x, kernel: conv.depthwise(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    cotangent = jnp.asarray(g.standard_normal(want.shape), jnp.float32)
    for a, b in zip(ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# --- the file's form


def check_round_trip(state):
    """Int8 to trees to f32 names to trees: the same bits, and the product of the file's numbers."""
    first = read(state)
    written = MobileNet().save("mobilenet_v2", *first, "plain")
    for name, tensor in written.items():
        layer, leaf = name.rsplit(".", 1)
        want = state[f"{layer}.bias"]
        if leaf == "weight":
            scale = state[f"{layer}.scale"].reshape(-1, 1, 1, 1)
            want = state[f"{layer}.weight_q"].astype(np.float32) * scale
        assert tensor.tobytes() == want.astype(np.float32).tobytes(), name
    assert len(written) == 2 * len(state) / 3
    again = read(written)
    for (path, a), b in zip(flatten(first).items(), flatten(again).values(), strict=True):
        assert a.tobytes() == b.tobytes(), path


def test_int8_in_f32_out_and_in_again_keep_every_bit():
    check_round_trip(int8_state())


def test_faults_of_int8_layers_come_in_one_table():
    state = int8_state()
    del state["stem.scale"]
    state["block3.dw.scale"] = state["block3.dw.scale"][:7]
    state["block4.dw.weight_q"] = state["block4.dw.weight_q"].astype(np.float32)
    state["head.weight"] = np.zeros((1280, 320, 1, 1), np.float32)
    with pytest.raises(ConfigError, match="weights do not fit mobilenet_v2") as error:
        read(state)
    rows = [" ".join(line.split()) for line in str(error.value).splitlines()[2:]]
    assert rows == [
        "block3.dw.scale (144,), one per output (7,) float32",
        "block4.dw.weight_q int8 kernel (192, 1, 3, 3) float32",
        "head.weight int8 or f32, not both both",
        "stem.scale (32,), one per output missing",
    ]


def test_faults_of_layers_name_the_layer():
    state = int8_state()
    del state["head.bias"], state["block0.dw.weight_q"]
    state["block17.dw.bias"] = np.zeros(3, np.float32)
    state["classifier.weight_q"] = state["classifier.weight_q"][1:]
    state["classifier.scale"] = state["classifier.scale"][1:]
    with pytest.raises(ConfigError) as error:
        read(state)
    rows = [" ".join(line.split()) for line in str(error.value).splitlines()[2:]]
    assert rows == [
        "block0.dw.scale no tensor of mobilenet_v2 (32,)",
        "block0.dw.weight (32, 1, 3, 3) missing",
        "block17.dw.bias no tensor of mobilenet_v2 (3,)",
        "classifier.weight (1001, 1280, 1, 1) (1000, 1280, 1, 1)",
        "head.bias (1280,) missing",
    ]


def test_a_backbone_reads_the_file(tmp_path):
    state, x = int8_state(), images(33, 33)
    np.savez(tmp_path / "w.npz", **state)
    network = backbone("mobilenet_v2", tmp_path / "w.npz")
    assert network.strides == {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
    assert network.mean == network.std == (0.5, 0.5, 0.5)
    maps = jax.jit(lambda b, x: b(x))(network.only(("layer2",)), x)
    assert set(maps) == {"layer2"}
    want, _ = numpy_network(state, x)
    np.testing.assert_allclose(maps["layer2"], want["layer2"], atol=1e-3)


# --- real weights


@pytest.fixture(scope="module")
def real():
    """The real tensors; skips where they are absent."""
    with np.load(real_data("weights", "mobilenetv2_in1k_int8.npz")) as archive:
        return dict(archive)


def normalised(image, side):
    """A Pillow image as one network input (side, side, 3), by ``MEAN`` and ``STD``."""
    image = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return (np.asarray(image, np.float32) / 255 - mobilenet.MEAN) / mobilenet.STD


def test_the_real_file_keeps_every_bit(real):
    check_round_trip(real)


def test_photos_are_recognised(real):
    """Photos of scikit-learn: a Chinese palace (class 698) and a flower (985: daisy)."""
    from sklearn.datasets import load_sample_images

    photos = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo)
        edge = (image.width - image.height) // 2
        photos.append(normalised(image.crop((edge, 0, edge + image.height, image.height)), 224))
    scores = jax.jit(mobilenet.logits)(read(real)[0], np.stack(photos).astype(np.float32))
    assert np.argmax(scores, axis=1).tolist() == [1 + 698, 1 + 985]


@pytest.mark.slow
def test_tiny_images_are_recognised_far_above_chance(real):
    """400 Tiny-ImageNet images, 64 px enlarged to 128, among all 1,001 classes; chance is 0.1 %."""
    with np.load(real_data("natural", "tiny_imagenet_50per200.npz")) as archive:
        jpeg, ends, label, wnid = (archive[n] for n in ("jpeg", "offsets", "label", "wnid"))
    table = csv.reader(io.StringIO((pathlib.Path(__file__).parent / CLASSES).read_text()))
    index = {name: int(number) for name, number in list(table)[1:]}
    assert sorted(index) == sorted(wnid)
    rows = np.random.default_rng(0).choice(len(label), 400, replace=False)
    files = [io.BytesIO(jpeg[ends[i] : ends[i + 1]].tobytes()) for i in rows]
    inputs = np.stack([normalised(Image.open(f), 128) for f in files]).astype(np.float32)
    classify, params = jax.jit(mobilenet.logits), read(real)[0]
    scores = np.concatenate([classify(params, inputs[i : i + 50]) for i in range(0, 400, 50)])
    truth = np.array([1 + index[wnid[label[i]]] for i in rows])
    order = np.argsort(-scores, axis=1)
    assert (order[:, 0] == truth).mean() > 0.2
    assert (order[:, :5] == truth[:, None]).any(1).mean() > 0.4
    known = np.array([1 + i for i in index.values()])  # among the 200 classes that occur
    assert (known[scores[:, known].argmax(1)] == truth).mean() > 0.4


#: Places of Tiny-ImageNet's 200 WordNet ids among the sorted ids of the 1,000 ImageNet classes.
CLASSES = "tiny_imagenet_classes.csv"
