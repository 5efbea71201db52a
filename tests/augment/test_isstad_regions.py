"""Regions: what is drawn, the masks of the shapes, and each change against an oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage, stats

from dsad.augment import _isstad_regions as regions
from dsad.augment import color
from tests.augment.test_color import grey64, reference

draw_shapes = jax.jit(regions.draw_shapes, static_argnums=2)
shape_masks = jax.jit(regions.shape_masks, static_argnums=2)
apply_change = jax.jit(regions.apply_change)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def boxes(box, count):
    return jnp.tile(jnp.array([box], jnp.int32), (count, 1))


def same(v, count):
    return jnp.tile(jnp.array([v], jnp.int32), (count, 1))


def shapes(*entries):
    """One image per entry, (kind, numbers): x, y, width, height or the vertices."""
    n = len(entries)
    corner, extent = np.zeros((2, n, 1, 2), np.int32)
    vertices, count = np.zeros((n, 1, 8, 2), np.int32), np.full((n, 1), 3, np.int32)
    for i, (kind, numbers) in enumerate(entries):
        if kind == regions.POLYGON:
            vertices[i, 0, : len(numbers)], count[i] = numbers, len(numbers)
            vertices[i, 0, len(numbers) :] = 7  # not to be read
        else:
            corner[i, 0], extent[i, 0] = numbers[:2], numbers[2:]
    kind = np.array([[k] for k, _ in entries], np.int32)
    used = np.ones((n, 1), bool)
    return regions.Shapes(*map(jnp.asarray, (kind, corner, extent, vertices, count, used)))


# --- masks


def sampled(picture, side):
    """A mask in original pixels as seen from the centres of side × side working pixels."""
    height, width = picture.shape
    rows = np.floor((np.arange(side) + 0.5) * height / side).astype(int)
    columns = np.floor((np.arange(side) + 0.5) * width / side).astype(int)
    return picture[np.ix_(rows, columns)]


def random_entries(kind, rng, count, width, height):
    for _ in range(count):
        if kind == regions.POLYGON:
            number = rng.integers(3, 9)
            yield kind, rng.integers(0, (width, height), (number, 2))
        else:
            x, y = rng.integers(0, width - 30), rng.integers(0, height - 30)
            yield kind, (x, y, rng.integers(20, width - x), rng.integers(20, height - y))


@pytest.mark.parametrize("kind", [regions.RECTANGLE, regions.ELLIPSE, regions.POLYGON])
@pytest.mark.parametrize(("width", "height", "side"), [(96, 96, 96), (211, 150, 64), (70, 90, 128)])
def test_shapes_equal_those_of_pillow(kind, width, height, side):
    """Exact for rectangles; curves and slanted edges agree from the third pixel off the outline."""
    rng = np.random.default_rng(kind)
    entries = list(random_entries(kind, rng, 12, width, height))
    size = same((height, width), 12)
    found = np.asarray(shape_masks(shapes(*entries), size, side))[:, 0]
    filled = 0
    for mask, (_, numbers) in zip(found, entries, strict=True):
        full, outline = (Image.new("L", (width, height)) for _ in range(2))
        if kind == regions.POLYGON:
            points = [tuple(map(int, p)) for p in numbers]
            ImageDraw.Draw(full).polygon(points, fill=1)
            ImageDraw.Draw(outline).line([*points, points[0]], fill=1)
        else:
            x, y, w, h = map(int, numbers)
            place = (x, y, x + w, y + h)
            draw = ImageDraw.Draw(full)
            if kind == regions.RECTANGLE:
                draw.rectangle(place, fill=1)
            else:
                draw.ellipse(place, fill=1)
                ImageDraw.Draw(outline).ellipse(place, outline=1)
        near = ndimage.binary_dilation(np.asarray(outline, bool), np.ones((3, 3)), 2)
        clear = ~sampled(near, side)
        expected = sampled(np.asarray(full, bool), side)
        np.testing.assert_array_equal(mask[clear], expected[clear])
        filled += bool(expected[clear].any())
    assert filled > 6


def even_odd(points, x, y):
    """Crossings of a ray upwards in float64, counted."""
    inside = False
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if (x0 > x) != (x1 > x) and y0 + (x - x0) * (y1 - y0) / (x1 - x0) > y:
            inside = not inside
    return inside


def test_crossing_polygons_are_filled_by_the_even_odd_rule():
    """A star of five lines has an empty middle; a bow tie fills both halves."""
    angle = 2 * np.pi * np.arange(0, 10, 2) / 5
    star = np.rint(50 + 45 * np.stack([np.sin(angle), -np.cos(angle)], 1)).astype(int)
    bow = np.array([[5, 8], [90, 85], [90, 9], [6, 84]])
    found = shape_masks(shapes((2, star), (2, bow)), same((100, 100), 2), 50)
    for mask, points in zip(np.asarray(found)[:, 0], (star, bow), strict=True):
        at = 2 * (np.arange(50) + 0.5) - 0.5  # never on an integer, so never on a vertex
        expected = [[even_odd(points.tolist(), x, y) for x in at] for y in at]
        np.testing.assert_array_equal(mask, expected)
    assert not found[0, 0, 25, 25]
    assert found[1, 0, 25, 10]
    assert found[1, 0, 25, 40]


def test_labels_at_the_working_size():
    """Fact sheet, check 9."""
    entries = (regions.RECTANGLE, (0, 0, 1023, 1023)), (regions.RECTANGLE, (300, 300, 399, 399))
    masks = np.asarray(shape_masks(shapes(*entries), same((1024, 1024), 2), 224))[:, 0]
    assert masks[0].sum() == 50176
    rows, columns = np.nonzero(masks[1])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (66, 152, 66, 152)
    assert masks[1].sum() == 87 * 87 == 7569


# --- draws


def test_coverage_of_the_published_settings():
    """Fact sheet, check 10: 1024 × 1024, whole image; the masks' pixel centres on a coarse grid."""
    for n_max, mean, tolerance in ((3, 0.150, 0.005), (1, 0.083, 0.004)):
        drawn = draw_shapes(keys(10000), boxes((0, 0, 1024, 1024), 10000), n_max)
        masks = shape_masks(drawn, same((1024, 1024), 10000), 32)
        share = np.asarray(jnp.any(masks, axis=1).mean((1, 2)))
        assert share.mean() == pytest.approx(mean, abs=tolerance)
        if n_max == 3:
            low, middle, high = np.percentile(share, [5, 50, 95])
            assert low == pytest.approx(0.009, abs=0.003)
            assert middle == pytest.approx(0.128, abs=0.008)
            assert high == pytest.approx(0.371, abs=0.015)


