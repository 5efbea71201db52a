"""Patches: draws, sizes at the working size, and many in a row against a plain sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from dsad.augment import _isstad_patches as patches
from dsad.augment import color
from tests.augment.test_color import grey64, reference

STEP = 0.5 / 255
SIDE, COUNT = 40, 4
MANY = 500
draw = jax.jit(patches.draw_patches)  # compiled once: always MANY samples, and any side
apply = jax.jit(patches.apply_patches, static_argnames=("step", "label_all"))


def drawn(size, side, count, seed=0):
    sizes = jnp.tile(jnp.array([size], jnp.int32), (MANY, 1))
    parts = [
        draw(jax.random.split(jax.random.fold_in(jax.random.key(seed), i), MANY), sizes, side)
        for i in range(-(-count // MANY))
    ]
    return jax.tree.map(lambda *v: np.concatenate(v)[:count], *parts)


def place(found, i, j):
    (top, left), (height, width) = found.corner[i, j], found.extent[i, j]
    return slice(top, top + height), slice(left, left + width)


def one_patch(image, found, i, j):
    """What the patch makes of its own pixels, in float64."""
    out = image[place(found, i, j)].astype(np.float64)
    if found.jitter.apply[i, j]:
        for operation in found.jitter.order[i, j]:
            hue = operation == color.HUE
            amount = found.jitter.shift[i, j] if hue else found.jitter.factors[i, j, operation]
            out = reference(out, operation, float(amount))
    if found.grey[i, j]:
        out = np.repeat(grey64(out), 3, axis=-1)
    for axis in (0, 1):
        if found.sigma[i, j, axis] > 0.01:
            out = ndimage.gaussian_filter1d(
                out, found.sigma[i, j, axis], axis=axis, mode="nearest", radius=8
            )
    for axis in (0, 1):
        if found.mirror[i, j, axis]:
            out = np.flip(out, axis)
    return out


def in_turn(image, found, i):
    """All patches one after another; a patch that changes nothing is not labelled."""
    image, label = image.astype(np.float64), np.zeros(image.shape[:2], bool)
    for j in np.flatnonzero(found.used[i]):
        where = place(found, i, j)
        changed = one_patch(image, found, i, j)
        if (np.abs(changed - image[where]) > STEP).any():
            image[where], label[where] = changed, True
    return image, label


@pytest.mark.parametrize("size", [(SIDE, SIDE), (600, 110)], ids=str)
def test_many_patches_equal_a_plain_sequence(size):
    """Every option, also of patches one pixel wide, on what the patches before have left."""
    rng = np.random.default_rng(1)
    images = rng.random((COUNT, SIDE, SIDE, 3), dtype=np.float32)
    images[1] = images[1, ..., :1]  # grey from the start
    images[2] = 0.25  # flips and blurs change nothing
    found = drawn(size, SIDE, COUNT, seed=5)
    assert found.used.sum(1).min() > 8
    assert found.extent.min() == (8 if size == (SIDE, SIDE) else 1)
    expected = [in_turn(image, found, i) for i, image in enumerate(images)]
    colours, labels = map(np.asarray, apply(images, found, step=STEP))
    assert colours.dtype == np.float32
    assert labels.dtype == bool
    assert colours.min() >= 0
    assert colours.max() <= 1
    for i, (image, label) in enumerate(expected):
        np.testing.assert_allclose(colours[i], image, atol=5e-5)
        np.testing.assert_array_equal(labels[i], label)
        np.testing.assert_array_equal(colours[i][~label], images[i][~label])
        assert label.any()
        assert not label.all()


def test_what_changes_nothing_is_not_labelled():
    """Grey pixels made grey, a constant blurred or mirrored; by their masks they would count."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (COUNT, SIDE, SIDE, 1)), 3, -1) / np.float32(255)
    images[1:] = np.float32(77 / 255)
    found = drawn((SIDE, SIDE), SIDE, COUNT)
    nothing = np.zeros_like(found.grey)
    found = found._replace(
        jitter=found.jitter._replace(apply=nothing),
        grey=~nothing,
        sigma=np.full_like(found.sigma, 1e-3),
        mirror=np.zeros_like(found.mirror),
    )
    found.sigma[1] = 1.5
    found.mirror[2] = True
    images = images.astype(np.float32)
    colours, labels = map(np.asarray, apply(images, found, step=STEP))
    assert not labels.any()
    np.testing.assert_array_equal(colours, images)
    colours, labels = map(np.asarray, apply(images, found, step=STEP, label_all=True))
    np.testing.assert_array_equal(colours, images)
    for i in range(COUNT):
        expected = np.zeros((SIDE, SIDE), bool)
        for j in np.flatnonzero(found.used[i]):
            expected[place(found, i, j)] = True
        np.testing.assert_array_equal(labels[i], expected)


