"""One self-contained HTML page: tables, curves, heat maps, training curves, config and stamp."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import PIL.Image

from dsad.core.errors import ConfigError, WorkdirError
from dsad.evaluation import figures, gallery, stamp
from dsad.evaluation.results import Results, read_results

#: Largest page in bytes; the gallery shrinks until it fits.
LIMIT = 8_000_000
#: Rows per section and longest side of a picture in pixels, tried in this order.
_SIZES = ((9, 288), (3, 256), (3, 208), (2, 192), (1, 160), (1, 112), (0, 1))
_LABELS = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
}
_TRAINING = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "feature_std": "Feature standard deviation",
    "effective_rank": "Effective rank",
    "images_per_s": "Images per second",
}


@dataclasses.dataclass(frozen=True)
class _Run:
    name: str
    results: Results
    colour: str


def write_report(
    out_path: str | os.PathLike[str],
    evaluations: Sequence[tuple[str, str | os.PathLike[str]]],
    training_dir: str | os.PathLike[str] | None = None,
    *,
    title: str = "Defect localization",
    allow_different: bool = False,
) -> pathlib.Path:
    """Write the page and return its path; nothing in it refers to another file or to a server.

    Args:
      out_path: the page; written under a temporary name and moved.
      evaluations: (name, folder with results.json) per run, side by side in this order; the
        gallery's cases are chosen by the first.
      training_dir: folder with ``metrics.jsonl`` and ``config.json`` of a pretraining run.
      title: heading of the page.
      allow_different: show runs whose stamps differ in meaning, with a notice, instead of refusing.

    Raises:
      ConfigError: no run, two runs of one name, or stamps that differ in meaning.
      WorkdirError: files that are missing or unreadable.

    """
    names = [name for name, _ in evaluations]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"report: expected one or more runs with distinct names, found {names}.")
    runs = [
        _Run(name, read_results(folder), figures.COLOURS[i % len(figures.COLOURS)])
        for i, (name, folder) in enumerate(evaluations)
    ]
    notices = _differing(runs)
    if notices and not allow_different:
        raise ConfigError(
            "report: these numbers do not mean the same:\n  " + "\n  ".join(notices) + "\n"
            "Evaluate the runs under one protocol, or ask for the comparison all the same with "
            "--allow-different."
        )
    page = _render(runs, title, notices, _training(training_dir))
    out = pathlib.Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _differing(runs: Sequence[_Run]) -> list[str]:
    first = runs[0]
    return [
        f"{first.name} / {run.name}: {line}"
        for run in runs[1:]
        for line in stamp.differences(first.results.stamp, run.results.stamp)
    ]


def _render(
    runs: Sequence[_Run], title: str, notices: Sequence[str], training: dict[str, Any]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dsad.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    metrics = list(dict.fromkeys(m for run in runs for m in run.results.metric_names))
    charts = {c: _charts(runs, c) for c in _categories(runs)}
    page = ""
    for rows, side in _SIZES:
        page = template.render(
            title=title,
            runs=runs,
            notices=notices,
            training=training,
            stamps=[stamp.flat(run.results.stamp) for run in runs],
            metrics=[(m, metric_label(m)) for m in metrics],
            summary=_summary(runs, metrics),
            kinds=_kinds(runs, metrics),
            categories=[_category(runs, c, charts[c], rows, side) for c in charts],
            gradient=figures.gradient(),
            top=figures.TOP,
        )
        if len(page.encode()) < LIMIT:
            break
    return page


def metric_label(name: str) -> str:
    """Readable name of a metric key: ``aupro_30`` is "AUPRO 0.3"."""
    if name.startswith("aupro_"):
        return f"AUPRO {int(name.removeprefix('aupro_')) / 100:g}"
    return _LABELS.get(name, name)


def _categories(runs: Sequence[_Run]) -> list[str]:
    return list(dict.fromkeys(c for run in runs for c in run.results.categories))


def _cells(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Per run and metric the text and whether it is the best of the runs, as displayed."""

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    shown = [[text(row.get(m)) for m in metrics] for row in rows]
    best = [max((r[j] for r in shown if r[j] != "–"), default="") for j in range(len(metrics))]
    several = len(rows) > 1
    return [[{"text": t, "best": several and t == best[j]} for j, t in enumerate(r)] for r in shown]


