"""Data sets that live on the devices: a gather inside the step instead of an input pipeline."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsad.core.batch import Batch, BatchSpec, selected, shapes
from dsad.core.chips import chip_of
from dsad.core.mesh import BATCH_SPEC, batch_sharding, replicated
from dsad.train.step import Fetch

#: Copies up to this many bytes are kept whole on every device; larger sets are split.
REPLICATE_BELOW = 2**30
#: The same as a share of the device's memory, where that is known and gives more: MVTec AD at 512
#: pixels, 2.9 GB, stays whole on a TPU v5e. Splitting saves memory but moves every batch.
REPLICATE_SHARE = 0.25


def replicated_bytes(mesh: Mesh) -> int:
    """Up to how many bytes a data set is kept whole on every device of a mesh."""
    chip = chip_of(mesh.devices.flat[0])
    return max(REPLICATE_BELOW, int(REPLICATE_SHARE * chip.hbm_bytes) if chip else 0)


#: ``gather(rows, index)``: of a part of the store, the rows of ``index`` (b,), split over the mesh.
Gather = Callable[[Any, jax.Array], Any]


def abstract_store(
    spec: BatchSpec, samples: int, mesh: Mesh, *, replicate_below: int | None = None
) -> tuple[Any, Gather]:
    """Shapes and shardings of the stored fields on the mesh, and how rows are gathered.

    Whole copies are gathered locally. Split sets, whose rows are filled up to a multiple of the
    devices, exchange only the batch: every device contributes the rows it owns and a reduce-scatter
    in the arrays' own type (uint8 for images) adds them up, exactly because all but one
    contribution are zero. That traffic is the whole batch for every device, however many there are.
    """
    if replicate_below is None:
        replicate_below = replicated_bytes(mesh)
    size = sum(
        math.prod(a.shape) * np.dtype(a.dtype).itemsize
        for a in jax.tree.leaves(shapes(spec.stored, samples))
    )
    if size <= replicate_below or mesh.size == 1:
        return shapes(spec.stored, samples, replicated(mesh)), _take
    rows = -(-samples // mesh.size) * mesh.size
    gather = jax.shard_map(
        _owned_rows, mesh=mesh, in_specs=(BATCH_SPEC, PartitionSpec()), out_specs=BATCH_SPEC
    )
    return shapes(spec.stored, rows, batch_sharding(mesh)), gather


def fetch_with(gather: Gather, spec: BatchSpec) -> Fetch:
    """``fetch(store, drawn)``: the batch behind ``BatchSpec.drawn``."""

    def fetch(store: Any, drawn: Any) -> Batch:
        def rows(index: jax.Array, names: Sequence[str]) -> Any:
            return gather(selected(store, names), index)

        return spec.complete(drawn, rows)

    return fetch


def put_store(host: Any, places: Any) -> Any:
    """Host arrays (N, ...) as ``places``, of ``abstract_store`` or a part of it, says."""

    def put(array: Any, place: jax.ShapeDtypeStruct) -> jax.Array:
        # By shard: every process touches the rows of its own devices only, and nothing is
        # compared or copied between processes.
        return jax.make_array_from_callback(
            place.shape, place.sharding, lambda where: _filled(array, where)
        )

    return jax.tree.map(put, host, places)


def rows_here(places: Any, samples: int) -> np.ndarray:
    """Which samples of a store this process's devices will hold, in ascending order."""
    place = places["size"]
    owned = place.sharding.addressable_devices_indices_map(place.shape).values()
    held = {row for where in owned for row in range(*where[0].indices(place.shape[0]))}
    return np.asarray(sorted(row for row in held if row < samples), np.int64)


def _filled(array: np.ndarray, where: Any) -> np.ndarray:
    """The rows of a shard (a tuple of slices), of which the last may lie behind the end: zeros."""
    start, stop = where[0].start or 0, where[0].stop
    found = array[start:stop]
    more = (len(found) if stop is None else stop - start) - len(found)
    return np.pad(found, [(0, more)] + [(0, 0)] * (array.ndim - 1)) if more else found


def _take(store: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0), store)


def _owned_rows(store: Any, index: jax.Array) -> Any:
    axes = ("data", "fsdp")
    rows = jax.tree.leaves(store)[0].shape[0]
    local = index - jax.lax.axis_index(axes) * rows
    owned = (local >= 0) & (local < rows)

    def exchange(a: jax.Array) -> jax.Array:
        if a.dtype == bool:  # which is not summed
            return exchange(a.astype(jnp.uint8)).astype(bool)
        mine = jnp.take(a, jnp.clip(local, 0, rows - 1), axis=0)
        keep = owned.reshape(owned.shape + (1,) * (a.ndim - 1))
        mine = jnp.where(keep, mine, jnp.zeros((), a.dtype))
        return jax.lax.psum_scatter(mine, axes, scatter_dimension=0, tiled=True)

    return jax.tree.map(exchange, store)
