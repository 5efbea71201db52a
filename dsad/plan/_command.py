"""The flags of ``dsad plan``, and a sweep over several plans."""

import dataclasses
import json
import os
from typing import Any

from rich.console import Console

from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.plan import _compile, _jobs, _report, _topology
from dsad.plan._plan import Options, Plan, make
from dsad.terminal import console, flags

_JSON_ADVICE = "Give another --json=FILE."

USAGE = """memory, speed and cost of a config on accelerators that need not be there.

  dsad plan --config=mae_imagenet:large --topology=v5e:8x8 --config.mesh.fsdp=8
  dsad plan --config=ds2 --topology=v5e:4x4 --sweep --fsdp=1,2 --batch=512,1024
  dsad plan --config=superadd:published --topology=v5e:2x2 --sweep --batch=8,32

Compiles for the topology, without a TPU, a data set or weights, the training
step of a config with an objective, or of one with a detector what an evaluation
computes of a batch of images or windows: the features, not their scores. Prints
what a chip has to hold against what it has, and a lower bound of the time that
a step or batch takes. Exit code 1 if it does not fit."""


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command("plan", USAGE, config="configs/ds2.py")
    command.string("topology", "local", "local, or a TPU slice: v5e:2x2, v5p:2x2x1, v6e:16x16 ...")
    command.integer("samples", 0, "Training images, where neither data nor a published size tell.")
    command.string("effort", "auto", "Of the compiler: fast, full, or auto (fast on few cores).")
    command.string("efficiency", "1.0", "Share of the roofline that a run is supposed to reach.")
    command.string("cache", "", "Folder for results, or off; without, the user's cache folder.")
    command.string("json", "", "File for everything that is known, for other programs.")
    command.switch("sweep", "Try several meshes and batch sizes and mark the best.")
    command.string(
        "fsdp", "", "With --sweep of trainings: values of config.mesh.fsdp, such as 1,4,8."
    )
    command.string("batch", "", "With --sweep: values of the batch size, such as 1024,2048.")
    config, values, _ = command.parse(argv)
    if (values.fsdp or values.batch) and not values.sweep:
        raise ConfigError("--fsdp and --batch list what --sweep tries; add --sweep.")
    if _jobs.kind(config) == "features":
        _check_features(values)
    if values.json:
        paths.check_place(values.json, _JSON_ADVICE, file=True)
    out = console.console()
    spec = [a.partition("=")[2] for a in argv if a.startswith("--config=")] or [command.config]
    options = _options(values, spec[-1])
    devices = _topology.devices(options.target)
    if values.sweep:
        return _sweep(config, options, devices, values, out)
    plan = make(config, options, devices, out)
    _report.one(plan, out)
    _write(values.json, [plan])
    return 0 if plan.fits else 1


def _sweep(config: Any, options: Options, devices: list[Any], values: Any, out: Console) -> int:
    training = _jobs.kind(config) == "training"
    own = config.batch_size if training else config.evaluation.batch_size
    shares = _default_fsdp(len(devices), config.mesh.fsdp) if training else [config.mesh.fsdp]
    fsdp, batches = _numbers("fsdp", values.fsdp) or shares, _numbers("batch", values.batch)
    combinations = [(f, b) for b in batches or [own] for f in fsdp]
    plans: list[Plan | str] = []
    for number, (shards, batch) in enumerate(combinations, start=1):
        changed = _jobs.resized(config, batch)
        if training:
            changed.mesh.data, changed.mesh.fsdp = -1, shards
        title = f"fsdp {shards}, batches of {batch}" if training else f"batches of {batch}"
        out.print(f"{number} of {len(combinations)}: {title}")
        try:
            plans.append(make(changed, options, devices, out))
        except ConfigError as error:
            plans.append(f"{title}: {error}")
    made = [p for p in plans if isinstance(p, Plan)]
    if not made:
        raise ConfigError(f"--sweep: none of the combinations can be built:\n  {plans[0]}")
    best = _report.sweep(plans, out)
    _write(values.json, made)
    return 0 if best is not None else 1


def _check_features(values: Any) -> None:
    """Refuse what only a training has."""
    reasons = {
        "samples": "the features of a batch do not depend on how many images there are",
        "fsdp": "an evaluation has all weights on every chip",
    }
    for name, why in reasons.items():
        if values[name].value:
            raise ConfigError(f"--{name}: {why}. Leave it out, or plan a training.")


def _default_fsdp(chips: int, own: int) -> list[int]:
    """1, the config's own, and all powers of two in between that divide the chips up to 8."""
    powers = [2**n for n in range(4) if chips % 2**n == 0]
    return sorted({*powers, own} if own > 0 else set(powers))


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(n < 1 for n in found):
        raise ConfigError(f"--{name}: expected positive numbers with commas, found {text!r}.")
    return found


def _options(values: Any, spec: str) -> Options:
    few = (os.cpu_count() or 1) < _compile.FEW_CORES
    effort = {"auto": "fast" if few else "full"}.get(values.effort, values.effort)
    if effort not in _compile.OPTIONS:
        raise ConfigError(f"--effort: expected auto, fast or full; found {values.effort!r}.")
    efficiency = flags.share("efficiency", values.efficiency, "share")
    cache = values.cache or _compile.default_cache()
    return Options(
        spec=spec, target=_topology.parse(values.topology), samples=values.samples, effort=effort,
        cache=None if cache == "off" else paths.directory(cache), efficiency=efficiency,
    )  # fmt: skip


def _write(file: str, plans: list[Plan]) -> None:
    if file:
        text = json.dumps([dataclasses.asdict(p) for p in plans], indent=2) + "\n"
        paths.write_whole(file, text, _JSON_ADVICE)
