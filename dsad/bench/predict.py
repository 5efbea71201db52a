"""``dsad bench predict``: images/s, latency, memory of a fitted model, beside plain torch."""

import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image

from dsad.assembly import api, pictures
from dsad.assembly import predict as command
from dsad.assembly.model import FittedModel
from dsad.bench import _measure
from dsad.bench._torch_patchcore import TorchPatchCore
from dsad.bench.input import picture
from dsad.core.errors import DsadError
from dsad.core.flops import model_flops
from dsad.core.types import silent
from dsad.terminal import console, flags

DSAD, TORCH = "dsad", "torch"
#: The command with overlays, tables and regions.
WRITTEN = "dsad predict"
#: Scores and maps of both may differ by this share.
TOLERANCE = 1e-3
_SIZE = 256  # of drawn images, as those of the reduced bottle


class Measured(NamedTuple):
    """Images/s and CPU ms an image of many, ms of one at p50 and p95, memory of a first call."""

    rate: float
    cpu: float
    median: float
    high: float
    growth: int


def main(argv: list[str]) -> int:
    """The command: ``dsad bench predict``."""
    about = "images/s, latency, memory of a fitted model, beside plain torch."
    parsed = flags.Command("bench predict", about)
    parsed.string("bottle", "", "Folder of MVTec's bottle; drawn images without it.")
    parsed.string("weights", "random", "Weights of the ResNet-18.")
    parsed.integer("images", 32, "Images to draw, to fit and again to score.", at_least=2)
    parsed.integer("side", 224, "Side of the network's input.", at_least=32)
    parsed.integer("batch", command.BATCH, "Images at once where there are many.", at_least=1)
    parsed.integer("rounds", 5, "Timed rounds; medians are shown.", at_least=1)
    _, values, _ = parsed.parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        model, files = _prepared(values, place)
        measure(model, files, place, values.batch, values.rounds)
    return 0


def _prepared(values: Any, place: pathlib.Path) -> tuple[FittedModel, list[str]]:
    """A model that was written and read again, and the files to score."""
    out = console.console()
    folder = pathlib.Path(values.bottle).expanduser()
    if not values.bottle:
        folder = place / "drawn"
        for split in ("train/good", "test"):
            (folder / split).mkdir(parents=True)
            for i in range(values.images):
                drawn = picture(_SIZE, _SIZE, 2 * i + (split == "test"))
                PIL.Image.fromarray(drawn).save(folder / split / f"{i:04d}.png")
        out.print("Drawn images and a small bank: give --bottle=DIR --weights=FILE for a real one.")
    out.print("fitting ...")
    model = api.fit(
        str(folder / "train" / "good"), backbone="resnet18", weights=values.weights,
        false_alarm_rate=0, settings={"evaluation.image_size": values.side},
    )  # fmt: skip
    model.save(place / "model")
    return FittedModel.load(place / "model"), pictures.matching([str(folder / "test")])


def measure(
    model: FittedModel, files: Sequence[str], place: pathlib.Path, batch: int, rounds: int
) -> dict[str, Measured]:
    """Time all implementations that there are, in turns; prints a table, returns its rows.

    Raises DsadError where scores or maps differ, before anything is timed.
    """
    out = console.console()
    many: dict[str, Callable[[], Any]] = {DSAD: lambda: list(_by_dsad(model, files, batch))}
    single: dict[str, Callable[[str], Any]] = {DSAD: model.predict}
    if _measure.installed("torch"):
        peer = TorchPatchCore(model)
        many[TORCH] = lambda: list(peer.many(files, batch))
        single[TORCH] = peer.one
    else:
        out.print(_measure.missing(TORCH, 'torch, or the extra "dsad[torch]"'))
    many[WRITTEN] = lambda: _written(model, files, place / "predictions")
    first = {name: _measure.timed(call) for name, call in many.items()}
    if TORCH in first:
        _agree(first[DSAD].result, first[TORCH].result)
    timed = _measure.interleaved(many, rounds, first=())
    calls = {n: functools.partial(_latencies, call, files) for n, call in single.items()}
    alone = _measure.interleaved(calls, rounds, first=None, keep=True)
    made = {}
    for name, timing in timed.items():
        each = [r for run in alone[name].rounds for r in run.result] if name in alone else [np.nan]
        median, high = np.quantile(each, [0.5, 0.95]).tolist()
        busy = statistics.median(run.cpu for run in timing.rounds) / len(files) * 1e3
        rate = len(files) / timing.median
        made[name] = Measured(rate, busy, median, high, first[name].growth)
    _print(out, model, files, made, place, batch, rounds)
    return made


