import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from dsad.augment.blur import draw_blur
from dsad.augment.color import apply_jitter, draw_jitter
from dsad.augment.crops import box_coordinates, resized_crop
from dsad.augment.views import ViewConfig, draw_crops, make_view
from dsad.core.config import build_dataclass
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.rng import named, sample_keys
from tests.helpers import optimised, real_data

EVERYTHING = ViewConfig(
    side=32, grey_probability=0.3, solarize_probability=0.3, blur_probability=0.6
)
GEOMETRY = ViewConfig(side=32, jitter_probability=0.0, blur_probability=0.0)
KEY = jax.random.key(42)


def make_batch(count=16, canvas=48):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, canvas, canvas, 3), dtype=np.uint8),
        "size": rng.integers(20, canvas + 1, (count, 2)).astype(np.int32),
        "index": np.arange(100, 100 + count, dtype=np.int32),
        "epoch": np.full(count, 3, np.int32),
    }


@functools.lru_cache
def jitted(config):
    return jax.jit(functools.partial(make_view, config=config))


def view(batch, config=EVERYTHING, key=KEY):
    return jax.tree.map(np.asarray, jitted(config)(batch, key))


def test_shapes_and_ranges():
    batch = make_batch()
    out = view(batch)
    assert out["image"].shape == (16, 32, 32, 3)
    assert out["box"].shape == (16, 4)
    assert out["image"].dtype == out["box"].dtype == np.float32
    pixels = out["image"] * EVERYTHING.std + np.array(EVERYTHING.mean)
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5
    assert ((out["box"] >= 0) & (out["box"] <= 1)).all()
    assert (out["box"][:, 3] > out["box"][:, 1]).all()


def test_the_whole_chain_equals_its_parts_one_by_one():
    """Crop, flip, jitter, grey, blur, solarize, normalise, in this order, from the same draws."""
    batch, config = make_batch(), EVERYTHING
    boxes, flips = jax.jit(draw_crops, static_argnames="config")(batch, KEY, config=config)
    images = np.asarray(jax.jit(resized_crop, static_argnums=2)(batch["image"], boxes, 32)) / 255
    images = np.where(np.asarray(flips)[:, None, None, None], images[:, :, ::-1], images)

    def keys(name):
        return sample_keys(named(KEY, name), batch["epoch"], batch["index"])

    def uniform(keys):
        return np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (), np.float32))(keys))

    draws = draw_jitter(
        keys("jitter"), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8
    )
    images = np.asarray(jax.jit(apply_jitter)(images, draws))
    drawn = draw_blur(keys("blur"), sigma=(0.1, 2.0), probability=0.6)
    sigma, blurs = (np.asarray(x) for x in drawn)
    greys, solarizes = uniform(keys("grey")) < 0.3, uniform(keys("solarize")) < 0.3
    assert all(x.any() and not x.all() for x in (blurs, greys, solarizes, np.asarray(flips)))
    found = view(batch)["image"]
    for i, image in enumerate(images.astype(np.float64)):
        if greys[i]:
            image = np.repeat((image @ [0.299, 0.587, 0.114])[..., None], 3, -1)
        if blurs[i]:
            for axis in (0, 1):
                image = ndimage.gaussian_filter1d(
                    image, sigma[i], axis=axis, mode="nearest", radius=8
                )
        expected = found[i] * config.std + np.array(config.mean)
        if solarizes[i]:  # at the threshold itself rounding decides
            clear = np.abs(image - 0.5) > 1e-5
            image = np.where(image >= 0.5, 1 - image, image)
            expected, image = expected[clear], image[clear]
        np.testing.assert_allclose(expected, image, atol=1e-5)


def same_views(found, expected):
    """Boxes bitwise; pixels within 1e-6 of their full scale, bitwise with jax 0.10.

    Newer compilers round the products of differently placed samples differently.
    """
    np.testing.assert_array_equal(found["box"], expected["box"])
    if jax.__version_info__ < (0, 11):
        np.testing.assert_array_equal(found["image"], expected["image"])
    scale = np.asarray(EVERYTHING.std, np.float32).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(found["image"] * scale, expected["image"] * scale, rtol=0, atol=1e-6)


