"""Facts of an image: Otsu's threshold from its definition, and the box of the largest object."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from dsad.data import facts
from tests.helpers import real_data


def defined_threshold(grey):
    """Otsu (1979): the threshold with the largest p0 p1 (mu1 - mu0)^2, by trying them all."""
    values = grey.ravel().astype(np.float64)
    best, found = -1.0, None
    for t in range(256):
        dark, bright = values[values <= t], values[values > t]
        if dark.size and bright.size:
            between = dark.size * bright.size * (bright.mean() - dark.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, found = between, t
    return found


def luma(image):
    """ITU-R 601 in whole steps."""
    return np.floor(image.astype(np.float64) @ [0.299, 0.587, 0.114] + 0.5).astype(np.uint8)


def plainly(image):
    """The box by the sheet's words: threshold, fill, label, measure, grow. Slow and simple."""
    height, width = image.shape[:2]
    threshold = defined_threshold(luma(image))
    if threshold is None:
        return [0, 0, width, height]
    filled = ndimage.binary_fill_holes(luma(image) > threshold)
    areas, count = ndimage.label(filled, np.ones((3, 3)))
    sizes = [np.count_nonzero(areas == i + 1) for i in range(count)]
    ys, xs = np.nonzero(areas == 1 + int(np.argmax(sizes)))
    w, h = int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
    across, along = w // 10, h // 5
    left, top = int(xs.min()) - across, int(ys.min()) - along
    right, bottom = int(xs.max()) + 1 + across, int(ys.max()) + 1 + along
    return [max(0, left), max(0, top), min(width, right), min(height, bottom)]


def grey_image(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def scene(seed, shape=(60, 90)):
    """Smooth blobs with noise and rings: holes, objects in holes, objects at the border."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.zoom(rng.random((7, 9)), (shape[0] / 7, shape[1] / 9), order=1)
    picture = Image.fromarray((255 * coarse[: shape[0], : shape[1]]).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 4)):
        x, y, r = rng.integers(0, 80), rng.integers(0, 50), rng.integers(3, 25)
        fill = (None, 0, 250)[rng.integers(0, 3)]
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=255, width=2)
    noisy = np.asarray(picture, np.int32)[..., None] + rng.integers(-20, 21, (*shape, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def test_original_size():
    found = facts.original_size(np.zeros((7, 5, 3), np.uint8))
    assert found.tolist() == [7, 5]
    assert found.dtype == np.int32


@pytest.mark.parametrize("seed", range(6))
def test_otsu_equals_its_definition(seed):
    grey = luma(scene(seed))
    assert facts.otsu(np.bincount(grey.ravel(), minlength=256)) == defined_threshold(grey)


def test_otsu_of_few_values():
    def histogram(*values):
        return np.bincount(values, minlength=256)

    assert facts.otsu(histogram(7, 7)) is None
    assert facts.otsu(histogram(0, 255)) == 0
    assert facts.otsu(histogram(10, 10, 10, 11)) == 10
    assert facts.otsu(histogram(10, 12, 200)) == 12
    # Counts of a large photograph: no rounding, no overflow.
    assert facts.otsu(10**7 * histogram(3, 4, 90, 91)) == 4


@pytest.mark.parametrize("seed", range(40))
def test_box_equals_the_plain_way(seed):
    image = scene(100 + seed)
    found = facts.foreground_box(image)
    assert found.tolist() == plainly(image)
    assert found.dtype == np.int32


def test_box_of_known_objects():
    values = np.zeros((100, 200))
    values[40:50, 60:100] = 200  # 40 wide, 10 high: grows by 4 and 2
    values[5, 5] = 255
    assert facts.foreground_box(grey_image(values)).tolist() == [56, 38, 104, 52]
    values[0:8, 0:199] = 200  # larger, at the border: grows as far as the image reaches
    assert facts.foreground_box(grey_image(values)).tolist() == [0, 0, 200, 9]


def test_a_ring_counts_with_what_it_surrounds():
    values = np.zeros((120, 120))
    values[10:50, 10:50] = 255
    values[11:49, 11:49] = 0  # 156 pixels of a ring around 1444
    values[20:40, 20:40] = 255  # an object inside it
    values[60:90, 60:90] = 255  # 900 pixels
    assert facts.foreground_box(grey_image(values)).tolist() == [6, 2, 54, 58]
    values[10, 30] = 0  # a gap: the ring's inside is no longer surrounded
    assert facts.foreground_box(grey_image(values)).tolist() == [57, 54, 93, 96]
    values[10, 30] = 255
    values[10, 10] = 0  # edges that touch by corners still close a ring
    assert facts.foreground_box(grey_image(values)).tolist() == [6, 2, 54, 58]


@pytest.mark.parametrize("value", [0, 130, 255])
def test_a_constant_image_is_its_own_box(value):
    image = np.full((9, 14, 3), value, np.uint8)
    assert facts.foreground_box(image).tolist() == [0, 0, 14, 9]


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1)])
def test_thin_images(shape):
    values = np.zeros(shape)
    values.flat[-1] = 9
    box = facts.foreground_box(grey_image(values))
    if values.size == 1:
        assert box.tolist() == [0, 0, 1, 1]
    else:
        assert box.tolist() == [shape[1] - 1, shape[0] - 1, shape[1], shape[0]]


def test_registry_states_what_the_functions_give():
    for image in (scene(0), scene(1, (33, 47))):
        for name, value in facts.find(tuple(facts.FACTS), image).items():
            fact = facts.FACTS[name]
            assert (value.shape, value.dtype) == (fact.shape, fact.dtype)


def test_a_real_object_is_found():
    """Hazelnuts lie bright before black, in the middle of the picture."""
    folder = real_data("mvtec", "hazelnut_reduced256", "train", "good")
    for file in sorted(folder.iterdir())[:5]:
        image = np.asarray(Image.open(file).convert("RGB"))
        x1, y1, x2, y2 = facts.foreground_box(image)
        assert 100 < x2 - x1 < 250
        assert 100 < y2 - y1 < 256
        outside = np.ones(image.shape[:2], bool)
        outside[y1:y2, x1:x2] = False
        assert luma(image)[outside].mean() < 60
