"""MobileNetV2 1.0 (Sandler et al. 2018) with batch norms folded into convolutions, and classifier.

Padding is TensorFlow's "SAME", as the published weights were trained: at stride 2 an even side
gets its only zero at the end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.models.conv import BiasedConv, DepthwiseConv
from dsad.models.draws import Draws
from dsad.models.functional import Functional, drawn

#: Expansion factor, output channels, blocks and the first block's stride (Table 2 of the paper).
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: Block whose output is each feature map: the last one before the next stride. Blocks end in a
#: linear projection, so maps have either sign.
LAYERS = {"layer1": 2, "layer2": 5, "layer3": 12, "layer4": 16}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
#: The 1,000 ImageNet classes in the order of their WordNet ids, after a class 0 for background.
CLASSES = 1001
MEAN = STD = (0.5, 0.5, 0.5)


def relu6(x: jax.Array) -> jax.Array:
    """Minimum of 6 and the ReLU."""
    return jnp.clip(x, 0, 6)


class InvertedResidual(nnx.Module):
    """1×1 expansion (unless by 1), 3×3 depthwise, linear 1×1 projection; residual if shapes agree.

    The first two are followed by ReLU6.
    """

    def __init__(self, cin: int, cout: int, factor: int, stride: int, *, draws: Draws, dtype: Any):
        mid = cin * factor
        self.expands = factor > 1
        self.adds = stride == 1 and cin == cout
        if self.expands:
            self.expand = BiasedConv(cin, mid, 1, draws=draws, dtype=dtype)
        self.dw = DepthwiseConv(mid, 3, stride, draws=draws, dtype=dtype)
        self.project = BiasedConv(mid, cout, 1, draws=draws, dtype=dtype, gain=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu6(self.expand(x)) if self.expands else x
        y = self.project(relu6(self.dw(y)))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """Feature maps ``layer1`` (stride 4) to ``layer4`` (stride 32), and class scores."""

    def __init__(self, *, draws: Draws, dtype: Any):
        self.stem = BiasedConv(3, 32, 3, 2, draws=draws, dtype=dtype)
        cin, self.blocks = 32, 0
        for factor, cout, repeats, first in GROUPS:
            for repeat in range(repeats):
                stride = first if repeat == 0 else 1
                block = InvertedResidual(cin, cout, factor, stride, draws=draws, dtype=dtype)
                setattr(self, f"block{self.blocks}", block)
                cin, self.blocks = cout, self.blocks + 1
        self.head = BiasedConv(cin, 1280, 1, draws=draws, dtype=dtype)
        self.classifier = BiasedConv(1280, CLASSES, 1, draws=draws, dtype=dtype, gain=1.0)

    def __call__(
        self, images: jax.Array, *, train: bool = False, views: int = 1
    ) -> dict[str, jax.Array]:
        del train, views  # without norms, nothing depends on them
        x, maps = relu6(self.stem(images)), {}
        names = {block: name for name, block in LAYERS.items()}
        for i in range(self.blocks):
            x = getattr(self, f"block{i}")(x)
            if i in names:
                maps[names[i]] = x
        return maps

    def logits(self, images: jax.Array) -> jax.Array:
        """Class scores (b, 1001) before the softmax: the head's mean over all cells, classified."""
        x = relu6(self.head(self(images)["layer4"]))
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        return self.classifier(pooled)[:, 0, 0]


@functools.cache
def mobilenet_v2(*, dtype: Any = jnp.float32) -> Functional:
    """The network as pure functions: ``apply(params, {}, images)`` gives its feature maps.

    images (b, H, W, 3) are RGB, normalised to [−1, 1] (``MEAN``, ``STD``). There is no extra state.
    ``dtype`` is the compute type; parameters stay f32. Random kernels keep the variance of their
    input (fan-in), as there are no norms.
    """
    return drawn(lambda draws, _: MobileNetV2(draws=draws, dtype=dtype))


def logits(params: Any, images: jax.Array) -> jax.Array:
    """Class scores (b, 1001) of normalised images (b, H, W, 3), f32.

    Column 0 is background; column 1 + i is the i-th of the 1,000 ImageNet classes, which are sorted
    by WordNet id.
    """
    return mobilenet_v2().apply(params, {}, jnp.asarray(images), method="logits")[0]