def test_padding_has_no_influence():
    batch = make_batch()
    noisy = dict(batch, image=batch["image"].copy())
    rng = np.random.default_rng(9)
    for image, (height, width) in zip(noisy["image"], batch["size"], strict=True):
        image[height:] = rng.integers(0, 256, image[height:].shape)
        image[:, width:] = rng.integers(0, 256, image[:, width:].shape)
    assert (noisy["image"] != batch["image"]).any()
    for config in (EVERYTHING, dataclasses.replace(GEOMETRY, area=(1.0, 1.0))):
        jax.tree.map(np.testing.assert_array_equal, view(batch, config), view(noisy, config))


def test_batch_position_and_company_do_not_matter():
    batch = make_batch()
    order = np.random.default_rng(1).permutation(16)
    base = view(batch)
    moved = view({k: v[order] for k, v in batch.items()})
    same_views(moved, {k: v[order] for k, v in base.items()})
    alone = view({k: v[5:8] for k, v in batch.items()}, GEOMETRY)
    np.testing.assert_array_equal(alone["box"], base["box"][5:8])
    np.testing.assert_allclose(alone["image"], view(batch, GEOMETRY)["image"][5:8], atol=1e-5)


def test_epoch_index_and_key_change_the_view():
    batch = make_batch()
    base = view(batch)["box"]
    for other in (
        view(dict(batch, epoch=batch["epoch"] + 1)),
        view(dict(batch, index=batch["index"] + 16)),
        view(batch, key=jax.random.key(43)),
    ):
        assert (other["box"] != base).any(axis=1).all()


@pytest.mark.parametrize(
    ("shape", "config"),
    [pytest.param((4, 2), EVERYTHING, marks=pytest.mark.slow), ((8, 1), GEOMETRY)],
)
def test_any_mesh_gives_the_same_views(shape, config):
    batch = make_batch()
    expected = optimised(jitted(config), batch, KEY)
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1]))
    found = optimised(jitted(config), place_batch(batch, mesh), KEY)
    assert len(found["image"].sharding.device_set) == 8
    assert found["image"].addressable_shards[0].data.shape[0] == 2
    same_views(*jax.tree.map(np.asarray, (found, expected)))


SWITCHES = {
    "flip": 0.0,
    "jitter_probability": 0.0,
    "blur_probability": 0.0,
    "grey_probability": 0.0,
    "solarize_probability": 0.0,
}


def test_switching_operations_off_leaves_the_other_draws():
    """Without flip, jitter and the rest, the crops stay; the chain test above does the others."""
    batch = make_batch()
    base = view(batch)
    off = view(batch, dataclasses.replace(GEOMETRY, flip=0.0))
    flipped = base["box"][:, 2] < base["box"][:, 0]
    assert flipped.any()
    np.testing.assert_array_equal(base["box"][~flipped], off["box"][~flipped])
    np.testing.assert_array_equal(base["box"][flipped][:, [2, 1, 0, 3]], off["box"][flipped])


def test_an_operation_that_is_off_is_not_in_the_program():
    batch = make_batch(2)
    off = {name: 0.0 for name in SWITCHES}

    def size(config):
        program = jax.make_jaxpr(functools.partial(make_view, config=config))(batch, KEY)
        return len(re.findall(r" = ", str(program)))

    bare = size(dataclasses.replace(EVERYTHING, **off))
    for name in SWITCHES:
        assert size(dataclasses.replace(EVERYTHING, **(off | {name: 0.3}))) > bare
    neutral = dataclasses.replace(EVERYTHING, **off, jitter=(0.0, 0.0, 0.0, 0.0))
    assert size(dataclasses.replace(neutral, jitter_probability=1.0)) == bare


def test_a_blur_meant_for_another_side_scales_with_the_view():
    batch = make_batch(4)
    plain = dataclasses.replace(GEOMETRY, blur_probability=1.0)
    meant = dataclasses.replace(plain, blur_sigma=(0.2, 4.0), blur_side=64)
    found, expected = view(batch, meant)["image"], view(batch, plain)["image"]
    np.testing.assert_array_equal(found, expected)
    own = dataclasses.replace(plain, blur_side=32)
    np.testing.assert_array_equal(view(batch, own)["image"], expected)


