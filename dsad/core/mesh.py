"""The device mesh with axes ("data", "fsdp"), and the placement of batches on it."""

import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsad.core.config import Refused, Settings, field
from dsad.core.errors import ConfigError
from dsad.core.sharding import Rule, check_rules

#: Batches are split over both axes; parameters over "fsdp" only.
BATCH_SPEC = PartitionSpec(("data", "fsdp"))


class MeshConfig(Settings, place="config.mesh"):
    """Devices per axis and who gets what.

    Attributes:
      data: devices that hold the same parts of the parameters; -1 takes what is left.
      fsdp: devices that parameters, moments and teacher are split over.
      min_fsdp_size: arrays of fewer elements stay whole, unless a rule says otherwise.
      rules: pairs (regular expression over the path, spec), the first match wins over the automatic
        choice of the largest axis; ``("blocks/fc1/kernel", "-,-,fsdp")``, see
        ``core.sharding.parse_spec``.

    """

    data: int = field(-1, at_least=-1)
    fsdp: int = field(1, at_least=-1)
    min_fsdp_size: int = field(2**18, at_least=0)
    rules: tuple[Rule, ...] = ()

    def check(self) -> None:
        check_rules(self.rules)
        if 0 in (self.data, self.fsdp) or self.data == self.fsdp == -1:
            axes = (self.data, self.fsdp)
            raise Refused("data, fsdp", "positive numbers of devices and at most one -1", axes)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all (or the given) devices; raises ConfigError if the axes do not fit."""
    devices = list(devices or jax.devices())
    shape = [config.data, config.fsdp]
    fixed = math.prod(s for s in shape if s != -1)
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"config.mesh: data × fsdp = {shape[0]} × {shape[1]} does not equal the "
            f"{len(devices)} devices; set one axis to -1."
        )
    # The types stay Auto: with Explicit axes convolutions ask for an output sharding.
    types = (AxisType.Auto,) * 2
    try:
        return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=types, devices=devices)
    except NotImplementedError:
        # Such as 32 × 8 on a torus of 16 × 16: an axis of the mesh has to be part of one of the
        # torus, which costs bandwidth but works.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, ("data", "fsdp"), axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, BATCH_SPEC)


def split_samples(x: jax.Array) -> jax.Array:
    """X (b, ...) kept split over the samples, where a mesh with both axes is known.

    Inside a layer whose weights are split over "fsdp", the partitioner may as well move all
    samples to the weights, which costs memory and traffic in proportion to the batch. The step
    makes its mesh known with ``jax.sharding.use_abstract_mesh``; elsewhere nothing happens, nor
    inside a ``shard_map``, where each device has its samples already.
    """
    return jax.lax.with_sharding_constraint(x, BATCH_SPEC) if devices_holding(x.shape[0]) else x


def devices_holding(samples: int) -> int:
    """Devices that ``samples`` are split over; 0 where ``split_samples`` does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != {"data", "fsdp"} or samples % mesh.size:
        return 0
    return 0 if AxisType.Manual in mesh.axis_types else mesh.size


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Put this process's part of a host batch on the mesh, split along the leading axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
