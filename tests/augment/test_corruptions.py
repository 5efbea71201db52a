"""Small corruptions against a float64 rendering of their draws, and what is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment.corruptions import (
    BLOB,
    RECTANGLE,
    SCAR,
    ShapesConfig,
    corrupt_shapes,
    draw_shapes,
)
from dsad.augment.isstad_corruption import HALF_STEP
from dsad.core.config import Refused
from dsad.core.rng import sample_keys

SIDE = 96
ALL = ShapesConfig(sources=("own", "other", "noise"), colour=0.1)


def keys(count, epoch=0, seed=0):
    index = jnp.arange(count, dtype=jnp.int32)
    return sample_keys(jax.random.key(seed), jnp.full(count, epoch, jnp.int32), index)


def images(count, side=SIDE, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.8, (count, side, side, 3)).astype(np.float32)


def drawn(count, config=ALL, **places):
    shapes = jax.jit(draw_shapes, static_argnums=(1, 2))(keys(count, **places), config, SIDE)
    return jax.tree.map(lambda v: np.asarray(v, np.float64), jax.device_get(shapes))


corrupted = jax.jit(corrupt_shapes, static_argnums=3)


def rendered(shape, i, j, irregularity):
    """Coverage of one shape in float64, pixel by pixel as the config's text says."""
    y0, x0 = shape.centre[i, j]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    a, (half_width, half_length) = shape.angle[i, j], shape.semi[i, j]
    if shape.kind[i, j] == BLOB:
        polar = np.angle((x - x0) + 1j * (y - y0))
        wave = np.mean(
            [np.cos(k * polar + p) for k, p in zip((2, 3, 5), shape.phase[i, j], strict=True)],
            axis=0,
        )
        inside = half_width * (1 - irregularity * (1 + wave) / 2) - np.hypot(x - x0, y - y0)
    else:
        turned = ((x - x0) + 1j * (y - y0)) * np.exp(-1j * a)
        inside = np.minimum(half_length - np.abs(turned.real), half_width - np.abs(turned.imag))
    return np.clip(inside / max(shape.soft[i, j], 1e-3), 0, 1)


def test_images_and_labels_are_those_of_a_float64_rendering():
    count, config = 12, ALL
    own, shapes = images(count), drawn(count, config)
    out, label = jax.device_get(corrupted(own, np.roll(own, 1, 0), keys(count), config))
    for i in range(count):
        # The noise is not drawn again here: where it fills a shape, pixels are left out.
        expected, known = own[i].astype(np.float64), np.ones((SIDE, SIDE), bool)
        for j in np.flatnonzero(shapes.used[i]):
            share = rendered(shapes, i, j, config.irregularity)
            dy, dx = shapes.shift[i, j].astype(int)
            source = (own[i], own[i - 1], None)[int(shapes.source[i, j])]
            if source is None:
                known &= share == 0
                continue
            filling = np.roll(source.astype(np.float64), (-dy, -dx), (0, 1))
            filling = np.clip(filling * shapes.gain[i, j] + shapes.offset[i, j], 0, 1)
            expected += share[..., None] * (filling - expected)
        change = np.abs(expected - own[i]).max(-1)
        sure = known & (np.abs(change - HALF_STEP) > 1e-4)
        # An edge of a thousandth of a pixel turns rounding into a share.
        assert np.mean((change > HALF_STEP)[sure] != label[i][sure]) < 1e-3
        close = np.abs(out[i] - np.where(label[i][..., None], expected, own[i])).max(-1)[sure]
        assert np.mean(close > 1e-4) < 1e-3
    assert label.any(axis=(1, 2)).sum() > 4


def test_labels_are_the_changed_pixels_and_all_others_are_untouched():
    own = images(64)
    out, label = jax.device_get(corrupted(own, np.roll(own, 1, 0), keys(64), ALL))
    np.testing.assert_array_equal(label, np.abs(out - own).max(-1) > HALF_STEP)
    np.testing.assert_array_equal(out[~label], own[~label])
    assert out.min() >= 0
    assert out.max() <= 1
    assert 0.01 < label.mean() < 0.06


def test_sizes_and_places():
    """Extents are those of the config; shapes and the places they come from are in the image."""
    shapes = drawn(2000)
    ranges = {
        RECTANGLE: ((3, 13.5), (3, 13.5)), SCAR: ((1, 2), (6, 24.5)), BLOB: ((4, 13), (4, 13)),
    }  # fmt: skip
    for kind, ends in ranges.items():
        for axis, (low, high) in enumerate(ends):
            values = shapes.semi[shapes.kind == kind][:, axis]
            assert low <= values.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < values.max() <= high + 1e-5
    np.testing.assert_array_equal(shapes.angle[shapes.kind != SCAR], 0)
    assert np.ptp(shapes.angle[shapes.kind == SCAR]) > 3.1
    cosine, sine = np.abs(np.cos(shapes.angle)), np.abs(np.sin(shapes.angle))
    across, along = shapes.semi[..., 0], shapes.semi[..., 1]
    box = np.stack([across * cosine + along * sine, along * cosine + across * sine], -1)
    for centre in (shapes.centre, shapes.centre + shapes.shift):
        slack = 1e-4 if centre is shapes.centre else 0.5 + 1e-4
        assert (centre - box).min() >= -slack
        assert (centre + box).max() <= SIDE + slack
    for axis in (0, 1):  # the whole image is reached
        assert (shapes.centre - box)[..., axis].min() < 0.5
        assert (shapes.centre + box)[..., axis].max() > SIDE - 0.5
    assert shapes.soft.min() >= 0
    assert 1.99 < shapes.soft.max() <= 2


