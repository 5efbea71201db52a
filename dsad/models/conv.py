"""2-D convolution that stays fast on small feature maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.models.draws import Draws

#: Outputs up to this side are computed as matrix products. XLA's CPU convolution of a 3×3 kernel
#: over a 2×2 map runs 80 times slower than over a 3×3 map (1 against 88 GFLOP/s measured).
TINY = 2


def conv2d(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolve x (b, h, w, cin) with an odd-sized kernel (k, k, cin, cout), padding k // 2."""
    size = kernel.shape[0]
    pad = size // 2
    out = -(-x.shape[1] // stride)
    if size > 1 and out <= TINY and -(-x.shape[2] // stride) <= TINY:
        return _as_products(x, kernel, stride)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _as_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """One product with the whole kernel, of the patches laid out along the channel axis."""
    size = kernel.shape[0]
    pad = size // 2
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    taps = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jnp.einsum("bhwc,cd->bhwd", jnp.concatenate(taps, axis=-1), flat)


class Conv(nnx.Module):
    """``conv2d`` without bias; kernel from N(0, 2 / (size² · cout)), as He et al. initialise."""

    def __init__(self, cin: int, cout: int, size: int, stride: int, *, draws: Draws, dtype: Any):
        deviation = (2.0 / (size * size * cout)) ** 0.5
        self.kernel = nnx.Param(deviation * draws.take((size, size, cin, cout)))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv2d(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)


def same_padding(side: int, size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side under TensorFlow's "SAME": the odd one goes to the end.

    The output has ⌈side / stride⌉ cells. At stride 2 an even side is padded by (0, 1), where
    torchvision's networks pad (1, 1) and sample half a cell earlier.
    """
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    return total // 2, total - total // 2


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolve each channel of x (b, h, w, c) with its own kernel (k, k, 1, c), "SAME" padding.

    Written as a sum of shifted, weighted copies, which XLA fuses into one loop: on CPUs its grouped
    convolution is 5 to 40 times slower (24.5 against 0.6 ms for 8 · 14 · 14 · 576 on two cores).
    """
    size = kernel.shape[0]
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    rows, columns = (same_padding(n, size, stride) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
    out = jnp.zeros((x.shape[0], height, width, x.shape[3]), x.dtype)
    for i in range(size):
        for j in range(size):
            down = slice(i, i + stride * (height - 1) + 1, stride)
            right = slice(j, j + stride * (width - 1) + 1, stride)
            out = out + x[:, down, right] * kernel[i, j].reshape(1, 1, 1, -1)
    return out


class BiasedConv(nnx.Module):
    """Convolution with bias, for networks without norms; kernel from N(0, gain / fan-in).

    ``gain`` is 2 in front of a ReLU and 1 without (He et al. 2015, forward case). ``padding`` is
    "SAME" (TensorFlow's rule, see ``same_padding``) or "VALID" (none).
    """

    def __init__(
        self, cin: int, cout: int, size: int, stride: int = 1, *, draws: Draws, dtype: Any,
        gain: float = 2.0, padding: str = "SAME",
    ):  # fmt: skip
        deviation = (gain / (size * size * cin)) ** 0.5
        self.kernel = nnx.Param(deviation * draws.take((size, size, cin, cout)))
        self.bias = nnx.Param(jnp.zeros((cout,), jnp.float32))
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.stride == 1 and self.padding == "SAME":
            y = conv2d(x, kernel, 1)  # the same padding, and fast on small maps
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (self.stride, self.stride), self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)


class DepthwiseConv(nnx.Module):
    """``depthwise`` with bias; kernel from N(0, 2 / size²)."""

    def __init__(self, channels: int, size: int, stride: int, *, draws: Draws, dtype: Any):
        deviation = (2.0 / (size * size)) ** 0.5
        self.kernel = nnx.Param(deviation * draws.take((size, size, 1, channels)))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)
        return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
