"""Numbers of several seeds: collected as they come, then mean and sample standard deviation."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core.config import listed
from dsad.evaluation import paired
from dsad.evaluation.results import Results


def collect(
    made: Results,
    category: str,
    seed: int,
    row: Mapping[str, float | None],
    kinds: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Add the numbers of one category and seed; times add up, equal notes are one."""
    found = made.seeds.setdefault(str(seed), {"categories": {}, "kinds": {}, "mean": {}})
    found["categories"][category] = dict(row)
    found["kinds"][category] = {k: dict(v) for k, v in kinds.items()}
    about = made.categories[category]
    total = about.setdefault("seconds", {})
    for part, value in seconds.items():
        total[part] = round(total.get(part, 0.0) + value, 3)
    if notes:
        about["notes"] = list(dict.fromkeys([*about.get("notes", []), *notes]))


def repeat(made: Results, group: Sequence[str], title: str, seed: int, again: int) -> None:
    """Give the seed ``again`` what ``seed`` measured of one detector's categories.

    ``measured_once[seed]`` of a category lists those that were given its numbers.
    """
    states = made.stamp["detector_state"][title]
    states[str(again)] = states[str(seed)]
    found = made.seeds.setdefault(str(again), {"categories": {}, "kinds": {}, "mean": {}})
    for category in group:
        for part in ("categories", "kinds"):
            found[part][category] = copy.deepcopy(made.seeds[str(seed)][part][category])
        if category in made.thresholds:
            rows = made.thresholds[category]
            rows[str(again)] = copy.deepcopy(rows[str(seed)])
        about = made.categories[category]
        about.setdefault("measured_once", {}).setdefault(str(seed), []).append(again)


def conclude(made: Results, names: Sequence[str]) -> None:
    """Fill ``categories``, ``kinds`` and ``mean`` with means over seeds, and ``std``.

    A mean over categories is over those in which every seed defines the number.
    """
    every = list(made.seeds.values())
    for m in names:
        rows = {c: [s["categories"][c][m] for s in every] for c in made.categories}
        defined = [c for c, values in rows.items() if None not in values]
        for seed in every:
            values = [seed["categories"][c][m] for c in defined]
            seed["mean"][m] = float(np.mean(values)) if values else None
        if len(defined) < len(rows):
            made.mean_over[m] = len(defined)
    for category, about in made.categories.items():
        numbers = _mean([s["categories"][category] for s in every], names)
        said = [
            f"seeds {listed([seed, *others])} fit on the same images and nothing is drawn: "
            "measured once"
            for seed, others in about.get("measured_once", {}).items()
        ]
        if said:
            about = {**about, "notes": [*about.get("notes", ()), *said]}
        made.categories[category] = {**numbers, **about}
        made.kinds[category] = {}
        for kind, first in every[0]["kinds"][category].items():
            rows = [s["kinds"][category][kind] for s in every]
            made.kinds[category][kind] = {**first, **_mean(rows, names)}
    for found in every:
        del found["kinds"]
    made.mean.update(_mean([s["mean"] for s in every], names))
    if len(every) > 1:
        made.std["mean"] = _std([s["mean"] for s in every], names)
        made.std["categories"] = {
            c: _std([s["categories"][c] for s in every], names) for c in made.categories
        }


def _mean(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per metric; None where a seed does not define it. One row is returned as it is.

    The largest ``error_bound`` of counted numbers holds for their mean as well.
    """
    bounds = [row["error_bound"] for row in rows if "error_bound" in row]
    bound = {"error_bound": max(bounds)} if bounds else {}
    if len(rows) == 1:
        return {m: rows[0][m] for m in names} | bound
    columns = {m: [row[m] for row in rows] for m in names}
    return {m: None if None in v else float(np.mean(v)) for m, v in columns.items()} | bound


def _std(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Sample standard deviation, as of ``paired.spread``; None as for ``_mean``."""
    columns = {m: {str(i): row[m] for i, row in enumerate(rows)} for m in names}
    return {m: paired.spread(values).std for m, values in columns.items()}
