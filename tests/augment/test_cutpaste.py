"""Pieces and scars: the published sizes, and what pasting does to pixels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dsad.augment.cutpaste import CutPasteConfig, Pieces, draw_cutpaste, draw_scar, paste
from dsad.core.errors import ConfigError
from dsad.core.rng import sample_keys

PLAIN = CutPasteConfig(jitter=0.0)
SIDE, COUNT = 64, 4000


@functools.cache
def pieces(draw, config=PLAIN, count=COUNT, side=SIDE):
    index = jnp.arange(count)
    keys = sample_keys(jax.random.key(3), index % 2, index)
    return jax.device_get(jax.jit(draw, static_argnums=(1, 2))(keys, side, config))


def noise(count, side=SIDE):
    return np.random.default_rng(0).random((count, side, side, 3)).astype(np.float32)


def first(drawn, count):
    return jax.tree.map(lambda a: a[:count], drawn)


def test_a_piece_is_copied_exactly_and_nothing_else_changes():
    images, drawn = noise(200), first(pieces(draw_cutpaste), 200)
    before = images.copy()
    pasted, where = jax.device_get(jax.jit(paste)(images, drawn))
    np.testing.assert_array_equal(images, before)
    for i in range(len(images)):
        (h, w), (sy, sx), (ty, tx) = drawn.extent[i], drawn.source[i], drawn.target[i]
        expected = images[i].copy()
        expected[ty : ty + h, tx : tx + w] = images[i, sy : sy + h, sx : sx + w]
        np.testing.assert_array_equal(pasted[i], expected)
        assert where[i].sum() == h * w
        assert where[i, ty : ty + h, tx : tx + w].all()


def test_sizes_of_pieces():
    drawn = pieces(draw_cutpaste)
    share = drawn.extent.prod(axis=1) / SIDE**2
    assert drawn.extent.min() >= 5
    assert drawn.extent.max() <= 45
    assert share.min() > 0.018
    assert share.max() < 0.1545
    # Uniform area, log-uniform aspect: rounding to pixels moves neither by more than this.
    assert stats.kstest(share, stats.uniform(0.02, 0.13).cdf).statistic < 0.03
    aspect = np.log(drawn.extent[:, 1] / drawn.extent[:, 0])
    span = math.log(1 / 0.3)
    assert stats.kstest(aspect, stats.uniform(-span, 2 * span).cdf).statistic < 0.06
    assert abs(np.median(aspect)) < 0.08
    assert abs((aspect > 0).mean() - (aspect < 0).mean()) < 0.05
    assert abs(np.corrcoef(share, aspect)[0, 1]) < 0.05
    assert share.mean() == pytest.approx(0.085, abs=0.002)


def test_sizes_of_pieces_of_whole_images():
    sides = pieces(draw_cutpaste, side=256).extent
    assert 19 <= sides.min() <= 24
    assert 160 <= sides.max() <= 181


@pytest.mark.parametrize("draw", [draw_cutpaste, draw_scar])
def test_places_are_uniform_independent_and_inside(draw):
    drawn = pieces(draw)
    for corner, extent in ((drawn.source, drawn.extent), (drawn.target, drawn.box)):
        room = SIDE - extent
        assert (corner >= 0).all()
        assert (corner <= room).all()
        share = (corner + 0.5) / (room + 1)
        for axis in range(2):
            assert stats.kstest(share[:, axis], "uniform").statistic < 0.03
    assert (drawn.target == SIDE - drawn.box).any()
    both = np.concatenate([drawn.source, drawn.target], axis=1) / SIDE
    apart = np.corrcoef(both.T) - np.eye(4)
    assert np.abs(apart).max() < 0.05 + 0.2 * (draw is draw_cutpaste)  # their extents are common


def test_scar_ranges():
    assert PLAIN.scar_ranges(64) == ((1, 4), (5, 6))
    assert PLAIN.scar_ranges(256) == ((2, 16), (10, 25))
    assert PLAIN.scar_box(64) == 9


def test_sizes_of_scars():
    drawn = pieces(draw_scar)
    lengths, widths = drawn.extent.T
    shares = [np.mean(widths == w) for w in range(1, 5)]
    np.testing.assert_allclose(shares, [1 / 6, 1 / 3, 1 / 3, 1 / 6], atol=0.03)
    shares = [np.mean(lengths == n) for n in (5, 6)]
    np.testing.assert_allclose(shares, [1 / 2, 1 / 2], atol=0.03)
    assert drawn.box.max() <= 8
    degrees = np.degrees(drawn.angle)
    assert stats.kstest(degrees, stats.uniform(-45, 90).cdf).statistic < 0.03


def test_scars_of_noise():
    images, drawn = noise(COUNT // 4), first(pieces(draw_scar), COUNT // 4)
    pasted, where = jax.device_get(jax.jit(paste)(images, drawn))
    changed = (pasted != images).any(axis=-1)
    assert not (changed & ~where).any()
    counts = where.sum(axis=(1, 2))
    assert counts.min() >= 3
    assert counts.max() <= 26
    assert counts.mean() / SIDE**2 == pytest.approx(0.0034, abs=0.0002)
    for i in range(len(images)):
        rows, columns = np.nonzero(where[i])
        near, far = drawn.target[i], drawn.target[i] + drawn.box[i]
        assert (near <= (rows.min(), columns.min())).all()
        assert (far > (rows.max(), columns.max())).all()


def test_a_scar_of_whole_images():
    images, drawn = noise(100, 256), pieces(draw_scar, count=100, side=256)
    _, where = jax.jit(paste)(images, drawn)
    assert np.mean(where) == pytest.approx(0.0024, abs=0.0004)


@pytest.mark.parametrize("degrees", [0.0, 7.0, -23.0, 31.0, -44.0])
def test_turning_is_pillow_s(degrees):
    """Box and pixels of ``Image.rotate(expand=True)``, nearest neighbour, but for ties."""
    g = np.random.default_rng(1)
    for height, width in [(5, 1), (6, 4), (5, 3), (25, 16)]:
        image = g.integers(0, 256, (1, 64, 64, 3)).astype(np.float32)
        piece = Image.fromarray(image[0, 2 : 2 + height, 3 : 3 + width].astype(np.uint8))
        turned = np.asarray(piece.convert("RGBA").rotate(degrees, expand=True))
        target = np.array([[20, 21]], np.int32)
        drawn = Pieces(
            extent=np.array([[height, width]], np.int32),
            source=np.array([[2, 3]], np.int32),
            box=np.array([turned.shape[:2]], np.int32),
            target=target,
            angle=np.radians(np.array([degrees], np.float32)),
            jitter=None,
        )
        pasted, where = jax.device_get(paste(image, drawn))
        window = (0, slice(20, 20 + turned.shape[0]), slice(21, 21 + turned.shape[1]))
        mask = turned[..., 3] > 0
        tie = ties(height, width, turned.shape[:2], degrees)
        assert ((where[window] == mask) | tie).all()
        assert where.sum() == where[window].sum()
        assert ((pasted[window] == turned[..., :3]).all(axis=-1) | tie | ~mask).all()
        assert tie.mean() < 0.1


def ties(height, width, box, degrees):
    """Pixels of the box whose centre falls within 1e-3 of an edge between the piece's pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (np.arange(n) + 0.5 - n / 2 for n in box)
    u = cos * x[None, :] - sin * y[:, None] + width / 2
    v = sin * x[None, :] + cos * y[:, None] + height / 2
    return (np.abs(u - np.round(u)) < 1e-3) | (np.abs(v - np.round(v)) < 1e-3)


