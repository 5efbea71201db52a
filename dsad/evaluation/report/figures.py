"""Pictures of the report: charts as inline SVG that follow the page's theme, and heat maps."""

import base64
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

#: Line colours of the runs, legible on light and on dark ground.
COLOURS = ("#2f7de1", "#e8743b", "#12a47a", "#a45ee5", "#d2497a", "#8a8f2a")
#: The top of the heat scale, in units of ``gallery.to_units``.
TOP = 2.0
#: Colour of defect outlines: far from every colour of the heat scale.
OUTLINE = (0, 229, 255)

_INK, _GRID = "#010203", "#040506"  # replaced by the page's colours
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
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
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def chart(draw: Callable[[Axes], None], title: str, *, name: str, left: float = 0.16) -> str:
    """Inline SVG of what ``draw(axes)`` draws; ``name`` makes ids unique within the page.

    ``left`` is the share of the width in front of the axes.
    """
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.1, 2.35))
        figure.patch.set_alpha(0)
        axes = figure.add_axes((left, 0.19, 0.97 - left, 0.69), facecolor="none")
        draw(axes)
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
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
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
        axes.axvline(fpr_limit, color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1)
        lines(axes, "pro/fpr", "pro/pro", ("false-positive rate", "mean region overlap"))
        axes.set_xlim(0, min(1.0, fpr_limit * 1.15))
        axes.locator_params(axis="x", nbins=5)

    return [
        chart(roc, "Pixel ROC", name=f"{name}-roc"),
        chart(recall, "Pixel precision and recall", name=f"{name}-pr"),
        chart(overlap, f"Region overlap up to FPR {fpr_limit:g}", name=f"{name}-pro"),
    ]


def score_chart(runs: Sequence[Sequence[Mapping[str, Any]]], *, name: str) -> str:
    """Image scores of normal and anomalous test images, one pair of rows per run.

    Every run is divided by the median of its normal scores.
    """

    def draw(axes: Axes) -> None:
        ticks = []
        for i, images in enumerate(runs):
            normal = np.array([x["score"] for x in images if x["label"] == 0])
            middle = float(np.median(normal)) if normal.size else 0.0
            unit = abs(middle) or 1.0
            for label in (0, 1):
                values = np.array([x["score"] for x in images if x["label"] == label]) / unit
                height = -(2.4 * i + label)
                ticks.append((height, ("normal", "anomalous")[label]))
                # A fixed spread, so that the same results give the same file.
                spread = (np.arange(values.size) * 0.618034 % 1 - 0.5) * 0.55
                colour = COLOURS[i % len(COLOURS)]
                face = colour if label else "none"
                axes.scatter(
                    values, height + spread, s=9, facecolor=face, edgecolor=colour,
                    linewidth=0.7, alpha=0.75,
                )  # fmt: skip
        axes.set_yticks([t[0] for t in ticks], [t[1] for t in ticks])
        axes.grid(visible=False, axis="y")
        axes.set_ylim(ticks[-1][0] - 0.6, 0.6)
        axes.set_xlabel("score ÷ median of normal images")

    return chart(draw, "Image scores", name=f"{name}-scores", left=0.24)


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
    return _colours(_level(units, size))


def overlay(image: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The heat colours over a picture (h, w, 3), more opaque where the map is higher."""
    level = _level(units, (image.shape[1], image.shape[0]))
    alpha = (0.85 * np.clip(level * 1.4, 0, 1))[..., None]
    mixed = image * (1 - alpha) + _colours(level) * alpha
    return np.round(mixed).astype(np.uint8)


def scaled(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Levels (h, w) uint8 as colours, or pixels (h, w, 3) as they are, of ``size``."""
    picture = np.asarray(PIL.Image.fromarray(levels).resize(size, PIL.Image.Resampling.BICUBIC))
    return _colours(picture / 255) if picture.ndim == 2 else picture


def _level(units: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = PIL.Image.fromarray(np.asarray(units, np.float32))
    wide = np.asarray(picture.resize(size, PIL.Image.Resampling.BICUBIC))
    return np.clip(wide / TOP, 0, 1)


def _colours(level: np.ndarray) -> np.ndarray:
    table = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    return table[np.round(level * 255).astype(np.uint8)]


def gradient() -> str:
    """The heat scale as a CSS gradient."""
    at = np.linspace(0, 1, 9)
    stops = ["#{:02x}{:02x}{:02x}".format(*c) for c in _colours(at)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def outline(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A copy of a picture (h, w, 3) with a line two pixels wide just outside the mask (h, w)."""
    if mask is None or not mask.any():
        return image
    around = np.ones((3, 3), bool)
    outer = np.asarray(ndimage.binary_dilation(mask, around, iterations=3), bool)
    inner = np.asarray(ndimage.binary_dilation(mask, around), bool)
    drawn = image.copy()
    drawn[outer & ~inner] = OUTLINE
    return drawn


def data_uri(image: np.ndarray, quality: int = 84) -> str:
    """A picture (h, w, 3) uint8 as a JPEG data URI."""
    packed = io.BytesIO()
    PIL.Image.fromarray(image).save(packed, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