def _by_dsad(model: FittedModel, files: Sequence[str], batch: int) -> Any:
    for images, _ in model.stream(pictures.source(files), batch=batch):
        yield from ((x.score, model.original(x)) for x in images)


def _written(model: FittedModel, files: Sequence[str], place: pathlib.Path) -> None:
    folder = command.claim(str(place), overwrite=True)
    command.predict(model, files, model.decision(), folder, silent)


def _latencies(call: Callable[[str], Any], files: Sequence[str]) -> list[float]:
    """Milliseconds of every file alone."""
    made = []
    for file in files:
        start = time.perf_counter()
        call(file)
        made.append((time.perf_counter() - start) * 1e3)
    return made


def _agree(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for (score, values), (other, others) in zip(ours, theirs, strict=True):
        gap = max(abs(score / other - 1), float(np.max(np.abs(values - others)) / others.max()))
        if not gap <= TOLERANCE:
            raise DsadError(
                f"bench predict: scores or maps of dsad and torch differ by {gap:.1e}, expected at "
                f"most {TOLERANCE:.0e}: the two do not compute the same, so nothing was timed."
            )


def _print(
    out: Any, model: FittedModel, files: Sequence[str], made: dict[str, Measured],
    place: pathlib.Path, batch: int, rounds: int,
) -> None:  # fmt: skip
    columns = "", "images\n/s", "CPU\nms", "p50\nms", "p95\nms", "MB", "×\nrate", "×\nCPU", "×\np50"
    table = console.table(*columns, whole=True)
    base = made.get(TORCH)
    for name, row in made.items():
        known = not np.isnan(row.median)
        times = [f"{x:.1f}" if known else "" for x in (row.median, row.high)]
        ratios = (
            [row.rate / base.rate, base.cpu / row.cpu, base.median / row.median] if base else []
        )
        table.add_row(
            name, f"{row.rate:.1f}", f"{row.cpu:.0f}", *times, f"{row.growth / 1e6:.0f}",
            *("" if np.isnan(x) else f"{x:.2f}" for x in ratios),
        )  # fmt: skip
    out.print(table)
    size = sum(p.stat().st_size for p in (place / "model").iterdir())
    rows, depth = int(model.fitted.state["rows"]), model.fitted.state["bank"].shape[1]
    network, search = _operations(model, rows, depth)
    speed = _measure.machine().operations
    out.print(
        f"PatchCore, ResNet-18 {' + '.join(model.detector.layers)}, {model.evaluation.image_size} "
        f"px, bank {rows:,} × {depth}, model {size / 1e6:.1f} MB on disk; {len(files)} files, "
        f"batches of {batch}, medians of {rounds} interleaved rounds, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}. From file to score and map on its pixels: images/s and "
        "CPU time an image of many, ms of one alone, warm. MB: growth of the resident set in the "
        "first call, compilation included. "
        f"Floor of float32 operations: network {network / speed * 1e3:.1f} ms, search "
        f"{search / speed * 1e3:.1f} ms an image (plain matmul {speed / 1e9:.0f} GFLOP/s)."
    )


def _operations(model: FittedModel, rows: int, depth: int) -> tuple[float, float]:
    """Of one image: the network's and the search's."""
    side = model.evaluation.image_size
    network: Any = model.backbone.only(model.detector.layers)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    grid = jax.eval_shape(network, image)[model.detector.layers[0]].shape
    return model_flops(network, image), 2.0 * grid[1] * grid[2] * rows * depth
