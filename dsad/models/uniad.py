"""UniAD's transformer: a token is reconstructed from others that are not near it (You et al. 2022).

Post-norm layers with ReLU. In all three kinds of attention a token sees nothing of the window
around its own place, so that it cannot be copied through. With p the positions, which join queries
and keys but no values:

    encoder layer     x = LN(x + Attn(x + p, x + p, x)); x = LN(x + MLP(x))
    decoder layer i   y = LN(q_i + Attn(q_i + p, m + p, m)) of its learned queries q_i, memory m
                      y = LN(y + Attn(y + p, o + p, o)), o the layer before's output, m at first
                      o = LN(y + MLP(y))

Layers of a kind have their parameters stacked along the leading axis, each drawn by itself (the
published code starts all layers with the same ones). Dropout is drawn from one key per image.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsad.core.types import Tree
from dsad.models.draws import Draws, normal, uniform_draws
from dsad.models.transformer import (
    dropout,
    folded,
    layer_norm,
    linear,
    linear_params,
    norm_params,
)

_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shape of the transformer: ``channels`` of a token, ``grid`` (rows, columns) of tokens."""

    channels: int
    grid: tuple[int, int]
    width: int
    heads: int
    mlp: int
    depth: int
    neighbourhood: int
    dropout: float


def neighbour_mask(grid: tuple[int, int], size: int) -> np.ndarray:
    """(cells, cells) bool, True where a cell lies in the size × size window around another."""
    rows, columns = (
        np.abs(np.subtract.outer(at, at)) <= size // 2 for at in (np.arange(n) for n in grid)
    )
    return np.kron(rows, columns)


def init(key: jax.Array, spec: Spec) -> Tree:
    """Fresh parameters: Xavier-uniform weights, positions from U(0, 1), queries from N(0, 1)."""
    return uniform_draws(key, functools.partial(_fresh, spec))


def _fresh(spec: Spec, draws: Draws) -> Tree:
    d, n = spec.width, spec.depth
    rows, columns = spec.grid

    def attends() -> Tree:
        return {"qkv": linear_params(draws, d, 3 * d, n), "proj": linear_params(draws, d, d, n)}

    def layer() -> Tree:
        return {
            "attend": attends(), "norm1": norm_params(d, n), "norm2": norm_params(d, n),
            "fc1": linear_params(draws, d, spec.mlp, n),
            "fc2": linear_params(draws, spec.mlp, d, n),
        }  # fmt: skip

    return {
        "embed": linear_params(draws, spec.channels, d),
        "columns": 0.5 + 0.5 * draws.take((columns, d // 2)),
        "rows": 0.5 + 0.5 * draws.take((rows, d // 2)),
        "encoder": layer(),
        "decoder": {
            **layer(), "recall": attends(), "norm3": norm_params(d, n),
            "queries": normal(draws.take((n, rows * columns, d))),
        },
        "norm": norm_params(d),
        "head": linear_params(draws, d, spec.channels),
    }  # fmt: skip


def reconstruct(params: Tree, spec: Spec, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Tokens (b, cells, channels) from such tokens; ``keys`` (b,) draw the dropout, None: none."""
    rows, columns = spec.grid
    half = (rows, columns, spec.width // 2)
    positions = jnp.concatenate(
        [
            jnp.broadcast_to(params["columns"][None], half),
            jnp.broadcast_to(params["rows"][:, None], half),
        ],
        axis=2,
    ).reshape(1, -1, spec.width)
    mask = jnp.asarray(neighbour_mask(spec.grid, spec.neighbourhood))

    def attended(p: Tree, y: jax.Array, source: jax.Array, keys: Any) -> jax.Array:
        mixed = attention(p, y + positions, source + positions, source, mask, spec, keys)
        return dropout(mixed, folded(keys, 1), spec.dropout)

    def mlp(p: Tree, y: jax.Array, keys: Any) -> jax.Array:
        hidden = jax.nn.relu(linear(p["fc1"], y))
        hidden = linear(p["fc2"], dropout(hidden, folded(keys, 0), spec.dropout))
        return dropout(hidden, folded(keys, 1), spec.dropout)

    def encode(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        p, own = layer[0], folded(keys, layer[1])
        x = layer_norm(p["norm1"], x + attended(p["attend"], x, x, folded(own, 0)), _EPS)
        return layer_norm(p["norm2"], x + mlp(p, x, folded(own, 1)), _EPS), None

    numbers = jnp.arange(2 * spec.depth)
    x = linear(params["embed"], x)
    memory, _ = lax.scan(encode, x, (params["encoder"], numbers[: spec.depth]))

    def decode(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        p, own = layer[0], folded(keys, layer[1])
        y = jnp.broadcast_to(p["queries"][None], memory.shape)
        y = layer_norm(p["norm1"], y + attended(p["attend"], y, memory, folded(own, 0)), _EPS)
        y = layer_norm(p["norm2"], y + attended(p["recall"], y, x, folded(own, 1)), _EPS)
        return layer_norm(p["norm3"], y + mlp(p, y, folded(own, 2)), _EPS), None

    x, _ = lax.scan(decode, memory, (params["decoder"], numbers[spec.depth :]))
    return linear(params["head"], layer_norm(params["norm"], x, _EPS))


def attention(
    p: Tree, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, spec: Spec, keys: Any
) -> jax.Array:
    """Multi-head attention of q to k and v (b, n, d), where ``mask`` (n, n) is False."""
    b, n, d = q.shape
    kernels, biases = (jnp.split(p["qkv"][name], 3, axis=-1) for name in ("kernel", "bias"))
    q, k, v = (
        linear({"kernel": kernels[i], "bias": biases[i]}, x).reshape(b, n, spec.heads, -1)
        for i, x in enumerate((q, k, v))
    )
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * np.float32((d // spec.heads) ** -0.5)
    weights = jax.nn.softmax(jnp.where(mask[None, None], -jnp.inf, scores), axis=-1)
    weights = dropout(weights, folded(keys, 0), spec.dropout)
    return linear(p["proj"], jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, d))