@pytest.mark.parametrize(
    ("name", "low", "high"), [("gain", 0.5, 1.5), ("offset", -0.3, 0.3), ("phase", 0, 2 * np.pi)]
)
def test_amounts_reach_from_end_to_end(name, low, high):
    values = getattr(drawn(2000), name)
    assert low - 1e-5 <= values.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < values.max() <= high + 1e-5


def test_how_many_of_which_kind():
    count = 6000
    shapes = drawn(count)
    number = shapes.used.sum(1)
    for value, share in ((0, 1 / 3), (1, 2 / 9), (2, 2 / 9), (3, 2 / 9)):
        assert np.mean(number == value) == pytest.approx(share, abs=4 * 0.5 / count**0.5)
    for values in (shapes.kind[shapes.used > 0], shapes.source[shapes.used > 0]):
        for value in range(3):
            assert np.mean(values == value) == pytest.approx(1 / 3, abs=0.02)
    only = drawn(50, ShapesConfig(probability=1.0, kinds=("scar",), sources=("other",), most=1))
    assert {*only.kind.flat, *only.used.flat} == {1.0}
    assert {*only.source.flat} == {0.0}  # the only one of its sources


@pytest.mark.parametrize("kind", [None, "rectangle", "scar", "blob"])
def test_no_draw_is_used_twice(kind):
    """Between images, epochs and shapes, nor for two purposes."""
    config = ALL if kind is None else dataclasses.replace(ALL, kinds=(kind,))
    both = [drawn(400, config, epoch=e) for e in (0, 1)]
    names = ["centre", "gain", "offset", "soft", "phase", "shift", "source"]
    names += {None: ["kind"], "scar": ["semi", "angle"]}.get(kind, ["semi"])
    columns, owner = [], []
    for name in names:
        values = np.concatenate([getattr(s, name).reshape(400, -1) for s in both])
        if (name, kind) == ("semi", "blob"):
            values = values[:, ::2]  # one radius
        columns.append(values.astype(np.float64))
        owner += [name] * values.shape[1]
        if name not in ("shift", "source", "kind"):  # which are whole numbers
            repeated = values.size - len(np.unique(values))
            by_chance = values.size**2 / 2**24  # floats have 2²³ values in [0, 1)
            assert repeated <= 2 + by_chance + 4 * by_chance**0.5, name
    columns = np.concatenate(columns, axis=1)
    related = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    # Offsets of the channels share a part, and a shift begins at its centre.
    pairs = [{"offset"}, {"centre", "shift"}]
    for i, j in zip(*np.nonzero(np.abs(related) > 0.2), strict=True):
        assert {owner[i], owner[j]} in pairs, (owner[i], owner[j])


def test_a_sample_is_the_same_anywhere_in_a_batch():
    own, others, chosen = images(6), images(6, seed=1), keys(6)
    whole = corrupted(own, others, chosen, ALL)
    place = np.array([4, 1])
    part = corrupted(own[place], others[place], chosen[place], ALL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[place], b, atol=1e-6), whole, part)


def test_another_image_and_noise_fill_the_shapes():
    """Of a white other image nothing but white comes; noise is grey and of every value."""
    plain = {"probability": 1.0, "gain": (1.0, 1.0), "offset": (0.0, 0.0), "soft": (0.0, 0.0)}
    own, white = np.zeros((16, SIDE, SIDE, 3), np.float32), np.ones((16, SIDE, SIDE, 3), np.float32)
    config = ShapesConfig(**plain, sources=("other",))
    out, label = jax.device_get(corrupted(own, white, keys(16), config))
    assert label.any(axis=(1, 2)).all()
    assert np.mean(out[label] == 1) > 0.99
    noise, label = jax.device_get(
        corrupted(own, white, keys(16), ShapesConfig(**plain, sources=("noise",)))
    )
    values = noise[label]
    np.testing.assert_array_equal(values, values[:, :1].repeat(3, 1))
    assert values[:, 0].mean() == pytest.approx(0.5, abs=0.03)
    assert values[:, 0].std() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize(("key", "side"), [("rectangle", 26), ("scar_length", 49), ("blob", 25)])
def test_shapes_that_do_not_fit_the_view_are_refused(key, side):
    kind = key.partition("_")[0]
    with pytest.raises(Refused, match=rf"shapes\.{key}: expected shapes within a view of {side}"):
        ShapesConfig(kinds=(kind,)).fits(side)
    ShapesConfig(kinds=(kind,)).fits(50)
