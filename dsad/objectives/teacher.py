"""What methods with a momentum teacher share: copy, average, and views side by side."""

from typing import Any

import jax
import jax.numpy as jnp


def copied(tree: Any) -> Any:
    """A copy with memory of its own: a donated state holds no array twice."""
    return jax.tree.map(jnp.copy, tree)


def averaged(teacher: Any, online: Any, momentum: jax.Array | float) -> Any:
    """The teacher moved towards the online weights: m · teacher + (1 − m) · online."""
    return jax.tree.map(lambda k, q: momentum * k + (1.0 - momentum) * q, teacher, online)


def momentum_at(step: jax.Array, start: float, total: int, end: float = 1.0) -> jax.Array:
    """Momentum end − (end − start)(cos(π step / total) + 1) / 2, held past the end (BYOL: 1)."""
    part = jnp.minimum(step.astype(jnp.float32) / total, 1.0)
    return end - (end - start) * (jnp.cos(jnp.pi * part) + 1.0) / 2.0


def interleaved(*views: jax.Array) -> jax.Array:
    """Views (b, ...) of the same images as (v · b, ...), those of an image next to each other.

    So lie the batches that networks take with ``views``, and each view is ``[n::v]`` of the result.
    """
    return jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])
