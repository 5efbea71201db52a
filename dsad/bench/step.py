"""``dsad bench step``: images/s of a training step, and where its time goes."""

import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from dsad.assembly import features, training
from dsad.assembly.pretrain import Run
from dsad.bench import _measure, _transformer
from dsad.core import config as core_config
from dsad.core import rng
from dsad.core.errors import ConfigError
from dsad.core.mesh import place_batch
from dsad.core.paths import size
from dsad.core.types import HasParts, KnowsFlops
from dsad.objectives.isstad import ISSTAD
from dsad.objectives.mae import MAE
from dsad.terminal import console, flags
from dsad.train.cache import fetch_with


def main(argv: list[str]) -> int:
    """The command: ``dsad bench step``."""
    command = flags.Command(
        "bench step", "images/s of a training step, and where its time goes.",
        config="configs/ds2.py:synthetic",
    )  # fmt: skip
    command.string("objective", "", "Short for --config=configs/OBJECTIVE.py:synthetic.")
    command.integer("rounds", 5, "Timed rounds of every part; medians are shown.", at_least=1)
    command.switch("brief", "Leave out, for transformers, masking, memory and compile times.")
    named = [a.partition("=")[2] for a in argv if a.startswith("--objective=")]
    if named and not any(a.startswith("--config=") for a in argv):
        core_config.resolve("objectives", named[-1])
        argv = [f"--config=configs/{named[-1]}.py:synthetic", *argv]
    config, values, _ = command.parse(argv)
    if values.objective and values.objective != config.objective.name:
        raise ConfigError(
            f"--objective={values.objective}: the config's objective is {config.objective.name}."
        )
    step(config, values.rounds, details=not values.brief)
    return 0


def step(config: Any, rounds: int, *, details: bool = False) -> dict[str, float]:
    """Time the step of a config and its parts; prints a table, returns median seconds by name.

    ``details`` adds what is particular to transformers, see ``_transformer``.
    """
    with tempfile.TemporaryDirectory(prefix="dsad-") as folder:
        return _step(config, rounds, epath.Path(folder), details=details)


def _step(config: Any, rounds: int, folder: epath.Path, *, details: bool) -> dict[str, float]:
    """The same; ``folder`` takes the place of a run's directory, for features on its disk."""
    out = console.console()
    with console.progress("reading images", out) as tell:
        prepared = training.build(config, progress=tell, weights=True)
    run = prepared.run
    state = training.first_state(prepared, prepared.earlier, out)
    prepared = training.with_features(prepared, state, out, folder)
    state = training.prepared(prepared, state)
    batches = prepared.pipeline.iterator()
    params, extra = jax.tree.map(lambda x: x.copy(), (state.params, state.extra))
    views, timed = _parts(prepared, params, extra, next(batches))
    out.print(f"compiling the step and {len(timed)} parts ...")

    def whole() -> Any:
        nonlocal state
        placed = place_batch(next(batches), run.mesh)
        state, scalars = run.step(state, placed, prepared.store, run.key)
        return scalars

    timings = _measure.interleaved({**timed, "step": whole}, rounds)
    median = {name: timing.median for name, timing in timings.items()}
    _print(out, median, run, rounds)
    if run.spec.features:
        kept = {"memory": "in memory", "disk": "on disk"}[run.config.feature_store]
        kept = "on the devices" if run.store is not None else kept
        out.print(f"features of {run.info.samples:,} samples: {size(features.size(run))} {kept}")
    if details and isinstance(run.objective, (MAE, ISSTAD)):
        _transformer.memory(out, run, views, (params, extra))
    if details and isinstance(run.objective, MAE):
        _transformer.masking(out, run.objective, params, extra, views, rounds)
        _transformer.compile_times(out)
    return median


def _parts(
    prepared: training.Training, params: Any, extra: Any, inputs: Any
) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """The views, and they and the objective's own parts as calls, each compiled by itself."""
    run = prepared.run
    batch = place_batch(inputs, run.mesh)
    if run.gather is not None:
        batch = jax.jit(fetch_with(run.gather, run.spec))(prepared.store, batch)
    key = rng.named(jax.random.key(run.config.seed), "views")
    make_views = jax.jit(run.objective.views)
    views = make_views(batch, key)
    timed: dict[str, Callable[[], Any]] = {"views": lambda: make_views(batch, key)}
    parts = run.objective.parts(params, extra, views) if isinstance(run.objective, HasParts) else {}
    for name, (function, arguments) in parts.items():
        compiled = jax.jit(function)
        timed[name] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    return views, timed


def _print(out: Any, median: dict[str, float], run: Run, rounds: int) -> None:
    parts = sum(v for name, v in median.items() if name != "step")
    table = console.table("part", "ms", "share of parts", whole=True)
    for name, value in median.items():
        share = "" if name == "step" else f"{value / parts:.1%}"
        if name == "step":
            table.add_section()
        table.add_row(name, f"{value * 1e3:.1f}", share)
    out.print(table)
    batch, device = run.config.batch_size, jax.devices()[0].device_kind
    _utilisation(out, run, batch / median["step"])
    out.print(
        f"{batch / median['step']:.1f} images/s ({batch} images a step, "
        f"{run.mesh.size} × {device}); medians of {rounds} interleaved rounds. "
        "Each part is compiled by itself, encoder and losses with their backward passes, so the "
        "parts need not add up to the step, which also updates the weights."
    )


def _utilisation(out: Any, run: Run, speed: float) -> None:
    """Model FLOPs utilisation, where the objective says what an image costs."""
    if not isinstance(run.objective, KnowsFlops):
        return
    flops = run.objective.flops_per_image
    peak = _measure.machine().operations * run.mesh.size
    out.print(
        f"{flops / 1e9:.2f} GFLOP of matrix products an image, forward and backward without "
        f"recomputation: {speed * flops / 1e9:.1f} GFLOP/s, {speed * flops / peak:.1%} of a plain "
        f"float32 matmul on the same device(s) ({peak / 1e9:.0f} GFLOP/s)"
    )
