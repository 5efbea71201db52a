"""Batch normalisation with separate statistics for the views that share a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

#: As published: PyTorch's momentum 0.1 is 0.9 here.
EPSILON = 1e-5
MOMENTUM = 0.9


class BatchNorm(nnx.Module):
    """Ioffe and Szegedy 2015 over all axes but the last, statistics in f32.

    Several views of a batch go through the network in one call, which halves compilation and feeds
    larger products to the hardware; the views of one image follow each other along the batch axis
    (image 0 view 0, image 0 view 1, image 1 view 0, ...), so that the batch stays split over
    devices as it was. Each view is normalised by its own statistics, and the running statistics
    become what one call per view in turn would give. Under one jit the statistics are those of
    the global batch.
    """

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs, zero: bool = False):
        del rngs
        start = jnp.zeros if zero else jnp.ones
        self.scale = nnx.Param(start((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        """X (b · views, ..., c) to the same shape in the compute type."""
        c = x.shape[-1]
        if not train:
            factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
            shift = self.bias[...] - self.mean[...] * factor
            wide = (1,) * (x.ndim - 1) + (c,)
            return (x * factor.reshape(wide) + shift.reshape(wide)).astype(self.dtype)
        split = x.astype(jnp.float32).reshape(x.shape[0] // views, views, -1, c)
        mean = jnp.mean(split, axis=(0, 2))
        var = jnp.maximum(jnp.mean(jnp.square(split), axis=(0, 2)) - jnp.square(mean), 0.0)
        factor = self.scale[...][None] * jax.lax.rsqrt(var + EPSILON)
        shift = self.bias[...][None] - mean * factor
        y = split * factor[None, :, None, :] + shift[None, :, None, :]
        for view in range(views):
            self.mean.set_value(MOMENTUM * self.mean[...] + (1.0 - MOMENTUM) * mean[view])
            self.var.set_value(MOMENTUM * self.var[...] + (1.0 - MOMENTUM) * var[view])
        return y.reshape(x.shape).astype(self.dtype)
