"""Pictures of the report: charts as inline SVG that follow the page's theme, and heat maps."""

import base64
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy import ndimage

from dsad.evaluation.report import gallery

#: Line colours of the runs, legible on light and on dark ground.
COLOURS = ("#2f7de1", "#e8743b", "#12a47a", "#a45ee5", "#d2497a", "#8a8f2a")
#: The top of the heat scale, in units of ``gallery.to_units``.
TOP = 2.0
#: Colours of the contour at the threshold and of the line around an annotated defect: far from
#: every colour of the heat scale.
OUTLINE, ANNOTATED = (0, 229, 255), (70, 235, 60)
#: Scores on the wrong side of their threshold.
WRONG = "#e0314b"

INK, _GRID = "#010203", "#040506"  # replaced by the page's colours
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def chart(
    draw: Callable[[Axes], None],
    title: str,
    *,
    name: str,
    size: tuple[float, float] = (3.1, 2.35),
    place: tuple[float, float, float, float] = (0.16, 0.19, 0.81, 0.69),
    titled: bool = True,
) -> str:
    """Inline SVG of what ``draw(axes)`` draws; ``name`` makes ids unique within the page.

    ``place`` is that of the axes (left, bottom, width, height) in shares of ``size``; the title is
    always read aloud.
    """
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        figure.patch.set_alpha(0)
        axes = figure.add_axes(place, facecolor="none")
        draw(axes)
        if titled:
            axes.set_title(title)
        packed = io.StringIO()
        # savefig would draw everything a second time to measure it.
        FigureCanvasSVG(figure).print_svg(packed, metadata={"Date": None})
    return _inline(packed.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """The bare <svg> element: no prologue, metadata, name spaces, fixed size or colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    label = re.sub(r'[<>&"]', " ", title)
    head = f'<svg class="chart" role="img" aria-label="{label}" {box.group() if box else ""}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = re.sub(
        r"font:( \d+)?( bold)? ([\d.]+)px [^;\"]*", r"font-size: \3px; font-weight:\1\2", svg
    )
    svg = re.sub(r"font-weight:(?=[;\"])", "font-weight: normal", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return re.sub(r"\n\s*", " ", svg.replace(_GRID, "var(--grid)"))


def curve_charts(
    curves: Sequence[Mapping[str, np.ndarray]], fpr_limit: float, *, name: str
) -> list[str]:
    """Pixel ROC, precision-recall and PRO charts; one mapping ("roc/fpr" etc.) per run."""

    def lines(axes: Axes, x: str, y: str, labels: tuple[str, str]) -> None:
        for i, run in enumerate(curves):
            if x in run:
                axes.plot(run[x], run[y], color=COLOURS[i % len(COLOURS)])
        axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1.02))

    def roc(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1)
        lines(axes, "roc/fpr", "roc/tpr", ("false-positive rate", "true-positive rate"))
        axes.set_xlim(-0.01, 1)

    def recall(axes: Axes) -> None:
        lines(axes, "pr/recall", "pr/precision", ("recall", "precision"))
        axes.set_xlim(0, 1.01)

    def overlap(axes: Axes) -> None:
        axes.axvspan(0, fpr_limit, color=COLOURS[0], alpha=0.09, linewidth=0)
        axes.axvline(fpr_limit, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1)
        lines(axes, "pro/fpr", "pro/pro", ("false-positive rate", "mean region overlap"))
        axes.set_xlim(0, min(1.0, fpr_limit * 1.15))
        axes.locator_params(axis="x", nbins=5)

    return [
        chart(roc, "Pixel ROC", name=f"{name}-roc"),
        chart(recall, "Pixel precision and recall", name=f"{name}-pr"),
        chart(overlap, f"Region overlap up to FPR {fpr_limit:g}", name=f"{name}-pro"),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Image scores (n,) of a run for its chart, by the name of their row.

    Those of the row ``filled`` have filled dots; those in ``wrong`` (n,) bool, by row, are red.
    """

    rows: Mapping[str, np.ndarray]
    filled: str
    threshold: float | None
    colour: str
    wrong: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    unit: float = 1.0


def scores_of(images: Sequence[Mapping[str, Any]], threshold: float | None, colour: str) -> Scores:
    """Of test images, good and defective ones."""
    rows = {
        name: np.array([x["score"] for x in images if x["label"] == label])
        for label, name in enumerate(("good", "defective"))
    }
    wrong = {}
    if threshold is not None:
        wrong = {"good": rows["good"] > threshold, "defective": rows["defective"] <= threshold}
    middle = abs(float(np.median(rows["good"]))) if rows["good"].size else 0.0
    return Scores(
        rows=rows, filled="defective", threshold=threshold, colour=colour, wrong=wrong,
        unit=middle or 1.0,
    )  # fmt: skip


def score_chart(runs: Sequence[Scores], *, name: str) -> str:
    """Image scores of every run, a row each for good and defective images, and its threshold.

    Several runs are each divided by their unit.
    """
    several, lines = len(runs) > 1, sum(len(run.rows) for run in runs)

    def draw(axes: Axes) -> None:
        ticks: list[tuple[float, str]] = []
        for i, run in enumerate(runs):
            unit, top = (run.unit if several else 1.0), -0.4 * i - len(ticks)
            for row, scores in run.rows.items():
                height = -0.4 * i - len(ticks)
                ticks.append((height, row))
                _strip(axes, run, row, scores / unit, height)
            if run.threshold is not None:
                at = run.threshold / unit
                axes.plot([at, at], [height - 0.45, top + 0.45], color=INK, linewidth=1,
                          linestyle=(0, (4, 2)))  # fmt: skip
                if not several:
                    low, high = axes.get_xlim()
                    side = ("left", "center", "right")[int(2.99 * (at - low) / (high - low))]
                    axes.annotate(f"threshold {run.threshold:.4g}", (at, top + 0.5), ha=side)
        axes.set_yticks([t[0] for t in ticks], [t[1] for t in ticks])
        axes.grid(visible=False, axis="y")
        axes.set_ylim(ticks[-1][0] - 0.5, 0.5)
        axes.set_xlabel("score ÷ median of good images" if several else "image score")

    height = 0.72 + 0.36 * lines + 0.14 * len(runs)
    place = (0.16, 0.42 / height, 0.81, 1 - 0.68 / height)
    return chart(draw, _told(runs), name=f"{name}-scores", size=(4.4, height), place=place,
                 titled=False)  # fmt: skip


def _strip(axes: Axes, run: Scores, row: str, values: np.ndarray, height: float) -> None:
    """One row of dots."""
    # A fixed spread, so that the same results give the same file.
    spread = (np.arange(values.size) * 0.618034 % 1 - 0.5) * 0.6
    wrong = run.wrong.get(row, np.zeros(values.size, bool))
    for part, colour in ((~wrong, run.colour), (wrong, WRONG)):
        face = colour if row == run.filled else "none"
        axes.scatter(
            values[part], (height + spread)[part], s=9, facecolor=face, edgecolor=colour,
            linewidth=0.7, alpha=0.8,
        )  # fmt: skip


def _told(runs: Sequence[Scores]) -> str:
    """What a chart of scores shows, in words."""
    parts = []
    for run in runs:
        rows = [f"{s.size} {row} images from {s.min():.4g} to {s.max():.4g}"
                for row, s in run.rows.items() if s.size]  # fmt: skip
        at = "" if run.threshold is None else f", threshold {run.threshold:.4g}"
        parts.append(", ".join(rows) + at)
    return "Image scores: " + "; ".join(parts)


def series_chart(x: np.ndarray, y: np.ndarray, title: str, *, name: str) -> str:
    """One quantity over training steps: thin raw line, and its running mean where it is long."""

    def draw(axes: Axes) -> None:
        smooth = len(y) >= 60
        axes.plot(x, y, color=COLOURS[0], linewidth=0.8 if smooth else 1.5,
                  alpha=0.35 if smooth else 1)  # fmt: skip
        if smooth:
            mean = ndimage.uniform_filter1d(y, max(5, len(y) // 25), mode="nearest")
            axes.plot(x, mean, color=COLOURS[0])
        axes.set_xlabel("step")
        axes.margins(x=0.01)

    return chart(draw, title, name=name)


def heat(units: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Map in normal units (h, w) as colours uint8 of ``size`` (width, height)."""
    return _colours(np.clip(_resized(units, size) / TOP, 0, 1))


def overlay(image: np.ndarray, units: np.ndarray, level: float | None = None) -> np.ndarray:
    """The heat colours over a picture (h, w, 3), more opaque where the map is higher.

    With the contour around where the map is above ``level``, in its units.
    """
    wide = _resized(units, (image.shape[1], image.shape[0]))
    heat = np.clip(wide / TOP, 0, 1)
    alpha = (0.65 * np.clip(heat * 1.4, 0, 1))[..., None]
    mixed = np.round(image * (1 - alpha) + _colours(heat) * alpha).astype(np.uint8)
    return mixed if level is None else outline(mixed, wide > level)


def scaled(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Levels (h, w) uint8 as colours, or pixels (h, w, 3) as they are, of ``size``."""
    picture = np.asarray(PIL.Image.fromarray(levels).resize(size, PIL.Image.Resampling.BICUBIC))
    return _colours(picture / 255) if picture.ndim == 2 else picture


def _resized(units: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = PIL.Image.fromarray(np.asarray(units, np.float32))
    return np.asarray(picture.resize(size, PIL.Image.Resampling.BICUBIC))


def _colours(level: np.ndarray) -> np.ndarray:
    table = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    return table[np.round(level * 255).astype(np.uint8)]


def gradient() -> str:
    """The heat scale as a CSS gradient."""
    at = np.linspace(0, 1, 9)
    stops = ["#{:02x}{:02x}{:02x}".format(*c) for c in _colours(at)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def outline(
    image: np.ndarray, mask: np.ndarray | None, colour: tuple[int, int, int] = OUTLINE
) -> np.ndarray:
    """A copy of a picture (h, w, 3) with a line just outside the mask (h, w).

    Where the picture cuts the mask off the line is on its edge. It is two pixels wide, or more on
    a picture that is shown much smaller than it is.
    """
    if mask is None or not mask.any():
        return image
    width = max(2, round(max(mask.shape) / 250))
    inner, outer = (_widened(mask, by) for by in (1, 1 + width))
    edge = np.ones_like(mask)
    edge[width:-width, width:-width] = False
    drawn = image.copy()
    drawn[(outer & ~inner) | (mask & edge)] = colour
    return drawn


def _widened(mask: np.ndarray, by: int) -> np.ndarray:
    return ndimage.maximum_filter(mask.astype(np.uint8), 2 * by + 1, mode="constant") > 0


def data_uri(image: np.ndarray | bytes, quality: int = 84) -> str:
    """A picture (h, w, 3) uint8, or the bytes of a JPEG, as a JPEG data URI."""
    packed = image if isinstance(image, bytes) else gallery.jpeg(image, quality)
    return "data:image/jpeg;base64," + base64.b64encode(packed).decode()
