"""Perlin noise from its definition, masks that are never empty, blends, textures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment import perlin

KEYS = jax.random.split(jax.random.key(0), 8)
SIZE = (24, 32)


def noise(angles, cells, size):
    """Cell by cell, in float64."""
    made = np.empty(size)
    for y, x in np.ndindex(*size):
        at = np.array([y * cells[0] / size[0], x * cells[1] / size[1]])
        low = np.floor(at).astype(int)
        t = at - low
        dots = np.empty((2, 2))
        for i, j in np.ndindex(2, 2):
            angle = angles[low[0] + i, low[1] + j]
            dots[i, j] = np.cos(angle) * (t[0] - i) + np.sin(angle) * (t[1] - j)
        w = 6 * t**5 - 15 * t**4 + 10 * t**3
        left, right = dots[0] + w[0] * (dots[1] - dots[0])
        made[y, x] = np.sqrt(2) * (left + w[1] * (right - left))
    return made


@pytest.mark.parametrize("cells", [(1, 1), (8, 2), (4, 32)])
def test_noise_is_that_of_its_definition(cells):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (33, 33)).astype(np.float32)
    y, x = perlin.turned(SIZE, jnp.float32(0))
    found = jax.jit(perlin.perlin)(angles, jnp.array(cells), *jnp.broadcast_arrays(y, x))
    np.testing.assert_allclose(found, noise(np.float64(angles), cells, SIZE), atol=2e-5)
    corners = found[:: SIZE[0] // cells[0], :: SIZE[1] // cells[1]]
    np.testing.assert_allclose(corners, 0, atol=1e-5)


def test_a_quarter_turn_moves_pixels_onto_pixels():
    y, x = (np.asarray(v) * 5 for v in perlin.turned((5, 5), jnp.float32(np.pi / 2)))
    rows, columns = np.indices((5, 5))
    np.testing.assert_allclose(y, np.broadcast_to(4 - columns, (5, 5)), atol=1e-5)
    np.testing.assert_allclose(x, np.broadcast_to(rows, (5, 5)), atol=1e-5)


def test_masks_are_never_empty_and_follow_their_key_alone():
    masks = jax.jit(perlin.perlin_masks, static_argnums=1)
    many = np.asarray(masks(jax.random.split(jax.random.key(1), 64), SIZE))
    assert many.any(axis=(1, 2)).all()
    assert 0.02 < many.mean() < 0.4
    first = jax.jit(jax.vmap(lambda k: perlin._mask(jax.random.fold_in(k, 0), SIZE)))(KEYS)
    empty = ~np.asarray(first).any(axis=(1, 2))
    assert empty.any()  # so that some were drawn again, and only those:
    found = np.asarray(masks(KEYS, SIZE))
    np.testing.assert_array_equal(found[~empty], np.asarray(first)[~empty])
    np.testing.assert_array_equal(masks(KEYS[::-1], SIZE), found[::-1])


def test_a_blend_is_the_image_outside_the_mask():
    rng = np.random.default_rng(0)
    images, fillings = np.float32(rng.uniform(0, 255, (2, 8, *SIZE, 3)))
    masks, shares = rng.random((8, *SIZE)) < 0.3, np.float32(rng.uniform(0.2, 0.8, 8))
    found = np.asarray(perlin.blended(images, fillings, masks, shares))
    np.testing.assert_array_equal(found[~masks], images[~masks])
    share = np.broadcast_to(np.float64(shares)[:, None, None, None], images.shape)[masks]
    expected = share * images[masks] + (1 - share) * fillings[masks]
    np.testing.assert_allclose(found[masks], expected, rtol=1e-5)


def test_textures_are_pixels_and_all_different():
    found = np.asarray(jax.jit(perlin.textures, static_argnums=1)(KEYS, SIZE))
    assert found.shape == (8, *SIZE, 3)
    assert 0 <= found.min() < 0.05
    assert 0.95 < found.max() <= 1
    assert (found.std(axis=(1, 2)).max(axis=1) > 0.01).all()
    colours = found.mean(axis=(1, 2))
    assert np.abs(colours[:, None] - colours).max(axis=2)[~np.eye(8, dtype=bool)].min() > 0.01
