"""Every objective, on 1 and on 8 devices: the promises of ``core.types.Objective``."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsad.augment.isstad_corruption import CorruptionConfig
from dsad.augment.views import ViewConfig
from dsad.core import config as core_config
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.tree import flatten
from dsad.core.types import Objective, RunInfo, Specs
from dsad.models.decoder import DecoderConfig
from dsad.objectives import mae
from dsad.train.optim import OptimConfig, make_optimizer, make_schedule
from dsad.train.state import abstract_state, initial_state
from dsad.train.step import make_step

BATCH, CANVAS, SIDE = 8, 40, 32
RUN = RunInfo(total_steps=30, batch_size=BATCH, samples=BATCH, classes=2)
SPECS = Specs(batch_size=BATCH, canvas=CANVAS)
VIEW = ViewConfig(side=SIDE, area=(0.3, 1.0))

ENCODER = mae.EncoderConfig(arch="mae_vit_tiny_patch16", width=48, depth=2, heads=4, patch=8)
DECODER = DecoderConfig(width=32, depth=2, heads=4)
#: Small settings for each objective; a new member must be listed to be tested.
SMALL = {
    "mae": {"encoder": ENCODER, "decoder": DECODER,
            "view": dataclasses.replace(mae.CROP, side=SIDE)},
    "isstad": {"encoder": ENCODER, "decoder": DECODER, "side": SIDE, "permute": "shuffle",
               "corruption": CorruptionConfig(most_draw=9)},
    "ds2": {"hidden": 16, "out": 8, "view1": VIEW,
            "view2": dataclasses.replace(VIEW, blur_probability=0.1)},
}  # fmt: skip
#: Biases in front of a batch norm have no gradient, mathematically.
NO_GRADIENT = {"ds2": r"projector_\w+/conv1/bias"}
#: Views that do not depend on the key.
FIXED = {"isstad": ("clean",)}
NAMES = core_config.members("objectives")


@functools.cache
def built(name):
    """The objective with perturbed parameters: fresh ones hide gradients behind zero scales."""
    module = core_config.resolve("objectives", name)
    objective = module.build(module.Config(**SMALL[name]), RUN)
    params, extra = jax.jit(lambda k: objective.init(k, SPECS))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return objective, jax.tree.unflatten(tree, noisy), extra


def batch(epoch=0):
    g = np.random.default_rng(1)
    coarse = g.uniform(0, 255, (BATCH, 10, 10, 3))
    return {
        "image": coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8),
        "size": np.tile(np.array([[CANVAS, 32]], np.int32), (BATCH, 1)),
        "index": np.arange(BATCH, dtype=np.int32),
        "epoch": np.full(BATCH, epoch, np.int32),
        "category": np.zeros(BATCH, np.int32),
        "facts": {
            "original_size": np.tile(np.array([[1000, 800]], np.int32), (BATCH, 1)),
            "foreground_box": np.tile(np.array([[100, 50, 700, 900]], np.int32), (BATCH, 1)),
        },
    }


def evaluate(name, devices):
    """Views, loss, gradients and extra on a mesh over the given devices."""
    objective, params, extra = built(name)
    mesh = make_mesh(MeshConfig(), devices)

    @jax.jit
    def run(params, extra, batch):
        views = objective.views(batch, jax.random.key(5))
        (loss, (extra, scalars)), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            params, extra, views, key=jax.random.key(6), step=jnp.int32(0)
        )
        return views, loss, grads, extra, scalars

    with jax.set_mesh(mesh):
        replicated = jax.sharding.NamedSharding(mesh, jax.P())
        placed = jax.device_put((params, extra), replicated)
        return jax.device_get(run(*placed, place_batch(batch(), mesh)))


@functools.cache
def on_one(name):
    return evaluate(name, tuple(jax.devices()[:1]))


@functools.cache
def on_eight(name):
    return evaluate(name, tuple(jax.devices()[:8]))


def test_every_member_is_tested():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
class TestObjective:
    def test_satisfies_the_protocol(self, name):
        assert isinstance(built(name)[0], Objective)

    def test_loss_is_a_finite_f32_scalar(self, name):
        loss = on_one(name)[1]
        assert loss.shape == ()
        assert loss.dtype == np.float32
        assert np.isfinite(loss)

    def test_every_parameter_gets_a_gradient(self, name):
        import re

        for path, grad in flatten(on_one(name)[2]).items():
            assert np.isfinite(grad).all(), path
            if not re.search(NO_GRADIENT.get(name, "$^"), path):
                assert np.abs(grad).max() > 0, path

    def test_one_device_equals_eight(self, name):
        one, eight = on_one(name), on_eight(name)
        assert one[1] == pytest.approx(eight[1], abs=1e-6)
        largest = max(np.abs(g).max() for g in jax.tree.leaves(one[2]))
        for a, b in zip(jax.tree.leaves(one[2]), jax.tree.leaves(eight[2]), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * largest

    def test_same_key_same_draws_on_any_devices(self, name):
        one, eight = flatten(on_one(name)[0]), flatten(on_eight(name)[0])
        for path, values in one.items():
            if path.endswith("box"):
                np.testing.assert_array_equal(values, eight[path])
            else:
                np.testing.assert_allclose(values, eight[path], atol=1e-6)

    def test_views_depend_on_key_and_epoch(self, name):
        objective, _, _ = built(name)
        views = jax.jit(objective.views)
        first = flatten(views(batch(), jax.random.key(5)))
        again = flatten(views(batch(), jax.random.key(5)))
        other_key = flatten(views(batch(), jax.random.key(6)))
        other_epoch = flatten(views(batch(1), jax.random.key(5)))
        for path in first:
            np.testing.assert_array_equal(first[path], again[path])
            if path in FIXED.get(name, ()):
                continue
            assert not np.array_equal(first[path], other_key[path])
            assert not np.array_equal(first[path], other_epoch[path])

    def test_extra_keeps_its_structure(self, name):
        objective, params, extra = built(name)
        after = objective.after_update(params, on_one(name)[3], jnp.int32(1))

        def spec(x):
            return x.shape, x.dtype

        assert jax.tree.map(spec, extra) == jax.tree.map(spec, after)

    def test_step_maps_its_state_to_itself_and_traces_once(self, name):
        """Also weak types: a leaf that changes its type would compile the step again."""
        state, step, mesh = training(name)
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(step, state, place_batch(batch(), mesh), None)[0]
            for path, leaf in flatten(state).items():
                found = flatten(shapes)[path]
                assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype), path
                assert found.weak_type == leaf.weak_type, path
            for epoch in range(3):
                state, _ = step(state, place_batch(batch(epoch), mesh), None)
        assert step._cache_size() == 1

    def test_training_reduces_the_loss(self, name):
        state, step, mesh = training(name)
        losses = []
        with jax.set_mesh(mesh):
            for _ in range(30):
                state, scalars = step(state, place_batch(batch(), mesh), None)
                losses.append(float(scalars["loss"]))
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05

    def test_features_are_maps_in_inference_mode(self, name):
        objective, params, extra = built(name)
        images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
        maps = jax.jit(objective.features)(params, extra, images)
        alone = jax.jit(objective.features)(params, extra, images[:1])
        for key, value in maps.items():
            assert value.ndim == 4
            np.testing.assert_allclose(value[:1], alone[key], atol=1e-4)


@functools.cache
def parts(name):
    module = core_config.resolve("objectives", name)
    objective = module.build(module.Config(**SMALL[name]), RUN)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(name="adamw", lr=1e-3, lr_batch=0, schedule="constant", warmup_epochs=0)
    schedule = make_schedule(optim, batch_size=BATCH, steps_per_epoch=1, total_steps=30)
    tx: optax.GradientTransformation = make_optimizer(optim, schedule)
    abstract = abstract_state(objective, tx, SPECS, mesh, 2**18)
    step = make_step(objective, tx, schedule, abstract, mesh=mesh, seed=0)
    return (objective, tx, SPECS, abstract), step, mesh


def training(name):
    """A fresh state, and the step that all tests share."""
    arguments, step, mesh = parts(name)
    return initial_state(*arguments, seed=0), step, mesh
