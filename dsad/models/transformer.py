"""Pre-norm transformer blocks, stacked and scanned, as pure functions of nested dicts.

The parameters of all blocks lie stacked along their leading axis, and ``lax.scan`` runs one block
after the other, so the program does not grow with the depth. These are plain functions and not
modules, because a scan over modules would have to split and merge them in every step.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.mesh import split_samples
from dsad.core.platform import platform
from dsad.core.types import Tree
from dsad.models.draws import Draws

Remat = Literal["none", "dots", "full"]
Activation = Literal["gelu", "quick_gelu"]

#: What a block keeps for the backward pass: everything, the results of its matrix products with
#: weights, or only its input.
POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """Shape of a stack of blocks.

    ``layer_scale`` multiplies each branch by a vector (DINOv2); ``attention`` "linear" has no
    softmax, see ``linear_attention``.
    """

    width: int
    depth: int
    heads: int
    mlp: int = 4
    activation: Activation = "gelu"
    layer_scale: bool = False
    eps: float = 1e-6
    attention: Literal["softmax", "linear"] = "softmax"


def xavier(draws: Draws, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Uniform in ±√(6 / (fan_in + fan_out))."""
    return np.float32(np.sqrt(6.0 / (fan_in + fan_out))) * draws.take(shape)


def linear_params(draws: Draws, cin: int, cout: int, depth: int = 0) -> Tree:
    """``kernel`` ([depth,] cin, cout), Xavier-uniform as one matrix, and ``bias``, zero."""
    lead = (depth,) if depth else ()
    return {
        "kernel": xavier(draws, (*lead, cin, cout), cin, cout),
        "bias": jnp.zeros((*lead, cout), jnp.float32),
    }


