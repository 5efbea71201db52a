"""``dsad demo``: the whole way once, on procedural images, in a few minutes on a CPU."""

import time
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from dsad.assembly import evaluate, pretrain, training, workdir
from dsad.core import config as core_config
from dsad.data import base as data_base
from dsad.evaluation.report.page import write_report
from dsad.evaluation.results import Results, shown
from dsad.terminal import console, flags
from dsad.train.stop import StopSignal

COMMAND_CONFIG = "configs/demo.py"
#: Kinds of defects that are drawn unlike any corruption: pixels move smoothly, an object is bent.
UNLIKE = ("warp", "bent")


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "demo", "pretrain on procedural images, localize defects, write a report.",
        config=COMMAND_CONFIG,
    )  # fmt: skip
    command.string("workdir", "dsad-demo", "Directory for everything the demo writes.")
    command.switch("overwrite", "Replace an earlier demo in --workdir.")
    config, values, _ = command.parse(argv)
    pretrain.parse(core_config.require(config, "pretrain", COMMAND_CONFIG).pretrain)
    evaluate.parse(core_config.require(config, "evaluate", COMMAND_CONFIG).evaluate)
    path = workdir.claim(values.workdir, "demo", config.to_dict(), overwrite=values.overwrite)
    return 0 if run(config, path, console.console()) else StopSignal.code


def run(config: Any, path: epath.Path, out: Console) -> dict[str, Results]:
    """Pretrain, evaluate before and after, report; returns the results by name, none if stopped."""
    start = time.perf_counter()
    cfg, _, _ = pretrain.parse(config.pretrain)
    dataset = data_base.load(cfg.data)
    out.print(
        console.headed(
            "1/3  Pretraining",
            "an encoder learns to see where normal images were changed, on "
            f"{len(dataset.categories)} procedural classes: {', '.join(dataset.categories)}",
        )
    )
    prepared = training.prepare(config.pretrain, out, dataset)
    folder = workdir.claim(
        str(path / "pretrain"), "pretrain", config.pretrain.to_dict(), info=prepared.run.info
    )
    if not training.pretrain(prepared, folder, out):
        out.print("stopped before the end of the training; start again with --overwrite")
        return {}
    out.print(
        console.headed(
            "2/3  Localizing defects",
            "by nearest neighbours, with the same encoder before and after its training",
        )
    )
    results = {}
    for name, spec in (("untrained", "@0"), ("pretrained", "")):
        chosen = config.evaluate.copy_and_resolve_references()
        chosen.backbone = f"run:{folder}{spec}"
        place = workdir.claim(str(path / name), "evaluate", chosen.to_dict())
        parts = evaluate.prepare(chosen, out, dataset)
        results[name] = evaluate.evaluate(parts, place, out, name=name)
    out.print("3/3  Report", style="bold")
    lead = gains(*results.values())
    report = write_report(
        path / "report.html", [(name, path / name) for name in results], training_dir=folder,
        title="dsad demo: pretraining on procedural images", lead=lead,
    )  # fmt: skip
    out.print(*lead, sep="\n", style="bold")
    out.print(comparison(results))
    out.print(
        f"Took {time.perf_counter() - start:.0f} s. Open {report} "
        "in a browser for the pictures.\n"
        "Next, with your own images in MVTec layout (CATEGORY/train/good, CATEGORY/test/KIND, "
        "CATEGORY/ground_truth/KIND):\n"
        "  dsad check-data --config.data.name=mvtec --config.data.root=DIR\n"
        "  dsad pretrain --config=configs/corrupt.py:mvtec --config.data.root=DIR "
        "--workdir=runs/mine\n"
        "  dsad evaluate --config.backbone=run:runs/mine --workdir=runs/mine-knn\n"
        "  dsad report runs/mine-knn"
    )
    return results


def gains(before: Results, after: Results) -> list[str]:
    """What training changed: mean AUPRO, and that of the kinds which no corruption is like."""
    metric, both = "aupro_30", (before, after)
    first, last = (r.mean[metric] for r in both)
    if first is None or last is None:  # no defect
        return []
    lines = [f"Pretraining: mean AUPRO {first:.3f} before, {last:.3f} after ({last - first:+.3f})"]
    unlike = []
    for kind in UNLIKE:
        numbers = [[k[kind][metric] for k in r.kinds.values() if kind in k] for r in both]
        if all(numbers):
            unlike.append(f"{kind} {np.mean(numbers[0]):.3f} → {np.mean(numbers[1]):.3f}")
    if unlike:
        lines.append(f"Defects drawn unlike any corruption: {', '.join(unlike)}")
    return lines


def comparison(results: dict[str, Results]) -> Table:
    """Numbers of every category, a row per encoder."""
    metrics = ("image_auroc", "pixel_auroc", "aupro_30")
    table = console.table("category", "encoder", *metrics)
    first = next(iter(results.values()))
    for row in (*first.categories, "mean"):
        for name, result in results.items():
            numbers = result.mean if row == "mean" else result.categories[row]
            cells = [shown(numbers[m]) for m in metrics]
            table.add_row(row, name, *cells, style="bold" if row == "mean" else None)
        table.add_section()
    return table
