"""Random initial weights of a whole network from one flat draw."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfinv

from dsad.core.errors import ConfigError


class Draws:
    """Hands out consecutive pieces of one flat array of random numbers.

    A draw per kernel compiles one generator per shape, which on a CPU takes far longer than the
    drawing (ResNet-18: 18 s against 1 s). ``array`` None counts only, for ``size_of``.
    """

    def __init__(self, array: jax.Array | None):
        self._array = array
        self.used = 0

    def take(self, shape: tuple[int, ...]) -> jax.Array:
        """The next piece, in the given shape; zeros when only counting."""
        start, self.used = self.used, self.used + math.prod(shape)
        if self._array is None:
            return jnp.zeros(shape, jnp.float32)
        return jax.lax.dynamic_slice_in_dim(
            self._array, np.int32(start), self.used - start
        ).reshape(shape)


def size_of(build: Callable[[Draws], Any]) -> int:
    """How many numbers ``build(draws)`` takes, found without computing anything."""
    draws = Draws(None)
    jax.eval_shape(lambda: build(draws) and None)
    return draws.used


def uniform_draws(key: jax.Array, build: Callable[[Draws], Any]) -> Any:
    """``build`` with as many numbers from U(-1, 1) as it takes; ConfigError for too many."""
    size = size_of(build)
    if size > np.iinfo(np.int32).max:
        raise ConfigError(
            f"a network of {size / 1e9:.1f} billion parameters is not drawn at random, only read. "
            "Name weights, or a smaller architecture."
        )
    # Not quite from -1, which would be minus infinity as a normal number.
    low = np.nextafter(np.float32(-1.0), np.float32(0.0))
    return build(Draws(jax.random.uniform(key, (size,), jnp.float32, low, 1.0)))


def normal(uniform: jax.Array) -> jax.Array:
    """Numbers from U(-1, 1) as standard normal ones."""
    return np.float32(np.sqrt(2.0)) * erfinv(uniform)
