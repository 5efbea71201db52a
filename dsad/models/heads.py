"""Heads of the dense objectives. 1×1 convolutions are linear maps over the channel axis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsad.models.functional import Functional
from dsad.models.norm import BatchNorm


def _linear(cin: int, cout: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Weight and bias from U(−1/√fan_in, 1/√fan_in)."""
    bound = float(1.0 / np.sqrt(cin))

    def uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        cin, cout, kernel_init=uniform, bias_init=uniform, dtype=dtype, param_dtype=jnp.float32,
        rngs=rngs,
    )  # fmt: skip


class Projector(nnx.Module):
    """Conv 1×1, batch norm, ReLU, conv 1×1: (b, h, w, cin) to (b, h, w, out)."""

    def __init__(self, cin: int, hidden: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv1 = _linear(cin, hidden, dtype, rngs)
        self.norm1 = BatchNorm(hidden, dtype=dtype, rngs=rngs)
        self.conv2 = _linear(hidden, out, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        x = self.norm1(self.conv1(x), train=train, views=views)
        return self.conv2(nnx.relu(x))


class Pointwise(nnx.Module):
    """One 1×1 convolution with bias."""

    def __init__(self, cin: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = _linear(cin, out, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        del train, views
        return self.conv(x)


def projector(cin: int, hidden: int, out: int, dtype: Any = jnp.float32) -> Functional:
    """The projection head as pure functions."""
    return Functional(lambda rngs: Projector(cin, hidden, out, dtype=dtype, rngs=rngs))


def pointwise(cin: int, out: int, dtype: Any = jnp.float32) -> Functional:
    """A single 1×1 convolution as pure functions."""
    return Functional(lambda rngs: Pointwise(cin, out, dtype=dtype, rngs=rngs))
