"""Data sets that live on the devices: a gather inside the step instead of an input pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsad.core.mesh import BATCH_SPEC, batch_sharding, replicated
from dsad.core.types import Batch
from dsad.train.step import Fetch

#: Copies up to this many bytes are kept whole on every device; larger sets are split.
REPLICATE_BELOW = 2**30


def device_store(
    host: dict[str, Any], mesh: Mesh, *, replicate_below: int = REPLICATE_BELOW
) -> tuple[Any, Fetch]:
    """Put arrays (N, ...), in nested dicts, on the mesh; returns (store, fetch).

    ``fetch(store, {"index", "epoch"})`` gives the batch with the rows of ``index`` (b,), split
    over the mesh. Whole copies are gathered locally. Split sets exchange only the batch: every
    device contributes the rows it owns and a reduce-scatter in the arrays' own type (uint8 for
    images) adds them up, exactly because all but one contribution are zero.
    """
    arrays = jax.tree.leaves(host)
    if sum(a.nbytes for a in arrays) <= replicate_below or mesh.size == 1:
        store = jax.device_put(host, replicated(mesh))
        return store, lambda store, inputs: _with_inputs(_take(store, inputs["index"]), inputs)
    rows = -(-len(arrays[0]) // mesh.size) * mesh.size
    padded = jax.tree.map(lambda a: np.pad(a, [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1)), host)
    store = jax.device_put(padded, batch_sharding(mesh))
    gather = jax.shard_map(
        _owned_rows, mesh=mesh, in_specs=(BATCH_SPEC, PartitionSpec()), out_specs=BATCH_SPEC
    )
    return store, lambda store, inputs: _with_inputs(gather(store, inputs["index"]), inputs)


def _take(store: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0), store)


def _owned_rows(store: Any, index: jax.Array) -> Any:
    axes = ("data", "fsdp")
    rows = jax.tree.leaves(store)[0].shape[0]
    local = index - jax.lax.axis_index(axes) * rows
    owned = (local >= 0) & (local < rows)

    def exchange(a: jax.Array) -> jax.Array:
        mine = jnp.take(a, jnp.clip(local, 0, rows - 1), axis=0)
        keep = owned.reshape(owned.shape + (1,) * (a.ndim - 1))
        mine = jnp.where(keep, mine, jnp.zeros((), a.dtype))
        return jax.lax.psum_scatter(mine, axes, scatter_dimension=0, tiled=True)

    return jax.tree.map(exchange, store)


def _with_inputs(rows: Any, inputs: Any) -> Batch:
    return {"facts": {}, **rows, "index": inputs["index"], "epoch": inputs["epoch"]}