def test_draws_fill_their_ranges_evenly():
    count = 20000
    drawn = jax.tree.map(np.asarray, draw_shapes(keys(count, 3), boxes((20, 40, 90, 97), count), 3))
    number = drawn.used.sum(1)
    assert (np.sort(drawn.used, axis=1)[:, ::-1] == drawn.used).all()
    for values, options in (
        (number, range(1, 4)),
        (drawn.kind[:, 0], range(3)),
        (drawn.kind[:, 2], range(3)),
        (drawn.count[:, 0], range(3, 9)),
        (drawn.corner[:, 0, 0], range(20, 41)),  # x1 .. x2 - 50
        (drawn.corner[:, 1, 1], range(40, 48)),  # y1 .. y2 - 50
        (drawn.vertices[:, 0, 0, 0], range(20, 41)),
        (drawn.vertices[:, 2, 7, 1], range(40, 48)),
        (drawn.extent[drawn.corner[..., 0] == 30][:, 0], range(10, 61)),  # 10 .. x2 - x
        (drawn.extent[drawn.corner[..., 1] == 44][:, 1], range(10, 54)),
    ):
        found, counts = np.unique(values, return_counts=True)
        assert found.tolist() == list(options)
        assert stats.chisquare(counts).pvalue > 1e-3
    table = np.stack([drawn.corner[:, 0, 0], drawn.corner[:, 0, 1], drawn.vertices[:, 0, 0, 0],
                      drawn.vertices[:, 0, 1, 0], drawn.corner[:, 1, 0], number])  # fmt: skip
    assert np.abs(np.corrcoef(table) - np.eye(6)).max() < 0.03


