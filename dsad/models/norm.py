"""Batch normalisation with separate statistics for the views that share a batch."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

#: As published: PyTorch's momentum 0.1 is 0.9 here.
EPSILON = 1e-5
MOMENTUM = 0.9

_measuring: contextvars.ContextVar[bool | None] = contextvars.ContextVar("_measuring", default=None)


@contextlib.contextmanager
def measuring(*, applied: bool) -> Iterator[None]:
    """In inference, norms replace their statistics by those of the batch at hand, within this.

    With ``applied`` they normalise by these, as in training; otherwise by those they had, so that
    what the network computes does not change. It acts while a program is traced: enter it in the
    function that is compiled.
    """
    token = _measuring.set(applied)
    try:
        yield
    finally:
        _measuring.reset(token)


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
            mean, var = self.mean[...], self.var[...]
            if (applied := _measuring.get()) is not None:
                batch = _moments(x.astype(jnp.float32).reshape(1, 1, -1, c))
                self.mean.set_value(batch[0][0])
                self.var.set_value(batch[2][0])
                mean, var = (batch[0][0], batch[2][0]) if applied else (mean, var)
            factor = scale * jax.lax.rsqrt(var + EPSILON)
            shift = bias - mean * factor
            wide = (1,) * (x.ndim - 1) + (c,)
            return (x * factor.reshape(wide) + shift.reshape(wide)).astype(self.dtype)
        split = x.astype(jnp.float32).reshape(x.shape[0] // views, views, -1, c)
        y, mean, var = _normalised(split, scale, bias)
        for view in range(views):
            self.mean.set_value(MOMENTUM * self.mean[...] + (1.0 - MOMENTUM) * mean[view])
            self.var.set_value(MOMENTUM * self.var[...] + (1.0 - MOMENTUM) * var[view])
        return y.reshape(x.shape).astype(self.dtype)


@jax.custom_vjp
def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    """Normalised x (b, v, n, c), and mean and biased variance (v, c), which pass on no gradient.

    The variance is mean((x − mean)²): of mean(x²) − mean² no digit is left where the mean is 1,000
    deviations. The backward pass is written out because it then keeps x alone, and no copy of
    x − mean, for which derivatives of these lines would make room in every layer.
    """
    return _forward(x, scale, bias)[0]


def _moments(x: jax.Array) -> tuple[jax.Array, ...]:
    """Mean (v, c), x minus it, and biased variance (v, c)."""
    mean = jnp.mean(x, axis=(0, 2))
    centred = x - mean[None, :, None]
    return mean, centred, jnp.mean(jnp.square(centred), axis=(0, 2))


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[Any, Any]:
    mean, centred, var = _moments(x)
    inverse = jax.lax.rsqrt(var + EPSILON)
    y = centred * (scale[None] * inverse)[None, :, None] + bias[None, None, None]
    return (y, mean, var), (x, mean, inverse, scale)


def _backward(kept: Any, cotangents: Any) -> tuple[jax.Array, ...]:
    x, mean, inverse, scale = kept
    dy, count = cotangents[0], x.shape[0] * x.shape[2]
    unit = (x - mean[None, :, None]) * inverse[None, :, None]
    dbias, dscale = jnp.sum(dy, axis=(0, 2)), jnp.sum(dy * unit, axis=(0, 2))
    inner = dy - (dbias[None, :, None] + unit * dscale[None, :, None]) / count
    dx = (scale[None] * inverse)[None, :, None] * inner
    return dx, jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0)


_normalised.defvjp(_forward, _backward)
