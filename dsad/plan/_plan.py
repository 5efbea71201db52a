"""One plan of a config on devices, as values."""

import dataclasses
from typing import Any

from etils import epath
from rich.console import Console

from dsad.plan import _compile, _estimate, _hardware, _jobs, _topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Values of the flags, checked."""

    spec: str
    target: _topology.Slice | None
    samples: int
    effort: _compile.Effort
    cache: epath.Path | None
    efficiency: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of one config on one mesh; ``estimate`` is None without a chip's figures.

    Images are those of ``unit``, of which ``batch_size`` are a call of the program; ``samples``,
    ``epochs`` and ``steps`` are of a training.
    """

    spec: str
    kind: _jobs.Kind
    unit: str
    topology: str
    chip: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    samples: int | None
    samples_from: str
    epochs: float | None
    steps: int | None
    model_flops_per_image: float
    limit: int
    fits: bool
    held: dict[str, int]
    effort: str
    cached: bool
    program: _compile.Program
    estimate: _estimate.Estimate | None
    warnings: tuple[str, ...]


def make(config: Any, options: Options, devices: list[Any], out: Console) -> Plan:
    """Plan one config on the devices; raises ConfigError for what cannot be built."""
    if _jobs.kind(config) == "training":
        job = _jobs.training(config, devices, options.spec, options.samples)
    else:
        job = _jobs.features(config, devices)
    about = options.target.name if options.target else devices[0].device_kind
    program, cached = _compile.compiled(
        job.lower, job.mesh, options.effort, out, options.cache, about
    )
    if not program.refused:  # weights that it makes nothing of are no argument, but lie there
        held = max(program.arguments, sum(job.held.values()))
        program = dataclasses.replace(program, arguments=held)
    chip, limit = _hardware.chip(devices), _hardware.limit(devices)
    ports = options.target.ports if options.target else (chip.ici_ports if chip else 1)
    estimate = None
    if chip and not program.refused:
        estimate = _estimate.estimate(
            program, chip, chips=len(devices), ports=ports, batch_size=job.batch_size,
            model_flops=job.model_flops, steps=job.steps, platform=job.platform,
            efficiency=options.efficiency,
        )  # fmt: skip
    return Plan(
        spec=options.spec, kind=job.kind, unit=job.unit,
        topology=options.target.name if options.target else "local",
        chip=chip.name if chip else devices[0].device_kind, chips=len(devices),
        mesh={str(k): v for k, v in job.mesh.shape.items()}, batch_size=job.batch_size,
        samples=job.samples, samples_from=job.samples_from, epochs=job.epochs, steps=job.steps,
        model_flops_per_image=job.model_flops, limit=limit,
        fits=not program.refused and (not limit or program.total <= limit),
        held=job.held, effort=options.effort, cached=cached, program=program,
        estimate=estimate, warnings=tuple(job.warnings(program)),
    )  # fmt: skip
