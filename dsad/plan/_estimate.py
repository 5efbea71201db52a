"""What a program would take on a chip at best: a roofline of published figures, no measurement."""

import dataclasses

from dsad.core.chips import Chip
from dsad.plan._compile import Program

#: What the estimate supposes; printed with it. ``call`` is a step, or a batch of an evaluation.
ASSUMPTIONS = (
    "{call} = the largest of three times, as if computing, memory and interconnect overlapped "
    "fully and each ran at its published peak; real ones take longer (--efficiency)",
    "compute: matrix products and convolutions at the peak for bfloat16 (on TPUs, float32 operands "
    "at higher precision in 3 or 6 passes); elementwise work costs memory traffic only",
    "memory: every operation that the compiler left apart reads its operands and writes its "
    "results once, except what it placed in on-chip memory",
    "interconnect: ring algorithms, each chip sending over all its ports that the slice connects, "
    "the same for groups along one axis of the mesh; latency is left out",
    "input from the host keeps up",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Times in seconds of one step, or batch; rates of the whole mesh unless they say per chip.

    ``bound_by`` names the largest of the three times. ``hours`` and ``chip_hours`` are for all
    steps of the run, None where their number is not known, ``chip_hours_per_thousand`` for 1,000
    images.
    """

    compute: float
    memory: float
    interconnect: float
    step: float
    bound_by: str
    images_per_s: float
    images_per_s_per_chip: float
    mfu: float
    hours: float | None
    chip_hours: float | None
    chip_hours_per_thousand: float


def estimate(
    program: Program,
    chip: Chip,
    *,
    chips: int,
    ports: int,
    batch_size: int,
    model_flops: float,
    steps: int | None,
    platform: str = "tpu",
    efficiency: float = 1.0,
) -> Estimate:
    """Roofline of a program on a mesh of ``chips``.

    ``ports``: of each chip that the slice connects, of ``chip.ici_ports``. ``model_flops``: per
    image. ``efficiency``: the share of the roofline that a run is supposed to reach.
    """
    counted = program.bf16_flops if platform == "tpu" else program.flops
    # What a compiled program hides from the counter, such as calls of a library, the model needs.
    flops = max(counted, model_flops * batch_size / chips)
    sent = sum(row["sent"] for row in program.collectives)
    bandwidth = chip.ici_bandwidth * ports / chip.ici_ports
    times = {
        "compute": flops / chip.peak_flops,
        "memory": program.bytes / chip.hbm_bandwidth,
        "interconnect": sent / bandwidth if sent and bandwidth else 0.0,
    }
    bound = max(times, key=lambda name: times[name])
    step = times[bound] / efficiency
    speed = batch_size / step
    hours = None if steps is None else steps * step / 3600
    return Estimate(
        **times, step=step, bound_by=bound, images_per_s=speed,
        images_per_s_per_chip=speed / chips, mfu=speed * model_flops / (chips * chip.peak_flops),
        hours=hours, chip_hours=None if hours is None else hours * chips,
        chip_hours_per_thousand=1000 / speed * chips / 3600,
    )  # fmt: skip
