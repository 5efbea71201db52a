"""Pictures of a report: which images under which heading, those of all runs side by side."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.evaluation.report import figures, gallery, panels
from dsad.evaluation.report.comparison import Run

#: Pictures per section of what one of two runs does better.
GAINS = 3
#: Longest side of heat maps, and what smaller pictures are enlarged to.
HEAT_SIDE = 256
_ROW = {  # of a good or a defective image: what it is called when it is flagged or not
    (0, False): "passed", (0, True): "false alarm", (1, False): "missed", (1, True): "found",
}  # fmt: skip


def sections(
    runs: Sequence[Run], category: str, rows: int, side: int, *, metric: str = "pixel_auroc"
) -> dict[str, list[dict[str, Any]]]:
    """Headings with their cases, at most ``rows`` each, no image twice: ``wrong`` and ``others``.

    First what each run missed and flagged falsely; where the first set no threshold, its lowest
    scores of defective images and its highest of good ones. Then, of two runs, what either does
    better by ``metric`` within the image, among the images that a run kept a picture of; then other
    images that the first run chose.
    """
    by_run = [images for run in runs if (images := _Images.of(run, category)).entries]
    plan = [("wrong", *line) for i, images in enumerate(by_run)
            if i == 0 or images.threshold is not None
            for line in _wrong(images, len(by_run) > 1)]  # fmt: skip
    if len(by_run) == len(runs) == 2:
        plan += [("others", *line, 0) for line in _gains(by_run, metric)]
    if by_run:
        plan += [("others", *line, 0) for line in _others(by_run[0])]
    parts: dict[str, list[dict[str, Any]]] = {"wrong": [], "others": []}
    seen: set[str] = set()
    for part, title, paths, count in plan:
        fresh = [p for p in paths if p not in seen][:rows]
        seen.update(fresh)
        cut = f", {len(fresh)} shown" if 0 < len(fresh) < count else ""
        if fresh or part == "wrong":
            cases = [_case(by_run, path, side, len(runs) > 1) for path in fresh]
            above = bool(paths) and not fresh and rows > 0
            parts[part].append({"title": f"{title}{cut}", "cases": cases, "above": above})
    return parts


@dataclasses.dataclass(frozen=True)
class _Images:
    """A run's test images of a category: entry and number by path."""

    run: Run
    category: str
    entries: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, int]
    threshold: float | None
    level: float | None

    @classmethod
    def of(cls, run: Run, category: str) -> "_Images":
        rows, row = run.results.images.get(category, []), run.row(category)
        return cls(
            run, category, {r["path"]: r for r in rows}, {r["path"]: i for i, r in enumerate(rows)},
            row["image"] if row else None, run.level(category),
        )  # fmt: skip

    @property
    def ranked(self) -> bool:
        """Whether a mask defines the pixel AUROC within an image."""
        return any(entry["pixel_auroc"] is not None for entry in self.entries.values())

    def chosen(self, section: str) -> list[str]:
        """Paths of the images of a section of ``gallery.choose_cases``."""
        paths = list(self.entries)
        return [paths[n] for n in self.run.results.cases[self.category].get(section, [])]

    def array(self, what: str, path: str) -> np.ndarray | None:
        number = self.numbers.get(path)
        return self.run.results.gallery.get(f"{what}/{self.category}/{number}")

    def verdict(self, path: str) -> str:
        """What became of an image at the threshold; empty without one."""
        if self.threshold is None:
            return ""
        entry = self.entries[path]
        return _ROW[entry["label"], entry["score"] > self.threshold]

    def fact(self, path: str) -> dict[str, Any]:
        return {"run": self.run, "verdict": self.verdict(path), **self.entries[path]}


def _wrong(images: _Images, several: bool) -> Iterator[tuple[str, list[str], int]]:
    """Heading, shown images and number of missed defects and of false alarms."""
    verdicts = [images.verdict(path) for path in images.entries]
    name = images.run.name
    words = (
        ("missed", f" by {name}", "defective", "lowest", 1),
        ("false_alarms", f" of {name}", "good", "highest", 0),
    )
    for section, by, kind, end, label in words:
        paths = images.chosen(section)
        total = sum(entry["label"] == label for entry in images.entries.values())
        if images.threshold is None:
            if paths:
                whose = f", {name}" if several else ""
                yield f"{kind.capitalize()} images with the {end} scores{whose}", paths, 0
            continue
        count = verdicts.count(section.replace("_", " ").removesuffix("s"))
        what = section.replace("_", " ").capitalize() + (by if several else "")
        order = f", the {end} score first" if count > 1 else ""
        yield f"{what}: {count or 'none'} of {total} {kind} images{order}", paths, count


