"""A comparison of many evaluations: rows of backbones and detectors, and their files."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.evaluation import paired, stamp
from dsad.evaluation.paired import Spread
from dsad.evaluation.results import Results, read_numbers
from dsad.evaluation.stamp import plain
from dsad.models.weights.licences import Licence

#: Everything that was compared, and the same numbers as a table of one line each.
FILE, TABLE = "comparison.json", "comparison.csv"
#: What may differ between the evaluations of one table: backbones and detectors are compared, with
#: how a detector's maps come about; of several seeds each may have an evaluation of its own.
COMPARED = (
    *stamp.IGNORED, "detector", "layers", "image_score", "smoothing", "upsampling",
    "map_wrappers", "support.seeds", "support.sha256",
    # Numbers of shots are told apart by the table, and so is who is fitted on test images.
    "support.shots", "support.rule", "support.contamination.images", "support.untested",
)  # fmt: skip
#: Of a stamp what tells rows apart, for people.
SHOWN = ("backbone.arch", "backbone.weights", "map_wrappers", "layers")

#: Training images of each category: a number, all of them, or none, where a detector is fitted on
#: the test images.
Shots = int | Literal["all", "none"]
ALL, NONE = "all", "none"


class Baseline(NamedTuple):
    """What differences are taken against; an empty name is that of the row itself."""

    backbone: str = ""
    detector: str = ""

    def of(self, backbone: str, detector: str) -> tuple[str, str] | None:
        """The row to compare with, None for a baseline itself or without any."""
        against = (self.backbone or backbone, self.detector or detector)
        return None if against == (backbone, detector) else against

    def __str__(self) -> str:
        return "/".join(filter(None, self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The numbers of a finished evaluation, which lies in ``folder`` below the comparison's.

    ``seeds[s]`` are its numbers, see ``Results.seeds``; ``seconds`` add up its categories.
    """

    dataset: str
    backbone: str
    detector: str
    shots: Shots
    folder: str
    stamp: Mapping[str, Any]
    seeds: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    defects: str = ""

    @property
    def row(self) -> tuple[str, str, Shots]:
        """Which row of its data set's numbers it is of."""
        return self.backbone, self.detector, self.shots

    def mean(self, metric: str) -> dict[str, float | None]:
        """A number by seed, over the categories."""
        return {seed: found["mean"][metric] for seed, found in self.seeds.items()}


def read_measured(workdir: epath.Path, folder: str, **names: Any) -> Measured:
    """The evaluation in a folder; ``names`` are its place: data set, backbone and so on.

    Raises WorkdirError for one that is not finished.
    """
    found = read_numbers(workdir / folder, ("stamp", "categories", "seeds"))
    seconds: dict[str, float] = {}
    for about in found["categories"].values():
        for part, value in about.get("seconds", {}).items():
            seconds[part] = seconds.get(part, 0.0) + value
    seeds = {
        seed: {
            "mean": numbers["mean"],
            "categories": {
                c: {m: row[m] for m in numbers["mean"]} for c, row in numbers["categories"].items()
            },
        }
        for seed, numbers in found["seeds"].items()
    }
    about = Results(stamp=found["stamp"]).about_defects
    return Measured(
        folder=folder, stamp=found["stamp"], seeds=seeds, seconds=seconds, defects=about, **names
    )


