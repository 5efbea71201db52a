"""What a report lays side by side: numbers with differences, pictures of the same images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.evaluation import thresholds
from dsad.evaluation.report import figures, gallery, panels
from dsad.evaluation.results import Results, shown

#: Pictures per section of what one of two runs does better.
GAINS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation of a report."""

    name: str
    results: Results
    colour: str


def categories(runs: Sequence[Run]) -> list[str]:
    """Every category that a run has, in the order of the first that has it."""
    return list(dict.fromkeys(c for run in runs for c in run.results.categories))


# --- numbers --------------------------------------------------------------------------------


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
            if spread and spread[i].get(m) is not None:
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


# --- pictures -------------------------------------------------------------------------------


def sections(
    runs: Sequence[Run], category: str, rows: int, side: int, *, metric: str = "pixel_auroc"
) -> list[dict[str, Any]]:
    """Headings with their cases, at most ``rows`` each, no image twice.

    Of two runs first what either does better by ``metric`` within the image, among the images
    that a run kept a picture of; then the sections of the first run that has the category.
    """
    found = [_Images.of(run, category) for run in runs]
    plan: list[tuple[str, list[str]]] = []
    if len(runs) == 2 and all(f.entries for f in found):
        plan += _gains(category, found, min(rows, GAINS), metric)
    owner = next((f for f in found if f.entries), None)
    if owner is None:  # no test image
        return []
    paths = list(owner.entries)
    ranked = any(entry["pixel_auroc"] is not None for entry in owner.entries.values())
    for section, heading in gallery.SECTIONS.items():
        numbers = owner.run.results.cases[category].get(section, [])[:rows]
        by = heading if ranked else heading.replace("pixel AUROC within the image", "score")
        plan.append((by, [paths[n] for n in numbers]))
    made, seen = [], set()
    for heading, wanted in plan:
        fresh = [p for p in wanted if p not in seen]
        seen.update(fresh)
        if fresh:
            cases = [_case(found, category, path, side) for path in fresh]
            made.append({"title": heading, "cases": cases})
    return made


@dataclasses.dataclass(frozen=True)
class _Images:
    """A run's test images of a category: entry and number by path."""

    run: Run
    entries: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, run: Run, category: str) -> "_Images":
        rows = run.results.images.get(category, [])
        return cls(run, {r["path"]: r for r in rows}, {r["path"]: i for i, r in enumerate(rows)})

    def pictured(self, category: str) -> list[str]:
        """Paths of the images that the run kept a picture of."""
        return [p for p in self.entries if self.array("image", category, p) is not None]

    def array(self, what: str, category: str, path: str) -> np.ndarray | None:
        number = self.numbers.get(path)
        return self.run.results.gallery.get(f"{what}/{category}/{number}")


def _gains(
    category: str, found: Sequence[_Images], count: int, metric: str
) -> list[tuple[str, list[str]]]:
    gain: dict[str, float] = {}
    for path in sorted({p for f in found for p in f.pictured(category)}):
        left, right = (f.entries.get(path, {}).get(metric) for f in found)
        if left is not None and right is not None:
            gain[path] = right - left
    order = sorted(gain, key=lambda p: (-gain[p], p))
    better = [p for p in order if gain[p] > 0][:count]
    worse = [p for p in reversed(order) if gain[p] < 0][:count]
    a, b = (f.run.name for f in found)
    text = "{} localizes better than {}: largest gain of pixel AUROC within the image"
    return [(text.format(b, a), better), (text.format(a, b), worse)]


def _case(found: Sequence[_Images], category: str, path: str, side: int) -> dict[str, Any]:
    """Pictures and caption of one test image: image, mask, every run's map in its own units."""
    stored = next(x for f in found if (x := f.array("image", category, path)) is not None)
    picture = PIL.Image.fromarray(stored)
    ratio = side / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    image = np.asarray(picture.resize(size, PIL.Image.Resampling.LANCZOS))
    mask = next((x for f in found if (x := f.array("mask", category, path)) is not None), None)
    if mask is not None:
        mask = np.asarray(PIL.Image.fromarray(mask).resize(size, PIL.Image.Resampling.NEAREST))
    pictures = [("Image", figures.data_uri(image))]
    several = len(found) > 1
    defect = mask is not None and bool(mask.any())
    if defect or several:  # in a comparison the columns stay the same from row to row
        label = "Annotated defect" if defect else "No annotated defect"
        pictures.append((label, figures.data_uri(figures.outline(image, mask))))
    facts = []
    for images in found:
        units = images.array("map", category, path)
        if units is None:
            continue
        drawn = figures.outline(figures.heat(units, size), mask)
        whose = f"{images.run.name}: " if several else ""
        pictures.append((f"{whose}heat map", figures.data_uri(drawn)))
        if not several:
            pictures.append(("overlay", figures.data_uri(figures.overlay(image, units))))
        facts.append({"run": images.run, **images.entries[path]})
    entry = next(f.entries[path] for f in found if path in f.entries)
    further = [row for images in found if (row := _panels(images, category, path, size, several))]
    return {"entry": entry, "facts": facts, "pictures": pictures, "panels": further}


def _panels(
    images: _Images, category: str, path: str, size: tuple[int, int], several: bool
) -> list[tuple[str, str]]:
    """Labels and pictures of what a run's own detector shows of an image, if it was a case."""
    row = []
    for name in panels.names(images.run.results.gallery):
        values = images.array(f"panel/{name}", category, path)
        if values is not None:
            whose = f"{images.run.name}: " if several else ""
            row.append((f"{whose}{name}", figures.data_uri(figures.scaled(values, size))))
    return row
