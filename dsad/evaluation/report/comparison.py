"""Numbers that a report lays side by side, with their differences."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsad.evaluation import thresholds
from dsad.evaluation.predictions import Decision
from dsad.evaluation.report import gallery
from dsad.evaluation.results import Results, shown


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation of a report."""

    name: str
    results: Results
    colour: str

    def row(self, category: str) -> Mapping[str, Any] | None:
        """Thresholds of the first seed, whose scores and pictures are shown; None without."""
        return next(iter(self.results.thresholds.get(category, {}).values()), None)

    def level(self, category: str) -> float | None:
        """In units of its maps, what at most the stated share of good images has a pixel above."""
        region, scale = Decision.of(self.row(category)).region, self.results.scales.get(category)
        if region is None or not scale:
            return None
        return float(gallery.to_units(np.asarray(region), scale))


def categories(runs: Sequence[Run]) -> list[str]:
    """Every category that a run has, in the order of the first that has it."""
    return list(dict.fromkeys(c for run in runs for c in run.results.categories))


def summary(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One group of rows per category, and one of the means."""
    groups = [
        {
            "name": c,
            "mean": False,
            "rows": _rows(
                runs,
                [run.results.categories.get(c, {}) for run in runs],
                metrics,
                [run.results.std.get("categories", {}).get(c, {}) for run in runs],
            ),
        }
        for c in categories(runs)
    ]
    means = [run.results.mean for run in runs]
    spread = [run.results.std.get("mean", {}) for run in runs]
    return [*groups, {"name": "Mean", "mean": True, "rows": _rows(runs, means, metrics, spread)}]


def kinds(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One group of rows per category and kind of defect."""
    made = []
    for category in categories(runs):
        per_run = [run.results.kinds.get(category, {}) for run in runs]
        for kind in dict.fromkeys(k for found in per_run for k in found):
            rows = [found.get(kind, {}) for found in per_run]
            made.append(
                {
                    "category": category,
                    "kind": kind,
                    "images": next(r["images"] for r in rows if r),
                    "rows": _rows(runs, rows, metrics),
                }
            )
    return made


def _rows(
    runs: Sequence[Run],
    numbers: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    spread: Sequence[Mapping[str, float]] = (),
) -> list[dict[str, Any]]:
    """A row per run, the best of each column marked as displayed; of two runs the difference."""
    texts = [[shown(row.get(m)) for m in metrics] for row in numbers]
    best = [max((r[j] for r in texts if r[j] != "–"), default="") for j in range(len(metrics))]
    made = []
    for i, run in enumerate(runs):
        cells = []
        for j, m in enumerate(metrics):
            text = texts[i][j]
            cell = {"text": text, "style": "best" if len(runs) > 1 and text == best[j] else ""}
            if spread and spread[i].get(m):  # equal numbers have none
                cell["text"] += f" ± {spread[i][m]:.3f}"
            cells.append(cell)
        made.append({"label": run.name, "colour": run.colour, "cells": cells})
    if len(runs) == 2:
        cells = [_difference(numbers[0].get(m), numbers[1].get(m)) for m in metrics]
        made.append({"label": f"{runs[1].name} − {runs[0].name}", "colour": "", "cells": cells})
    return made


def _difference(left: float | None, right: float | None) -> dict[str, str]:
    if left is None or right is None:
        return {"text": "–", "style": "gap"}
    value = right - left
    rounded = f"{value:+.3f}".replace("-", "−")
    if float(f"{value:.3f}") == 0:
        return {"text": "0.000", "style": "gap"}
    return {"text": rounded, "style": "gap up" if value > 0 else "gap down"}


def seeded(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs with several seeds or drawn support sets: ``seeds``, ``shots`` (0: all), ``runs``."""
    found: dict[tuple[tuple[str, ...], int], list[str]] = {}
    for run in runs:
        support = run.results.stamp.get("support")
        shots = support.get("shots", "all") if isinstance(support, Mapping) else "all"
        key = tuple(run.results.seeds), 0 if shots == "all" else int(shots)
        found.setdefault(key, []).append(run.name)
    return [
        {"seeds": list(seeds), "shots": shots, "runs": names}
        for (seeds, shots), names in found.items()
        if len(seeds) > 1 or shots
    ]


def threshold_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per category and run that set thresholds: held-out images, then ``COLUMNS``."""
    made = []
    for category in categories(runs):
        for run in runs:
            if by_seed := run.results.thresholds.get(category):
                row = thresholds.mean(list(by_seed.values()))
                forms = {n: ".4g" if n in thresholds.VALUES else ".2%" for n in row}
                cells = [shown(row[n], forms[n]) for n, _ in thresholds.COLUMNS]
                cells = [c.replace("%", " %") for c in cells]
                first = next(iter(by_seed.values()))["recall_by_kind"]
                by_kind = {
                    k: float(np.mean([s["recall_by_kind"][k] for s in by_seed.values()]))
                    for k in first
                }
                made.append(
                    {
                        "category": category,
                        "run": run,
                        "held_out": f"{row['held_out']:g}",
                        "cells": cells,
                        "kinds": ", ".join(f"{k} {100 * v:.0f} %" for k, v in by_kind.items()),
                    }
                )
    return made
