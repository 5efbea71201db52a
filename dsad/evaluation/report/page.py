"""One self-contained HTML page: decision, pictures, then tables, curves, training and stamp."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jinja2
import PIL.Image
from etils import epath

from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.evaluation import stamp, thresholds
from dsad.evaluation.channels import KINDS
from dsad.evaluation.config import Rule
from dsad.evaluation.report import cases, comparison, decisions, figures, gallery, panels
from dsad.evaluation.report.comparison import Run
from dsad.evaluation.report.training import pretraining
from dsad.evaluation.results import read_results

#: Largest page in bytes; the gallery shrinks until it fits.
LIMIT = 16_000_000
#: Rows per section and longest side of a picture in pixels, tried in this order. With several
#: categories there are fewer rows.
_SIZES = ((9, gallery.PICTURE_SIDE), (9, 640), (9, 320), (3, 320), (3, 208), (2, 192), (1, 160),
          (1, 112), (0, 1))  # fmt: skip
_OVERLAPS = {"aupro": "AUPRO", "spro": "sPRO"}
_LABELS = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "image_aupr_visa": "Image AU-PR (VisA)",
    "pixel_auroc_anomalous": "Pixel AUROC, anomalous images",
    "pixel_ap_anomalous": "Pixel AP, anomalous images",
    "pixel_auroc_visa": "Pixel AUROC (VisA)",
    "pixel_auroc_partial_05": "Pixel AUROC to FPR 0.05, standardised",
    "pixel_aupr_visa": "Pixel AU-PR (VisA)",
    **{f"pixel_f1_{rule}": f"SegF1, {rule}" for rule in get_args(Rule)},
    **{f"image_f1_{rule}": f"ClassF1, {rule}" for rule in get_args(Rule)},
}


def write_report(
    out_path: str | epath.PathLike,
    evaluations: Sequence[tuple[str, str | epath.PathLike]],
    training_dir: str | epath.PathLike | None = None,
    *,
    title: str = "Defect localization",
    allow_different: bool = False,
    commands: Mapping[str, str] | None = None,
    lead: Sequence[str] = (),
) -> epath.Path:
    """Write the page and return its path; nothing in it refers to another file or to a server.

    Everything may lie in a bucket.

    Args:
      out_path: the page.
      evaluations: (name, folder with results.json) per run, side by side in this order; of two
        runs differences are shown, and images that either localizes better; the gallery's other
        cases are chosen by the first.
      training_dir: folder of a pretraining run, with ``metrics.jsonl``, ``config.json`` and, where
        its objective shows some, ``pictures``.
      title: heading of the page.
      allow_different: show runs whose stamps differ in meaning, with a notice, instead of refusing.
      commands: by run, what gives it thresholds, shown where it has none.
      lead: sentences that come first.

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
    training = pretraining(training_dir) if training_dir else {}
    page = _render(runs, title, notices, training, commands or {}, lead)
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def write_training(
    out_path: str | epath.PathLike, folder: str | epath.PathLike, *, title: str = ""
) -> epath.Path:
    """Write the page of a pretraining run by itself and return its path.

    Without a ``title`` it has the folder's name.
    Raises WorkdirError for a folder of anything else, or a page that cannot be written.
    """
    training = pretraining(folder)
    page = template("training").render(title=title or training["folder"], training=training)
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def _differing(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    return [
        f"{first.name} / {run.name}: {line}"
        for run in runs[1:]
        for line in stamp.differences(first.results.stamp, run.results.stamp)
    ]


def _render(
    runs: Sequence[Run],
    title: str,
    notices: Sequence[str],
    training: dict[str, Any],
    commands: Mapping[str, str],
    lead: Sequence[str],
) -> str:
    metrics = list(dict.fromkeys(m for run in runs for m in run.results.metric_names))
    names = comparison.categories(runs)
    undecided = [run.name for run in runs if not run.results.thresholds]
    about = {
        "title": title,
        "runs": runs,
        "notices": notices,
        "lead": lead,
        "verdicts": decisions.verdicts(runs),
        "undecided": undecided,
        "commands": [command for name in undecided if (command := commands.get(name))],
        "scores": decisions.charts(runs),
        "training": training,
        "stamps": [stamp.flat(run.results.stamp) for run in runs],
        "metrics": [(m, metric_label(m)) for m in metrics],
        "summary": comparison.summary(runs, metrics),
        "kinds": comparison.kinds(runs, metrics),
        "seeded": comparison.seeded(runs),
        "thresholds": comparison.threshold_rows(runs),
        "threshold_columns": [label for _, label in thresholds.COLUMNS],
        "categories": [_category(runs, c) for c in names],
        "top": figures.TOP,
    }
    page, most = "", 9 if len(names) == 1 else 3 if len(names) < 5 else 2
    for rows, side in _SIZES:
        if side > cases.HEAT_SIDE and _large(runs, side) > LIMIT:
            continue
        pictures = {c: cases.sections(runs, c, min(rows, most), side) for c in names}
        page = template("report").render(**about, pictures=pictures)
        if len(page.encode()) < LIMIT:
            break
    return page


def template(name: str) -> jinja2.Template:
    """A page of this folder, with what all have."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dsad.evaluation.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(gradient=figures.gradient(), number=itertools.count(1).__next__)
    return environment.get_template(f"{name}.html.jinja")


def _large(runs: Sequence[Run], side: int) -> float:
    """About the bytes of a page with all pictures of this side, without drawing them."""
    total = 0.0
    for run in runs:
        for name, stored in run.results.gallery.items():
            if name.startswith("image/"):
                longest = max(PIL.Image.open(io.BytesIO(stored.tobytes())).size)
                total += stored.size * min(1.0, side / longest) ** 2
    return total * (2 + len(runs))  # the picture, its annotation, an overlay of each run


def metric_label(name: str) -> str:
    """Readable name of a metric key: ``aupro_30`` is "AUPRO 0.3", ``spro_05`` "sPRO 0.05"."""
    if name.endswith(KINDS):
        return f"{metric_label(name.removesuffix(KINDS))}, mean of kinds"
    kind, _, limit = name.partition("_")
    if kind in _OVERLAPS:
        return f"{_OVERLAPS[kind]} {float(limit) / 100:g}"
    return _LABELS.get(name, name)


def _curves(runs: Sequence[Run], category: str) -> list[str]:
    prefix = f"{category}/"
    curves = [
        {
            name.removeprefix(prefix): values
            for name, values in run.results.curves.items()
            if name.startswith(prefix)
        }
        for run in runs
    ]
    limit = runs[0].results.stamp["fpr_limit"]
    return figures.curve_charts(curves, limit, name=category) if any(curves) else []


def _category(runs: Sequence[Run], category: str) -> dict[str, Any]:
    first = next(run.results for run in runs if category in run.results.categories)
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
        "charts": _curves(runs, category),
        "scales": [_scale(run, category) for run in runs if category in run.results.scales],
        "panels": [
            {"run": run, "names": shown, "legend": panels.legend(tops)}
            for run in runs
            if (tops := run.results.scales.get(category, {}))
            and (shown := panels.names(run.results.gallery))
        ],
    }


def _scale(run: Run, category: str) -> dict[str, Any]:
    """Values of the heat scale at its ends and in its middle, and where on it the contour is."""
    scale, level = run.results.scales[category], run.level(category)
    spread = scale["p99_9"] - scale["median"]
    ticks = [scale["median"] + units * spread for units in (0, 1, figures.TOP)]
    at = None if level is None else 100 * min(max(level / figures.TOP, 0.0), 1.0)
    return {"run": run, "ticks": [f"{t:.4g}" for t in ticks], "contour": at}