def differing(first: str, one: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> list[str]:
    """Why the numbers of two stamps of a data set must not stand in one table, a line each."""
    return [f"{first} / {name}: {line}" for line in stamp.differences(one, other, COMPARED)]


def summary(
    cells: Sequence[Measured], baseline: Baseline, main: Sequence[str], left: Sequence[str] = (),
    licences: Mapping[str, Licence] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """What ``comparison.json`` holds: JSON types only.

    Args:
      cells: those that are finished.
      baseline: of the paired differences.
      main: the numbers that lead the tables.
      left: titles of those that are not finished.
      licences: of the backbones' weights, by name.

    Returns:
      ``datasets[d]`` has ``categories``, ``shots``, ``rows``, ``leads`` (by metric the numbers of
      the rows that lead those of as many shots, see ``paired.leader``), ``common`` and ``notices``.
      A row, of a backbone, a detector and ``shots``, has ``numbers[metric]`` over the categories,
      ``categories[c][metric]``, and ``differences[metric]`` to the row ``against`` of as many
      shots; each of these holds mean, std and values by seed. ``backbones[b]`` has the ``licence``
      of its weights and whether ``commercial`` use is allowed, ``cells`` holds every number.

    """
    by_set: dict[str, list[Measured]] = {}
    for cell in cells:
        by_set.setdefault(cell.dataset, []).append(cell)
    return plain(
        {
            "complete": not left,
            "left": list(left),
            "baseline": baseline._asdict(),
            "main": list(main),
            "backbones": {name: found._asdict() for name, found in licences.items()},
            "datasets": {name: _of_dataset(own, baseline) for name, own in by_set.items()},
            "cells": [
                {n: v for n, v in vars(cell).items() if n not in ("stamp", "defects")}
                for cell in cells
            ],
        }
    )


#: Backbone, detector and shots.
_Key = tuple[str, str, Shots]


def _of_dataset(cells: Sequence[Measured], baseline: Baseline) -> dict[str, Any]:
    rows: dict[_Key, list[Measured]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(cell)
    metrics = list(next(iter(cells[0].seeds.values()))["mean"])
    first, *others = cells
    values = {
        row: {m: _joined(own, lambda c, m=m: c.mean(m)) for m in metrics}
        for row, own in rows.items()
    }
    every = {row[2] for row in rows}
    shots = [*sorted(s for s in every if isinstance(s, int)), *(s for s in _WORDS if s in every)]
    return {
        "metrics": metrics,
        "categories": first.stamp["categories"],
        "defects": first.defects,
        "shots": shots,
        "rows": [_row(own, values, baseline) for own in rows.values()],
        "leads": {m: [row for s in shots for row in _leaders(values, s, m)] for m in metrics},
        "common": _common([cell.stamp for cell in cells]),
        "notices": [
            line
            for cell in others
            for line in differing(first.folder, first.stamp, cell.folder, cell.stamp)
        ],
    }


def _leaders(
    values: Mapping[_Key, Mapping[str, paired.BySeed]], shots: Shots, metric: str
) -> list[int]:
    """The row that leads those of as many shots, if one does."""
    alike = [number for number, row in enumerate(values) if row[2] == shots]
    best = paired.leader([own[metric] for row, own in values.items() if row[2] == shots])
    return [] if best is None else [alike[best]]


def _row(
    cells: Sequence[Measured],
    values: Mapping[_Key, Mapping[str, paired.BySeed]],
    baseline: Baseline,
) -> dict[str, Any]:
    row = cells[0].row
    metrics, against = values[row], baseline.of(*row[:2])
    known = (*against, row[2]) if against and (*against, row[2]) in values else None
    flat = stamp.flat(cells[0].stamp)

    def of_category(category: str, metric: str) -> Spread:
        return paired.spread(
            _joined(
                cells,
                lambda cell: {s: x["categories"][category][metric] for s, x in cell.seeds.items()},
            )
        )

    seconds = [cell.seconds for cell in cells]
    return {
        "backbone": row[0],
        "detector": row[1],
        "shots": row[2],
        "seeds": list(next(iter(metrics.values()))),
        "numbers": {m: _told(paired.spread(by_seed)) for m, by_seed in metrics.items()},
        "categories": {
            c: {m: _told(of_category(c, m)) for m in metrics} for c in cells[0].stamp["categories"]
        },
        "against": "/".join(known[:2]) if known else "",
        "baseline": against is None and baseline != Baseline(),
        "differences": {
            m: _told(paired.difference(by_seed, values[known][m])) for m, by_seed in metrics.items()
        } if known else {},
        "seconds": {p: sum(s.get(p, 0.0) for s in seconds) for p in seconds[0]},
        "folders": [cell.folder for cell in cells],
        "about": {n: flat[n] for n in SHOWN if n in flat},
    }  # fmt: skip


def _joined(cells: Iterable[Measured], of: Any) -> dict[str, float | None]:
    return {seed: value for cell in cells for seed, value in of(cell).items()}


def _told(spread: Spread) -> dict[str, Any]:
    return spread._asdict()


def _common(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all stamps have alike, on one level."""
    first, *others = (stamp.flat(s) for s in stamps)
    absent = object()
    return {n: v for n, v in first.items() if all(o.get(n, absent) == v for o in others)}


def told(spread: Mapping[str, Any], form: str = ".3f") -> str:
    """``0.512 ± 0.003``, no deviation of one value or of equal ones, a dash where nothing is."""
    if spread["mean"] is None:
        return "–"
    std = f" ± {spread['std']:.3f}" if spread["std"] else ""
    mean = f"{spread['mean']:{form}}"
    if float(mean) == 0:  # a sign would claim more than the digits show
        mean = mean.lstrip("+-")
    return f"{mean}{std}".replace("-", "−")


#: Words of ``Shots``, in the order of columns.
_WORDS = {ALL: "all images", NONE: "0-shot"}


def shots_words(shots: Shots) -> str:
    """``4-shot``; of all training images, and of none, likewise."""
    return f"{shots}-shot" if isinstance(shots, int) else _WORDS[shots]


def commercial_words(commercial: bool | None) -> str:
    """Whether weights may be used commercially."""
    return "not known" if commercial is None else "allowed" if commercial else "not allowed"


def write(workdir: epath.Path, content: Mapping[str, Any]) -> None:
    """Write both files of a comparison; a reader never sees half of one."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    paths.write_whole(workdir / TABLE, _lines(content["cells"]))
    paths.write_whole(workdir / FILE, text)


_PLACE = ("dataset", "backbone", "detector", "shots", "folder")


def _lines(cells: Sequence[Mapping[str, Any]]) -> str:
    """Every number: a line for each cell, seed and category, and for the mean over these."""
    names: dict[str, None] = {}
    for cell in cells:
        for found in cell["seeds"].values():
            names |= dict.fromkeys(found["mean"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_PLACE, "seed", "category", *names])
    for cell in cells:
        place = [cell[n] for n in _PLACE]
        for seed, found in cell["seeds"].items():
            for category, row in {**found["categories"], "(mean)": found["mean"]}.items():
                values = [row.get(n) for n in names]
                writer.writerow([*place, seed, category, *("" if v is None else v for v in values)])
    return out.getvalue()


def read(workdir: str | epath.PathLike) -> dict[str, Any]:
    """What ``comparison.json`` of a directory holds; WorkdirError without a readable one."""
    path = paths.directory(workdir) / FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise WorkdirError(
            f"{path}: no such file; no evaluation of this comparison is finished. Give the same "
            "dsad compare command again."
        ) from None
    except ValueError as error:
        raise WorkdirError(
            f"{path}: not valid JSON ({error}). Run `dsad compare` again."
        ) from error
    if "backbones" not in content:
        raise WorkdirError(
            f"{path}: written by an older dsad. The same dsad compare command writes it anew, from "
            "the evaluations that are finished."
        )
    return content
