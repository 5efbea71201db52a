"""The training state and its placement on a mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dsad.core.sharding import Rule, state_shardings
from dsad.core.types import Trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step reads and writes; ``step`` counts completed updates (int32)."""

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any


def abstract_state(
    objective: Trainable,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    min_size: int,
    rules: Sequence[Rule] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing any of it.

    ``min_size`` and ``rules`` are those of ``core.mesh.MeshConfig``. Raises ConfigError for a rule
    that does not fit.
    """
    shapes = jax.eval_shape(lambda: _fresh(objective, tx, jax.random.key(0)))
    others = {"step": shapes.step, "extra": shapes.extra, "opt_state": shapes.opt_state}
    params, rest = state_shardings(shapes.params, others, mesh, min_size, rules)
    shardings = TrainState(params=params, **rest)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def initial_state(
    objective: Trainable,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
) -> TrainState:
    """The state at step 0, created in place on the mesh; equal for every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda key: _fresh(objective, tx, key), out_shardings=shardings)
    return make(jax.random.key(seed))


def _fresh(objective: Trainable, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params, extra = objective.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, extra=extra, opt_state=tx.init(params)
    )
