"""``dsad bench input``: images/s of every input mode, beside a torch DataLoader."""

import contextlib
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from dsad.assembly import training
from dsad.bench import _host_views, _measure
from dsad.core.batch import BatchSpec
from dsad.core.mesh import place_batch
from dsad.data import records, records_builder
from dsad.data.base import DataConfig, load
from dsad.data.pipeline import CacheMode, make_pipeline
from dsad.objectives import ds2
from dsad.terminal import console, flags
from dsad.train.state import initial_state

#: What is generated: name, height and width, suffix.
KINDS = {"jpeg": (400, 500, ".jpg"), "png": (1024, 1024, ".png")}


def main(argv: list[str]) -> int:
    """The command: ``dsad bench input``."""
    command = flags.Command(
        "bench input", "images/s of every input mode, beside a torch DataLoader.",
        config="configs/ds2.py:small",
    )  # fmt: skip
    command.string("root", "", "Folder of images to read; generated ones without it.")
    command.integer("images", 96, "Images of each kind to generate.", at_least=1)
    command.integer("canvas", 512, "Side of the canvases.", at_least=1)
    command.integer("batch", 32, "Images of a batch.", at_least=1)
    command.integer("batches", 6, "Timed batches in a round.", at_least=1)
    command.integer("workers", 2, "Worker processes of the rows with workers.", at_least=1)
    command.integer("rounds", 3, "Timed rounds of every mode; medians are shown.", at_least=1)
    command.integer("steps", 8, "Steps of the config in which the input is waited for (0: none).")
    config, values, _ = command.parse(argv)
    out = console.console()
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        folders = {"root": pathlib.Path(values.root).expanduser()}
        if not values.root:
            folders = {name: _generate(place, name, values.images, out) for name in KINDS}
        for name, folder in folders.items():
            work = place / f"work-{name}"
            measure(name, folder, work, values, out)
            if values.steps:
                waiting(name, folder, work, config, values, out)
    return 0


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth structure with sensor noise (height, width, 3) uint8: it compresses like a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (height // 16 + 2, width // 16 + 2, 3))
    pixels = np.asarray(ndimage.zoom(coarse, (16, 16, 1), order=1))[:height, :width]
    return np.clip(pixels + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def _generate(scratch: pathlib.Path, name: str, count: int, out: Any) -> pathlib.Path:
    height, width, suffix = KINDS[name]
    folder = scratch / name / "images"
    folder.mkdir(parents=True)
    with console.progress(f"drawing {name}", out) as tell:
        for i in range(count):
            image = Image.fromarray(picture(height, width, i))
            image.save(folder / f"{i:04d}{suffix}", quality=90)  # PNG has none and ignores it
            tell(i + 1, count, "")
    return folder.parent


class Spent(NamedTuple):
    """Wall and CPU seconds for a number of images; CPU over all processes."""

    wall: float
    cpu: float
    images: int


def cpu_seconds() -> float:
    """CPU seconds of this process and its children; NaN where the system does not tell."""
    own = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own


def spent(start: Callable[[], Iterator[Any]], warm: int, count: int, batch: int) -> Spent:
    """Time ``count`` batches of a new iterator, once what it had read ahead is used up."""
    iterator = start()
    try:
        for _ in range(warm):
            next(iterator)
        begin, busy = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            next(iterator)
        return Spent(time.perf_counter() - begin, cpu_seconds() - busy, count * batch)
    finally:
        with contextlib.suppress(AttributeError):
            iterator.close()  # type: ignore[attr-defined]


def sources(folder: pathlib.Path, work: pathlib.Path, side: int) -> dict[str, Any]:
    """The training split of a folder: as files, records of these and records of canvases."""
    found = {"files": load(DataConfig(name="folder", root=str(folder)))}
    for name, canvas in (("records", 0), (f"canvases {side}", side)):
        path = work / name.replace(" ", "-")
        if not path.exists():
            plan = records_builder.plan(found["files"], canvas)
            records_builder.write(plan, str(path))
        found[name] = load(DataConfig(name="records", root=str(path)))
    return {name: data.source("train") for name, data in found.items()}


def _modes(found: dict[str, Any], side: int, batch: int, workers: int) -> dict[str, Any]:
    """Pipelines by the name of their mode."""
    again = [name for name in found if name != "records"]
    wanted: list[tuple[CacheMode, str, int]] = [
        ("device", "files", 0), ("host", "files", 0),
        *(("none", name, 0) for name in found), *(("none", name, workers) for name in again),
    ]  # fmt: skip
    modes = {}
    for cache, name, count in wanted:
        label = f"{cache}: {name}" if cache == "none" else cache
        label += f", {count} workers" if count else ""
        modes[label] = make_pipeline(
            found[name], BatchSpec(canvas=side), cache=cache, batch_size=batch, seed=0,
            workers=count, prefetch=1 if count else 2,
        )  # fmt: skip
    return modes


def measure(
    name: str, folder: pathlib.Path, work: pathlib.Path, values: Any, out: Any
) -> dict[str, Spent]:
    """Time every mode and the peer, print a table, return the medians over rounds by mode."""
    records.tfds()
    method = ds2.Config()
    found = sources(folder, work, values.canvas)
    batch, count = values.batch, values.batches
    calls = {}
    for label, pipeline in _modes(found, values.canvas, batch, values.workers).items():
        # Each worker keeps about four batches ready, beside those in the making: they are used up
        # first, and more are timed than could have been ready. Cached modes need many to be seen.
        ahead = 5 * (values.workers if "workers" in label else 1)
        many = count * {"device": 200, "host": 20}.get(label, 1)
        warm, many = 1 + ahead, max(many, 2 * ahead if "workers" in label else 1)
        calls[label] = lambda p=pipeline, w=warm, n=many: spent(p.iterator, w, n, batch)
    files = [str(folder / r.path) for r in found["files"].records]
    peers = _peers(files, method, batch, values)
    calls.update(peers)
    rows = _rounds(calls, values.rounds, name, out)
    _print(name, files, rows, list(peers), values, method, out)
    return rows


def _peers(files: list[str], method: Any, batch: int, values: Any) -> dict[str, Any]:
    if not _measure.installed("torch"):
        return {}
    kind = "torchvision" if _measure.installed("torchvision") else "Pillow"
    calls = {}
    for workers in (0, values.workers):
        label = f"torch DataLoader, {kind} views" + (f", {workers} workers" if workers else "")
        warm = 1 + 3 * workers  # what its workers make and keep
        calls[label] = lambda n=workers, w=warm: spent(
            lambda: _host_views.batches(files, method, batch, n), w, values.batches, batch
        )
    return calls


def _rounds(calls: dict[str, Any], rounds: int, name: str, out: Any) -> dict[str, Spent]:
    with console.progress(f"timing {name}", out) as tell:
        done = itertools.count(1)
        timings = _measure.interleaved(
            calls, rounds, first=(), keep=True,
            tell=lambda _, label, run: tell(next(done), rounds * len(calls), label),
        )  # fmt: skip
    medians = {}
    for label, timing in timings.items():
        results = [run.result for run in timing.rounds]
        medians[label] = Spent(*map(statistics.median, zip(*results, strict=True)))
    return medians


def _print(
    name: str, files: list[str], rows: dict[str, Spent], peers: list[str], values: Any,
    method: Any, out: Any,
) -> None:  # fmt: skip
    columns = ("mode", "images/s", "batches/s", "CPU ms an image", "images/s a core", "× peer")
    title = f"{name}: {len(files)} images, {_sizes(files)}"
    table = console.table(*columns, title=title, whole=True)
    base = rows[peers[0]] if peers else None
    for label, row in rows.items():
        if label == next(iter(peers), None):
            table.add_section()
        per_core = row.images / row.cpu if row.cpu > 0 else float("inf")
        ratio = per_core * base.cpu / base.images if base else float("nan")
        table.add_row(
            label, f"{row.images / row.wall:,.0f}", f"{row.images / values.batch / row.wall:,.1f}",
            f"{row.cpu / row.images * 1e3:.2f}", f"{per_core:,.0f}",
            f"{ratio:,.1f}" if base and label not in peers else "",
        )  # fmt: skip
    out.print(table)
    side = method.view1.side
    out.print(
        f"Canvases of {values.canvas} px, batches of {values.batch}; medians of {values.rounds} "
        f"interleaved rounds on {os.cpu_count()} cores. dsad's rows end with a uint8 batch in host "
        f"memory, as the step takes it; its views are made on the device. The peer makes both "
        f"views of DS2 ({side} px) on the host. A core: images by CPU seconds of all processes; "
        "× peer compares that with the peer without workers."
    )
    if not peers:
        out.print(_measure.missing("torch DataLoader", "torch torchvision"))


def _sizes(files: list[str]) -> str:
    with Image.open(files[0]) as first:
        size = f"{first.width}×{first.height}"
    mean = statistics.mean(os.path.getsize(f) for f in files)
    return f"the first {size}, {mean / 1e3:,.0f} kB on average"


def waiting(
    name: str, folder: pathlib.Path, work: pathlib.Path, config: Any, values: Any, out: Any
) -> dict[str, tuple[float, float]]:
    """Run steps of the config in every mode; prints and returns (wait, total) seconds by mode."""
    side = config.data.canvas
    found = sources(folder, work, side)
    batch = config.batch_size
    streamed = _run(config, folder, "none")
    cached = _run(config, folder, "device")
    out.print(f"compiling two steps of {batch} images ...")
    rows = {}
    with console.progress(f"training on {name}", out) as tell:
        modes = _modes(found, side, batch, values.workers)
        for number, (label, pipeline) in enumerate(modes.items(), start=1):
            made = cached if label == "device" else streamed
            rows[label] = _steps(made, pipeline, values.steps)
            tell(number, len(modes), label)
    table = console.table(
        "mode", "ms a step", "ms waited", "share", whole=True,
        title=f"{name}: waiting for the input in {values.steps} steps",
    )  # fmt: skip
    for label, (wait, total) in rows.items():
        each, waited = (1e3 * s / values.steps for s in (total, wait))
        table.add_row(label, f"{each:,.1f}", f"{waited:,.2f}", f"{wait / total:.2%}")
    out.print(table)
    out.print(
        f"{config.objective.name}, {batch} images a step, canvases of {side} px, on "
        f"{jax.device_count()} × {jax.devices()[0].device_kind}. Waited: time of the loop's thread "
        "in next(batches)."
    )
    return rows


def _run(config: Any, folder: pathlib.Path, cache: str) -> dict[str, Any]:
    """A compiled step of the config, and the state it goes on from."""
    mine = config.copy_and_resolve_references()
    mine.data.update(name="folder", root=str(folder), cache=cache, workers=0, categories=())
    made = training.build(mine)
    run = made.run
    state = initial_state(run.objective, run.tx, run.abstract, run.config.seed)
    return {"run": run, "store": made.store, "state": state}


def _steps(made: dict[str, Any], pipeline: Any, count: int) -> tuple[float, float]:
    """Seconds waited for batches and seconds in all, with one step in flight as in the loop."""
    run, batches = made["run"], pipeline.iterator()
    wait = start = 0.0
    before = None
    try:
        for number in range(-2, count):  # the first two compile and fill what is read ahead
            if number == 0:
                jax.block_until_ready(before)
                wait, start = 0.0, time.perf_counter()
            asked = time.perf_counter()
            inputs = next(batches)
            wait += time.perf_counter() - asked
            made["state"], scalars = run.step(
                made["state"], place_batch(inputs, run.mesh), made["store"], run.key
            )
            jax.block_until_ready(before)
            before = scalars
        jax.block_until_ready(before)
        return wait, time.perf_counter() - start
    finally:
        batches.close()
