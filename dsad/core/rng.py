"""Random keys as a function of names, epochs and sample indices, never carried in a state."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def named(key: jax.Array, name: str) -> jax.Array:
    """The key of a named purpose: adding another purpose leaves this one's draws unchanged."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def sample_keys(key: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample, (b,), from epoch (b,) and sample index (b,).

    Which device, host or batch position handles the sample does not enter.
    """
    fold = jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i))
    return fold(epoch, index)


def priorities(key: jax.Array, index: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Random integers (n, *shape) below 2³², one block per sample, from key and sample index (n,).

    Which samples come together, and in which order, does not enter: the lowest of them are a
    random subset that is the same for any order of the samples.
    """
    return np.asarray(_bits(key, jnp.asarray(index, jnp.uint32), shape))


def lowest(places: np.ndarray, most: int) -> np.ndarray:
    """Positions, ascending, of the ``most`` columns of ``places`` (k, n) of lowest rank.

    Columns are ranked by their first row, equal ones by the next: a priority, then the indices that
    tell samples apart, so that equal draws are never settled by the order of the source.
    """
    return np.sort(np.lexsort(places[::-1])[:most])


@functools.partial(jax.jit, static_argnums=2)
def _bits(key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), shape))(index)