def _summary(runs: Sequence[_Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    rows = [
        {
            "name": c,
            "cells": _cells([run.results.categories.get(c, {}) for run in runs], metrics),
            "mean": False,
        }
        for c in _categories(runs)
    ]
    mean = _cells([run.results.mean for run in runs], metrics)
    return [*rows, {"name": "Mean", "cells": mean, "mean": True}]


def _kinds(runs: Sequence[_Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    made = []
    for category in _categories(runs):
        per_run = [run.results.kinds.get(category, {}) for run in runs]
        for kind in dict.fromkeys(k for kinds in per_run for k in kinds):
            rows = [kinds.get(kind, {}) for kinds in per_run]
            made.append(
                {
                    "category": category,
                    "kind": kind,
                    "images": next(r["images"] for r in rows if r),
                    "cells": _cells(rows, metrics),
                }
            )
    return made


def _charts(runs: Sequence[_Run], category: str) -> list[str]:
    prefix = f"{category}/"
    curves = [
        {
            name.removeprefix(prefix): values
            for name, values in run.results.curves.items()
            if name.startswith(prefix)
        }
        for run in runs
    ]
    images = [run.results.images.get(category, []) for run in runs]
    limit = runs[0].results.stamp["fpr_limit"]
    return [
        *figures.curve_charts(curves, limit, name=category),
        figures.score_chart(images, name=category),
    ]


def _category(
    runs: Sequence[_Run], category: str, charts: Sequence[str], rows: int, side: int
) -> dict[str, Any]:
    first = next(run.results for run in runs if category in run.results.categories)
    scales = []
    for run in runs:
        if scale := run.results.scales.get(category):
            spread = scale["p99_9"] - scale["median"]
            ticks = [scale["median"] + units * spread for units in (0, 1, figures.TOP)]
            scales.append({"run": run, "ticks": [f"{t:.4g}" for t in ticks]})
    sections = [
        {
            "title": heading,
            "cases": [_case(runs, first, category, n, side) for n in numbers[:rows]],
        }
        for section, heading in gallery.SECTIONS.items()
        if (numbers := first.cases[category].get(section, [])[:rows])
    ]
    row = first.categories[category]
    return {
        "name": category,
        "counts": row["counts"],
        "seconds": [(run, run.results.categories.get(category, {}).get("seconds")) for run in runs],
        "charts": charts,
        "scales": scales,
        "sections": sections,
    }


def _case(
    runs: Sequence[_Run], first: Results, category: str, number: int, side: int
) -> dict[str, Any]:
    """Pictures and caption of one test image; every run's map of the same image."""
    entry = first.images[category][number]
    stored = PIL.Image.fromarray(first.gallery[f"image/{category}/{number}"])
    ratio = side / max(stored.size)
    size = (max(1, round(stored.width * ratio)), max(1, round(stored.height * ratio)))
    image = np.asarray(stored.resize(size, PIL.Image.Resampling.LANCZOS))
    mask = first.gallery.get(f"mask/{category}/{number}")
    if mask is not None:
        mask = np.asarray(PIL.Image.fromarray(mask).resize(size, PIL.Image.Resampling.NEAREST))
    pictures = [("Image", figures.data_uri(image))]
    if mask is not None and mask.any():
        pictures.append(("Annotated defect", figures.data_uri(figures.outline(image, mask))))
    facts = []
    for run in runs:
        images = run.results.images.get(category, [])
        own = next((i for i, x in enumerate(images) if x["path"] == entry["path"]), None)
        if own is None:
            continue
        units = run.results.gallery[f"map/{category}/{own}"]
        drawn = figures.outline(figures.heat(units, size), mask)
        whose = f"{run.name}: " if len(runs) > 1 else ""
        pictures.append((f"{whose}heat map", figures.data_uri(drawn)))
        pictures.append((f"{whose}overlay", figures.data_uri(figures.overlay(image, units))))
        facts.append({"run": run, **images[own]})
    return {"entry": entry, "facts": facts, "pictures": pictures}


def _training(folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Charts and config of a pretraining run; empty without one."""
    if folder is None:
        return {}
    directory = pathlib.Path(folder)
    rows = _read_lines(directory / "metrics.jsonl")
    charts = []
    for name, title in _TRAINING.items():
        points = [(r["step"], r[name]) for r in rows if _finite(r.get(name)) and "step" in r]
        if len(points) > 1:
            x, y = np.array(points, np.float64).T
            keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), 600)).astype(int))
            svg = figures.series_chart(x[keep], y[keep], title, name=f"training-{name}")
            charts.append(svg)
    config = directory / "config.json"
    if not config.is_file():
        raise WorkdirError(f"{config}: no such file; expected the workdir of `dsad pretrain`.")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkdirError(f"{config}: not valid JSON ({error}).") from error
    text = json.dumps(content, indent=2, ensure_ascii=False)
    last = rows[-1].get("step") if rows else None
    return {"charts": charts, "config": text, "steps": last, "folder": directory.name}


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut by a killed process is left out."""
    if not path.is_file():
        raise WorkdirError(f"{path}: no such file; expected the workdir of `dsad pretrain`.")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line end: the process died while writing
                continue
            raise WorkdirError(f"{path}: line {number} is not valid JSON ({error}).") from error
        rows.append(row)
    return rows