def test_box_of_a_turned_piece_is_pillow_s():
    drawn = pieces(draw_scar)
    for i in range(300):
        height, width = drawn.extent[i]
        turned = Image.new("L", (width, height)).rotate(math.degrees(drawn.angle[i]), expand=True)
        assert turned.size == tuple(drawn.box[i, ::-1])


@pytest.mark.parametrize("draw", [draw_cutpaste, draw_scar])
def test_only_a_piece_s_colours_are_jittered_with_its_own_mean(draw):
    """With equal pixels around it, or others, a piece comes out the same."""
    drawn = pieces(draw, CutPasteConfig(), 50)
    again = pieces(draw, PLAIN, 50)
    np.testing.assert_array_equal(drawn.source, again.source)
    factors = drawn.jitter.factors
    assert drawn.jitter.apply.all()
    assert (np.abs(factors - 1) <= 0.1 + 1e-6).all()
    assert (np.abs(drawn.jitter.shift) <= 0.1).all()
    images = noise(50)
    other = np.full_like(images, 0.25)
    for i in range(50):
        (h, w), (y, x) = drawn.extent[i], drawn.source[i]
        other[i, y : y + h, x : x + w] = images[i, y : y + h, x : x + w]
    pasted, where = jax.device_get(jax.jit(paste)(images, drawn))
    elsewhere, _ = jax.device_get(jax.jit(paste)(other, drawn))
    np.testing.assert_allclose(pasted[where], elsewhere[where], atol=1e-6)
    np.testing.assert_array_equal(pasted[~where], images[~where])
    plain, _ = jax.device_get(jax.jit(paste)(images, again))
    assert np.abs(pasted[where] - plain[where]).mean() > 0.005


@pytest.mark.parametrize("draw", [draw_cutpaste, draw_scar])
def test_an_image_s_draws_do_not_depend_on_the_others(draw):
    keys = sample_keys(jax.random.key(3), jnp.arange(8) % 2, jnp.arange(8))
    alone = jax.jit(draw, static_argnums=(1, 2))(keys[5:3:-1], SIDE, CutPasteConfig())
    among = jax.tree.map(lambda a: a[5:3:-1], pieces(draw, CutPasteConfig(), 8))
    jax.tree.map(np.testing.assert_array_equal, alone, among)


def test_bad_settings_are_refused():
    for settings in ({"area": (0.2, 0.1)}, {"jitter": 0.6}, {"scar_width": (0.0, 4.0)}):
        with pytest.raises(ConfigError, match=rf"patches\.{next(iter(settings))}"):
            CutPasteConfig(**settings)
