"""SqueezeNet 1.1 (Iandola et al. 2016) without its classifier.

The first convolution has no padding and the three 3×3 max pools of stride 2 have none either; as in
the Caffe network that the weights were trained in (and in torchvision's), a pool whose last window
hangs over the border keeps that window. The Keras port drops it. The two agree for every side
that is a multiple of 16, such as 224 and 256, and differ for 227, the size of training.

Without padding, cell k of a map of stride s lies around pixel s·k + s − 1/2, counted from the
image's edge, and a side of n pixels gives about n/s − 1 cells.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.core.errors import ConfigError
from dsad.models.conv import BiasedConv
from dsad.models.draws import Draws
from dsad.models.functional import Functional, drawn

#: Output channels of each fire module's squeeze and of both its expansions.
FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128),
         6: (48, 192), 7: (48, 192), 8: (64, 256), 9: (64, 256)}  # fmt: skip
#: Fire module in front of which a pool stands, and whose output is each feature map.
POOLED = (2, 4, 6)
LAYERS = {"layer1": 3, "layer2": 5, "layer3": 9}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16}
#: Caffe's means of red, green and blue, subtracted from pixels of 0 to 255 that are not divided
#: by a deviation: the same in the convention (pixels / 255 − mean) / std.
MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)
#: Side of the smallest image with a whole cell at stride 16.
SMALLEST = 17


def pooled_side(side: int) -> int:
    """Cells that a pool makes of ``side`` cells: ⌈(side − 3) / 2⌉ + 1."""
    return -(-(side - 3) // 2) + 1


def _max_pool(x: jax.Array) -> jax.Array:
    """3×3, stride 2; a last window that hangs over the border sees only what is there."""
    over = [2 * (pooled_side(n) - 1) + 3 - n for n in x.shape[1:3]]
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
        ((0, 0), (0, over[0]), (0, over[1]), (0, 0)),
    )  # fmt: skip


class Fire(nnx.Module):
    """1×1 squeeze, then 1×1 and 3×3 expansions side by side, each with ReLU."""

    def __init__(self, cin: int, squeeze: int, expand: int, *, draws: Draws, dtype: Any):
        self.squeeze1x1 = BiasedConv(cin, squeeze, 1, draws=draws, dtype=dtype)
        self.expand1x1 = BiasedConv(squeeze, expand, 1, draws=draws, dtype=dtype)
        self.expand3x3 = BiasedConv(squeeze, expand, 3, draws=draws, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.squeeze1x1(x))
        return nnx.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class SqueezeNet(nnx.Module):
    """Feature maps ``layer1`` (stride 4) to ``layer3`` (stride 16), after the ReLU."""

    def __init__(self, *, draws: Draws, dtype: Any):
        self.conv1 = BiasedConv(3, 64, 3, 2, draws=draws, dtype=dtype, padding="VALID")
        cin = 64
        for number, (squeeze, expand) in FIRES.items():
            fire = Fire(cin, squeeze, expand, draws=draws, dtype=dtype)
            setattr(self, f"fire{number}", fire)
            cin = 2 * expand

    def __call__(
        self, images: jax.Array, *, train: bool = False, views: int = 1
    ) -> dict[str, jax.Array]:
        del train, views  # without norms, nothing depends on them
        if min(images.shape[1:3]) < SMALLEST:
            raise ConfigError(
                f"squeezenet1_1: expected images of at least {SMALLEST} × {SMALLEST} pixels, found "
                f"{images.shape[1]} × {images.shape[2]}; its pools would leave no cell. Set "
                "--config.evaluation.image_size."
            )
        x, maps = nnx.relu(self.conv1(images)), {}
        names = {number: name for name, number in LAYERS.items()}
        for number in FIRES:
            x = _max_pool(x) if number in POOLED else x
            x = getattr(self, f"fire{number}")(x)
            if number in names:
                maps[names[number]] = x
        return maps


@functools.cache
def squeezenet1_1(*, dtype: Any = jnp.float32) -> Functional:
    """The network as pure functions: ``apply(params, {}, images)`` gives its feature maps.

    images (b, H, W, 3) are RGB, normalised with ``MEAN`` and ``STD``. There is no extra state.
    ``dtype`` is the compute type; parameters stay f32. Raises ConfigError for images of fewer than
    ``SMALLEST`` pixels a side.
    """
    return drawn(lambda draws, _: SqueezeNet(draws=draws, dtype=dtype))