def test_flip_probability_and_coordinates():
    count = 2000
    many = {
        "size": np.full((count, 2), 4, np.int32),
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    config = dataclasses.replace(GEOMETRY, flip=0.3, coordinates="centres")
    draw = jax.jit(draw_crops, static_argnames="config")
    _, flips = draw(many, KEY, config=config)
    assert stats.binomtest(int(flips.sum()), count, 0.3).pvalue > 1e-3
    batch = make_batch()

    @jax.jit  # of a view whose pixels are not asked for, little is left to compile
    def both(batch, key):
        boxes, flips = draw_crops(batch, key, config)
        expected = box_coordinates(boxes, batch["size"], flips, convention="centres")
        return make_view(batch, key, config)["box"], expected

    np.testing.assert_allclose(*both(batch, KEY), atol=1e-6)


def test_traced_once_and_no_weak_types():
    traces = []

    def counted(batch, key):
        traces.append(1)
        return make_view(batch, key, GEOMETRY)

    step = jax.jit(counted)
    for seed in range(3):
        out = step(make_batch(4), jax.random.key(seed))
    assert len(traces) == 1
    assert not any(x.weak_type for x in jax.tree.leaves(out))


def test_real_image_equals_pillow():
    path = real_data("mvtec", "bottle256", "train", "good", "000.png")
    with Image.open(path) as file:
        image = np.asarray(file.convert("RGB"))
    canvas = np.zeros((2, 300, 300, 3), np.uint8)
    canvas[:, : image.shape[0], : image.shape[1]] = image
    batch = {
        "image": canvas,
        "size": np.array([image.shape[:2]] * 2, np.int32),
        "index": np.array([0, 1], np.int32),
        "epoch": np.zeros(2, np.int32),
    }
    config = dataclasses.replace(GEOMETRY, side=96)
    out = view(batch, config)
    for i in range(2):
        x0, y0, x1, y1 = out["box"][i] * np.tile(image.shape[1::-1], 2)
        box = [round(float(v)) for v in (min(x0, x1), y0, max(x0, x1), y1)]
        pillow = Image.fromarray(image).crop(box).resize((96, 96), Image.Resampling.BILINEAR)
        expected = np.asarray(pillow)[:, ::-1] if x1 < x0 else np.asarray(pillow)
        pixels = (out["image"][i] * config.std + np.array(config.mean)) * 255
        assert np.abs(pixels - expected).max() < 1.01


BAD = [
    ("side", 1, "side: expected an integer >= 2, found 1"),
    ("area", (0.0, 1.0), r"area\[0\]: expected a finite number > 0, <= 1, found 0\.0"),
    ("area", (0.1, 1.2), r"area\[1\]: expected a finite number > 0, <= 1, found 1\.2"),
    ("aspect", (1.3, 0.7), r"aspect: expected .* from low to high, found \(1\.3, 0\.7\)"),
    ("flip", 1.5, r"flip: expected a finite number in \[0, 1\], found 1\.5"),
    ("jitter", (0.4, 0.4, 0.2, 0.6), r"jitter\[3\]: expected a hue of at most 0\.5.* found 0\.6"),
    ("jitter", (-0.1, 0, 0, 0), r"jitter\[0\]: expected a finite number >= 0, found -0\.1"),
    ("jitter", (0.1, 0, 0), r"jitter: expected tuple.* found \(0\.1, 0, 0\)"),
    ("jitter_probability", -0.1, "jitter_probability: expected .* found -0.1"),
    ("blur_sigma", (0.0, 2.0), r"blur_sigma\[0\]: expected a finite number > 0, found 0\.0"),
    ("blur_sigma", (2.0, 0.1), r"blur_sigma: expected .* from low to high, found \(2\.0, 0\.1\)"),
    ("blur_probability", float("nan"), "blur_probability: expected a finite number .* found nan"),
    ("solarize_threshold", 2.0, "solarize_threshold: expected .* found 2.0"),
    ("mean", (0.5, 0.5), r"mean: expected tuple\[float, float, float\], found \(0\.5, 0\.5\)"),
    ("std", (0.2, 0.0, 0.2), r"std\[1\]: expected a finite number > 0, found 0\.0"),
    ("coordinates", "corners", "coordinates: expected one of 'edges', 'centres', found 'corners'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_config_names_the_key(name, value, message):
    with pytest.raises(ConfigError, match=rf"^view\.{message}"):
        ViewConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"^config\.objective\.view1\.{message}"):
        build_dataclass(ViewConfig, {name: value}, "config.objective.view1")


def test_lists_and_integers_of_a_file():
    made = build_dataclass(ViewConfig, {"area": [0.5, 1], "side": 64}, "view")
    assert made == ViewConfig(area=(0.5, 1.0), side=64)
    assert hash(made)


def test_float_canvases_are_refused():
    batch = make_batch(2)
    with pytest.raises(DataError, match="expected uint8 canvases"):
        make_view(dict(batch, image=batch["image"] / 255), KEY, GEOMETRY)
