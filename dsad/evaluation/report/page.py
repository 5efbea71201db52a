"""One self-contained HTML page: tables, curves, heat maps, training curves, config and stamp."""

import json
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath

from dsad.core import paths
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.metric_files import read_metrics
from dsad.evaluation import stamp, thresholds
from dsad.evaluation.report import comparison, figures, panels
from dsad.evaluation.report.comparison import Run
from dsad.evaluation.results import read_results

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
    "probe_aupro": "AUPRO of the probe",
    "images_per_s": "Images per second",
}


def write_report(
    out_path: str | epath.PathLike,
    evaluations: Sequence[tuple[str, str | epath.PathLike]],
    training_dir: str | epath.PathLike | None = None,
    *,
    title: str = "Defect localization",
    allow_different: bool = False,
) -> epath.Path:
    """Write the page and return its path; nothing in it refers to another file or to a server.

    Everything may lie in a bucket.

    Args:
      out_path: the page.
      evaluations: (name, folder with results.json) per run, side by side in this order; of two
        runs differences are shown, and images that either localizes better; the gallery's other
        cases are chosen by the first.
      training_dir: folder with ``metrics.jsonl`` and ``config.json`` of a pretraining run.
      title: heading of the page.
      allow_different: show runs whose stamps differ in meaning, with a notice, instead of refusing.

    Raises:
      ConfigError: no run, two runs of one name, or stamps that differ in meaning.
      WorkdirError: files that are missing or unreadable, or a page that cannot be written.

    """
    names = [name for name, _ in evaluations]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"report: expected one or more runs with distinct names, found {names}.")
    runs = [
        Run(name, read_results(folder), figures.COLOURS[i % len(figures.COLOURS)])
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
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def _differing(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    return [
        f"{first.name} / {run.name}: {line}"
        for run in runs[1:]
        for line in stamp.differences(first.results.stamp, run.results.stamp)
    ]


def _render(
    runs: Sequence[Run], title: str, notices: Sequence[str], training: dict[str, Any]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dsad.evaluation.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    metrics = list(dict.fromkeys(m for run in runs for m in run.results.metric_names))
    charts = {c: _charts(runs, c) for c in comparison.categories(runs)}
    page = ""
    for rows, side in _SIZES:
        page = template.render(
            title=title,
            runs=runs,
            notices=notices,
            training=training,
            stamps=[stamp.flat(run.results.stamp) for run in runs],
            metrics=[(m, metric_label(m)) for m in metrics],
            summary=comparison.summary(runs, metrics),
            kinds=comparison.kinds(runs, metrics),
            seeded=comparison.seeded(runs),
            thresholds=comparison.threshold_rows(runs),
            threshold_columns=[label for _, label in thresholds.COLUMNS],
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
        return f"AUPRO {float(name.removeprefix('aupro_')) / 100:g}"
    return _LABELS.get(name, name)


def _charts(runs: Sequence[Run], category: str) -> list[str]:
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
    drawn = figures.curve_charts(curves, limit, name=category) if any(curves) else []
    return [*drawn, *([figures.score_chart(images, name=category)] if any(images) else [])]


def _category(
    runs: Sequence[Run], category: str, charts: Sequence[str], rows: int, side: int
) -> dict[str, Any]:
    first = next(run.results for run in runs if category in run.results.categories)
    scales = []
    for run in runs:
        if scale := run.results.scales.get(category):
            spread = scale["p99_9"] - scale["median"]
            ticks = [scale["median"] + units * spread for units in (0, 1, figures.TOP)]
            scales.append({"run": run, "ticks": [f"{t:.4g}" for t in ticks]})
    row = first.categories[category]
    return {
        "name": category,
        "counts": row["counts"],
        "notes": [
            (run, note)
            for run in runs
            for note in run.results.categories.get(category, {}).get("notes", [])
        ],
        "support": next(iter(first.support.get(category, {}).values()), {}),
        "seconds": [(run, run.results.categories.get(category, {}).get("seconds")) for run in runs],
        "charts": charts,
        "scales": scales,
        "panels": [
            {"run": run, "names": shown, "legend": panels.legend(tops)}
            for run in runs
            if (tops := run.results.scales.get(category, {}))
            and (shown := panels.names(run.results.gallery))
        ],
        "sections": comparison.sections(runs, category, rows, side),
    }


def _training(folder: str | epath.PathLike | None) -> dict[str, Any]:
    """Charts and config of a pretraining run; empty without one."""
    if folder is None:
        return {}
    directory = paths.directory(folder)
    config = directory / "config.json"
    for file in (directory / "metrics.jsonl", config):
        if not file.is_file():
            raise WorkdirError(f"{file}: no such file; expected the workdir of `dsad pretrain`.")
    rows = read_metrics(directory / "metrics.jsonl")
    charts = []
    for name, title in _TRAINING.items():
        points = [(r["step"], r[name]) for r in rows if _finite(r.get(name))]
        if len(points) > 1:
            x, y = np.array(points, np.float64).T
            keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), 600)).astype(int))
            svg = figures.series_chart(x[keep], y[keep], title, name=f"training-{name}")
            charts.append(svg)
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise WorkdirError(f"{config}: not valid JSON ({error}).") from error
    text = json.dumps(content, indent=2, ensure_ascii=False)
    last = rows[-1]["step"] if rows else None
    return {"charts": charts, "config": text, "steps": last, "folder": directory.name}


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
