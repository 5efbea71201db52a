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
    the global batch. ``zero`` starts the scale at 0; without ``affine`` there is neither scale nor
    bias.
    """

    def __init__(
        self, channels: int, *, dtype: Any, rngs: nnx.Rngs, zero: bool = False, affine: bool = True
    ):
        del rngs
        if zero and not affine:
            raise ValueError("batch norm: a scale that starts at 0 needs affine=True.")
        self.affine = affine
        if affine:
            start = jnp.zeros if zero else jnp.ones
            self.scale = nnx.Param(start((channels,), jnp.float32))
            self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        """X (b · views, ..., c) to the same shape in the compute type."""
        c = x.shape[-1]
        scale = self.scale[...] if self.affine else jnp.ones((c,), jnp.float32)
        bias = self.bias[...] if self.affine else jnp.zeros((c,), jnp.float32)
        if not train:
            factor = scale * jax.lax.rsqrt(self.var[...] + EPSILON)
            shift = bias - self.mean[...] * factor
            wide = (1,) * (x.ndim - 1) + (c,)
            return (x * factor.reshape(wide) + shift.reshape(wide)).astype(self.dtype)
        split = x.astype(jnp.float32).reshape(x.shape[0] // views, views, -1, c)
        mean = jnp.mean(split, axis=(0, 2))
        var = _variance(split, mean)
        factor = scale[None] * jax.lax.rsqrt(var + EPSILON)
        y = (split - mean[None, :, None]) * factor[None, :, None] + bias[None, None, None]
        for view in range(views):
            self.mean[...] = MOMENTUM * self.mean[...] + (1.0 - MOMENTUM) * mean[view]
            self.var[...] = MOMENTUM * self.var[...] + (1.0 - MOMENTUM) * var[view]
        return y.reshape(x.shape).astype(self.dtype)


def _variance(x: jax.Array, mean: jax.Array) -> jax.Array:
    """Biased variance (v, c) of x (b, v, n, c) about its mean (v, c), which may be large.

    For every constant a it is mean((x − a)²) − (mean − a)²; with a = 0 no digit would be left where
    the mean is 1,000 deviations. With a = mean the backward pass needs no sum of its own.
    """
    about = jax.lax.stop_gradient(mean)
    return jnp.mean(jnp.square(x - about[None, :, None]), axis=(0, 2)) - jnp.square(mean - about)