def _others(images: _Images) -> Iterator[tuple[str, list[str]]]:
    by = "pixel AUROC within the image" if images.ranked else "score"
    other = "Defects found" if images.threshold is not None else "Other defective images"
    titles = (f"{other}: lowest {by}", f"{other}: middle", f"{other}: highest {by}",
              "Other good images: highest score")  # fmt: skip
    for section, title in zip(gallery.OTHERS, titles, strict=True):
        yield title, images.chosen(section)


def _gains(by_run: Sequence[_Images], metric: str) -> list[tuple[str, list[str]]]:
    gain: dict[str, float] = {}
    for path in sorted({p for f in by_run for p in f.entries if f.array("image", p) is not None}):
        left, right = (f.entries.get(path, {}).get(metric) for f in by_run)
        if left is not None and right is not None:
            gain[path] = right - left
    order = sorted(gain, key=lambda p: (-gain[p], p))
    better = [p for p in order if gain[p] > 0][:GAINS]
    worse = [p for p in reversed(order) if gain[p] < 0][:GAINS]
    a, b = (f.run.name for f in by_run)
    text = "{} localizes better than {}: largest gain of pixel AUROC within the image"
    return [(text.format(b, a), better), (text.format(a, b), worse)]


def _case(by_run: Sequence[_Images], path: str, side: int, several: bool) -> dict[str, Any]:
    """Pictures and caption of one test image: image, mask, every run's map in its own units."""
    stored = next(x for f in by_run if (x := f.array("image", path)) is not None)
    pixels = gallery.opened(stored)
    longest = max(pixels.shape[:2])
    size = _size(pixels, min(side, max(longest, HEAT_SIDE)))
    image = _resized(pixels, size, PIL.Image.Resampling.LANCZOS)
    mask = next((x for f in by_run if (x := f.array("mask", path)) is not None), None)
    annotated, defect = image, mask is not None and bool(mask.any())
    if mask is not None:
        mask = _resized(mask, size, PIL.Image.Resampling.NEAREST)
        annotated = figures.outline(image, mask, figures.ANNOTATED)
    small = _size(image, min(side, HEAT_SIDE))
    overlays, heats, facts = [], [], []
    for images in by_run:
        if (units := images.array("map", path)) is not None:
            names = [f"{images.run.name}: overlay", f"{images.run.name}: heat map"]
            overlaid, heated = names if several else ("Overlay", "Heat map")
            drawn = figures.overlay(image, units, images.level)
            overlays.append((overlaid, figures.data_uri(drawn)))
            heat = figures.heat(units, small)
            around = None if mask is None else _resized(mask, small, PIL.Image.Resampling.NEAREST)
            heat = figures.outline(heat, around, figures.ANNOTATED)
            heats.append((heated, figures.data_uri(heat)))
            facts.append(images.fact(path))
    plain = image if max(size) < longest else stored.tobytes()
    pictures = [("Image", figures.data_uri(plain)), *overlays]
    if defect or several:  # in a comparison the columns stay the same from row to row
        label = "Annotated defect" if defect else "No annotated defect"
        pictures.append((label, figures.data_uri(annotated)))
    further = [row for images in by_run if (row := _panels(images, path, small, several))]
    return {
        "entry": next(f.entries[path] for f in by_run if path in f.entries), "facts": facts,
        "pictures": [*pictures, *heats], "panels": further, "ratio": f"{size[0]} / {size[1]}",
        "columns": 1 + len(overlays) if several else 3 + by_run[0].ranked,
        "narrow": min(1 + len(overlays), 3) if several else 2,
    }  # fmt: skip


def _size(image: np.ndarray, side: int) -> tuple[int, int]:
    ratio = side / max(image.shape[:2])
    return max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio))


def _resized(image: np.ndarray, size: tuple[int, int], by: PIL.Image.Resampling) -> np.ndarray:
    if size == (image.shape[1], image.shape[0]):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize(size, by))


def _panels(
    images: _Images, path: str, size: tuple[int, int], several: bool
) -> list[tuple[str, str]]:
    """Labels and pictures of what a run's own detector shows of an image, if it was a case."""
    row = []
    for name in panels.names(images.run.results.gallery):
        values = images.array(f"panel/{name}", path)
        if values is not None:
            whose = f"{images.run.name}: " if several else ""
            row.append((f"{whose}{name}", figures.data_uri(figures.scaled(values, size))))
    return row
