"""Facts of an image: Otsu's threshold from its definition, and the box of the largest object."""

import hypothesis
import hypothesis.strategies as st
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


def plainly(image, published=False):
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
    if published:
        x0, y0 = max(0, left), max(0, top)
        return [x0, y0, x0 + min(width - x0, w + 2 * across), y0 + min(height - y0, h + 2 * along)]
    right, bottom = int(xs.max()) + 1 + across, int(ys.max()) + 1 + along
    return [max(0, left), max(0, top), min(width, right), min(height, bottom)]


def box_of(image, published=False):
    name = "foreground_box_published" if published else "foreground_box"
    return facts.find((name,), image)[name]


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


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_box_equals_the_plain_way(seed, published):
    image = scene(100 + seed)
    found = box_of(image, published)
    assert found.tolist() == plainly(image, published)
    assert found.dtype == np.int32


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_boxes_of_any_object_in_any_image(data):
    """The published one differs only where the left or top pad is cut, and then on the far side."""
    near, far, image = np.zeros((3, 2), int)
    for axis in (0, 1):
        image[axis] = data.draw(st.integers(1, 300))
        near[axis] = data.draw(st.integers(0, image[axis] - 1))
        far[axis] = data.draw(st.integers(near[axis] + 1, image[axis]))
    values = np.zeros(image[::-1])
    values[near[1] : far[1], near[0] : far[0]] = 200
    picture = grey_image(values)
    boxes = facts.find(("foreground_box_published", "foreground_box"), picture)
    padded, published = boxes["foreground_box"], boxes["foreground_box_published"]
    for axis, share in ((0, 10), (1, 5)):
        pad = (far[axis] - near[axis]) // share
        cut = max(0, pad - near[axis])
        assert padded[axis] == published[axis] == near[axis] - pad + cut
        assert padded[2 + axis] == min(image[axis], far[axis] + pad)
        assert published[2 + axis] == min(image[axis], far[axis] + pad + cut)


def test_the_published_box_moves_from_the_border():
    values = np.zeros((100, 200))
    values[0:20, 2:62] = 200  # 60 wide, 20 high: grows by 6 and 4, cut by 4 and 4
    assert box_of(grey_image(values)).tolist() == [0, 0, 68, 24]
    assert box_of(grey_image(values), published=True).tolist() == [0, 0, 72, 28]
    far = grey_image(values[::-1, ::-1])  # cut on the right and bottom alone
    assert box_of(far).tolist() == box_of(far, published=True).tolist() == [132, 76, 200, 100]


def test_boxes_of_one_image_look_for_its_object_once(monkeypatch):
    calls = []

    def counted(histogram, otsu=facts.otsu):
        calls.append(histogram)
        return otsu(histogram)

    monkeypatch.setattr(facts, "otsu", counted)
    assert set(facts.find(tuple(facts.FACTS), scene(3))) == set(facts.FACTS)
    assert len(calls) == 1


def test_box_of_known_objects():
    values = np.zeros((100, 200))
    values[40:50, 60:100] = 200  # 40 wide, 10 high: grows by 4 and 2
    values[5, 5] = 255
    assert box_of(grey_image(values)).tolist() == [56, 38, 104, 52]
    values[0:8, 0:199] = 200  # larger, at the border: grows as far as the image reaches
    assert box_of(grey_image(values)).tolist() == [0, 0, 200, 9]


def test_a_ring_counts_with_what_it_surrounds():
    values = np.zeros((120, 120))
    values[10:50, 10:50] = 255
    values[11:49, 11:49] = 0  # 156 pixels of a ring around 1444
    values[20:40, 20:40] = 255  # an object inside it
    values[60:90, 60:90] = 255  # 900 pixels
    assert box_of(grey_image(values)).tolist() == [6, 2, 54, 58]
    values[10, 30] = 0  # a gap: the ring's inside is no longer surrounded
    assert box_of(grey_image(values)).tolist() == [57, 54, 93, 96]
    values[10, 30] = 255
    values[10, 10] = 0  # edges that touch by corners still close a ring
    assert box_of(grey_image(values)).tolist() == [6, 2, 54, 58]


@pytest.mark.parametrize("value", [0, 130, 255])
def test_a_constant_image_is_its_own_box(value):
    image = np.full((9, 14, 3), value, np.uint8)
    assert box_of(image).tolist() == [0, 0, 14, 9]


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1)])
def test_thin_images(shape):
    values = np.zeros(shape)
    values.flat[-1] = 9
    box = box_of(grey_image(values))
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
        x1, y1, x2, y2 = box_of(image)
        assert 100 < x2 - x1 < 250
        assert 100 < y2 - y1 < 256
        outside = np.ones(image.shape[:2], bool)
        outside[y1:y2, x1:x2] = False
        assert luma(image)[outside].mean() < 60
