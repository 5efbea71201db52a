"""Heads of the objectives. 1×1 convolutions are linear maps over the channel axis."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsad.models.functional import Functional
from dsad.models.norm import BatchNorm

#: What follows a linear map: nothing, a batch norm, or one without scale and bias.
Norm = Literal["none", "affine", "plain"]


def _linear(cin: int, cout: int, dtype: Any, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """Weight and bias from U(−1/√fan_in, 1/√fan_in)."""
    bound = float(1.0 / np.sqrt(cin))

    def uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        cin, cout, use_bias=bias, kernel_init=uniform, bias_init=uniform, dtype=dtype,
        param_dtype=jnp.float32, rngs=rngs,
    )  # fmt: skip


class MLP(nnx.Module):
    """Linear maps ``conv1``, ``conv2``, ... with ReLUs between: (b, ..., cin) to (b, ..., out).

    See ``mlp`` for the settings. ``norm1`` follows ``conv1`` and precedes its ReLU.
    """

    def __init__(
        self, widths: Sequence[int], *, hidden: Norm, last: Norm, bias: bool, dtype: Any,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.norms = (*(hidden,) * (len(widths) - 2), last)
        for i, norm in enumerate(self.norms, start=1):
            cin, cout = widths[i - 1 : i + 1]
            biased = bias or norm == "none"
            setattr(self, f"conv{i}", _linear(cin, cout, dtype, rngs, bias=biased))
            if norm != "none":
                affine = norm == "affine"
                setattr(self, f"norm{i}", BatchNorm(cout, dtype=dtype, rngs=rngs, affine=affine))

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        for i, norm in enumerate(self.norms, start=1):
            x = getattr(self, f"conv{i}")(x if i == 1 else nnx.relu(x))
            if norm != "none":
                x = getattr(self, f"norm{i}")(x, train=train, views=views)
        return x


class Pointwise(nnx.Module):
    """One 1×1 convolution with bias."""

    def __init__(self, cin: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = _linear(cin, out, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool, views: int = 1) -> jax.Array:
        del train, views
        return self.conv(x)


class Discriminator(nnx.Module):
    """Linear map ``conv1``, batch norm ``norm1``, LeakyReLU 0.2, linear map ``conv2`` to a logit.

    Neither map has a bias: the norm takes the first one's away again, and that of the logit is left
    out as published. Weights are normal with variance 2 / (channels in + out) (Glorot and Bengio).
    """

    def __init__(self, cin: int, hidden: int, *, rngs: nnx.Rngs):
        xavier = nnx.initializers.variance_scaling(1.0, "fan_avg", "normal")
        settings = {"use_bias": False, "kernel_init": xavier, "rngs": rngs}
        self.conv1 = nnx.Linear(cin, hidden, **settings)
        self.norm1 = BatchNorm(hidden, dtype=jnp.float32, rngs=rngs)
        self.conv2 = nnx.Linear(hidden, 1, **settings)

    def hidden(self, x: jax.Array) -> jax.Array:
        return self.conv1(x)

    def judge(self, hidden: jax.Array, *, train: bool) -> jax.Array:
        x = nnx.leaky_relu(self.norm1(hidden, train=train), 0.2)
        return self.conv2(x)[..., 0]


def discriminator(cin: int, hidden: int) -> Functional:
    """SimpleNet's and GLASS's discriminator in two halves, on either side of its sums.

    Method ``hidden`` takes cells (..., cin) to (..., hidden), and ``judge`` these to logits (...),
    with the batch statistics of all that it is given.
    """
    return Functional(lambda rngs: Discriminator(cin, hidden, rngs=rngs))


def mlp(
    widths: Sequence[int],
    *,
    hidden: Norm = "affine",
    last: Norm = "none",
    bias: bool = False,
    dtype: Any = jnp.float32,
) -> Functional:
    """Linear layers with ReLUs between as pure functions: ``apply(params, extra, x, train=...)``.

    It takes vectors (b, c) or maps (b, h, w, c); for ``views`` see ``norm.BatchNorm``.

    Args:
      widths: channels that enter and that leave each layer, at least two numbers.
      hidden: norm behind each layer but the last.
      last: norm behind the last layer, which no ReLU follows.
      bias: whether layers in front of a norm have a bias, which the norm takes away again; the
        other layers always have one.
      dtype: compute type; parameters and statistics stay f32.

    """
    if len(widths) < 2:
        raise ValueError(f"mlp: expected at least two widths, found {tuple(widths)}.")
    return Functional(
        lambda rngs: MLP(widths, hidden=hidden, last=last, bias=bias, dtype=dtype, rngs=rngs)
    )


def projector(cin: int, hidden: int, out: int, dtype: Any = jnp.float32) -> Functional:
    """PixPro's projection head: conv 1×1, batch norm, ReLU, conv 1×1, both with a bias."""
    return mlp((cin, hidden, out), bias=True, dtype=dtype)


def pointwise(cin: int, out: int, dtype: Any = jnp.float32) -> Functional:
    """A single 1×1 convolution as pure functions."""
    return Functional(lambda rngs: Pointwise(cin, out, dtype=dtype, rngs=rngs))
