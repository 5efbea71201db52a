import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dsad.augment.crops import box_coordinates, random_resized_crop_box, resized_crop


def pillow_crop(image, box, side, flip):
    """Crop first, then resize, per channel in Pillow's float mode."""
    top, left, height, width = (int(v) for v in box)
    planes = []
    for channel in range(image.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel], np.float32))
        plane = plane.crop((left, top, left + width, top + height))
        plane = plane.resize((side, side), Image.Resampling.BILINEAR)
        planes.append(np.asarray(plane))
    out = np.stack(planes, -1)
    return out[:, ::-1] if flip else out


crop = jax.jit(resized_crop, static_argnames="side")


@pytest.mark.parametrize("side", [17, 64])
def test_crop_equals_pillow(side):
    rng = np.random.default_rng(0)
    images = rng.random((8, 90, 131, 3), dtype=np.float32)
    boxes = np.array(
        [
            [0, 0, 90, 131],  # everything, non-square
            [13, 20, 64, 64],  # the box itself where side is 64
            [5, 100, 80, 31],  # shrinks one axis, enlarges the other; touches the right edge
            [70, 0, 20, 131],
            [40, 50, 3, 2],
            [89, 130, 1, 1],  # one pixel: constant
            [1, 1, 17, 34],
            [2, 3, 65, 63],
        ],
        np.float32,
    )
    flips = np.arange(8) % 2 == 1
    found = crop(images, boxes, side=side, flip=flips)
    assert found.shape == (8, side, side, 3)
    assert found.dtype == jnp.float32
    for i in range(8):
        expected = pillow_crop(images[i], boxes[i], side, flips[i])
        np.testing.assert_allclose(found[i], expected, atol=2e-6)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_crop_of_any_box_equals_pillow(data):
    height = data.draw(st.integers(1, 60))
    width = data.draw(st.integers(1, 90))
    top = data.draw(st.integers(0, 60 - height))
    left = data.draw(st.integers(0, 90 - width))
    flip = data.draw(st.booleans())
    image = np.random.default_rng(height * 91 + width).random((60, 90, 3), dtype=np.float32)
    box = np.array([top, left, height, width], np.float32)
    found = crop(image, box, side=24, flip=jnp.array(flip))
    np.testing.assert_allclose(found, pillow_crop(image, box, 24, flip), atol=2e-6)


