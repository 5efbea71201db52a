"""Arrays over the devices of several processes: what of them is here, and how they are fetched.

An array that is split over a mesh of several processes cannot be read as a whole by any of them.
Everything here also works, trivially, with the mesh of a single process.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core.mesh import batch_sharding


def spans(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of other processes."""
    return mesh is not None and len(mesh.local_devices) < mesh.size


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of ``count`` rows, a multiple of the devices, are on this process's devices (bool).

    That is for rows split as a batch. Every row is on one process; those of one process need not
    follow each other, as a mesh may put devices in any order.
    """
    own = np.zeros(count, bool)
    for at in batch_sharding(mesh).addressable_devices_indices_map((count,)).values():
        own[at] = True
    return own


def put(values: Any, sharding: NamedSharding) -> jax.Array:
    """Host values, the same on every process, as an array of a sharding.

    Unlike ``jax.device_put`` this sends nothing between processes, and trusts that the values are
    the same. Only the parts for this process's devices are read.
    """
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])


def whole(array: Any) -> np.ndarray:
    """The host's copy of a whole array, on every process; all of them must ask for it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_part(array: jax.Array) -> np.ndarray:
    """The rows of ``own_rows`` of an array split as a batch, ascending, on the host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {(s.index[0].start or 0): s.data for s in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def split(values: Any, mesh: Mesh) -> jax.Array:
    """Host rows, the same on every process, split over all devices, whose number divides them."""
    return put(values, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
