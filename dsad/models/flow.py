"""A conditional normalising flow on single vectors (CFLOW-AD, Gudovskiy et al., WACV 2022).

One block maps x = [x1, x2], of which x1 is the first ⌈C/2⌉ channels, under a condition q:

    (s', t) = MLP([x1, q]) / 10           MLP: linear to twice its inputs, ReLU, linear
    z = R (g · [x1, x2 exp(s) + t] + o)   s = α tanh(s') or α tanh(s'/α), with α = 1.9
    ln |det| = Σ s + Σ ln g               g = 0.2 ln(1 + exp(p/2))

with a fixed random rotation R, and p and o learned per channel. Blocks have their parameters
stacked along the leading axis, and ``lax.scan`` runs one after the other. FrEIA has this as its
all-in-one block; its version that CFLOW's code names clamps "plain", later ones "scaled".
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsad.core import rng
from dsad.core.types import Tree
from dsad.models import positions
from dsad.models.draws import Draws, uniform_draws

Clamp = Literal["plain", "scaled"]
#: Bound of s, so that a block scales by at most exp(1.9) = 6.69.
ALPHA = 1.9
#: p at which g is 1.
UNIT = 2 * np.log(np.expm1(5.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSpec:
    """Shape of a flow: channels of its vectors and of their condition, blocks, clamp of s."""

    channels: int
    condition: int
    blocks: int = 8
    clamp: Clamp = "plain"

    @property
    def split(self) -> int:
        """Channels of x1, which a block leaves as they are."""
        return self.channels - self.channels // 2


def position_code(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Sines and cosines (cells, width) f32 of column and row, cells row by row.

    Channels 2k and 2k + 1 are sin(x w_k) and cos(x w_k) of the column x, from 0, and those width/2
    further on the same of the row, with w_k = 10000^(-4k/width).
    """
    table = positions.sincos_table(width, grid, prefix=0)
    return table.reshape(-1, 2, 2, width // 4).swapaxes(2, 3).reshape(-1, width)


def init_flow(key: jax.Array, spec: FlowSpec) -> tuple[Tree, jax.Array]:
    """Parameters, and the rotations (blocks, C, C), which are not learned."""

    def linear(draws: Draws, cin: int, cout: int) -> Tree:
        bound = np.float32(cin**-0.5)
        return {
            "kernel": bound * draws.take((spec.blocks, cin, cout)),
            "bias": bound * draws.take((spec.blocks, cout)),
        }

    def build(draws: Draws) -> Tree:
        inputs = spec.split + spec.condition
        return {
            "fc1": linear(draws, inputs, 2 * inputs),
            "fc2": linear(draws, 2 * inputs, 2 * (spec.channels - spec.split)),
            "gain": jnp.full((spec.blocks, spec.channels), UNIT, jnp.float32),
            "offset": jnp.zeros((spec.blocks, spec.channels), jnp.float32),
        }

    drawn = random_rotations(rng.named(key, "rotations"), spec.blocks, spec.channels)
    return uniform_draws(rng.named(key, "weights"), build), drawn


def random_rotations(key: jax.Array, count: int, size: int) -> jax.Array:
    """Rotations (count, size, size), uniform in SO(size)."""

    def one(key: jax.Array) -> jax.Array:
        q, r = jnp.linalg.qr(jax.random.normal(key, (size, size), jnp.float32))
        q = q * jnp.sign(jnp.diagonal(r))[None, :]
        return q.at[:, 0].multiply(jnp.linalg.slogdet(q)[0])

    # One by one: jaxlib 0.10.2 splits stacks over the threads of its CPU client, and two stacks at
    # a time can wait for each other forever.
    return lax.map(one, jax.random.split(key, count))


def forward(
    params: Tree, rotations: jax.Array, spec: FlowSpec, x: jax.Array, condition: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Z (n, C) of vectors x (n, C) under ``condition`` (n, c), and ln |dz/dx| (n,)."""

    def step(x: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        p, rotation = block
        kept, s, t, gain = _parts(p, spec, x, condition)
        moved = jnp.concatenate([kept, x[:, spec.split :] * jnp.exp(s) + t], axis=1)
        moved = moved * gain[None] + p["offset"][None]
        z = jnp.einsum("nc,dc->nd", moved, rotation, precision="highest")
        return z, jnp.sum(s, axis=1) + jnp.sum(jnp.log(gain))

    z, determinants = lax.scan(step, x, (params, rotations))
    return z, jnp.sum(determinants, axis=0)


def inverse(
    params: Tree, rotations: jax.Array, spec: FlowSpec, z: jax.Array, condition: jax.Array
) -> jax.Array:
    """The vectors x (n, C) whose ``forward`` is z (n, C)."""

    def step(z: jax.Array, block: Any) -> tuple[jax.Array, None]:
        p, rotation = block
        moved = jnp.einsum("nd,dc->nc", z, rotation, precision="highest") - p["offset"][None]
        moved = moved / _gain(p)[None]
        kept, s, t, _ = _parts(p, spec, moved, condition)
        return jnp.concatenate([kept, (moved[:, spec.split :] - t) * jnp.exp(-s)], axis=1), None

    return lax.scan(step, z, (params, rotations), reverse=True)[0]


def log_likelihood(
    params: Tree, rotations: jax.Array, spec: FlowSpec, x: jax.Array, condition: jax.Array
) -> jax.Array:
    """Natural logarithm of the density at x (n, C), divided by C: (n,)."""
    z, determinant = forward(params, rotations, spec, x, condition)
    normal = -0.5 * jnp.sum(jnp.square(z), axis=1)
    return (normal + determinant) / spec.channels - np.float32(0.5 * np.log(2 * np.pi))


def _gain(p: Tree) -> jax.Array:
    return 0.2 * jax.nn.softplus(p["gain"] / 2)


def _parts(p: Tree, spec: FlowSpec, x: jax.Array, condition: jax.Array) -> tuple[jax.Array, ...]:
    """What one block does to vectors (n, C): x1, s and t (n, ...), and g (C,)."""
    kept = x[:, : spec.split]
    hidden = jnp.concatenate([kept, condition], axis=1) @ p["fc1"]["kernel"]
    hidden = jax.nn.relu(hidden + p["fc1"]["bias"][None])
    raw = 0.1 * (hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"][None])
    s, t = jnp.split(raw, 2, axis=1)
    return kept, clamped(s, spec.clamp), t, _gain(p)


def clamped(s: jax.Array, clamp: Clamp) -> jax.Array:
    """Values within ±1.9: 1.9 tanh(s), or "scaled", with slope 1 at 0, 1.9 tanh(s / 1.9)."""
    return ALPHA * jnp.tanh(s if clamp == "plain" else s / ALPHA)