def test_uint8_keeps_its_scale_and_matches_pillow_rgb_within_rounding():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)
    box = np.array([10, 5, 48, 40], np.float32)
    found = np.asarray(crop(image, box, side=32, flip=jnp.array(False)))
    pillow = Image.fromarray(image).crop((5, 10, 45, 58))
    pillow = np.asarray(pillow.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(found - pillow).max() < 1.01  # two passes, each rounded to integers
    np.testing.assert_allclose(found, pillow_crop(image, box, 32, False), atol=3e-4)


def test_large_canvas_keeps_precision():
    """Weights are formed from exact integers, so a far-off box is as good as a near one."""
    rng = np.random.default_rng(2)
    image = np.zeros((1100, 1400, 1), np.float32)
    part = rng.random((700, 500, 1), dtype=np.float32)
    image[350:1050, 880:1380] = part
    box = np.array([350, 880, 700, 500], np.float32)
    found = crop(image, box, side=224)
    near = crop(part, np.array([0, 0, 700, 500], np.float32), side=224)
    np.testing.assert_allclose(found, near, atol=1e-6)
    np.testing.assert_allclose(near, pillow_crop(part, [0, 0, 700, 500], 224, False), atol=2e-6)


def test_nothing_outside_the_box_enters():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    other = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    other[7:30, 11:25] = image[7:30, 11:25]
    box = np.array([7, 11, 23, 14], np.float32)
    for side in (8, 64):
        np.testing.assert_array_equal(crop(image, box, side=side), crop(other, box, side=side))


def reference_box(draws, height, width, area, aspect):
    """The published rule as a plain loop in float64, fed with the same uniform draws."""
    place = draws[-2:]
    for u, v in draws[:-2].reshape(10, 2):
        target = height * width * (area[0] + (area[1] - area[0]) * u)
        low, high = math.log(aspect[0]), math.log(aspect[1])
        ratio = math.exp(low + (high - low) * v)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w)
    if width / height < min(aspect):
        w, h = width, round(width / min(aspect))
    elif width / height > max(aspect):
        h, w = height, round(height * max(aspect))
    else:
        h, w = height, width
    return ((height - h) // 2, (width - w) // 2, h, w)


BOX_CASES = {
    "square": (256, 256, (0.08, 1.0), (3 / 4, 4 / 3)),
    "wide": (120, 300, (0.08, 1.0), (3 / 4, 4 / 3)),
    "whole area": (100, 100, (0.5, 1.0), (0.5, 2.0)),
    "never fits, wide": (50, 400, (0.9, 1.0), (3 / 4, 4 / 3)),
    "never fits, tall": (400, 51, (0.9, 1.0), (3 / 4, 4 / 3)),
    "tiny": (3, 2, (0.08, 1.0), (3 / 4, 4 / 3)),
}


@functools.partial(jax.jit, static_argnames=("area", "aspect", "tries"))
def draw_boxes(keys, size, area, aspect, tries):
    def draw(key):
        return random_resized_crop_box(key, size, area=area, aspect=aspect, tries=tries)

    return jax.vmap(draw)(keys)


def boxes_of(name, tries=10):
    height, width, area, aspect = BOX_CASES[name]
    keys = jax.random.split(jax.random.key(7), 3000)
    return np.asarray(draw_boxes(keys, jnp.array([height, width]), area, aspect, tries))


@pytest.mark.parametrize("name", BOX_CASES)
def test_box_follows_the_published_rule(name):
    height, width, area, aspect = BOX_CASES[name]
    boxes = boxes_of(name)[:300]
    keys = jax.random.split(jax.random.key(7), 3000)[:300]
    draws = jax.vmap(lambda k: jax.random.uniform(k, (22,), jnp.float32))(keys)
    draws = np.asarray(draws, np.float64)
    expected = [reference_box(d, height, width, area, aspect) for d in draws]
    # Rounding at exactly half a pixel may go the other way in float32.
    same = (boxes == np.array(expected)).all(axis=1)
    assert same.mean() > 0.99
    if name.startswith("never"):
        assert same.all()
        assert len(np.unique(boxes, axis=0)) == 1


@pytest.mark.parametrize("name", BOX_CASES)
def test_boxes_lie_inside_and_are_whole_pixels(name):
    height, width, _, _ = BOX_CASES[name]
    boxes = boxes_of(name)
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, np.round(boxes))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_fallback_values():
    wide = boxes_of("never fits, wide")
    np.testing.assert_array_equal(wide[0], [0, (400 - 67) // 2, 50, 67])
    tall = boxes_of("never fits, tall")
    np.testing.assert_array_equal(tall[0], [(400 - 68) // 2, 0, 68, 51])


def test_only_ten_tries():
    """With one try the fallback is common on a wide image, with ten it is rare but real."""
    rates = {}
    for tries in (1, 10):
        boxes = boxes_of("wide", tries)
        rates[tries] = (boxes == [0, 70, 120, 160]).all(axis=1).mean()
    # One draw fits with probability p (own integral over the two uniforms), ten fail with (1-p)^10.
    u, v = np.meshgrid((np.arange(1000) + 0.5) / 1000, (np.arange(1000) + 0.5) / 1000)
    target = 120 * 300 * (0.08 + 0.92 * u)
    ratio = np.exp(np.log(0.75) + (np.log(4 / 3) - np.log(0.75)) * v)
    fits = (np.round(np.sqrt(target / ratio)) <= 120) & (np.round(np.sqrt(target * ratio)) <= 300)
    for tries in (1, 10):
        expected = (1 - fits.mean()) ** tries
        sigma = math.sqrt(expected * (1 - expected) / 3000)
        assert abs(rates[tries] - expected) < 5 * sigma + 1e-4


def test_area_and_aspect_are_distributed_as_stated():
    """Where every draw fits: area uniform, aspect log-uniform, independent, position uniform."""
    keys = jax.random.split(jax.random.key(3), 4000)
    boxes = draw_boxes(keys, jnp.array([4000, 4000]), (0.1, 0.5), (3 / 4, 4 / 3), 10)
    top, left, height, width = np.asarray(boxes, np.float64).T
    area = height * width / 4000**2
    assert 0.1 - 1e-3 <= area.min() < 0.105
    assert 0.495 < area.max() <= 0.5 + 1e-3
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    log_aspect = np.log(width / height)
    low = math.log(3 / 4)
    assert stats.kstest(log_aspect, stats.uniform(low, -2 * low).cdf).pvalue > 1e-3
    for offset in (top / (4000 - height), left / (4000 - width)):
        assert stats.kstest(offset, stats.uniform.cdf).pvalue > 1e-3
    table = np.corrcoef([area, log_aspect, top / (4000 - height), left / (4000 - width)])
    assert np.abs(table - np.eye(4)).max() < 0.08


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("extent", "tolerance"), [((32, 48), 1e-6), ((9, 13), 1e-6), ((24, 33), 1e-3)]
)
def test_coordinates_locate_the_pixels_of_a_ramp(extent, tolerance, flip):
    """The value of a linear ramp at each view pixel is the position its coordinates claim.

    Exactly so when enlarging and for whole reduction factors; otherwise the sampled triangle is
    slightly lopsided (1e-3 is 0.06 of an input pixel here, "centres" would be off by up to 1).
    """
    height, width, side = 40, 60, 16
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    image = np.stack(np.broadcast_arrays(x[None, :], y[:, None], np.float32(0)), -1)
    box = np.array([7, 10, *extent], np.float32)
    view = np.asarray(crop(image, box, side=side, flip=jnp.array(flip)))
    x0, y0, x1, y1 = np.asarray(
        box_coordinates(jnp.array(box), jnp.array([height, width]), jnp.array(flip))
    )
    middle = (np.arange(side) + 0.5) / side
    inner = slice(2, -2)  # at the ends the triangle is cut off by the box
    np.testing.assert_allclose(view[8, inner, 0], (x0 + middle * (x1 - x0))[inner], atol=tolerance)
    np.testing.assert_allclose(view[inner, 8, 1], (y0 + middle * (y1 - y0))[inner], atol=tolerance)
    assert (x1 < x0) == flip


def test_coordinate_conventions():
    box = jnp.array([[10.0, 20, 30, 40], [0, 0, 100, 200], [5, 6, 1, 1]])
    size = jnp.array([[100, 200], [100, 200], [11, 21]])
    flip = jnp.array([False, True, False])
    edges = box_coordinates(box, size, flip)
    np.testing.assert_allclose(
        edges, [[0.1, 0.1, 0.3, 0.4], [1, 0, 0, 1], [6 / 21, 5 / 11, 7 / 21, 6 / 11]], rtol=1e-6
    )
    centres = box_coordinates(box, size, flip, convention="centres")
    expected = [
        [20 / 199, 10 / 99, 59 / 199, 39 / 99],
        [1, 0, 0, 1],
        [6 / 20, 5 / 10, 6 / 20, 5 / 10],
    ]
    np.testing.assert_allclose(centres, expected, rtol=1e-6)
