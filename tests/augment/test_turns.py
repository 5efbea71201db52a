"""Quarter turns of images on their canvases, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment.turns import random_turns, turned
from dsad.core.errors import DataError

SIZES = np.array([[5, 3], [2, 6], [8, 8], [1, 7], [4, 4]], np.int32)
turn = jax.jit(lambda image, size, turns: turned({"image": image, "size": size}, turns))


def canvases():
    return np.random.default_rng(0).integers(0, 256, (len(SIZES), 8, 8, 3), np.uint8)


@pytest.mark.parametrize("quarters", range(4))
def test_the_image_is_turned_in_its_corner(quarters):
    images = canvases()
    out = jax.device_get(turn(images, SIZES, np.full(len(SIZES), quarters, np.int32)))
    assert out["image"].dtype == np.uint8
    for image, (h, w), canvas, size in zip(images, SIZES, out["image"], out["size"], strict=True):
        want = np.rot90(image[:h, :w], quarters)
        np.testing.assert_array_equal(size, want.shape[:2])
        np.testing.assert_array_equal(canvas[: size[0], : size[1]], want)


@pytest.mark.parametrize("quarters", [0, 1, 3])
def test_four_equal_turns_are_none(quarters):
    """Of the whole canvas, what lies around the image included."""
    image, size = canvases(), SIZES
    for _ in range(4):
        image, size = turn(image, size, np.full(len(SIZES), quarters, np.int32)).values()
    np.testing.assert_array_equal(image, canvases())
    np.testing.assert_array_equal(size, SIZES)


def test_turns_follow_key_epoch_and_sample_alone():
    def drawn(index, epoch, key=0):
        n = len(index)
        batch = {
            "image": np.zeros((n, 2, 2, 3), np.uint8), "size": np.full((n, 2), 2, np.int32),
            "index": np.asarray(index, np.int32), "epoch": np.full(n, epoch, np.int32),
        }  # fmt: skip
        return np.asarray(jax.jit(random_turns)(batch, jax.random.key(key))[1])

    first = drawn(range(400), 0)
    assert first.dtype == np.int32
    assert set(first) == {0, 1, 2, 3}
    assert np.bincount(first).min() > 70  # of 100 expected, 3.5 deviations
    np.testing.assert_array_equal(drawn(range(399, -1, -1), 0), first[::-1])
    assert not np.array_equal(drawn(range(400), 1), first)
    assert not np.array_equal(drawn(range(400), 0, key=1), first)


def test_a_canvas_that_is_not_square_is_refused():
    with pytest.raises(DataError, match="square canvases"):
        turned({"image": jnp.zeros((1, 4, 5, 3)), "size": jnp.ones((1, 2))}, jnp.zeros(1, int))
