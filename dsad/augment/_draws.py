"""Numbers that augmentations draw: one key per sample, one name per purpose."""

import jax
import jax.numpy as jnp

from dsad.core.rng import named


def uniforms(keys: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 (b, *shape) in [0, 1) of a named purpose, one key per sample (b,)."""
    return jax.vmap(lambda k: jax.random.uniform(named(k, name), shape, jnp.float32))(keys)


def integers(uniform: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    """Integers int32, both ends included, from uniform numbers in [0, 1)."""
    low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
    span = (high - low).astype(jnp.float32)
    # u < 1, but u * (span + 1) may round up to span + 1.
    return low + jnp.minimum(jnp.floor(uniform * (span + 1)), span).astype(jnp.int32)


def between(uniform: jax.Array, ends: tuple[float, float]) -> jax.Array:
    """From the first end to the second one, uniform numbers in [0, 1) brought there."""
    return ends[0] + (ends[1] - ends[0]) * uniform
