"""Figures of the devices: from the table of chips, or measured where there is no table."""

import os
from typing import Any

from dsad.bench import _measure
from dsad.core.chips import Chip, chip_of


def chip(devices: list[Any]) -> Chip | None:
    """The chip of the devices; for CPUs what a short measurement finds, shared among them.

    None for an accelerator that the table does not have.
    """
    if found := chip_of(devices[0]):
        return found
    if devices[0].platform != "cpu":
        return None
    machine = _measure.machine()
    shared = len(devices)
    return Chip(
        name="CPU", peak_flops=machine.operations / shared, hbm_bytes=limit(devices),
        hbm_bandwidth=machine.bytes / shared, ici_bandwidth=machine.bytes / 2 / shared, ici_ports=1,
        kinds=(), source="measured: a float32 matrix product and a copy in memory",
    )  # fmt: skip


def limit(devices: list[Any]) -> int:
    """Bytes that a program may use on one device; 0 if nobody knows."""
    first = devices[0]
    if first.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    try:
        # What JAX has taken for itself on a real device, which is less than there is.
        if stated := (first.memory_stats() or {}).get("bytes_limit"):
            return int(stated)
    except Exception:  # devices that are only described have no statistics; the class varies
        pass
    found = chip_of(first)
    return found.hbm_bytes if found else 0
