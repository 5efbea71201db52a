"""GLASS: the loss from its equations, the published numbers, what is measured before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.detectors import glass
from dsad.detectors._discriminator import adapted
from dsad.train.optim import lengths_in_state
from tests.contracts.detectors.common import KEY, Batches, made
from tests.contracts.detectors.glass import images_of, maps_of, network

SPHERE, MANIFOLD = {"hypothesis": "hypersphere"}, {"hypothesis": "manifold"}
SMALL = {"hidden": 12, "noise": 0.3, "ascent": 0.05}


def objective_of(**config):
    """The objective on batches of four images, its parameters and extra, and views."""
    detector = made("glass", **SMALL | config)
    maps = maps_of(0, 4)
    number = jnp.arange(4, dtype=jnp.int32)
    batch = {"image": jnp.uint8(maps["image"]), "index": number, "epoch": 0 * number}
    objective = detector.objective(jax.eval_shape(lambda: batch), network())
    params, extra = objective.init(KEY)
    source = Batches(maps)
    extra |= detector.measured(source, functools.partial(images_of, source))
    return objective, params, {**extra, "backbone": network()}, objective.views(batch, KEY)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective, params, extra, views):
    loss, (extra, scalars) = objective.loss(params, extra, views, key=KEY, step=jnp.int32(0))
    return loss, extra["statistics"], scalars


class Oracle:
    """One step in float64, with gradients written out."""

    def __init__(self, objective, params, extra, views):
        self.cfg = objective.config
        head = params["discriminator"]
        self.first, self.last = (np.float64(head[n]["kernel"]) for n in ("conv1", "conv2"))
        images = np.asarray(views["images"])
        embed = lambda x: objective.detector.embed(network()(x, None))  # noqa: E731
        cells = [np.float64(adapted(params, embed(images[:, i]))) for i in range(2)]
        depth = cells[0].shape[-1]
        self.normal, self.pasted = (x.reshape(4, -1, depth) for x in cells)
        self.centre = np.float64(adapted(params, extra["centre"])).reshape(1, -1, depth)
        self.local = np.asarray(views["local"]).reshape(4, -1)
        self.noise = np.float64(views["noise"]).reshape(self.normal.shape)
        self.sphere = bool(extra["hypersphere"])

    def forward(self, cells):
        """Logits of all cells together, and what the gradient needs."""
        hidden = cells @ self.first
        std = np.sqrt(hidden.var(axis=(0, 1)) + 1e-5)
        unit = (hidden - hidden.mean(axis=(0, 1))) / std
        return (np.where(unit > 0, unit, 0.2 * unit) @ self.last)[..., 0], unit, std, hidden

    def slope(self, cells):
        """Of the mean of softplus(-D) over the second half of the cells of each image."""
        half = cells.shape[1] // 2
        scores, unit, std, _ = self.forward(cells)
        d = np.zeros_like(scores)
        d[:, half:] = -1 / (1 + np.exp(scores[:, half:])) / scores[:, half:].size
        du = d[..., None] * self.last[:, 0] * np.where(unit > 0, 1, 0.2)
        dh = du - du.mean(axis=(0, 1)) - unit * (du * unit).mean(axis=(0, 1))
        return ((dh / std) @ self.first.T)[:, half:]

    def loss(self):
        far = lambda x, base: np.linalg.norm(x - base, axis=2, keepdims=True)  # noqa: E731
        gaps = [far(self.pasted, self.centre)[~self.local], far(self.normal, self.centre)]
        self.radius = np.quantile(np.concatenate([g.ravel() for g in gaps]), 0.75)
        base, low = (self.centre, self.radius) if self.sphere else (self.normal, 0.5)
        moved = self.normal + self.cfg.noise * self.noise
        for step in range(self.cfg.steps):
            slope = self.slope(np.concatenate([self.normal, moved], axis=1))
            moved += self.cfg.ascent * slope / (far(slope, 0) + 1e-10)
            if step % 5 == 4:
                gap = far(moved, base)
                moved = base + np.clip(gap, low, 2 * low) / gap * (moved - base)
        self.moved = moved
        both = np.concatenate([self.normal, moved], axis=1)
        scores, _, _, self.hidden = self.forward(both)
        low, high = np.split(scores, 2, axis=1)
        pasted = self.pasted.copy()
        if self.sphere:
            gap = far(pasted, self.centre)
            put = self.centre + np.clip(gap, 2 * self.radius, 4 * self.radius) / gap * (
                pasted - self.centre
            )
            pasted[self.local] = put[self.local]
        self.put = pasted
        p = 1 / (1 + np.exp(-self.forward(pasted)[0]))
        hard = (p - self.local) ** 2 >= np.quantile((p - self.local) ** 2, 0.5)
        true = np.where(self.local, p, 1 - p)
        true = (1 - 2e-5) * true + 2e-5
        focal = (-((1 - true) ** 2) * np.log(true))[hard].mean()
        return np.log1p(np.exp(low)).mean(), np.log1p(np.exp(-high)).mean(), focal


@pytest.mark.parametrize("config", [SPHERE, MANIFOLD], ids=lambda c: c["hypothesis"])
def test_the_loss_is_that_of_the_equations(config):
    objective, params, extra, views = objective_of(**config, steps=10)
    oracle = Oracle(objective, params, extra, views)
    expected = oracle.loss()
    loss, statistics, scalars = loss_of(objective, params, extra, views)
    for name, value in zip(("normal", "global", "local"), expected, strict=True):
        assert scalars[name] == pytest.approx(value, rel=1e-4)
    assert loss == pytest.approx(sum(expected), rel=1e-4)
    assert scalars["radius"] == pytest.approx(oracle.radius, rel=1e-5)
    # Once a step, of normal and global cells.
    mean = oracle.hidden.mean(axis=(0, 1))
    np.testing.assert_allclose(statistics["norm1"]["mean"], 0.1 * mean, atol=1e-5)
    # The shells, which the equations alone give.
    far = lambda x, base: np.linalg.norm(x - base, axis=2)  # noqa: E731
    ends = (oracle.radius, oracle.centre) if oracle.sphere else (0.5, oracle.normal)
    gaps = far(oracle.moved, ends[1]) / ends[0]
    assert ((gaps > 1 - 1e-9) & (gaps < 2 + 1e-9)).all()
    if oracle.sphere:
        gaps = far(oracle.put, oracle.centre)[oracle.local] / oracle.radius
        assert ((gaps > 2 - 1e-9) & (gaps < 4 + 1e-9)).all()


@pytest.mark.parametrize("config", [SPHERE, MANIFOLD], ids=lambda c: c["hypothesis"])
def test_only_what_is_trained_has_a_gradient(config):
    objective, params, extra, views = objective_of(**config)

    @jax.jit
    @jax.grad
    def slopes(trained, extra, views):
        params, kernels = trained
        extra = {**extra, "backbone": type(network())(kernels)}
        return objective.loss(params, extra, views, key=KEY, step=jnp.int32(0))[0]

    params, kernels = slopes((params, network().kernels), extra, views)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), kernels)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-6 for g in jax.tree.leaves(params))


@pytest.mark.parametrize("least", [2.0, 100.0])
def test_the_ascent_passes_on_no_gradient_and_the_projections_do(least):
    """Within a shell the start passes through; onto one, its direction does."""
    step = 0.1 if least < 3 else 1e-5
    objective, params, extra, _ = objective_of(**SPHERE, steps=5, ascent=step)
    start = jax.random.normal(KEY, (1, 6, 11))
    start = 3 * start / glass.lengths(start)[..., None]

    def moved(start):
        shell = jnp.zeros_like(start), jnp.float32(least)
        found = objective._ascended(params, extra["statistics"], 0 * start, start, shell)
        return jnp.sum(found[0, :, 0]), found

    slope, found = jax.jit(jax.grad(moved, has_aux=True))(start)
    assert np.abs(found - start).max() > step
    expected = np.eye(11)[0]
    if least > 3:
        gap = np.float64(start[0])
        expected = 100 / 3 * (expected - gap[:, :1] * gap / 9)
    np.testing.assert_allclose(
        slope[0], np.broadcast_to(expected, (6, 11)), rtol=1e-3, atol=1e-2 if least > 3 else 1e-6
    )


def test_focal_losses_are_the_published_ones():
    pairs = {(0.5, 1): 0.173275, (0.5, 0): 0.173275, (0.9, 1): 1.0535e-3, (0.1, 1): 1.864874}
    for (score, label), loss in pairs.items():
        found = glass.focal(jnp.float32(score), jnp.asarray(bool(label)))
        assert float(found) == pytest.approx(loss, rel=1e-4)
    scores, labels = jnp.array([[0.0, 0.2, 0.4, 0.1]]), jnp.array([[False, True, False, False]])
    hard = [float(glass.focal(scores[0, i], labels[0, i])) for i in (1, 2)]
    assert glass.hard_focal(scores, labels, 0.5) == pytest.approx(np.mean(hard), rel=1e-5)
    whole = [float(glass.focal(s, m)) for s, m in zip(scores[0], labels[0], strict=True)]
    assert glass.hard_focal(scores, labels, 0.0) == pytest.approx(np.mean(whole), rel=1e-5)


def test_lengths_after_a_projection():
    points = np.float32(np.random.default_rng(0).normal(size=(64, 7)))
    points *= np.logspace(-3, 3, 64, dtype=np.float32)[:, None]
    base = jnp.ones((1, 7))
    found = np.asarray(glass.brought(points + base, base, jnp.float32(2), jnp.float32(4)))
    gaps = np.linalg.norm(np.float64(found) - 1, axis=1)
    assert ((gaps > 2 - 1e-5) & (gaps < 4 + 1e-5)).all()
    before = np.linalg.norm(np.float64(points), axis=1)
    np.testing.assert_allclose(gaps, np.clip(before, 2, 4), rtol=1e-5)
    slope = jax.grad(lambda x: glass.brought(x, base, 2.0, 4.0).sum())(base)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_quantiles_are_those_of_numpy(share, count):
    values = np.float32(np.random.default_rng(count).normal(size=(4, 6)))
    used = np.zeros(24, bool)
    used[np.random.default_rng(count).permutation(24)[:count]] = True
    found = jax.jit(glass.quantile, static_argnums=1)(values, share, used.reshape(4, 6))
    expected = np.quantile(values.ravel()[used].astype(np.float64), share)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(glass.quantile(values, share)) == pytest.approx(np.quantile(values, share), 1e-5)


@pytest.mark.parametrize("grid", [(4, 3), (5, 4)])
def test_cells_that_a_mask_touches(grid):
    masks = np.random.default_rng(0).random((3, 16, 12)) < 0.06
    found = np.asarray(glass.touched(jnp.asarray(masks), grid))
    expected = np.zeros((3, *grid), bool)
    for b, y, x in np.argwhere(masks):
        expected[b, y * grid[0] // 16, x * grid[1] // 12] = True
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.mean() < 1


def test_the_centre_is_exact_and_behind_any_adaptor():
    """Whatever the batches; the mean of adapted cells is that of the cells, adapted."""
    detector, maps = made("glass", **SMALL), maps_of(3, 7)
    found = [
        detector.measured(s, functools.partial(images_of, s))["centre"]
        for s in (Batches(maps, size=7), Batches(maps, size=3))
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)
    cells = np.float64(detector.embed(maps))
    np.testing.assert_allclose(found[0], cells.mean(axis=0), atol=1e-6)
    kernel = {"adaptor": {"kernel": jax.random.normal(KEY, (11, 11))}}
    each = np.asarray(adapted(kernel, detector.embed(maps))).mean(axis=0)
    np.testing.assert_allclose(adapted(kernel, found[0]), each, atol=1e-5)


def test_the_hypothesis_follows_from_the_mean_image():
    y, x = np.mgrid[:24, :20]
    disc = np.float64(np.hypot(y - 11.5, x - 9.5) < 7)
    maps, found = maps_of(0, 4), {}
    source = Batches(maps)
    for name, image in (("disc", disc), ("flat", np.ones_like(disc))):
        images = np.uint8(np.repeat(np.repeat(200 * image[None, ..., None], 4, 0), 3, 3))
        given = lambda images=images: iter([images[:3], images[3:]])  # noqa: E731
        for config in ({}, SPHERE, MANIFOLD):
            sphere = made("glass", **config).measured(source, given)["hypersphere"]
            found[name, config.get("hypothesis", "auto")] = bool(sphere)
    assert [k for k, v in found.items() if v] == [
        ("disc", "auto"), ("disc", "hypersphere"), ("flat", "hypersphere")
    ]  # fmt: skip


def test_without_an_adaptor_the_rest_trains_at_its_rate():
    params = objective_of(**SPHERE, adaptor=False)[1]
    assert params.keys() == {"discriminator"}
    tx, _ = lengths_in_state(glass.OPTIM, 8)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    jax.tree.map(
        lambda u, p: np.testing.assert_allclose(u, -2e-4 * 0.01 * p, rtol=1e-5), updates, params
    )


def test_steps_end_with_a_projection():
    with pytest.raises(ConfigError, match=r"detector\.steps: expected a multiple of 5, found 7"):
        made("glass", steps=7)