@pytest.mark.parametrize("side", [1, 2, 9, 11, 30, 49, 50, 51])
def test_small_boxes_still_give_shapes_inside_them(side):
    """Quirk 10: under 50 pixels the published ranges are empty."""
    x, y, count = 13, 21, 300
    box = (x, y, x + side, y + side)
    drawn = draw_shapes(keys(count), boxes(box, count), 2)
    for place in (drawn.corner, drawn.vertices):
        assert int(place[..., 0].min()) == x
        assert int(place[..., 1].min()) == y
        assert int(place[..., 0].max()) < x + side
        assert int(place[..., 1].max()) < y + side
    far = np.asarray(drawn.corner + drawn.extent)
    assert far.max(axis=(0, 1)).tolist() == [x + side, y + side]
    assert int(drawn.extent.min()) >= min(10, (side + 1) // 2)
    boxed = np.asarray(drawn.kind) != regions.POLYGON
    masks = np.asarray(shape_masks(drawn, same((80, 80), count), 80)).any((2, 3))
    assert masks[np.asarray(drawn.used) & boxed].all()
    if 9 <= side < 50:  # polygons are no single points, as they are in the published range of 50
        assert masks[np.asarray(drawn.used) & ~boxed].mean() > 0.7


def test_families_and_options_are_equally_likely():
    count = 18000
    change = jax.jit(regions.draw_change)(keys(count, 5))
    change = jax.tree.map(np.asarray, change._replace(noise_key=None))
    jitter, grey, blur, noise = change.jitter.apply, change.grey, change.blur, change.noise
    mirror = change.mirror.any(1)
    colour = jitter | grey | blur
    assert (colour.astype(int) + mirror + noise == 1).all()
    for family in (colour, mirror, noise):
        assert stats.binomtest(int(family.sum()), count, 1 / 3).pvalue > 1e-3
    codes, counts = np.unique((4 * jitter + 2 * grey + blur)[colour], return_counts=True)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6]  # one or two of three, never all
    assert stats.chisquare(counts).pvalue > 1e-3
    codes, counts = np.unique(change.mirror[mirror] @ [2, 1], return_counts=True)
    assert codes.tolist() == [1, 2, 3]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(change.sigma, stats.uniform(15, 5).cdf).pvalue > 1e-3
    for i in range(3):
        factors = change.jitter.factors[:, i]
        assert stats.kstest(factors, stats.uniform(0.2, 1.6).cdf).pvalue > 1e-3
    assert stats.kstest(change.jitter.shift, stats.uniform(-0.4, 0.8).cdf).pvalue > 1e-3


# --- changes

OPTIONS = ["jitter", "grey", "blur", "jitter+grey", "jitter+blur", "grey+blur",
           "left-right", "top-bottom", "both", "noise"]  # fmt: skip
SIDE, SIZE = 40, (160, 100)


def every_change():
    """One sample per option, with its own factors and order."""
    rng = np.random.default_rng(3)
    n = len(OPTIONS)
    jitter = color.JitterDraws(
        rng.uniform(0.2, 1.8, (n, 3)).astype(np.float32),
        rng.uniform(-0.4, 0.4, n).astype(np.float32),
        np.stack([rng.permutation(4) for _ in range(n)]).astype(np.int32),
        np.array(["jitter" in o for o in OPTIONS]),
    )
    return regions.Change(
        jitter=jitter,
        grey=np.array(["grey" in o for o in OPTIONS]),
        blur=np.array(["blur" in o for o in OPTIONS]),
        sigma=rng.uniform(15, 20, n).astype(np.float32),
        mirror=np.array([[o in (name, "both") for name in OPTIONS[7:5:-1]] for o in OPTIONS]),
        noise=np.array([o == "noise" for o in OPTIONS]),
        noise_key=keys(n),
    )


