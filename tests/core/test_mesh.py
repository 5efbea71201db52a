"""Meshes over slices of accelerators that are not here."""

import dataclasses

import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX looks at when it lays a mesh on a slice."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


SLICE = [Chip(16 * y + x, (x, y, 0)) for y in range(16) for x in range(16)]


@pytest.mark.parametrize("fsdp", [1, 8, 16, 256])
def test_every_divisor_of_a_slice_makes_a_mesh(fsdp):
    """Also one that splits an axis of the torus; neighbours in the mesh are neighbours there."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), SLICE)
    assert dict(mesh.shape) == {"data": 256 // fsdp, "fsdp": fsdp}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(256))
    if fsdp in (8, 16):
        for row in mesh.devices:
            columns, rows = ({d.coords[i] for d in row} for i in range(2))
            assert 1 in (len(columns), len(rows))  # a line of the torus
            assert max(len(columns), len(rows)) == fsdp


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"data × fsdp = 85 × 3 does not equal the 256 devices"):
        make_mesh(MeshConfig(fsdp=3), SLICE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": -2}, "data: expected an integer >= -1, found -2"),
        ({"fsdp": 0}, r"data, fsdp: expected positive .* at most one -1, found \(-1, 0\)"),
        ({"fsdp": -1}, r"data, fsdp: expected positive .* at most one -1, found \(-1, -1\)"),
    ],
)
def test_axes_without_devices_are_refused(values, message):
    with pytest.raises(ConfigError, match=rf"config\.mesh\.{message}"):
        MeshConfig(**values)
