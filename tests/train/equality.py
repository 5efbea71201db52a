"""One step of an objective on any mesh: its loss, gradients and hard choices, for comparison."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.core.mesh import MeshConfig, make_mesh, place_batch, replicated
from dsad.core.tree import flatten, path_name
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
    """An optimiser that leaves the parameters alone and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: {"kept": jax.tree.map(jnp.zeros_like, params)},
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), {"kept": grads}),
    )


@functools.cache
def recorded(name):
    """The objective, and parameters and extra as host arrays."""
    objective = common.build(name, recorded=True)
    return objective, *drawn(objective)


def drawn(objective):
    """Random values of the sizes that initial ones have, which no compiler is needed for."""
    g = np.random.default_rng(7)

    def draw(keys, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # counters, places in a queue
            return np.zeros(leaf.shape, leaf.dtype)
        noise, path = np.asarray(g.standard_normal(leaf.shape), leaf.dtype), path_name(keys)
        if path.endswith(("scale", "var")):
            return 1 + np.abs(noise) / 10
        if not path.endswith("kernel"):
            return noise / 10
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[max(leaf.ndim - 2, 0)]
        return noise / math.sqrt(fan_in)

    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    return jax.tree.map_with_path(draw, shapes)


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


def one_step(name, mesh, min_size=MIN_SIZE, accumulate=1, rows=slice(None)):
    """Run it from the same state and batch; ``rows`` of the batch are this process's."""
    step, abstract, values = parts(name, mesh, min_size, accumulate)
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, abstract)
    inputs = place_batch(jax.tree.map(lambda x: x[rows], batch(name)), mesh)
    arguments = (state, inputs, None, placed_key(jax.random.key(5), mesh))
    state, scalars = step.lower(*arguments).compile(QUICK)(*arguments)
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
