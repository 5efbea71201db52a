"""The one training step: views, loss, gradient, update, teacher; jitted, donated, sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.errors import ConfigError
from dsad.core.mesh import BATCH_SPEC, batch_sharding, replicated
from dsad.core.tree import global_norm
from dsad.core.types import Objective, Scalars
from dsad.train.optim import Schedule
from dsad.train.state import TrainState

Fetch = Callable[[Any, Any], Batch]
#: ``step(state, inputs, store) -> (state, scalars)``, jitted.
Step = jax.stages.Wrapped


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    *,
    mesh: Mesh,
    seed: int,
    fetch: Fetch | None = None,
    accumulate: int = 1,
) -> Step:
    """Compile-once ``step(state, inputs, store) -> (state, scalars)``; ``state`` is donated.

    Args:
      objective: what to train.
      tx: optimiser.
      schedule: its learning rate, for the log.
      abstract: shapes and shardings of the state.
      mesh: devices; ``inputs`` must be split over it along the leading axis.
      seed: of every random draw; the state carries no key.
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
    base = jax.random.key(seed)

    def step(state: TrainState, inputs: Any, store: Any) -> tuple[TrainState, Scalars]:
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
            "lr": schedule(state.step),
            "grad_norm": global_norm(grads),
            "update_norm": global_norm(updates),
            "param_norm": global_norm(params),
        }
        return TrainState(step=done, params=params, extra=extra, opt_state=opt_state), scalars

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), None),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """(b, ...) to (parts, b / parts, ...) so that every part stays spread over all devices."""
    if x.shape[0] % parts:
        raise ConfigError(f"config.accumulate={parts} does not divide the batch of {x.shape[0]}.")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
