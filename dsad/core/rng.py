"""Random keys as a function of names, epochs and sample indices, never carried in a state."""

import zlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """The key of a named purpose: adding another purpose leaves this one's draws unchanged."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def sample_keys(key: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, (b,), from epoch (b,) and sample index (b,).

    Which device, host or batch position handles the sample does not enter.
    """
    fold = jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i))
    return fold(epoch, index)
