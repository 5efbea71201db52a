"""What accelerators can do at best: the figures that utilisation and roofline estimates rest on.

All figures are the makers' published ones for a whole chip; no program reaches them all at once.
"""

import dataclasses
from typing import Any

_TPU = "Cloud TPU documentation, system architecture of the chip (read in 2026)"
_NVIDIA = "NVIDIA data sheet, dense figures (without sparsity)"
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      name: as in topology names ("v5e") and in tables.
      peak_flops: dense bfloat16 matrix products, FLOP/s (a multiply-add counts 2).
      hbm_bytes: memory that a program may use, in bytes; on TPUs the limit of the compiler, which
        keeps a part of the capacity for itself (libtpu 0.0.42 states it when a program is larger).
      hbm_bandwidth: bytes/s, reads and writes together.
      ici_bandwidth: bytes/s that a chip can send to its neighbours (TPU: ICI, GPU: NVLink) over
        all ports together, ONE direction; it receives as much at the same time.
      ici_ports: ports over which ``ici_bandwidth`` is spread; 1 where a switch joins all chips.
      kinds: ``device_kind`` of JAX devices of this chip.
      source: where the figures come from.

    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_ports: int
    kinds: tuple[str, ...]
    source: str


def _chip(**values: Any) -> tuple[str, Chip]:
    return values["name"], Chip(**values)


#: Chips by name. The TPU pages state both directions of the ICI together (v5e 400, v5p 1200, v6e
#: 800 GB/s a chip), NVIDIA both directions of NVLink (A100 600, H100 and H200 900 GB/s); half is
#: one direction. A v4 device of JAX is a whole chip (megacore); so is a v5p device.
CHIPS: dict[str, Chip] = dict(
    (
        _chip(
            name="v4", peak_flops=275e12, hbm_bytes=int(30.75 * _GIB), hbm_bandwidth=1200e9,
            ici_bandwidth=300e9, ici_ports=6, kinds=("TPU v4",),
            source=f"{_TPU}; ICI: Jouppi et al., ISCA 2023, 6 links of 50 GB/s; memory: 30.75 of "
            "32 GiB for programs",
        ),
        _chip(
            name="v5e", peak_flops=197e12, hbm_bytes=int(15.75 * _GIB), hbm_bandwidth=819e9,
            ici_bandwidth=200e9, ici_ports=4, kinds=("TPU v5 lite", "TPU v5e"),
            source=f"{_TPU}; memory: 15.75 of 16 GiB for programs",
        ),
        _chip(
            name="v5p", peak_flops=459e12, hbm_bytes=int(95.74 * _GIB), hbm_bandwidth=2765e9,
            ici_bandwidth=600e9, ici_ports=6, kinds=("TPU v5", "TPU v5p"),
            source=f"{_TPU}; memory: 95.74 GiB for programs",
        ),
        _chip(
            name="v6e", peak_flops=918e12, hbm_bytes=int(31.25 * _GIB), hbm_bandwidth=1638e9,
            ici_bandwidth=400e9, ici_ports=4, kinds=("TPU v6 lite", "TPU v6e"),
            source=f"{_TPU}; memory: 31.25 of 32 GiB for programs",
        ),
        _chip(
            name="A100-40GB", peak_flops=312e12, hbm_bytes=40 * 10**9, hbm_bandwidth=1555e9,
            ici_bandwidth=300e9, ici_ports=1, kinds=("NVIDIA A100-SXM4-40GB",), source=_NVIDIA,
        ),
        _chip(
            name="A100-80GB", peak_flops=312e12, hbm_bytes=80 * 10**9, hbm_bandwidth=2039e9,
            ici_bandwidth=300e9, ici_ports=1, kinds=("NVIDIA A100-SXM4-80GB",), source=_NVIDIA,
        ),
        _chip(
            name="H100", peak_flops=989.4e12, hbm_bytes=80 * 10**9, hbm_bandwidth=3350e9,
            ici_bandwidth=450e9, ici_ports=1, kinds=("NVIDIA H100 80GB HBM3",),
            source=f"{_NVIDIA}; the SXM module",
        ),
        _chip(
            name="H200", peak_flops=989.4e12, hbm_bytes=141 * 10**9, hbm_bandwidth=4800e9,
            ici_bandwidth=450e9, ici_ports=1, kinds=("NVIDIA H200",),
            source=f"{_NVIDIA}; the SXM module",
        ),
    )
)  # fmt: skip

_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device, by its ``device_kind``; None for CPUs and chips not in the table.

    Variants with other figures (A100 and H100 as PCIe cards) are not taken for the SXM modules.
    """
    return _BY_KIND.get(device.device_kind)