def norm_params(width: int, depth: int = 0) -> Tree:
    """``scale`` 1 and ``bias`` 0, ([depth,] width)."""
    shape = (depth, width) if depth else (width,)
    return {"scale": jnp.ones(shape, jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}


def init_blocks(draws: Draws, spec: BlockSpec) -> Tree:
    """Fresh parameters of all blocks, stacked, from draws of U(−1, 1).

    Queries, keys and values are one matrix (width, 3 · width) and are drawn as one (MAE's rule):
    the bound is √(6 / 4 width), that of three separate matrices would be √(6 / 2 width).
    """
    d, n, hidden = spec.width, spec.depth, spec.mlp * spec.width
    made: dict[str, Any] = {
        "norm1": norm_params(d, n),
        "qkv": linear_params(draws, d, 3 * d, n),
        "proj": linear_params(draws, d, d, n),
        "norm2": norm_params(d, n),
        "fc1": linear_params(draws, d, hidden, n),
        "fc2": linear_params(draws, hidden, d, n),
    }
    if spec.layer_scale:
        # DINOv2 starts its branches at 1e-5.
        made["scale1"] = {"gamma": jnp.full((n, d), 1e-5, jnp.float32)}
        made["scale2"] = {"gamma": jnp.full((n, d), 1e-5, jnp.float32)}
    return made


def layer_norm(p: Tree, x: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis of x (b, n, d); statistics in f32, the result in x's type."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    var = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    scale, bias = p["scale"][None, None, :], p["bias"][None, None, :]
    return (centred * jax.lax.rsqrt(var + eps) * scale + bias).astype(x.dtype)


def linear(p: Tree, x: jax.Array) -> jax.Array:
    """X (b, n, cin) times ``kernel`` plus ``bias``, computed in x's type."""
    y = jnp.einsum("bnc,cd->bnd", x, p["kernel"].astype(x.dtype))
    # The weights move to the samples, not the samples to split weights.
    return split_samples(y + p["bias"].astype(x.dtype)[None, None, :])


def folded(keys: jax.Array | None, number: Any) -> jax.Array | None:
    """The keys (b,) of one of several draws from those of samples; None stays None."""
    return None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)


def dropout(x: jax.Array, keys: jax.Array | None, rate: float) -> jax.Array:
    """X (b, ...) with a share ``rate`` of its entries at 0 and the others scaled up.

    Each sample's are drawn from its own key, so that it does not matter which samples come
    together; without ``keys`` (b,) nothing changes.
    """
    if keys is None or not rate:
        return x
    kept = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax(q kᵀ / √(head dim)) v of queries, keys and values (b, n, heads, head dim).

    The softmax is in f32. ``jax.nn.dot_product_attention``, except on CPUs, where XLA's product of
    weights and values runs five times faster (120 against 22 GFLOP/s on two cores) with the heads
    in front of the tokens.
    """
    if platform() != "cpu":
        return jax.nn.dot_product_attention(q, k, v)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * np.float32(q.shape[-1] ** -0.5), axis=-1)
    return jnp.swapaxes(jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v), 1, 2)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Σ_m w_nm v_m / Σ_m w_nm with w_nm = φ(q_n) · φ(k_m) and φ(x) = elu(x) + 1.

    Queries, keys and values (b, n, heads, head dim); cost grows as n, not n² (Katharopoulos et al.
    2020).
    """
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    sums = jnp.einsum("bmhd,bmhe->bhde", k, v)
    totals = jnp.einsum("bnhd,bhd->bnh", q, jnp.sum(k, axis=1))
    return jnp.einsum("bnhd,bhde->bnhe", q, sums) / totals[..., None]


def block(p: Tree, x: jax.Array, spec: BlockSpec) -> jax.Array:
    """One block on x (b, n, d): x + Attn(LN(x)), then x + MLP(LN(x))."""
    b, n, d = x.shape
    qkv = linear(p["qkv"], layer_norm(p["norm1"], x, spec.eps))
    qkv = qkv.reshape(b, n, 3, spec.heads, d // spec.heads)
    attend = linear_attention if spec.attention == "linear" else attention
    mixed = split_samples(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
    x = x + _scaled(p, "scale1", linear(p["proj"], mixed.reshape(b, n, d)))
    hidden = linear(p["fc1"], layer_norm(p["norm2"], x, spec.eps))
    if spec.activation == "gelu":
        hidden = jax.nn.gelu(hidden, approximate=False)
    else:
        hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
    return x + _scaled(p, "scale2", linear(p["fc2"], hidden))


def _scaled(p: Tree, name: str, x: jax.Array) -> jax.Array:
    return x * p[name]["gamma"].astype(x.dtype)[None, None, :] if name in p else x


def scan_blocks(
    params: Tree,
    x: jax.Array,
    spec: BlockSpec,
    *,
    remat: Remat = "none",
    each: Callable[[jax.Array], Any] | None = None,
) -> tuple[jax.Array, Any]:
    """Run the stacked blocks ``params`` on x (b, n, d), in x's type.

    Returns the last output and, stacked over the blocks, ``each`` of every block's output.
    ``remat`` names what is kept for the backward pass, see ``POLICIES``. The blocks that
    ``params`` holds are run: a slice of a stack is a stack.
    """

    def step(x: jax.Array, p: Tree) -> tuple[jax.Array, Any]:
        x = block(p, x, spec)
        return x, each(x) if each else None

    if remat != "none":
        # Inside a scan nothing can be merged back, so the barriers against it would only cost.
        step = jax.checkpoint(step, policy=POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, params)


def tap_blocks(
    params: Tree, x: jax.Array, spec: BlockSpec, taps: Collection[int] | None, remat: Remat = "none"
) -> dict[int, jax.Array]:
    """Outputs (b, n, d) after the blocks ``taps`` (None: all), by 0-based number.

    Blocks behind the last tap are not run, and outputs between taps are not kept.
    """
    if taps is None:
        _, every = scan_blocks(params, x, spec, remat=remat, each=lambda y: y)
        return {i: every[i] for i in range(every.shape[0])}
    found, start = {}, 0
    for tap in sorted(set(taps)):
        part = jax.tree.map(lambda p, a=start, b=tap + 1: p[a:b], params)
        x, _ = scan_blocks(part, x, spec, remat=remat)
        found[tap], start = x, tap + 1
    return found


def forward_flops(spec: BlockSpec, tokens: int) -> int:
    """Floating-point operations of the matrix products of all blocks for one sequence."""
    d, n = spec.width, tokens
    per_block = (4 + 2 * spec.mlp) * n * d * d + 2 * n * n * d  # multiply-adds
    return 2 * spec.depth * per_block
