"""``dsad bench step``: images/s of a training step, and where its time goes."""

from collections.abc import Callable
from typing import Any

import jax

from dsad.cli import console, flags, pretrain
from dsad.cli.bench import _measure
from dsad.core import rng
from dsad.core.mesh import place_batch
from dsad.train.state import initial_state


def main(argv: list[str]) -> int:
    """The command: ``dsad bench step``."""
    command = flags.Command(
        "bench step", "images/s of a training step, and where its time goes.",
        config="configs/ds2.py:synthetic",
    )  # fmt: skip
    command.integer("rounds", 5, "Timed rounds; each times every part once, medians are shown.")
    config, values = _measure.parsed(command, argv, {"rounds": 1})
    step(config, values.rounds)
    return 0


def step(config: Any, rounds: int) -> dict[str, float]:
    """Time the step of a config and its parts; prints a table, returns median seconds by name."""
    out = console.console()
    with console.progress("reading images", out) as tell:
        run = pretrain.build(config, progress=tell)
    state = initial_state(run.objective, run.tx, run.specs, run.abstract, run.config.seed)
    batches = run.pipeline.iterator()
    timed = _parts(run, state, next(batches))
    out.print(f"compiling the step and {len(timed)} parts ...")

    def whole() -> Any:
        nonlocal state
        state, scalars = run.step(state, place_batch(next(batches), run.mesh), run.store)
        return scalars

    found = _measure.interleaved({**timed, "step": whole}, rounds)
    median = {name: timing.median for name, timing in found.items()}
    _print(out, median, run, rounds)
    return median


def _parts(run: pretrain.Run, state: Any, inputs: Any) -> dict[str, Callable[[], Any]]:
    """Views and the objective's own parts, each compiled by itself, on copies of the state."""
    batch = place_batch(inputs, run.mesh)
    if run.store is not None:
        batch = {
            **jax.tree.map(lambda v: v[batch["index"]], run.store),
            "index": batch["index"], "epoch": batch["epoch"],
        }  # fmt: skip
    params, extra = jax.tree.map(lambda x: x.copy(), (state.params, state.extra))
    key = rng.named(jax.random.key(run.config.seed), "views")
    make_views = jax.jit(run.objective.views)
    views = make_views(batch, key)
    timed: dict[str, Callable[[], Any]] = {"views": lambda: make_views(batch, key)}
    parts = getattr(run.objective, "parts", None)  # optional: not part of the seam
    if parts is None:
        return timed
    for name, (function, arguments) in parts(params, extra, views).items():
        compiled = jax.jit(function)
        timed[name] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    return timed


def _print(out: Any, median: dict[str, float], run: pretrain.Run, rounds: int) -> None:
    parts = sum(v for name, v in median.items() if name != "step")
    table = _measure.table(None, "part", "ms", "share of parts")
    for name, value in median.items():
        share = "" if name == "step" else f"{value / parts:.1%}"
        if name == "step":
            table.add_section()
        table.add_row(name, f"{value * 1e3:.1f}", share)
    out.print(table)
    device = jax.devices()[0]
    out.print(
        f"{run.config.batch_size / median['step']:.1f} images/s ({run.config.batch_size} images a "
        f"step, {run.mesh.size} × {device.device_kind}); medians of {rounds} interleaved rounds. "
        "Each part is compiled by itself, encoder and losses with their backward passes, so the "
        "parts need not add up to the step, which also updates the weights."
    )
