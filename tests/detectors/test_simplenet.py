"""SimpleNet: its loss from the equation, what trains, for how long, and what noise means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core.recipe import OptimConfig, Recipe
from dsad.detectors.simplenet import OPTIM
from dsad.train.optim import lengths_in_state
from tests.contracts.detectors.common import KEY, Batches, cases, fitted, made

PLAIN = {"layers": ("a",), "neighbourhood": 1, "hidden": 32}


def batch_of(values):
    """A batch whose only layer holds ``values`` (b, h, w, d)."""
    number = np.arange(len(values), dtype=np.int32)
    return {"features": {"a": jnp.asarray(values)}, "index": number, "epoch": 0 * number}


def objective_of(batch, **config):
    return made("simplenet", **PLAIN, **config).objective(jax.eval_shape(lambda: batch), None)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective, params, extra, batch):
    views = objective.views(batch, KEY)
    loss, (extra, scalars) = objective.loss(params, extra, views, key=KEY, step=jnp.int32(0))
    return loss, extra, scalars, views


VALUES = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)


@pytest.mark.parametrize("unit", ["std", "absolute"])
def test_the_loss_is_that_of_the_equation(unit):
    objective = objective_of(batch_of(VALUES), noise=0.7, noise_unit=unit)
    params, extra = objective.init(KEY)
    loss, after, scalars, views = loss_of(objective, params, extra, batch_of(VALUES))
    normal = np.float64(VALUES).reshape(-1, 5) @ np.float64(params["adaptor"]["kernel"])
    noise = 0.7 * np.float64(views["noise"]).reshape(-1, 5)
    noise *= normal.std(axis=0) if unit == "std" else 1
    hidden = np.concatenate([normal, normal + noise])
    hidden = hidden @ np.float64(params["discriminator"]["conv1"]["kernel"])
    np.testing.assert_allclose(
        after["statistics"]["norm1"]["mean"], 0.1 * hidden.mean(axis=0), atol=1e-6
    )
    hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5)
    hidden = np.maximum(hidden, 0.2 * hidden)
    scores = hidden @ np.float64(params["discriminator"]["conv2"]["kernel"])[:, 0]
    high, low = np.split(scores, 2)
    expected = np.maximum(0.5 - high, 0).mean(), np.maximum(0.5 + low, 0).mean()
    assert float(loss) == pytest.approx(sum(expected), rel=1e-5)
    assert (scalars["normal"], scalars["noised"]) == pytest.approx(expected, rel=1e-5)


def test_without_noise_no_discriminator_gains_anything():
    """relu(m - x) + relu(m + x) >= 2 m for every x, with equality within the margin."""
    batch = batch_of(VALUES)
    for seed in range(3):
        objective = objective_of(batch, noise=0.0)
        params, extra = objective.init(jax.random.key(seed))
        assert loss_of(objective, params, extra, batch)[0] >= 1 - 1e-6
        params["discriminator"]["conv2"]["kernel"] *= 1e-3
        assert loss_of(objective, params, extra, batch)[0] == pytest.approx(1, abs=1e-6)


def test_a_separable_toy_reaches_zero_hinge():
    """Two normal points in 32 dimensions, and noise that never comes near them."""
    points = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    batch = batch_of(points[np.random.default_rng(1).integers(0, 2, (4, 4, 4))])
    objective = objective_of(batch, noise=8.0, noise_unit="absolute")
    tx, _ = lengths_in_state(OptimConfig(lr=0.01), 4)

    def step(state, at):
        params, extra, opt = state
        views = objective.views({**batch, "epoch": batch["epoch"] + at}, KEY)
        run = functools.partial(objective.loss, key=KEY, step=at)
        (loss, (extra, _)), grads = jax.value_and_grad(run, has_aux=True)(params, extra, views)
        updates, opt = tx.update(grads, opt, params)
        return (jax.tree.map(jnp.add, params, updates), extra, opt), loss

    params, extra = objective.init(KEY)
    start = params, extra, tx.init(params)
    losses = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(400))[1])()
    assert losses[0] > 0.5
    assert np.median(losses[-100:]) == 0
    assert losses[-100:].mean() < 0.01


def test_only_adaptor_and_discriminator_learn():
    """Beside rates and decays as published; the frozen network is nowhere in the state."""
    objective = objective_of(batch_of(VALUES))
    params, extra = objective.init(KEY)
    assert (params.keys(), extra.keys()) == ({"adaptor", "discriminator"}, {"statistics"})
    tx, _ = lengths_in_state(OPTIM, 8)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    rates = {"adaptor": 1e-4 * 0.01, "discriminator": 2e-4 * 1e-5}
    for name, factor in rates.items():
        jax.tree.map(
            lambda u, p, f=factor: np.testing.assert_allclose(u, -f * p, rtol=1e-5),
            updates[name], params[name],
        )  # fmt: skip


def test_the_budget_is_fixed(monkeypatch):
    """Epochs of the images there are, whatever the loss; the number of steps is the state's."""
    told = []
    module = cases()["simplenet"].module
    monkeypatch.setattr(module, "logits", counted(told, module.logits))
    recipe = Recipe(epochs=3.0, batch_size=4, optim=OptimConfig(lr=1e-3))
    state = fitted(
        made("simplenet", **PLAIN, recipe=recipe), Batches({"a": np.repeat(VALUES, 2, 0)})
    )
    assert state.keys() == {"adaptor", "discriminator", "statistics"}
    assert len(told) == 6


def counted(told, function):
    def wrapped(*args, train):
        scores, statistics = function(*args, train=train)
        jax.debug.callback(lambda: told.append(1))
        return scores, statistics

    return wrapped
