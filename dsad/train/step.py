"""The one training step: views, loss, gradient, update, teacher; jitted, donated, sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.errors import ConfigError
from dsad.core.hosts import put
from dsad.core.mesh import BATCH_SPEC, batch_sharding, replicated
from dsad.core.tree import global_norm
from dsad.core.types import Scalars, Trainable
from dsad.train.state import TrainState

Fetch = Callable[[Any, Any], Batch]
#: ``step(state, inputs, store, key) -> (state, scalars)``, jitted.
Step = jax.stages.Wrapped


def make_step(
    objective: Trainable,
    tx: optax.GradientTransformation,
    rate: Callable[[TrainState], jax.Array],
    abstract: TrainState,
    *,
    mesh: Mesh,
    fetch: Fetch | None = None,
    accumulate: int = 1,
) -> Step:
    """Compile-once ``step(state, inputs, store, key) -> (state, scalars)``; ``state`` is donated.

    ``key`` is that of the run, from which every random draw follows, see ``placed_key``: runs of
    other seeds share the program, and the state carries no key.

    Args:
      objective: what to train.
      tx: optimiser.
      rate: its learning rate in a state, for the log.
      abstract: shapes and shardings of the state.
      mesh: devices; ``inputs`` must be split over it along the leading axis.
      fetch: ``(store, inputs) -> batch`` for data that live on the device; without it ``inputs``
        is the batch and ``store`` is ignored.
      accumulate: split the batch into this many parts and add up their gradients.

    Raises:
      ConfigError: accumulation for an objective whose loss couples the samples of a batch.

    """
    if accumulate > 1 and objective.traits.couples_batch:
        raise ConfigError(
            f"config.accumulate={accumulate}: this objective's loss depends on the whole batch "
            "(batch statistics or negatives), so parts of it would give another result; use 1."
        )

    def step(
        state: TrainState, inputs: Any, store: Any, base: jax.Array
    ) -> tuple[TrainState, Scalars]:
        batch = fetch(store, inputs) if fetch else inputs
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH_SPEC))
        key = jax.random.fold_in(rng.named(base, "loss"), state.step)

        def part(extra: Any, batch: Batch) -> tuple[Any, Any]:
            views = objective.views(batch, rng.named(base, "views"))
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for split_samples
                (loss, (extra, scalars)), grads = jax.value_and_grad(objective.loss, has_aux=True)(
                    state.params, extra, views, key=key, step=state.step
                )
            return extra, (grads, {"loss": loss, **scalars})

        if accumulate == 1:
            extra, (grads, scalars) = part(state.extra, batch)
        else:
            split = jax.tree.map(lambda x: _interleave(x, accumulate), batch)
            extra, parts = jax.lax.scan(part, state.extra, split)
            grads, scalars = jax.tree.map(lambda x: jnp.mean(x, axis=0), parts)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        extra = objective.after_update(params, extra, done)
        scalars |= {
            "lr": rate(state),
            "grad_norm": global_norm(grads),
            "update_norm": global_norm(updates),
            "param_norm": global_norm(params),
        }
        return TrainState(step=done, params=params, extra=extra, opt_state=opt_state), scalars

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), None, replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def placed_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A run's key on every device of its mesh, as the step takes it."""
    words = put(np.asarray(jax.random.key_data(key)), replicated(mesh))
    return jax.random.wrap_key_data(words)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Likewise without a value, for devices that need not be there."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """(b, ...) to (parts, b / parts, ...) so that every part stays spread over all devices."""
    if x.shape[0] % parts:
        raise ConfigError(f"config.accumulate={parts} does not divide the batch of {x.shape[0]}.")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
