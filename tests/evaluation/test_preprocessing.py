"""From the pixels of a file to inputs and back: whole, by one side, cut, in windows."""

import itertools

import numpy as np
import PIL.Image
import pytest

from dsad.core.detection import highest, within
from dsad.core.errors import ConfigError
from dsad.evaluation.preprocessing import Preprocessing

SHAPES = [(1, 1), (3, 200), (224, 224), (225, 97), (1056, 422), (500, 1270)]


def image(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def smooth(shape):
    """A plane over the pixel centres."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return x + 3 * y


def owned(into, shape):
    """How many views decide of each pixel."""
    count = np.zeros(shape, int)
    for rows, columns in into.views(shape):
        count[rows.first : rows.last, columns.first : columns.last] += 1
    return count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["stretched", "longer", "windows"])
def test_every_pixel_is_decided_of_by_one_view(method, shape):
    into = Preprocessing(height=96, width=64, method=method, overlap=8)
    assert (owned(into, shape) == 1).all()
    assert into.inspected(shape) == (slice(0, shape[0]), slice(0, shape[1]))


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_that_is_inspected(shape, crop):
    into = Preprocessing(height=96, width=64, method="shorter", crop=crop)
    count = owned(into, shape)
    rows, columns = into.inspected(shape)
    assert (count[rows, columns] == 1).all()
    assert count.sum() == count[rows, columns].size
    scale = max(96 / shape[0], 64 / shape[1]) / crop
    for part, length, size in zip((rows, columns), shape, (96, 64), strict=True):
        assert abs((part.stop - part.start) - min(length, size / scale)) <= 1
        assert abs((part.start + part.stop) / 2 - length / 2) <= 0.5  # in the middle


def test_published_centre_crop():
    """256, then the middle 224, of an image whose shorter side is 512."""
    into = Preprocessing(method="shorter", crop=0.875)
    assert into.inspected((512, 700)) == (slice(32, 480), slice(126, 574))
    whole = image((512, 700))
    small = PIL.Image.fromarray(whole).resize((350, 256), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(into.to_input(whole), np.asarray(small)[16:240, 63:287])


def test_stretched_is_what_it_was():
    whole = image((301, 517))
    into = Preprocessing(height=96, width=64)
    expected = PIL.Image.fromarray(whole).resize((64, 96), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(into.to_input(whole), np.asarray(expected))
    assert set(into.describe()) == {"height", "width", "method", "resize"}
    assert into.views(whole.shape[:2])[0].rows == (96 / 301, 0, 0, 301, 0, 96)


@pytest.mark.parametrize("method", ["stretched", "longer", "shorter", "windows"])
def test_maps_go_back_to_where_they_came_from(method):
    """A plane of the image, sampled in the inputs, is that plane again."""
    shape = (150, 420)
    into = Preprocessing(height=96, width=64, method=method, overlap=8)
    maps = []
    for rows, columns in into.views(shape):
        y = (np.arange(96) + 0.5 - rows.offset) / rows.scale
        x = (np.arange(64) + 0.5 - columns.offset) / columns.scale
        maps.append(x[None] + 3 * y[:, None])
    back, where = np.full(shape, -1, np.float32), into.inspected(shape)
    for view, values in zip(into.views(shape), maps, strict=True):
        view.paint(back, values)
    if into.single:
        painted, back = back, into.to_original(maps[0], shape)
        np.testing.assert_array_equal(back[where], painted[where])
    expected = smooth(shape)
    # At the outer half pixel of the input the edge value continues.
    inner = tuple(slice(s.start + 4, s.stop - 4) for s in where)
    np.testing.assert_allclose(back[inner], expected[inner], rtol=1e-5)
    if method == "shorter":
        outside = np.ones(shape, bool)
        outside[where] = False
        assert outside.any()
        assert (back[outside] == back[where].min()).all()


@pytest.mark.parametrize(
    ("length", "starts"),
    [(40, [0]), (41, [0, 1]), (54, [0, 14]), (80, [0, 20, 40]), (87, [0, 23, 47]),
     (95, [0, 18, 36, 55]), (165, [0, 20, 41, 62, 83, 104, 125])],
)  # fmt: skip
def test_published_starts_of_windows(length, starts):
    """SuperADD's windows of 40 that overlap by 8 on either side."""
    into = Preprocessing(height=40, width=40, method="windows", overlap=8)
    rows = [view.rows for view in into.views((length, 40))]
    assert [-axis.offset for axis in rows] == starts


def test_places_are_taken_from_the_window_in_which_they_are_central():
    into = Preprocessing(height=40, width=40, method="windows", overlap=8)
    for length in range(41, 400):
        rows = [view.rows for view in into.views((length, 40))]
        for before, after in itertools.pairwise(rows):
            assert before.last == after.first
            assert 40 - before.high >= 8  # of the inner sides
            assert after.low >= 8
        middles = np.asarray([20 - axis.offset for axis in rows])
        for i, axis in enumerate(rows):
            at = np.arange(axis.first, axis.last) + 0.5
            gaps = np.abs(at[:, None] - middles[None])
            assert (gaps[:, i] <= gaps.min(axis=1) + 0.51).all()


def test_written_ranges_are_the_published_ones_and_partition_any_length():
    into = Preprocessing(height=40, width=40, method="windows", overlap=8)
    for length in range(40, 3000):
        rows = [view.rows for view in into.views((length, 40))]
        count = -(-(length - 40) // 24) + 1
        starts = [i * (length - 40) // max(1, count - 1) for i in range(count)]
        assert [-axis.offset for axis in rows] == starts
        shared = [a + 40 - b for a, b in itertools.pairwise(starts)]
        first = [0, *(b + -(-v // 2) for b, v in zip(starts[1:], shared, strict=True))]
        last = [*(a + 40 - v // 2 for a, v in zip(starts[:-1], shared, strict=True)), length]
        assert [(axis.first, axis.last) for axis in rows] == list(zip(first, last, strict=True))
        assert last[:-1] == first[1:]
        for axis in rows[:-1]:
            assert axis.last + axis.offset <= 32
        for axis in rows[1:]:
            assert axis.first + axis.offset >= 8


@pytest.mark.parametrize(
    ("shape", "grid", "windows"),
    [((1024, 2232), (40, 87), (1, 3)), ((1056, 4224), (41, 165), (2, 7)),
     ((1900, 1400), (74, 54), (3, 2)), ((1520, 2100), (59, 82), (2, 3)),
     ((2048, 2448), (80, 95), (3, 4))],
    ids=["can", "sheet_metal", "vial", "fruit_jelly", "others"],
)  # fmt: skip
def test_windows_of_mvtec_ad_2_are_as_many_as_of_its_published_grids(shape, grid, windows):
    """At 0.625, of tokens of 16 pixels; what these leave of an image is in the windows here."""
    into = Preprocessing(height=640, width=640, method="windows", overlap=128, scale=0.625)
    assert tuple(int(n * 0.625) // 16 for n in shape) == grid
    views = into.views(shape)
    assert tuple(len({view[axis] for view in views}) for axis in (0, 1)) == windows
    assert tuple(-(-(n - 40) // 24) + 1 for n in grid) == windows
    assert (owned(into, shape) == 1).all()


def test_windows_show_the_pixels_themselves():
    whole = image((130, 75))
    into = Preprocessing(height=64, width=96, method="windows", overlap=8)
    for view in into.views(whole.shape[:2]):
        top, left = -view.rows.offset, view.columns.offset  # narrower than a window
        seen = into.to_input(whole, view)
        assert seen.shape == (64, 96, 3)
        np.testing.assert_array_equal(seen[:, left : left + 75], whole[top : top + 64])
        np.testing.assert_array_equal(seen[:, 0], seen[:, left])  # the border again
        np.testing.assert_array_equal(seen[:, -1], seen[:, left + 74])


def test_windows_at_a_scale():
    """Neighbours show the same where they overlap, as the image resized at once does."""
    whole = np.repeat(np.asarray(smooth((300, 500)) / 8, np.uint8)[..., None], 3, axis=2)
    into = Preprocessing(height=96, width=96, method="windows", overlap=8, scale=0.5)
    once = np.asarray(PIL.Image.fromarray(whole).resize((250, 150), 2), int)
    views = into.views((300, 500))
    assert len(views) == 2 * 3
    for rows, columns in views:
        top, left = -int(rows.offset), -int(columns.offset)
        seen = into.to_input(whole, type(views[0])(rows, columns)).astype(int)
        assert abs(seen - once[top : top + 96, left : left + 96]).max() <= 1


def test_longer_side_leaves_a_border_that_does_not_count():
    into = Preprocessing(height=96, width=96, method="longer")
    whole = image((100, 400))
    seen, (view,) = into.to_input(whole), into.views((100, 400))
    small = np.asarray(PIL.Image.fromarray(whole).resize((96, 24), 2))
    np.testing.assert_array_equal(seen[36:60], small)
    assert (seen[:36] == small[:1]).all()
    inside = into.inside([view], (100, 400))
    np.testing.assert_allclose(inside[0, 0], [[36 / 96, 60 / 96], [0, 1]])
    cells = np.asarray(within(inside[:, 0], (12, 12)))[0]
    # Of 12 rows those whose centres, at 36, 44 and 52 pixels, lie from 36 to 60.
    np.testing.assert_array_equal(np.flatnonzero(cells.any(axis=1)), [4, 5, 6])
    assert cells[4:7].all()


def test_there_is_always_a_cell():
    thin = np.asarray([[[0.501, 0.502], [0, 1]]], np.float32)
    cells = np.asarray(within(thin, (4, 4)))[0]
    assert cells.any(axis=1).sum() == 1
    values = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    assert highest(values, thin) in (7, 11)
    assert highest(values) == 15


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"method": "longer", "crop": 0.9}, "crop"),
     ({"method": "windows", "overlap": 32}, "overlap")],
)  # fmt: skip
def test_settings_that_do_not_go_together(keys, words):
    with pytest.raises(ConfigError, match=words):
        Preprocessing(height=64, width=96, **keys)
