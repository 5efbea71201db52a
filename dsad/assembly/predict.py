"""Predictions of a fitted model for any number of images, written as they come.

DIR/about.json         model, thresholds and how the run ended; DIR is one of ``dsad predict``
DIR/predictions.csv    a row per image, with its highest region
DIR/predictions.jsonl  an object per image, with all regions
DIR/overlays/PATH.png  the picture under its map, with the contour at the threshold
DIR/maps/PATH.tiff     the map, float32 on the pixels of the image, where asked for

The two files end in ``.partial`` until all images are in them.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
import PIL.Image
from etils import epath

from dsad.assembly import pictures
from dsad.assembly.model import FittedModel
from dsad.core import paths
from dsad.core.errors import ConfigError, StoppedError, WorkdirError
from dsad.core.types import Progress
from dsad.evaluation.maps import MapWriter
from dsad.evaluation.predictions import Decision, Prediction, overlay
from dsad.evaluation.report import gallery
from dsad.evaluation.scored import ScoredImage
from dsad.evaluation.stamp import plain

ABOUT = "about.json"
CSV, JSON_LINES, OVERLAYS = "predictions.csv", "predictions.jsonl", "overlays"
_PARTIAL = ".partial"
_ADVICE = "Choose another --out, or mend this one."
#: Images at once, whatever their size.
BATCH = 8
COLUMNS: tuple[str, ...] = (
    "path", "score", "percentile", "flagged", "peak", "peak_x", "peak_y", "regions", "left", "top",
    "right", "bottom", "area", "overlay", "error",
)  # fmt: skip


@dataclasses.dataclass
class Summary:
    """What came of a run, counted as its images pass by."""

    total: int
    decision: Decision
    drift: pictures.Drift | None
    scored: int = 0
    flagged: int = 0
    above: int = 0
    faults: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, image: "_Image") -> None:
        """A readable image."""
        self.scored += 1
        self.flagged += bool(image.row.get("flagged"))
        self.above += self.decision.row is not None and image.row["score"] > self.decision.largest
        if self.drift:
            self.drift.add(image.level, image.shape)

    def warnings(self) -> list[str]:
        """How the images lie far outside the normal ones, in sentences."""
        lines = self.drift.warnings() if self.drift else []
        if self.scored >= 8 and self.above >= 0.9 * self.scored:  # of a few all may be defects
            lines.append(
                f"score: {self.above} of {self.scored} images lie above all "
                f"{self.decision.normals} held-out normal images, the highest "
                f"{self.decision.largest:.4g}"
            )
        return lines


def claim(out: str, *, overwrite: bool, dry: bool = False) -> epath.Path:
    """Take a directory for predictions; one that was stopped is begun anew.

    ``dry``: only refuse what may not be taken. Raises ConfigError for no name, WorkdirError for a
    directory that holds predictions, without ``overwrite``, or anything else, or that cannot be
    written.
    """
    if not out:
        raise ConfigError("dsad predict: --out=DIR is missing; it takes the predictions.")
    folder = paths.directory(out)
    paths.check_place(out, _ADVICE)
    with paths.writing(folder, _ADVICE):
        there = list(folder.iterdir()) if folder.exists() else []
        if any(not p.name.endswith(paths.TEMPORARY) for p in there):
            ours = _about(folder)
            if ours is None:
                raise WorkdirError(
                    f"--out={out}: holds files but no predictions. Choose another directory."
                )
            if ours.get("complete") and (folder / CSV).exists() and not overwrite:
                raise WorkdirError(
                    f"--out={out}: holds predictions. Replace them with --overwrite, or choose "
                    "another directory."
                )
        if dry:
            return folder
        about = {"command": "predict", "complete": False}
        paths.write_whole(folder / ABOUT, json.dumps(about), _ADVICE)
        paths.clear(folder, ABOUT)  # now that they count as stopped
    return folder


def _about(folder: epath.Path) -> dict[str, Any] | None:
    """``about.json``; None where it is missing or that of something else."""
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and about.get("command") == "predict" else None


def read(directory: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """``about.json`` and the rows of ``predictions.jsonl``; None for any other directory.

    Raises WorkdirError for predictions that were stopped or cannot be read.
    """
    folder = paths.directory(directory)
    about = _about(folder)
    if about is None:
        return None
    try:
        text = (folder / JSON_LINES).read_text() if about["complete"] else ""
        # Not splitlines: names may hold further signs that it takes for ends of lines.
        rows = [json.loads(line) for line in text.split("\n") if line]
        if not all(
            "error" in r or (r["path"] and r["overlay"] and r["score"] < np.inf) for r in rows
        ):
            raise ValueError("expected path, overlay and score of each image")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkdirError(
            f"{folder / JSON_LINES}: not as dsad predict wrote it ({error!r}). Predict again."
        ) from error
    if not about["complete"]:
        raise WorkdirError(f"{folder}: predictions that were stopped. Run `dsad predict` again.")
    return about, rows


def predict(
    model: FittedModel,
    images: Sequence[str],
    decision: Decision,
    folder: epath.Path,
    progress: Progress,
    *,
    maps: bool = False,
) -> Summary:
    """Score files and write what comes of it; goes on past what cannot be read.

    Raises StoppedError where Ctrl-C ends it, WorkdirError where nothing can be written.
    """
    normals = model.normals.get(model.category)
    drift = pictures.Drift(normals) if normals else None
    summary, done = Summary(total=len(images), decision=decision, drift=drift), 0
    try:
        with _tables(folder) as (rows, lines):
            writer = csv.DictWriter(rows, COLUMNS)
            writer.writeheader()
            progress(0, len(images), "compiling …")
            # Closed at once where it is stopped, so that nothing is written after it was told.
            with contextlib.closing(_rows(model, images, folder, summary, maps)) as made:
                for row, regions in made:
                    writer.writerow(row)
                    line = {k: v for k, v in row.items() if k in _OF_IMAGE and v not in ("", None)}
                    lines.write(json.dumps({**line, **regions}, ensure_ascii=False) + "\n")
                    done += 1
                    progress(done, len(images), f"{summary.flagged} flagged")
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped after {done} of {len(images)} images; their rows are in {folder}. The same "
            "command begins anew."
        ) from None
    about = {
        "command": "predict", "complete": True, "images": len(images), "flagged": summary.flagged,
        "unreadable": len(summary.faults), "category": model.category, "decision": str(decision),
        **{n: getattr(decision, n) for n in ("rate", "bound", "image", "region")},
        "warnings": summary.warnings(), "stamp": model.stamp,
    }  # fmt: skip
    paths.write_whole(folder / ABOUT, json.dumps(plain(about), indent=1, ensure_ascii=False))
    return summary


_OF_IMAGE = ("path", "score", "percentile", "flagged", "overlay", "error")


@contextlib.contextmanager
def _tables(folder: epath.Path) -> Iterator[tuple[TextIO, TextIO]]:
    """The two files, under their names once they are whole."""
    options: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    partial = {name: folder / f"{name}{_PARTIAL}" for name in (CSV, JSON_LINES)}
    try:
        with contextlib.ExitStack() as stack:
            rows, lines = (stack.enter_context(open(p, "w", **options)) for p in partial.values())
            yield rows, lines
        for name, path in reversed(partial.items()):
            path.replace(folder / name)
    except OSError as error:
        raise paths.failure(folder, error, _ADVICE) from error


def _rows(
    model: FittedModel,
    images: Sequence[str],
    folder: epath.Path,
    summary: Summary,
    maps: bool,
) -> Generator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row of ``COLUMNS`` per image, and its peak and regions; overlays and maps are written.

    Threads do so for a batch while the next one is scored.
    """
    lossy = tuple(model.config["data"]["lossy"])
    source = pictures.Tolerant(pictures.source(images, lossy=lossy))
    names = pictures.names(images)
    output = _Output(
        model, summary.decision, folder, MapWriter(folder / "maps", "tiff") if maps else None
    )
    waiting: list[tuple[str, concurrent.futures.Future[_Image]]] = []
    with concurrent.futures.ThreadPoolExecutor(model.evaluation.workers) as pool:
        try:
            for found, _ in model.stream(source, batch=BATCH, picture=gallery.shrunk):
                jobs = []
                for image in found:
                    fault = source.faults.pop(image.number, "")
                    job = pool.submit(output.write, names[image.number], fault, image)
                    jobs.append((images[image.number], job))
                yield from (_counted(path, job.result(), summary) for path, job in waiting)
                waiting = jobs
            yield from (_counted(path, job.result(), summary) for path, job in waiting)
        finally:
            pool.shutdown(cancel_futures=True)


