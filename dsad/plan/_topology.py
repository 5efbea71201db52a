"""Devices to plan for: those at hand, or a TPU slice that only a compiler knows."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from dsad.core.errors import ConfigError

#: TPU generations that can be named, with the axes of a slice and the units in the name of the
#: accelerator type: chips for v5e and v6e, cores (two a chip) for v4 and v5p.
GENERATIONS = {"v4": (3, 2, "v4"), "v5e": (2, 1, "v5litepod"), "v5p": (3, 2, "v5p"),
               "v6e": (2, 1, "v6e")}  # fmt: skip
#: An axis of this length, or of a multiple, has links that close it to a ring.
_WRAPS = {"v4": 4, "v5p": 4, "v5e": 16, "v6e": 16}
_EXAMPLES = "local, v5e:2x2, v5e:16x16, v5p:2x2x1, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: generation and chips along each axis."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As ``jax.experimental.topologies`` spells it."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def ports(self) -> int:
        """Ports of a chip over which a ring over the whole slice can send at once.

        Two along an axis that is closed to a ring, one along an open line or a pair, none along an
        axis of 1.
        """
        wrap = _WRAPS[self.generation]
        return sum(2 if n % wrap == 0 else 1 for n in self.shape if n > 1)


def parse(text: str) -> Slice | None:
    """The slice that ``--topology`` names; None for "local". Raises ConfigError."""
    if text == "local":
        return None
    found = re.fullmatch(r"(v\d+[a-z]*):(\d+(?:x\d+)*)", text)
    if not found or found.group(1) not in GENERATIONS:
        raise ConfigError(
            f"--topology={text}: expected local or a TPU generation ({', '.join(GENERATIONS)}) "
            f"and its chips, for example {_EXAMPLES}."
        )
    shape = tuple(int(n) for n in found.group(2).split("x"))
    axes = GENERATIONS[found.group(1)][0]
    if len(shape) != axes or 0 in shape:
        raise ConfigError(
            f"--topology={text}: slices of {found.group(1)} have {axes} axes, for example "
            f"{found.group(1)}:{'x'.join(['2', '2', '1'][:axes])}."
        )
    return Slice(found.group(1), shape)


def set_environment(target: Slice | None) -> None:
    """What the compilers read when they are loaded; before the first import of jax.

    Warnings of the partitioner must reach stderr, where plan reads them, and a TPU compiler without
    a TPU must not look for one.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"
    if target is None:
        return
    _, units, accelerator = GENERATIONS[target.generation]
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{accelerator}-{target.chips * units}",
        "TPU_STDERR_LOG_LEVEL": "1",
        "TPU_MIN_LOG_LEVEL": "1",
        "TPU_LOG_DIR": "disabled",
        # Planning touches no chip, so it may go on beside a run, or another plan.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(target: Slice | None) -> list[Any]:
    """The devices: real ones of this machine, or descriptions that programs can be compiled for.

    Raises ConfigError without libtpu, and for slices that do not exist.
    """
    import jax
    from jax.experimental import topologies

    if target is None:
        return list(jax.devices())
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={target.name}: the compiler for TPUs is missing; add it with: "
            "pip install 'dsad[plan]' (libtpu, 650 MB; no TPU is needed)."
        )
    options: dict[str, Any] = {}
    if target.chips < 4:  # otherwise a host is taken to have 2 × 2
        options["chips_per_host_bounds"] = (*target.shape, 1)[:3]
    if target.generation == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=target.name, **options
        ).devices
    except Exception as error:  # the class differs between versions of jax
        raise ConfigError(
            f"--topology={target.name}: the TPU compiler refuses it: {str(error).splitlines()[0]}"
        ) from error
    if len(found) != target.chips:
        raise ConfigError(
            f"--topology={target.name}: expected {target.chips} devices, found {len(found)}."
        )
    return list(found)
