"""Residual cells and the losses on them, against float64 loops and the numbers of the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from dsad.ops import residual as ops
from dsad.ops.similarity import unit

EVERY = np.ones


def norms(*values):
    """Cells (n, 3) with these norms."""
    direction = np.array([2.0, -1.0, 2.0]) / 3
    return jnp.asarray(np.array(values)[:, None] * direction, jnp.float32)


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([0], [0], 1.353066), ([3], [0], 1.890426), ([3], [1], 0.895724), ([0], [1], 2.406756),
        ([0.5, 1.5], [0, 1], 2.725744), ([4, 0.2], [0, 1], 6.872156), ([8, 8], [1, 1], 0),
    ],
)  # fmt: skip
def test_published_numbers_of_the_norm_loss(values, labels, expected):
    bad = np.array(labels, bool)
    loss = ops.norm_loss(norms(*values), bad, EVERY(len(bad), bool))
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_on_the_shell_nothing_pulls():
    """Between 0.99 r and r, which float32 can tell from r."""
    cells = norms(0.955)
    loss, slope = jax.value_and_grad(ops.norm_loss)(cells, np.zeros(1, bool), EVERY(1, bool))
    assert loss == 0
    assert not slope.any()


def test_radii_are_the_published_ones():
    """Lengths 0.96 and 3.6225 are the published 0.4 and 1.15; tiny lengths are halved."""
    lengths = np.float32([0, 1e-6, 0.96, 3.6225])
    vectors = lengths[:, None] * np.float32([0.6, 0, -0.8])
    expected = [0, 5e-7, 0.4, 1.15]
    np.testing.assert_allclose(ops.radius(jnp.asarray(vectors)), expected, rtol=1e-6)
    huber = ops.radius(jnp.asarray([[0.0, 0.98], [1.9, 0]]), "pseudo_huber")
    np.testing.assert_allclose(huber, [0.4, 1.147], atol=1e-3)


def norm_oracle(cells, bad, counted, form):
    n = np.linalg.norm(np.float64(cells), axis=1)
    a = np.sqrt((n if form == "released" else n**2) + 1) - 1
    r = min([0.4] + [0.9 * x for x in a[bad & counted]])
    phi = lambda d: np.log1p(np.exp(d)) * np.exp(d)  # noqa: E731
    sets = [a - r, 0.99 * r - a, r + 0.75 - a]
    of = [~bad & counted, ~bad & counted, bad & counted]
    terms = [g[m & (g > 0)] for g, m in zip(sets, of, strict=True)]
    return sum(phi(t).mean() for t in terms if len(t))


@pytest.mark.parametrize("form", ["released", "pseudo_huber"])
def test_norm_loss_against_float64(form):
    g = np.random.default_rng(0)
    cells = (g.normal(size=(60, 5)) * g.exponential(size=(60, 1))).astype(np.float32)
    bad, counted = g.random(60) < 0.3, g.random(60) < 0.8
    loss = jax.jit(ops.norm_loss, static_argnames="form")(cells, bad, counted, form=form)
    np.testing.assert_allclose(loss, norm_oracle(cells, bad, counted, form), rtol=1e-5)
    turned, _ = np.linalg.qr(g.normal(size=(5, 5)))
    again = ops.norm_loss((cells @ turned).astype(np.float32), bad, counted, form=form)
    np.testing.assert_allclose(again, loss, rtol=1e-5)


def test_gradient_of_the_norm_loss_is_that_of_its_definition():
    """Of phi through softplus alone; finite at a cell of length 0 and far out."""
    cells = norms(3.0)
    slope = jax.grad(ops.norm_loss)(cells, np.zeros(1, bool), EVERY(1, bool))
    gap = np.sqrt(4.0) - 1 - 0.4
    steep = np.exp(gap) / (1 + np.exp(-gap)) / (2 * np.sqrt(4.0))
    np.testing.assert_allclose(np.linalg.norm(slope), steep, rtol=1e-5)
    for cells in (norms(0.0), norms(1e8)):
        slope = jax.grad(ops.norm_loss)(cells, np.zeros(1, bool), EVERY(1, bool))
        assert np.isfinite(slope).all()


def angle(first, second, labels, centre=(0, 0), counted=None):
    bad = np.array(labels, bool)
    counted = EVERY(len(bad), bool) if counted is None else counted
    first, second, centre = (jnp.asarray(x, jnp.float32) for x in (first, second, centre))
    return ops.angle_loss(first, second, centre, bad, counted)


def test_published_numbers_of_the_angle_loss():
    for views, expected in (
        ([[1, 0], [0, 1]], -5.973519), ([[1, 0], [-1, 0]], -12.640186), ([[1, 1]] * 2, 0.693147)
    ):  # fmt: skip
        np.testing.assert_allclose(angle(views, views, [0, 1]), expected, atol=2e-6)
    first, second = [[1, 0], [0, 1], [3, 4], [-1, 1]], [[1, 1], [0, 2], [4, 3], [-2, 1]]
    labels = [0, 0, 0, 1]
    np.testing.assert_allclose(angle(first, second, labels), -4.182308, atol=5e-6)
    found = angle(first, second, labels, centre=(0.5, -0.25))
    np.testing.assert_allclose(found, -3.117637, atol=5e-6)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_without_one_of_the_labels_the_angle_loss_is_nothing(labels):
    views = jnp.asarray([[1.0, 2.0], [0.0, 0.0]])
    loss, slope = jax.value_and_grad(lambda x: angle(x, x, labels))(views)
    assert loss == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("block", [ops.BLOCK, 9])
def test_angle_loss_against_float64(monkeypatch, block):
    """Also in blocks that do not divide the cells; gradients against the whole matrix."""
    monkeypatch.setattr(ops, "BLOCK", block)
    g = np.random.default_rng(1)
    first, second = g.normal(size=(2, 37, 4))
    bad, counted, centre = g.random(37) < 0.4, g.random(37) < 0.8, g.normal(size=4)
    of = lambda x: (x - centre) / np.linalg.norm(x - centre, axis=-1, keepdims=True)  # noqa: E731
    rows, label, used = of(np.concatenate([first, second])), np.tile(bad, 2), np.tile(counted, 2)
    partner = np.roll(rows, 37, axis=0)
    each = [
        logsumexp(rows[(label != label[i]) & used] @ rows[i] / 0.15)
        - rows[i] @ partner[i] / 0.15
        for i in range(74) if used[i]
    ]  # fmt: skip
    found, slope = jax.jit(
        jax.value_and_grad(lambda x: angle(x, second, bad, centre, counted))
    )(jnp.asarray(first, jnp.float32))  # fmt: skip
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-5)

    def whole(x):
        r = jnp.concatenate([unit(x - centre[None]), unit(jnp.asarray(second - centre))])
        alike = jnp.where((label[:, None] != label[None]) & used[None], r @ r.T / 0.15, -jnp.inf)
        pair = jnp.sum(r * jnp.roll(r, 37, axis=0), -1) / 0.15
        return jnp.mean((jax.nn.logsumexp(alike, axis=1) - pair)[used])

    expected = jax.grad(whole)(jnp.asarray(first, jnp.float32))
    np.testing.assert_allclose(slope, expected, atol=1e-5 * np.abs(expected).max())
    moved = angle(
        centre + 3 * (first - centre), centre + 3 * (second - centre), bad, centre, counted
    )
    np.testing.assert_allclose(moved, found, rtol=1e-5)


def test_residual_against_loops():
    g = np.random.default_rng(2)
    cells, references = g.normal(size=(2, 7, 5)), 3 * g.normal(size=(2, 11, 5))
    valid = g.random((2, 11)) < 0.6
    left = ops.residual(jnp.asarray(cells), jnp.asarray(references), valid)
    for b in range(2):
        rows = references[b][valid[b]]
        cosine = cells[b] @ rows.T / np.linalg.norm(rows, axis=1)
        expected = cells[b] - rows[cosine.argmax(1)]
        np.testing.assert_allclose(left[b], expected, atol=1e-5)
        bank = np.concatenate([rows, references[b][~valid[b]]])
        same = ops.bank_residual(jnp.asarray(cells[b]), jnp.asarray(bank), jnp.int32(len(rows)))
        np.testing.assert_allclose(same, expected, atol=1e-5)


def test_cells_of_the_bank_leave_nothing_and_order_does_not_matter():
    g = np.random.default_rng(3)
    rows = g.normal(size=(12, 6)).astype(np.float32)
    cells = np.concatenate([rows[:5], g.normal(size=(4, 6)).astype(np.float32)])
    left = ops.bank_residual(cells, rows)
    np.testing.assert_array_equal(left[:5], 0)
    np.testing.assert_allclose(ops.bank_residual(cells, rows[::-1]), left, atol=1e-6)
    one = lambda rows: ops.residual(cells[None], rows[None], EVERY((1, len(rows)), bool))[0]  # noqa: E731
    np.testing.assert_array_equal(one(rows)[:5], 0)
    np.testing.assert_allclose(one(rows[::-1]), left, atol=1e-6)

    def cosine(rows):
        matched = cells - one(rows)
        return np.sum(unit(cells) * unit(matched), -1)

    assert (cosine(rows) >= cosine(rows[:6]) - 1e-6).all()


def test_rows_without_a_direction_are_nearest_to_nothing_else():
    cells = np.array([[1.0, 0], [-1, 1]], np.float32)
    rows = np.array([[0.0, 0], [-1, -1]], np.float32)
    np.testing.assert_array_equal(ops.bank_residual(cells, rows), cells - rows[1])
    np.testing.assert_array_equal(ops.bank_residual(cells, rows[:1]), cells)


def test_token_labels_count_pixels():
    mask = np.zeros((1, 28, 28), np.uint8)
    mask[0, :4, :8] = 1
    mask[0, 14:18, :8] = mask[0, 18, 0] = 1
    np.testing.assert_array_equal(
        ops.token_labels(mask, (2, 2))[0], [[False, False], [True, False]]
    )
    np.testing.assert_array_equal(ops.covered(mask, (2, 2))[0], [[32, 0], [33, 0]])
    shares = ops.covered(np.ones((1, 7, 5), np.uint8), (2, 3))
    np.testing.assert_allclose(shares, 35 / 6, rtol=1e-6)
    larger = mask.repeat(2, axis=1).repeat(2, axis=2)  # cells of 28 px: four times the pixels
    np.testing.assert_array_equal(ops.token_labels(larger, (2, 2)), ops.token_labels(mask, (2, 2)))
    corner = np.zeros((1, 32, 32), np.uint8)
    corner[0, 0, 0] = corner[0, 15, 15] = 1
    np.testing.assert_array_equal(
        ops.corner_labels(corner, (2, 2))[0], [[True, False], [False] * 2]
    )


@pytest.mark.parametrize(("side", "cells"), [(16, 16), (28, 14), (56, 14), (37, 13)])
def test_pooled_maps_are_means_of_blocks(side, cells):
    maps = np.random.default_rng(4).normal(size=(2, side, side, 3)).astype(np.float32)
    found = ops.pooled(jnp.asarray(maps), 16)
    block = -(-side // 16)
    assert found.shape == (2, cells, cells, 3)
    for i, j in ((0, 0), (cells - 1, 1), (2, cells - 1)):
        part = maps[:, block * i : block * (i + 1), block * j : block * (j + 1)]
        np.testing.assert_allclose(found[:, i, j], part.mean((1, 2)), atol=1e-5)
