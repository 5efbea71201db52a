"""CFLOW's flow and training against the numbers of its equations; the contract has the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsad.core.errors import ConfigError
from dsad.detectors.cflow import Config, Flows
from dsad.models import flow
from dsad.models.flow import FlowSpec
from dsad.train.optim import make_optimizer, make_schedule
from tests.contracts.detectors.cflow import BASE, RECIPE, code, maps_of
from tests.contracts.detectors.common import KEY, Batches, fitted, made

SIX = FlowSpec(channels=6, condition=8, blocks=3)


def drawn(spec, seed=0, spread=0.4):
    """A flow far from the identity."""
    params, rotations = flow.init_flow(jax.random.key(seed), spec)
    rng = np.random.default_rng(seed)
    noise = lambda x: x + spread * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, params), rotations


def vectors(spec, count=4):
    rng = np.random.default_rng(1)
    make = lambda n: jnp.asarray(rng.standard_normal((count, n)), jnp.float32)  # noqa: E731
    return make(spec.channels), make(spec.condition)


@pytest.mark.parametrize("clamp", ["plain", "scaled"])
@pytest.mark.parametrize("channels", [6, 7])
def test_inverse_and_determinant(channels, clamp):
    spec = dataclasses.replace(SIX, channels=channels, clamp=clamp)
    params, rotations = drawn(spec)
    x, q = vectors(spec)
    z, determinant = flow.forward(params, rotations, spec, x, q)
    assert float(jnp.abs(determinant).max()) > 0.2
    back = flow.inverse(params, rotations, spec, z, q)
    np.testing.assert_allclose(back, x, atol=1e-4)

    def one(x, q):
        return flow.forward(params, rotations, spec, x[None], q[None])[0][0]

    jacobian = np.float64(jax.vmap(jax.jacfwd(one))(x, q))
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], determinant, rtol=1e-4, atol=1e-4)


def test_without_couplings_a_flow_is_a_rotation():
    params, rotations = flow.init_flow(KEY, SIX)
    still = {**params, "fc2": jax.tree.map(jnp.zeros_like, params["fc2"])}
    x, q = vectors(SIX)
    z, determinant = flow.forward(still, rotations, SIX, x, q)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(determinant, 0, atol=1e-5)
    ll = flow.log_likelihood(still, rotations, SIX, jnp.zeros_like(x), q)
    np.testing.assert_allclose(jax.nn.softplus(-ll), 1.254655, rtol=1e-6)


def test_rotations_have_determinant_one():
    found = np.float64(flow.random_rotations(KEY, 16, 5))
    np.testing.assert_allclose(
        found @ found.swapaxes(1, 2), np.tile(np.eye(5), (16, 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-5)
    # Of uniform ones every column points anywhere: both signs of each diagonal entry occur.
    diagonal = np.diagonal(found, axis1=1, axis2=2)
    assert ((diagonal > 0).any(axis=0) & (diagonal < 0).any(axis=0)).all()


def test_position_code():
    table = flow.position_code(128, (3, 4)).reshape(3, 4, 128)
    np.testing.assert_allclose(table[0, 1, :3], [0.841471, 0.540302, 0.681561], atol=1e-6)
    assert (table[:, :, 64] == table[:, :1, 64]).all()
    assert (table[1, :, 64] != table[0, :, 64]).all()
    np.testing.assert_allclose(table, code(3, 4), atol=1e-6)


@pytest.mark.parametrize(("clamp", "value"), [("plain", 1.447029), ("scaled", 0.916864)])
def test_clamps(clamp, value):
    assert float(flow.clamped(jnp.float32(1), clamp)) == pytest.approx(value, abs=1e-6)
    assert float(flow.clamped(jnp.float32(99), clamp)) == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("channels", "count"), [(768, 10_512_384), (1024, 17_074_176), (1280, 25_208_832)]
)
def test_parameters_of_published_sizes(channels, count):
    spec = FlowSpec(channels=channels, condition=128)
    params, rotations = jax.eval_shape(lambda k: flow.init_flow(k, spec), KEY)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert rotations.shape == (8, channels, channels)


def specs(maps, images):
    return {
        "features": {
            n: jax.ShapeDtypeStruct((images, *m.shape[1:]), m.dtype) for n, m in maps.items()
        }
    }


def views(cfg, images=8, epoch=0):
    maps = maps_of(0, 8)
    batch = {
        "features": {n: jnp.asarray(m[:images]) for n, m in maps.items()},
        "index": jnp.arange(images), "epoch": jnp.full(images, epoch),
    }  # fmt: skip
    objective = Flows(cfg, specs(maps, images))
    return objective, objective.views(batch, KEY), maps


def test_tokens_are_drawn_per_image_and_epoch():
    config = Config(**BASE | {"tokens": 64})
    _, found, maps = views(config)
    places, rows = (np.asarray(x) for x in found["layer2"])
    assert places.shape == (8, 8)
    assert all(len(set(row)) == 8 for row in places.tolist())
    expected = maps["layer2"].reshape(8, 30, 7)[np.arange(8)[:, None], places]
    np.testing.assert_array_equal(rows, expected)
    assert found["layer3"][0].shape == (8, 8)
    assert not np.array_equal(places, views(config, epoch=1)[1]["layer2"][0])
    # A step with half as many images and vectors draws the same of these images.
    half = views(dataclasses.replace(config, tokens=32), images=4)[1]
    np.testing.assert_array_equal(half["layer2"][0], places[:4])
    everything = np.sort(views(dataclasses.replace(config, tokens=0))[1]["layer3"][0])
    np.testing.assert_array_equal(everything, np.tile(np.arange(9), (8, 1)))


def test_levels_train_as_if_alone():
    """One Adam for all is one per level."""

    def trained(layers):
        objective, seen, _ = views(Config(**BASE | {"layers": layers}))
        params, extra = objective.init(KEY)
        schedule = make_schedule(RECIPE.optim, batch_size=8, steps_per_epoch=1, total_steps=3)
        tx = make_optimizer(RECIPE.optim, schedule)
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            grads = jax.grad(
                lambda p: objective.loss(p, extra, seen, key=KEY, step=jnp.int32(0))[0]
            )(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(2):
            params, state = step(params, state)
        return params["flows"]["layer3"]

    together, alone = trained(("layer2", "layer3")), trained(("layer3",))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, alone)


def test_the_schedule_of_the_recipe():
    recipe = Config().recipe
    schedule = make_schedule(recipe.optim, batch_size=16, steps_per_epoch=10.0, total_steps=2000)
    rate = lambda epoch: float(schedule(jnp.int32(10 * epoch)))  # noqa: E731
    published = {
        0: 2e-5,
        16: 1.968615e-4,
        12 * 8: 1.063728e-4,
        13 * 8 - 1: 1.063728e-4,
        24 * 8: 9.877e-7,
    }
    for epoch, expected in published.items():
        assert rate(epoch) == pytest.approx(expected, rel=1e-4), epoch
    assert rate(8) == pytest.approx((2e-5 + 1.968615e-4) / 2, rel=1e-4)
    assert recipe.optim.weight_decay == recipe.optim.clip == 0


def test_scores_are_of_the_training_maximum():
    """Other test images change no score, and the most likely training vector scores 0."""
    detector, normal = made("cflow", **{**BASE, "layers": ("layer2",)}), maps_of(0, 6)
    state = fitted(detector, Batches(normal))
    score = jax.jit(detector.score)
    assert float(score(state, normal).map.min()) == pytest.approx(0, abs=1e-6)
    test = maps_of(1, 8)
    alone = score(state, {n: m[3:4] for n, m in test.items()})
    np.testing.assert_allclose(alone.map[0], score(state, test).map[3], rtol=1e-5)
    assert state["tops"].shape == (1,)


def test_untrained_is_refused():
    with pytest.raises(ConfigError, match="cflow trains: expected trained parameters"):
        made("cflow").fit(Batches(maps_of(0, 2)), mesh=None, key=KEY, progress=lambda *_: None)
    with pytest.raises(ConfigError, match=r"detector\.blocks"):
        made("cflow", blocks=0)
