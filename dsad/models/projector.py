"""ADPretrain's projector of residual features: attention to learned references, and a gated MLP.

Yao et al., NeurIPS 2025, arXiv 2511.05245. One for every level; there is no position and no norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.mesh import split_samples
from dsad.core.types import Tree
from dsad.models.draws import Draws, normal
from dsad.models.transformer import linear, xavier


def squeezed(width: int) -> int:
    """Width of the gate's hidden layer: a sixteenth of 4 · width, to a multiple of 8."""
    return max(8, (width // 4 + 4) // 8 * 8)


def init_projector(draws: Draws, width: int, *, references: int, heads: int) -> Tree:
    """Fresh parameters for cells of ``width`` channels, from draws of U(−1, 1).

    ``queries``, ``keys`` and ``values`` are (width, heads, width / heads), which tells the heads.
    ``references`` (n, width) start as standard normal numbers.
    """
    hidden, gate = 4 * width, squeezed(width)

    def uniform(cin: int, cout: int) -> Tree:
        bound = np.float32(1 / np.sqrt(cin))
        return {"kernel": bound * draws.take((cin, cout)), "bias": bound * draws.take((cout,))}

    def attending() -> Tree:
        # Three maps, drawn as one matrix.
        kernel = xavier(draws, (width, width), width, 3 * width)
        shape = (width, heads, width // heads)
        return {"kernel": kernel.reshape(shape), "bias": jnp.zeros(shape[1:], jnp.float32)}

    mixed = {**uniform(width, width)}
    mixed["kernel"] = np.float32(np.sqrt(2 / width)) * normal(draws.take((width, width)))
    out = {**uniform(width, width), "bias": jnp.zeros((width,), jnp.float32)}
    return {
        "references": normal(draws.take((references, width))),
        "mix": mixed,
        "queries": attending(),
        "keys": attending(),
        "values": attending(),
        "out": out,
        "fc1": uniform(width, hidden),
        "squeeze": uniform(hidden, gate),
        "excite": uniform(gate, hidden),
        "fc2": uniform(hidden, width),
    }


def project(p: Tree, cells: jax.Array) -> jax.Array:
    """Projected cells (b, n, d) of residual ones, all cells of an image, in their type.

    What attention finds among the learned references is subtracted. The gate of the MLP's hidden
    channels is computed from their means over the image.
    """
    dtype = cells.dtype
    references = p["references"].astype(dtype) @ p["mix"]["kernel"].astype(dtype)
    references += p["mix"]["bias"].astype(dtype)[None]
    cells = cells - linear(p["out"], _attended(p, cells, references))
    hidden = linear(p["fc1"], cells)
    mean = jnp.mean(hidden.astype(jnp.float32), axis=1, keepdims=True).astype(dtype)
    gate = jax.nn.sigmoid(linear(p["excite"], jax.nn.relu(linear(p["squeeze"], mean))))
    return linear(p["fc2"], jax.nn.gelu(gate * hidden, approximate=False)) + cells


def _attended(p: Tree, cells: jax.Array, references: jax.Array) -> jax.Array:
    """Multi-head attention (b, n, d) of cells to references (m, d) that all images share."""

    def split(name: str, x: jax.Array) -> jax.Array:
        kernel, bias = (p[name][part].astype(x.dtype) for part in ("kernel", "bias"))
        wide = (None,) * (x.ndim - 1)
        return jnp.einsum("...c,chd->...hd", x, kernel) + bias[wide]

    queries = split_samples(split("queries", cells))
    keys, values = split("keys", references), split("values", references)
    scale = np.float32(queries.shape[-1] ** -0.5)
    scores: Any = jnp.einsum("bnhd,mhd->bhnm", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale, axis=-1).astype(cells.dtype)
    attended = jnp.einsum("bhnm,mhd->bnhd", weights, values)
    return attended.reshape(cells.shape)
