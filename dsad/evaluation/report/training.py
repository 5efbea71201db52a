"""What a report shows of a pretraining run: what it saw, its curves, its config."""

import io
import json
import math
import re
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.core.metric_files import read_metrics
from dsad.evaluation.report import figures, gallery

#: Below the run's directory, see ``assembly.strips``, which writes them.
FOLDER = "pictures"
_NAME = re.compile(r"(\d+) (\d+) (.+)\.png")
_CHARTS = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "feature_std": "Feature standard deviation",
    "effective_rank": "Effective rank",
    "accuracy": "Accuracy on the batch",
    "spd_loss": "Loss of SPD",
    "spd_accuracy": "SPD: changed or not, accuracy",
    "spd_matte_peak": "SPD: highest value of the matte",
    "spd_cosine_positive": "SPD: cosine of the positive",
    "spd_cosine_negative": "SPD: cosine of the negative",
    "probe_aupro": "AUPRO of the probe",
    "images_per_s": "Images per second",
}


def pretraining(folder: str | epath.PathLike) -> dict[str, Any]:
    """Charts, pictures and config of a pretraining run; raises WorkdirError for anything else."""
    directory = paths.directory(folder)
    config = directory / "config.json"
    for file in (directory / "metrics.jsonl", config):
        if not file.is_file():
            raise WorkdirError(f"{file}: no such file; expected the workdir of `dsad pretrain`.")
    rows = read_metrics(directory / "metrics.jsonl")
    charts = []
    for name, title in _CHARTS.items():
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
    return {
        "charts": charts, "config": text, "steps": last, "folder": directory.name,
        "pictures": _pictures(directory / FOLDER),
    }  # fmt: skip


def _pictures(folder: epath.Path) -> list[dict[str, Any]]:
    """Strips with title and step; those that are alike at all steps are shown once, and first."""
    strips: dict[tuple[int, str], dict[int, bytes]] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(file.name):
            step, number, title = match.groups()
            strips.setdefault((int(number), title), {})[int(step)] = file.read_bytes()
    rows = []
    for (number, title), by_step in strips.items():
        alike = len(set(by_step.values())) == 1
        for step, packed in sorted(by_step.items())[: 1 if alike else None]:
            pixels = np.asarray(PIL.Image.open(io.BytesIO(packed)).convert("RGB"))
            uri, at = figures.data_uri(gallery.shrunk(pixels)), None if alike else step
            rows.append(
                {"title": title, "step": at, "uri": uri, "place": (not alike, step, number)}
            )
    return sorted(rows, key=lambda row: row["place"])


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
