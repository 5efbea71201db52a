"""One page of the probes by labels: what both reach, class by class, and what is taken for what."""

from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes

from dsad.core import paths
from dsad.evaluation import label_results, stamp
from dsad.evaluation.label_results import ALL, PROBES, LabelResults
from dsad.evaluation.report import figures
from dsad.evaluation.report.page import template
from dsad.evaluation.results import shown

#: Rows of the chart and of the lists: the worst classes and the largest confusions.
ROWS = 30


def write_probed(
    out_path: str | epath.PathLike, folder: str | epath.PathLike, *, title: str = ""
) -> epath.Path:
    """Write the page of finished probes by labels and return its path.

    Without a ``title`` it has the name of the evaluation. Nothing in it refers to another file.
    Raises WorkdirError for files that are missing, or a page that cannot be written.
    """
    results = label_results.read(folder)
    worst = sorted(
        (name for name, row in results.classes.items() if row["test"]),
        key=lambda name: (results.classes[name]["linear"], results.classes[name]["knn"], name),
    )
    page = template("probed").render(
        title=title or results.stamp["name"],
        results=results,
        verdict=_verdict(results),
        rows=_rows(results),
        probes=list(zip(PROBES.values(), figures.COLOURS, strict=False)),
        worst=worst[:ROWS],
        bars=_bars(results, worst[:ROWS]),
        matrix=_matrix(results) if len(results.classes) <= ALL else "",
        confusions=results.confusions["linear"][:ROWS],
        cards=_cards(results),
        stamp=stamp.flat(results.stamp),
        shown=shown,
    )
    return paths.write_whole(out_path, page, "Give another --out=FILE.")


def _verdict(results: LabelResults) -> str:
    """The shares of both probes, in words."""
    mean = results.mean
    parts = [f"{title} {mean[f'{name}_top1']:.1%}" for name, title in PROBES.items()]
    return f"{', '.join(parts)}; chance {mean['chance_top1']:.1%}"


def _rows(results: LabelResults) -> list[tuple[str, list[str]]]:
    """The table: titles with a cell for each number of best classes."""
    rows = []
    for name, title in {**PROBES, "chance": "chance: the most frequent classes"}.items():
        keys = [f"{name}_top{best}" for best in results.tops]
        spread = [f" ± {results.std[key]:.3f}" if results.std else "" for key in keys]
        cells = [f"{results.mean[k]:.3f}{s}" for k, s in zip(keys, spread, strict=True)]
        rows.append((title, cells))
    return rows


def _bars(results: LabelResults, names: list[str]) -> str:
    """Shares of the classes ``names`` from the top, a bar for each probe."""

    def draw(axes: Axes) -> None:
        places = -np.arange(len(names), dtype=float)
        for i, (probe, title) in enumerate(PROBES.items()):
            values = [results.classes[name][probe] for name in names]
            offset = 0.2 - 0.4 * i
            axes.barh(places + offset, values, 0.38, color=figures.COLOURS[i], label=title)
        axes.set_yticks(places, [_short(name) for name in names])
        axes.set(xlim=(0, 1), xlabel="share that is named rightly")
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.grid(visible=False, axis="y")
        axes.axvline(results.mean["chance_top1"], color=figures.WRONG, linewidth=0.9)

    height = 0.7 + 0.24 * len(names)
    place = (0.27, 0.45 / height, 0.68, 1 - 0.55 / height)
    title = "Shares of test images by class that each probe names rightly"
    return figures.chart(draw, title, name="classes", size=(4.4, height), place=place, titled=False)


def _matrix(results: LabelResults) -> str:
    """Test images of each class (a row) by the class that the linear probe names."""
    names = list(results.classes)
    number = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for true, named, count in results.confusions["linear"]:
        counts[number[true], number[named]] = count
    for i, row in enumerate(results.classes.values()):
        counts[i, i] = row["test"] - counts[i].sum()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 12

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        step = max(1, -(-len(names) // 25))
        at = np.arange(0, len(names), step)
        axes.set_xticks(at, [_short(names[i]) for i in at], rotation=90)
        axes.set_yticks(at, [_short(names[i]) for i in at])
        axes.grid(visible=False)
        axes.set(xlabel="named class", ylabel="class")
        if few:
            for i, j in np.argwhere(counts > 0):
                # In the colours of the scale, not of the page, which may be dark.
                ink = "white" if shares[i, j] > 0.5 else "#10264a"
                axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=ink)

    return figures.chart(
        draw, "Confusions of the linear probe", name="confusions", size=(4.4, 4.2),
        place=(0.26, 0.26, 0.7, 0.7), titled=False,
    )  # fmt: skip


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _cards(results: LabelResults) -> list[dict[str, Any]]:
    """Pictures of mistakes with what they are."""
    return [
        {
            **row, 
            "uri": figures.data_uri(results.pictures[str(number)].tobytes()),
        }
        for number, row in enumerate(results.mistakes)
    ]  # fmt: skip
