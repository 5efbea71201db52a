"""What the runs of a report decided: defects found, false alarms, and at which threshold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsad.evaluation import thresholds
from dsad.evaluation.report import comparison, figures
from dsad.evaluation.report.comparison import Run


def verdicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One per run that set thresholds: its decision over all categories, and of each.

    ``text`` is what the terminal says, ``aside`` what follows it in brackets; ``seeds`` are
    decisions of further seeds.
    """
    lines = []
    for run in runs:
        rows = {c: row for c in comparison.categories([run]) if (row := run.row(c))}
        if not rows:
            continue
        parts = [
            {"category": c, **_about(row), "seeds": _further(run, c)} for c, row in rows.items()
        ]
        whole = parts[0] if len(parts) == 1 else {"text": _total(run, rows), "aside": ""}
        lines.append({"run": run, **whole, "parts": parts})
    return lines


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    text, _, aside = row["decision"].partition(" (")
    return {
        "text": text,
        "aside": aside.removesuffix(")"),
        "threshold": f"{row['image']:.4g}",
        "bound": thresholds.percent(row["image_bound"]).replace(" ", "\N{NO-BREAK SPACE}"),
        "held_out": row["held_out"],
    }


def _further(run: Run, category: str) -> list[str]:
    rows = list(run.results.thresholds[category].items())[1:]
    return [f"seed {seed}: {row['decision']}" for seed, row in rows]


def _total(run: Run, rows: Mapping[str, Mapping[str, Any]]) -> str:
    flagged, labels = [], []
    for category, row in rows.items():
        images = run.results.images.get(category, [])
        flagged += [x["score"] > row["image"] for x in images]
        labels += [x["label"] == 1 for x in images]
    rates = {thresholds.at_rate(row) for row in rows.values()}
    rate = rates.pop() if len(rates) == 1 else "the rate of each category"
    return thresholds.decision(np.array(flagged, bool), np.array(labels, bool), rate)


def charts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Category and chart of image scores with the thresholds, of every category with images."""
    drawn = []
    for category in comparison.categories(runs):
        scores = []
        for run in runs:
            if images := run.results.images.get(category):
                row = run.row(category)
                at = row["image"] if row else None
                scores.append(figures.scores_of(images, at, run.colour))
        if scores:
            drawn.append((category, figures.score_chart(scores, name=category)))
    return drawn
