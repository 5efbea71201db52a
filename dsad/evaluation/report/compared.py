"""One page of a comparison: tables with paired differences, their charts, times, protocol."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes

from dsad.core import paths
from dsad.evaluation import compared
from dsad.evaluation.compared import NONE, commercial_words, shots_words, told
from dsad.evaluation.report import figures
from dsad.evaluation.report.page import metric_label, template

#: Parts of the time of an evaluation, in their order.
PARTS = ("features", "fit", "score", "metrics")


def write_compared(
    out_path: str | epath.PathLike, folder: str | epath.PathLike, *, title: str = "Comparison"
) -> epath.Path:
    """Write the page of a comparison, finished or not, and return its path.

    It links to the pages of evaluations that have one. Raises WorkdirError for files that are
    missing, or a page that cannot be written.
    """
    content = compared.read(folder)
    colours: dict[str, str] = {}
    for found in content["datasets"].values():
        for row in found["rows"]:
            unused = figures.COLOURS[len(colours) % len(figures.COLOURS)]
            colours.setdefault(row["backbone"], unused)
    page = template("compared").render(
        title=title,
        lead=_lead(content),
        left=content["left"],
        against="/".join(filter(None, content["baseline"].values())),
        seeds=_seeds(content),
        main=[(m, metric_label(m)) for m in content["main"]],
        datasets=[
            _dataset(name, found, content, colours, (out_path, folder))
            for name, found in content["datasets"].items()
        ],
        parts=PARTS,
        told=told,
        words=shots_words,
        may=commercial_words,
        label=metric_label,
    )
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def _seeds(content: Mapping[str, Any]) -> list[str]:
    rows = [row for found in content["datasets"].values() for row in found["rows"]]
    return list(dict.fromkeys(seed for row in rows for seed in row["seeds"]))


def _lead(content: Mapping[str, Any]) -> str:
    """What was compared, in words."""
    rows = [row for found in content["datasets"].values() for row in found["rows"]]
    counts = {
        "data set": len(content["datasets"]),
        "backbone": len({row["backbone"] for row in rows}),
        "detector": len({row["detector"] for row in rows}),
        "number of shots": len({row["shots"] for row in rows} - {NONE}),
        "seed": len(_seeds(content)),
    }
    if counts["number of shots"] < 2:
        del counts["number of shots"]
    plural = {"number of shots": "numbers of shots"}
    return " × ".join(
        f"{n} {plural.get(noun, f'{noun}s') if n > 1 else noun}" for noun, n in counts.items()
    )


def _dataset(
    name: str, found: Mapping[str, Any], content: Mapping[str, Any], colours: Mapping[str, str],
    places: tuple[str | epath.PathLike, str | epath.PathLike],
) -> dict[str, Any]:  # fmt: skip
    """A section of the page.

    ``rows`` are those of the numbers; of several numbers of shots ``beside`` has one for each
    backbone and detector, with its rows by shots.
    """
    main, several = content["main"], len([s for s in found["shots"] if s != NONE]) > 1
    rows = [
        {
            **row,
            "label": row["detector"]
            + (f", {shots_words(row['shots'])}" if several or row["shots"] == NONE else ""),
            "colour": colours[row["backbone"]],
            "licence": content["backbones"].get(row["backbone"]),
            "leads": [m for m, leaders in found["leads"].items() if number in leaders],
            "links": [(f, _link(f, places)) for f in row["folders"]],
            "total": sum(row["seconds"].values()),
        }
        for number, row in enumerate(found["rows"])
    ]
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows if several else []:
        first = {**row, "label": row["detector"], "by_shots": {}}
        pair = by_pair.setdefault((row["backbone"], row["detector"]), first)
        pair["by_shots"][row["shots"]] = row
    beside = list(by_pair.values())
    for group in (rows, beside):
        _spanned(group)
    charted = next((s for s in reversed(found["shots"]) if s != NONE), NONE)
    gaps = [row for row in rows if row["differences"] and row["shots"] == charted]
    charts = [_chart(name, gaps, m) for m in main] if gaps else []
    return {
        **found, "name": name, "rows": rows, "beside": beside, "charts": charts, "charted": charted
    }  # fmt: skip


def _spanned(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of a backbone are neighbours: the first one names it for all."""
    last = ""
    for row in rows:
        own = [r for r in rows if r["backbone"] == row["backbone"]]
        row["span"] = len(own) if row["backbone"] != last else 0
        last = row["backbone"]


def _link(folder: str, places: tuple[str | epath.PathLike, str | epath.PathLike]) -> str:
    """The page of an evaluation, as the page of the comparison links to it; empty without one."""
    page = paths.directory(places[1]) / folder / "report.html"
    if not page.exists() or paths.is_remote(page) or paths.is_remote(places[0]):
        return ""
    start = os.path.dirname(os.path.abspath(os.path.expanduser(places[0])))
    return epath.Path(os.path.relpath(page, start)).as_posix()


def _chart(name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Differences of all rows to the baseline: a dot for each seed, mean and deviation.

    The rows of a backbone stand below its name where there are several detectors.
    """
    several = len({row["detector"] for row in rows}) > 1
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for row, before in zip(rows, [None, *rows], strict=False):
        if several and (before is None or row["backbone"] != before["backbone"]):
            lines.append((row["backbone"], None))
        lines.append((row["detector"] if several else row["backbone"], row))

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=figures.INK, linewidth=0.8)
        for number, (_, row) in enumerate(lines):
            if row:
                _interval(axes, row["differences"][metric], -number, row["colour"])
        axes.set_yticks(-np.arange(len(lines), dtype=float), [_short(text) for text, _ in lines])
        for tick, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("normal" if row else "bold")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(lines) + 0.4, 0.6)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)

    height = 0.75 + 0.24 * len(lines)
    place = (0.36, 0.3 / height, 0.61, 1 - 0.6 / height)
    title = f"{metric_label(metric)}: difference"
    return figures.chart(draw, title, name=f"{name}-{metric}", size=(4.0, height), place=place)


def _interval(axes: Axes, gap: Mapping[str, Any], height: float, colour: str) -> None:
    """Mean and deviation of a difference, and below them that of every seed."""
    if gap["mean"] is None:
        return
    if gap["std"] is not None:
        ends = [gap["mean"] - gap["std"], gap["mean"] + gap["std"]]
        axes.plot(ends, [height, height], color=colour, linewidth=2.2)
        values = list(gap["values"].values())
        axes.scatter(
            values, [height - 0.3] * len(values), s=7, facecolor="none", edgecolor=colour,
            linewidth=0.7,
        )  # fmt: skip
    axes.scatter([gap["mean"]], [height], s=26, color=colour, zorder=3)


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