def test_draws_at_the_original_size():
    """With S equal to the original's side, places and sizes are the drawn integers."""
    side, count = 96, 1000
    found = drawn((side, side), side, count)
    number = found.used.sum(1)
    assert (np.sort(found.used, axis=1)[:, ::-1] == found.used).all()
    spread = number - np.random.default_rng(0).random(count)  # an integer's share of 0 .. 100
    assert stats.kstest(spread, stats.uniform(0, 100).cdf).pvalue > 1e-3
    assert (number.min(), number.max()) == (1, 100)
    for axis in (0, 1):
        values, counts = np.unique(found.extent[..., axis], return_counts=True)
        assert values.tolist() == list(range(8, 11 + 8 + 1))  # floor(88 / 8) + 8
        assert stats.chisquare(counts).pvalue > 1e-3
        widest = found.extent[..., axis] == 19
        values, counts = np.unique(found.corner[..., axis][widest], return_counts=True)
        assert values.tolist() == list(range(96 - 19 + 1))
        assert stats.chisquare(counts).pvalue > 1e-3
    assert len(np.unique(found.jitter.shift)) > 0.99 * count * patches.MOST


def test_options_are_equally_likely():
    found = drawn((1024, 1024), 224, 500, seed=4)
    blurred = found.sigma[..., 0] > 0.01
    codes = found.mirror @ [2, 1] + 4 * found.jitter.apply + 8 * found.grey + 16 * blurred
    values, counts = np.unique(codes, return_counts=True)
    every = 4 + 8 + 16
    assert values.tolist() == sorted([4, 8, 16, every, 1, 2, every + 1, every + 2])
    assert stats.chisquare(counts).pvalue > 1e-3
    sigma = found.sigma[blurred][:, 0] * 1024 / 224
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    for i in range(3):
        factors = found.jitter.factors[..., i].ravel()
        assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert stats.kstest(found.jitter.shift.ravel(), stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("side", [224, 16])
def test_patches_fit_the_window_and_the_image(side):
    assert patches.window(side) <= side
    for size in ((224, 224), (1024, 512), (3000, 231), (100, 16)):
        found = drawn(size, side, 60, seed=1)
        assert found.extent.min() >= 1
        assert found.extent.max() <= patches.window(side)
        assert (found.corner >= 0).all()
        assert (found.corner + found.extent <= side).all()


def test_working_pixels_are_those_whose_centres_are_covered():
    size, side = (1000, 600), 224
    found = drawn(size, side, 40, seed=3)
    # The same uniform numbers at S = 600 give the drawn integers of the width, which is 600.
    whole = drawn(size, 600, 40, seed=3)
    left, width = whole.corner[..., 1], whole.extent[..., 1]
    centre = (np.arange(side) + 0.5) * 600 / side
    values = left, width, found.corner[..., 1], found.extent[..., 1]
    for edge, wide, first, pixels in zip(*(v.ravel() for v in values), strict=True):
        covered = np.flatnonzero((centre >= edge) & (centre < edge + wide))
        assert (first, pixels) == (covered[0], len(covered))


def test_coverage_of_the_published_settings():
    """Fact sheet, section 3b: 20.5 % of 1024 × 1024, median 21.2 %."""
    count, side = 2500, 112
    found = drawn((1024, 1024), side, count, seed=6)
    share = np.zeros(count)
    for i in range(count):
        mask = np.zeros((side, side), bool)
        for j in range(found.used[i].sum()):
            mask[place(found, i, j)] = True
        share[i] = mask.mean()
    assert share.mean() == pytest.approx(0.205, abs=0.01)
    assert np.median(share) == pytest.approx(0.212, abs=0.015)