def expected_change(image, option, change, i):
    image = image.astype(np.float64)
    if "jitter" in option:
        for operation in change.jitter.order[i]:
            hue = operation == color.HUE
            amount = change.jitter.shift[i] if hue else change.jitter.factors[i, operation]
            image = reference(image, operation, float(amount))
    if "grey" in option:
        image = np.repeat(grey64(image), 3, axis=-1)
    if "blur" in option:
        for axis in (0, 1):
            sigma = change.sigma[i] * SIDE / SIZE[axis]
            image = ndimage.gaussian_filter1d(
                image, sigma, axis=axis, mode="nearest", radius=SIDE - 1
            )
    flips = {"left-right": np.fliplr, "top-bottom": np.flipud, "both": lambda v: v[::-1, ::-1]}
    return flips.get(option, lambda v: v)(image)


def test_every_change_equals_its_oracle():
    images = np.random.default_rng(0).random((len(OPTIONS), SIDE, SIDE, 3), dtype=np.float32)
    images[:, :9, :20] = images[:, :9, :20, :1]
    change = every_change()
    found = np.asarray(apply_change(images, change, same(SIZE, len(OPTIONS))))
    assert found.min() >= 0
    assert found.max() <= 1
    for i, option in enumerate(OPTIONS[:-1]):
        expected = expected_change(images[i], option, change, i)
        np.testing.assert_allclose(found[i], expected, atol=1e-5, err_msg=option)
        assert np.abs(found[i] - images[i]).max() > 0.1
    mirrored = np.asarray(OPTIONS[6:9])
    assert mirrored.tolist() == ["left-right", "top-bottom", "both"]
    np.testing.assert_array_equal(found[6], images[6, :, ::-1])  # flips lose nothing
    np.testing.assert_array_equal(found[8], images[8, ::-1, ::-1])


def test_noise_is_half_of_uniform_bytes():
    count, side = 12, 48
    images = np.random.default_rng(1).random((count, side, side, 3), dtype=np.float32)
    change = jax.tree.map(lambda v: v[jnp.full(count, len(OPTIONS) - 1)], every_change())
    change = change._replace(noise_key=keys(count, 8))
    found = np.asarray(jax.jit(regions.apply_change)(images, change, same((480, 480), count)))
    noise = 255 * (2 * found.astype(np.float64) - images)
    values = np.rint(noise).astype(int)
    np.testing.assert_allclose(noise, values, atol=1e-3)
    assert (values.min(), values.max()) == (0, 255)
    assert stats.chisquare(np.bincount(values.ravel(), minlength=256)).pvalue > 1e-3
    assert len(np.unique(values.reshape(count, -1), axis=0)) == count
    near = values[:, :, 1:], values[:, :, :-1]
    below = values[:, 1:], values[:, :-1]
    channels = values[..., 0], values[..., 1]
    for a, b in (near, below, channels, (values[1:], values[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_background_removal_equals_its_definition():
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (4, 37, 37, 3), dtype=np.uint8)
    pixels[1] = pixels[1] // 30  # few values, many of them equal to the mean
    pixels[2, ..., :] = pixels[2, ..., :1]
    pixels[3] = 91  # nothing is above the mean
    images = (pixels / np.float32(255)).astype(np.float32)
    found = np.asarray(jax.jit(regions.without_background)(images))
    for i, image in enumerate(pixels[:3].astype(np.int64)):
        luma = image @ [299, 587, 114]
        bright = luma * luma.size > luma.sum()
        colour = np.trunc(image[bright].mean(0))
        expected = np.where(bright[..., None], image, colour)
        np.testing.assert_array_equal(np.rint(255 * found[i]), expected)
        np.testing.assert_array_equal(found[i][bright], images[i][bright])
    np.testing.assert_array_equal(found[3], images[3])


def test_the_mean_of_a_large_image_does_not_overflow():
    pixels = np.full((1, 1024, 1024, 3), 255, np.uint8)
    pixels[0, 0] = 10
    found = np.asarray(jax.jit(regions.without_background)(pixels / np.float32(255)))
    np.testing.assert_array_equal(found, 1)
