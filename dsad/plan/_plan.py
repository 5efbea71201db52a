"""One plan of a config on devices, as values."""

import dataclasses
from typing import Any

from etils import epath
from rich.console import Console

from dsad.assembly.pretrain import DataFacts, assemble, parse
from dsad.plan import _compile, _estimate, _hardware, _samples, _topology
from dsad.plan._warnings import unintended


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
    """What is known of one config on one mesh; ``estimate`` is None without a chip's figures."""

    spec: str
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
    cfg, _, _ = parse(config)
    samples, classes, source = _samples.count(cfg, options.spec, options.samples)
    run = assemble(config, devices, DataFacts(samples=samples, classes=classes))
    model_flops = run.model_flops_per_image()
    about = options.target.name if options.target else devices[0].device_kind
    program, cached = _compile.compiled(run, options.effort, out, options.cache, about)
    chip, limit = _hardware.chip(devices), _hardware.limit(devices)
    ports = options.target.ports if options.target else (chip.ici_ports if chip else 1)
    estimate = None
    if chip and not program.refused:
        estimate = _estimate.estimate(
            program, chip, chips=len(devices), ports=ports, batch_size=cfg.batch_size,
            model_flops=model_flops, steps=run.total_steps, platform=run.platform,
            efficiency=options.efficiency,
        )  # fmt: skip
    return Plan(
        spec=options.spec, topology=options.target.name if options.target else "local",
        chip=chip.name if chip else devices[0].device_kind, chips=len(devices),
        mesh={str(k): v for k, v in run.mesh.shape.items()}, batch_size=cfg.batch_size,
        samples=samples, samples_from=source,
        epochs=cfg.epochs if not cfg.steps else None, steps=run.total_steps,
        model_flops_per_image=model_flops, limit=limit,
        fits=not program.refused and (not limit or program.total <= limit),
        held=_compile.held(run), effort=options.effort, cached=cached, program=program,
        estimate=estimate, warnings=tuple(unintended(run, program)),
    )  # fmt: skip
