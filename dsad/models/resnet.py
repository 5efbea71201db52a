"""ResNet-18/34/50 and Wide-ResNet-50-2 (He et al. 2016; Zagoruyko and Komodakis 2016).

Paddings are explicit (7×7: 3, 3×3: 1): "SAME" pads unevenly at stride 2 and shifts the features
by half a pixel against the published weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.core.config import listed, named
from dsad.core.errors import ConfigError
from dsad.models.conv import Conv
from dsad.models.draws import Draws
from dsad.models.functional import Functional, drawn
from dsad.models.norm import BatchNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arch:
    """Blocks per stage, whether blocks are bottlenecks, and the bottleneck's width factor."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    width: int = 1

    def channels(self, layer: str) -> int:
        """Output channels of ``layer1`` to ``layer4``."""
        return 64 * 2 ** (int(layer[-1]) - 1) * (4 if self.bottleneck else 1)


ARCHS = {
    "resnet18": Arch(blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet34": Arch(blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet50": Arch(blocks=(3, 4, 6, 3), bottleneck=True),
    "wide_resnet50_2": Arch(blocks=(3, 4, 6, 3), bottleneck=True, width=2),
}
STEM = "stem"
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}


def arch(name: str) -> Arch:
    """The architecture called ``name``; an unknown name lists what exists."""
    return named(ARCHS, name, "backbone")


def _max_pool(x: jax.Array) -> jax.Array:
    """3×3, stride 2, padding 1 with −inf (a literal: an array breaks reverse mode)."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )


class Block(nnx.Module):
    """Basic (3×3, 3×3) or bottleneck (1×1, 3×3 strided, 1×1) residual block."""

    def __init__(
        self, cin: int, mid: int, cout: int, stride: int, *, bottleneck: bool, zero: bool,
        draws: Draws, dtype: Any, rngs: nnx.Rngs,
    ):  # fmt: skip
        plan = [(cin, mid, 3, stride), (mid, cout, 3, 1)]
        if bottleneck:
            plan = [(cin, mid, 1, 1), (mid, mid, 3, stride), (mid, cout, 1, 1)]
        self.depth = len(plan)
        for i, (a, b, size, step) in enumerate(plan, start=1):
            last = zero and i == len(plan)
            setattr(self, f"conv{i}", Conv(a, b, size, step, draws=draws, dtype=dtype))
            setattr(self, f"norm{i}", BatchNorm(b, dtype=dtype, rngs=rngs, zero=last))
        self.projects = stride != 1 or cin != cout
        if self.projects:
            self.down_conv = Conv(cin, cout, 1, stride, draws=draws, dtype=dtype)
            self.down_norm = BatchNorm(cout, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, views: int) -> jax.Array:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"conv{i}")(y)
            y = getattr(self, f"norm{i}")(y, train=train, views=views)
            y = nnx.relu(y) if i < self.depth else y
        if self.projects:
            x = self.down_norm(self.down_conv(x), train=train, views=views)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """Feature maps of every stage after its last ReLU: ``layer1`` (stride 4) to ``layer4`` (32)."""

    def __init__(
        self, spec: Arch, *, stages: int, zero: bool, draws: Draws, dtype: Any, rngs: nnx.Rngs
    ):
        self.spec, self.stages = spec, stages
        self.conv1 = Conv(3, 64, 7, 2, draws=draws, dtype=dtype)
        self.norm1 = BatchNorm(64, dtype=dtype, rngs=rngs)
        cin = 64
        for s in range(1, stages + 1):
            cout = spec.channels(f"layer{s}")
            mid = 64 * 2 ** (s - 1) * spec.width if spec.bottleneck else cout
            for b in range(spec.blocks[s - 1]):
                stride = 2 if s > 1 and b == 0 else 1
                block = Block(
                    cin, mid, cout, stride, bottleneck=spec.bottleneck, zero=zero, draws=draws,
                    dtype=dtype, rngs=rngs,
                )  # fmt: skip
                setattr(self, f"layer{s}_block{b}", block)
                cin = cout

    def __call__(self, images: jax.Array, *, train: bool, views: int = 1) -> dict[str, jax.Array]:
        maps = self.pyramid(images, train=train, views=views)
        return {name: x for name, x in maps.items() if name != STEM}

    def pyramid(self, images: jax.Array, *, train: bool, views: int = 1) -> dict[str, jax.Array]:
        """The maps, and before them that of the first convolution, ``STEM`` (stride 2)."""
        x = nnx.relu(self.norm1(self.conv1(images), train=train, views=views))
        maps = {STEM: x}
        x = _max_pool(x)
        for s in range(1, self.stages + 1):
            for b in range(self.spec.blocks[s - 1]):
                x = getattr(self, f"layer{s}_block{b}")(x, train=train, views=views)
            maps[f"layer{s}"] = x
        return maps


@functools.cache
def resnet(
    name: str, *, stages: int = 4, zero_init_last: bool = False, dtype: Any = jnp.float32
) -> Functional:
    """The network ``name`` as pure functions: ``apply(params, extra, images, train=...)``.

    images (b, H, W, 3) are normalised; with ``views`` > 1 in training, the views of an image follow
    each other along the batch axis, see ``norm.BatchNorm``. ``zero_init_last``: the last norm scale
    of every residual block starts at 0 (the DS2 initialisation) instead of 1. ``dtype`` is the
    compute type; parameters and statistics stay f32.
    """
    spec = arch(name)

    def make(draws: Draws, rngs: nnx.Rngs) -> ResNet:
        return ResNet(spec, stages=stages, zero=zero_init_last, draws=draws, dtype=dtype, rngs=rngs)

    return drawn(make)


def of_params(params: Any) -> Functional:
    """The network that has these parameters."""
    stages = [[b for b in params if b.startswith(f"layer{s}_")] for s in range(1, 5)]
    blocks = [len(found) for found in stages if found]
    first = params["layer1_block0"]
    mid = first["conv2"]["kernel"].shape[-1] if "conv3" in first else 0
    for name, spec in ARCHS.items():
        wide = 64 * spec.width if spec.bottleneck else 0
        if (list(spec.blocks[: len(blocks)]), wide) == (blocks, mid):
            return resnet(name, stages=len(blocks))
    raise ConfigError(f"no residual network has {blocks} blocks; known: {listed(ARCHS)}.")
