"""One step of an objective on any mesh: its loss, gradients and hard choices, for comparison."""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.core.mesh import MeshConfig, make_mesh, place_batch, replicated
from dsad.core.tree import flatten
from dsad.train.state import TrainState, abstract_state
from dsad.train.step import make_step, placed_key
from tests.contracts.objectives import common
from tests.contracts.objectives.common import batch

#: Small enough that the small networks are really split.
MIN_SIZE = 64
#: Compiling takes most of the time here, running none.
QUICK: Any = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = "False"


class Found(NamedTuple):
    """What one step gave, on the host."""

    loss: np.ndarray
    grads: dict
    extra: dict
    choices: dict


def keep_gradients():
    """Adam at the ``rate`` of its state, 0 unless changed, which holds the last gradient, too."""
    adam = optax.scale_by_adam()

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"kept": zeros, "rate": jnp.float32(0), "adam": adam.init(params)}

    def update(grads, state, params=None):
        updates, moments = adam.update(grads, state["adam"], params)
        updates = jax.tree.map(lambda u: -state["rate"] * u, updates)
        return updates, {"kept": grads, "rate": state["rate"], "adam": moments}

    return optax.GradientTransformation(init, update)


@functools.cache
def recorded(name):
    """The objective, and parameters and extra as host arrays."""
    return common.build(name, recorded=True), *common.perturbed(name)[1:]


@functools.cache
def parts(name, mesh, min_size=MIN_SIZE, accumulate=1, rules=()):
    """Step and abstract state of an objective on a mesh."""
    objective, params, extra = recorded(name)
    tx = keep_gradients()
    abstract = abstract_state(objective, tx, mesh, min_size, rules)
    step = make_step(
        objective, tx, lambda n: jnp.float32(0), abstract, mesh=mesh, accumulate=accumulate
    )
    values = TrainState(
        step=np.int32(3), params=params, extra=extra, opt_state=jax.device_get(tx.init(params))
    )
    return step, abstract, values


def placed(values, abstract):
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, abstract)


def training(name):
    """A state to train from, which the step may consume, and the step, key and mesh."""
    mesh = mesh_of(1)
    step, abstract, values = parts(name, mesh)
    opt_state = {**values.opt_state, "rate": np.float32(1e-3)}
    values = dataclasses.replace(values, step=np.int32(0), opt_state=opt_state)
    return placed(values, abstract), step, placed_key(jax.random.key(0), mesh), mesh


def one_step(name, mesh, min_size=MIN_SIZE, accumulate=1, rows=slice(None)):
    """Run it from the same state and batch; ``rows`` of the batch are this process's."""
    step, abstract, values = parts(name, mesh, min_size, accumulate)
    inputs = place_batch(jax.tree.map(lambda x: x[rows], batch(name)), mesh)
    arguments = (placed(values, abstract), inputs, None, placed_key(jax.random.key(5), mesh))
    if os.environ.get("DSAD_TEST_OPTIMISED"):
        step = step.lower(*arguments).compile(QUICK)
    with jax.set_mesh(mesh):  # as all who call the step: one program
        state, scalars = step(*arguments)
    out = {"grads": state.opt_state["kept"], "extra": state.extra, "scalars": scalars}
    # Every process needs a whole copy to bring it to its host.
    out = jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(mesh))(out))
    chosen = {k: v for k, v in out["scalars"].items() if k.startswith("chosen")}
    return Found(out["scalars"]["loss"], flatten(out["grads"]), flatten(out["extra"]), chosen)


def mesh_of(devices, fsdp=1):
    return make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])


@functools.cache
def stepped(name, devices, fsdp=1):
    return one_step(name, mesh_of(devices, fsdp))


def assert_equal(one, other, loss=1e-6, gradient=1e-4):
    """Equal choices; then loss, gradients (against the largest of all) and batch statistics."""
    assert one.choices.keys() == other.choices.keys()
    for name, values in one.choices.items():
        np.testing.assert_array_equal(values, other.choices[name], err_msg=name)
    assert abs(other.loss - one.loss) <= loss * max(1, abs(one.loss))
    largest = max(np.abs(g).max() for g in one.grads.values())
    assert one.grads.keys() == other.grads.keys()
    for path, values in one.grads.items():
        difference = np.abs(values - other.grads[path]).max()
        assert difference <= gradient * largest, (path, difference, largest)
    for path, values in one.extra.items():
        np.testing.assert_allclose(other.extra[path], values, rtol=1e-5, atol=1e-6, err_msg=path)
