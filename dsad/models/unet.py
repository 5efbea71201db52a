"""U-Net's expanding path over the maps of an encoder (Ronneberger et al., MICCAI 2015)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.models.conv import BiasedConv, Conv
from dsad.models.draws import Draws
from dsad.models.functional import Functional, drawn
from dsad.models.norm import BatchNorm
from dsad.ops.resize import match_grid


class Rise(nnx.Module):
    """Twice a convolution 3×3, batch norm and ReLU, behind a step to a finer grid."""

    def __init__(self, cin: int, cout: int, *, draws: Draws, rngs: nnx.Rngs):
        for i, channels in enumerate((cin, cout), start=1):
            setattr(self, f"conv{i}", Conv(channels, cout, 3, 1, draws=draws, dtype=jnp.float32))
            setattr(self, f"norm{i}", BatchNorm(cout, dtype=jnp.float32, rngs=rngs))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i in (1, 2):
            x = nnx.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x), train=train))
        return x


class Decoder(nnx.Module):
    """From the deepest map up: bilinearly to the next grid, joined with its map, a ``Rise``."""

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], draws: Draws, rngs: nnx.Rngs
    ):
        self.steps = len(channels)
        below = channels[-1]
        for i, (beside, width) in enumerate(zip((*channels[-2::-1], 0), widths, strict=True)):
            setattr(self, f"rise{i}", Rise(below + beside, width, draws=draws, rngs=rngs))
            below = width
        self.head = BiasedConv(below, 1, 1, draws=draws, dtype=jnp.float32, gain=1.0)

    def __call__(
        self, maps: Sequence[jax.Array], size: tuple[int, int], *, train: bool
    ) -> jax.Array:
        *beside, x = maps
        for i in range(self.steps):
            finer = beside.pop() if beside else None
            x = match_grid(x, size if finer is None else (finer.shape[1], finer.shape[2]))
            x = x if finer is None else jnp.concatenate([x, finer], axis=-1)
            x = getattr(self, f"rise{i}")(x, train=train)
        return self.head(x)[..., 0]


@functools.cache
def decoder(channels: tuple[int, ...], widths: tuple[int, ...]) -> Functional:
    """Logits (b, *size) from maps (b, h, w, c), coarser from one to the next, and ``size``.

    ``channels`` are those of the maps; ``widths``, as many, those behind every step from the
    deepest map to the image.
    """
    return drawn(lambda draws, rngs: Decoder(channels, widths, draws, rngs))