class _Image(NamedTuple):
    """What is kept of an image: its row and regions, or the fault that it has."""

    fault: str
    row: Mapping[str, Any] = {}
    regions: Mapping[str, Any] = {}
    level: float = 0.0
    shape: tuple[int, int] = (0, 0)


class _Output(NamedTuple):
    """Writes the files of an image; of those at work alone there is a map on original pixels."""

    model: FittedModel
    decision: Decision
    folder: epath.Path
    tiffs: MapWriter | None

    def write(self, name: str, fault: str, image: ScoredImage) -> _Image:
        found, picture, shape = image.map, image.picture, image.shape
        assert picture is not None  # ``stream`` makes one of every image
        if not fault and not np.isfinite([image.score, found.min(), found.max()]).all():
            fault = f"the score, {image.score}, or its map is not finite"
        if fault:
            return _Image(fault)
        values = self.model.original(image)
        place = f"{OVERLAYS}/{name}.png"
        scale = self.model.scales.get(self.model.category, {})
        drawn = overlay(picture, values, scale, self.decision.region)
        paths.write_whole(self.folder / place, _png(drawn), _ADVICE)
        if self.tiffs:
            self.tiffs.write(f"{name}.tiff", values)
        row, regions = _filled(self.decision.predict(image.score, values))
        return _Image("", row | {"overlay": place}, regions, pictures.brightness(picture), shape)


def _counted(path: str, image: _Image, summary: Summary) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of an image, and its regions; ``summary`` hears of it."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"path": path}
    if image.fault:
        summary.faults[path] = image.fault
        return row | {"error": image.fault}, {}
    summary.add(image)
    return {**row, **image.row}, dict(image.regions)


def _filled(prediction: Prediction) -> tuple[dict[str, Any], dict[str, Any]]:
    values = prediction.map
    y, x = (int(i) for i in np.unravel_index(int(values.argmax()), values.shape))
    peak = float(values[y, x])
    row: dict[str, Any] = {"score": prediction.score, "peak": peak, "peak_x": x, "peak_y": y}
    if prediction.flagged is not None:
        row["flagged"] = prediction.flagged
    if prediction.percentile is not None:
        row |= {"percentile": prediction.percentile, "regions": len(prediction.regions)}
    if prediction.regions:
        first = prediction.regions[0]
        row |= dict(zip(("left", "top", "right", "bottom"), first.box, strict=True))
        row["area"] = first.area
    size = {"height": values.shape[0], "width": values.shape[1]}
    regions = [dataclasses.asdict(r) for r in prediction.regions]
    return row, {**size, "peak": {"value": peak, "at": [x, y]}, "regions": regions}


def _png(image: np.ndarray) -> bytes:
    packed = io.BytesIO()
    PIL.Image.fromarray(image).save(packed, "PNG", compress_level=3)
    return packed.getvalue()
