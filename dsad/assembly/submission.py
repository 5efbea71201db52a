"""Submissions to the server that knows the labels of MVTec AD 2's private images.

DIR/anomaly_images/OBJECT/{test_private,test_private_mixed}/NNN_{regular,mixed}.tiff: float16 maps
of one channel; DIR/anomaly_images_thresholded/.../NNN_{regular,mixed}.png, 0 and 255, where there
are decisions; nothing else. ``DIR.tar.gz`` is what the server takes, ``DIR.json`` says how it was
made. Maps have the size of their image or a quarter of its height and width, rounded down.
"""

import collections
import concurrent.futures
import io
import json
import math
import pathlib
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tifffile

from dsad.assembly.model import FittedModel, Saved
from dsad.assembly.predict import BATCH
from dsad.core import paths
from dsad.core.config import listed
from dsad.core.errors import ConfigError, DataError, WorkdirError
from dsad.core.types import Dataset, Progress, Source, silent
from dsad.data.combined import joined
from dsad.data.mvtec_ad2 import ABOUT
from dsad.evaluation.scored import ScoredImage
from dsad.evaluation.stamp import plain

#: Trees of a submission with the suffix of their files; the second may be missing.
MAPS, MASKS = "anomaly_images", "anomaly_images_thresholded"
SUFFIXES = {MAPS: ".tiff", MASKS: ".png"}
#: The private splits of the data set, as their folders and the ends of their files' names.
PRIVATE = {"private": ("test_private", "regular"), "private_mixed": ("test_private_mixed", "mixed")}
#: A rule that makes no decisions.
NO_RULE = "none"
#: Images of each private set by object.
PUBLISHED = {c: dict(zip(ABOUT.columns, row, strict=True))["private"]
             for c, row in ABOUT.counts.items()}  # fmt: skip
_ADVICE = "Choose another --out, or mend this one."
_THREADS = 8

Shape = tuple[int, int]


def expected(counts: Mapping[str, int]) -> list[str]:
    """The private images of a data set with so many per object and set, without suffix, sorted."""
    return sorted(
        f"{name}/{folder}/{i:03d}_{light}"
        for name, count in counts.items()
        for folder, light in PRIVATE.values()
        for i in range(count)
    )


def private(dataset: Dataset, category: str) -> Source:
    """The images of a category that are submitted."""
    return joined([dataset.source(split, category) for split in PRIVATE])


def images(dataset: Dataset) -> list[str]:
    """All that are submitted, without suffix; raises DataError where a split is not there."""
    try:
        sources = [private(dataset, category) for category in dataset.categories]
    except ConfigError as error:
        folders = " and ".join(folder for folder, _ in PRIVATE.values())
        raise DataError(
            f"{dataset.name}: expected {folders} in every object's folder. Unpack the whole "
            f"archive, and name its folder with --root ({error})"
        ) from error
    return sorted(r.path.removesuffix(".png") for source in sources for r in source.records)


def factor(largest: float) -> float:
    """The power of two that brings the highest score of normal images into [1, 2).

    float16 keeps 11 bits of whatever lies between 6.1e-5 and 65,504, so of scores down to a
    sixteen-thousandth of the highest normal one, and up to 32,752 times it; a power of two rounds
    nothing. Of scores that are all 0 it is 1.
    """
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0


def halved(scores: np.ndarray, scale: float, name: str) -> np.ndarray:
    """Scores (h, w) as float16 after ``scale``; DataError names a map that has no such form."""
    if not np.isfinite(scores).all():
        raise DataError(f"{name}: NaN or infinite scores. Find out why the detector made them.")
    with np.errstate(over="ignore"):
        half = (scores * np.float32(scale)).astype(np.float16)
    if not np.isfinite(half).all():
        raise DataError(
            f"{name}: a score of {np.abs(scores).max():.6g} is beyond float16 (65,504) after the "
            f"data set's factor {scale:g}, which brings normal images to 1. Choose a detector "
            "whose scores do not explode."
        )
    return half


def quarter_of(shape: Shape) -> Shape:
    """Height and width of a map of a quarter of them, rounded down."""
    return shape[0] // 4, shape[1] // 4


def quartered(scores: np.ndarray) -> np.ndarray:
    """Means of 4 × 4 pixels: (h // 4, w // 4) f32; the rest at the right and below is left out."""
    h, w = quarter_of((scores.shape[0], scores.shape[1]))
    return scores[: 4 * h, : 4 * w].reshape(h, 4, w, 4).mean((1, 3), dtype=np.float32)


class Plan(NamedTuple):
    """What is submitted: thresholds by object (None: no decisions) and the scale of all maps."""

    saved: Saved
    dataset: Dataset
    rule: str
    limits: Mapping[str, float | None]
    scale: float
    quarter: bool


def plan(saved: Saved, dataset: Dataset, rule: str = "", *, quarter: bool = False) -> Plan:
    """Refuse what is sure to fail, before an image is scored.

    Args:
      saved: fitted models of all objects of the data set.
      dataset: with the private splits.
      rule: of the thresholds, see ``evaluation.rules``; by default the first of the models' own,
        "none" submits maps alone.
      quarter: maps of a quarter of the height and width.

    Raises:
      ConfigError: no model of an object, a rule that the models do not have, no thresholds.

    """
    have = {c for row in saved.index["categories"].values() for c in row["categories"]}
    if missing := [c for c in dataset.categories if c not in have]:
        raise ConfigError(
            f"{saved.directory}: no model of {listed(missing)}; it has: {listed(have)}. Fit all "
            "objects."
        )
    stored = saved.config()["evaluation"]
    if not stored["false_alarm_rate"]:
        raise ConfigError(
            f"{saved.directory}: was fitted without thresholds, whose normal images tell the range "
            "of scores. Fit it with config.evaluation.false_alarm_rate above 0."
        )
    rules = stored["decisions"]
    if not rule and not rules:
        raise ConfigError(
            f"{saved.directory}: was fitted without config.evaluation.decisions. Fit it with some, "
            'such as ("bound", "sigma"), or submit maps alone with --rule=none.'
        )
    rule = rule or rules[0]
    if rule not in (*rules, NO_RULE):
        raise ConfigError(f"--rule={rule}: expected one of {listed((*rules, NO_RULE))}.")
    rows = {c: saved.threshold(c) for c in dataset.categories}
    limits = {c: None if rule == NO_RULE else row["decisions"][rule] for c, row in rows.items()}
    if lack := [c for c, limit in limits.items() if limit is None and rule != NO_RULE]:
        raise ConfigError(f"--rule={rule}: gives no threshold for {listed(lack)}. Choose another.")
    largest = max(abs(score) for row in rows.values() for score in row["maxima"])
    return Plan(saved, dataset, rule, limits, factor(largest), quarter)


def claim(out: str, *, overwrite: bool) -> pathlib.Path:
    """A folder of this machine that may be written; one that was stopped is begun anew.

    Raises ConfigError for no name or a bucket, WorkdirError for one that holds anything else, or a
    whole submission without ``overwrite``. Nothing is removed.
    """
    if not out or paths.is_remote(out):
        raise ConfigError(f"--out: expected a folder of this machine, found {out!r}.")
    folder = pathlib.Path(paths.directory(out))
    paths.check_place(out, _ADVICE)
    foreign = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if foreign := [n for n in foreign if n not in SUFFIXES]:
        raise WorkdirError(f"--out={out}: holds {foreign[0]}, no part of a submission. {_ADVICE}")
    if archive(folder).exists() and not overwrite:
        raise WorkdirError(
            f"{archive(folder)}: is there already. Replace it with --overwrite, or choose another "
            "--out."
        )
    return folder


def archive(folder: pathlib.Path) -> pathlib.Path:
    """What the server takes, beside the folder."""
    return folder.with_name(f"{folder.name}.tar.gz")


def write(made: Plan, folder: pathlib.Path, progress: Progress = silent) -> dict[str, Shape]:
    """Score all private images and write their files; gives the shapes of images by path.

    Memory is that of a few images. Raises DataError for an image that cannot be read, or a map
    that float16 cannot hold; WorkdirError where a file cannot be written.
    """
    with paths.writing(folder, _ADVICE):
        for path in (*(folder / tree for tree in SUFFIXES), archive(folder)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shapes: dict[str, Shape] = {}
    total = len(images(made.dataset))
    for category in made.dataset.categories:
        progress(len(shapes), total, f"compiling …  {category}")
        model, source = made.saved.model(category), private(made.dataset, category)
        names = [record.path.removesuffix(".png") for record in source.records]

        def save(
            image: ScoredImage,
            names: Sequence[str] = names,
            model: FittedModel = model,
            limit: float | None = made.limits[category],
        ) -> tuple[str, Shape]:
            name = names[image.number]
            _write(made, folder, name, model, model.original(image), limit)
            return name, image.shape

        for name, shape in threaded(save, _scored(model, source)):
            shapes[name] = shape
            progress(len(shapes), total, category)
    about = {
        "rule": made.rule, "thresholds": made.limits, "scale": made.scale,
        "maps": "a quarter of height and width" if made.quarter else "original pixels",
        "morphology": made.saved.config()["evaluation"]["morphology"],
        "model_sha256": made.saved.sha256, "stamp": made.saved.stamp,
    }  # fmt: skip
    text = json.dumps(plain(about), indent=1, ensure_ascii=False)
    paths.write_whole(folder.with_name(f"{folder.name}.json"), text, _ADVICE)
    return shapes


def _scored(model: FittedModel, source: Source) -> Iterator[ScoredImage]:
    for found, _ in model.stream(source, batch=BATCH):
        yield from found


def threaded(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results of many calls in order, of threads that are never far ahead of who takes them."""
    waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write(
    made: Plan,
    folder: pathlib.Path,
    name: str,
    model: FittedModel,
    scores: np.ndarray,
    limit: float | None,
) -> None:
    half = halved(quartered(scores) if made.quarter else scores, made.scale, name)
    packed = io.BytesIO()
    tifffile.imwrite(packed, half, photometric="minisblack", metadata=None)
    paths.write_whole(folder / MAPS / f"{name}.tiff", packed.getvalue(), _ADVICE)
    if limit is not None:
        above = model.evaluation.morphology.decided(scores, limit)
        packed = io.BytesIO()
        PIL.Image.fromarray(above.astype(np.uint8) * 255).save(packed, "PNG")
        paths.write_whole(folder / MASKS / f"{name}.png", packed.getvalue(), _ADVICE)


def pack(folder: pathlib.Path, progress: Progress = silent) -> pathlib.Path:
    """Write the archive of a submission, whole or not at all; owner and times are left out."""
    target = archive(folder)
    files = sorted(p for tree in SUFFIXES for p in (folder / tree).rglob("*") if p.is_file())
    temporary = target.with_name(f".{uuid.uuid4().hex}{paths.TEMPORARY}")
    with paths.writing(target, _ADVICE):
        try:
            with tarfile.open(temporary, "w:gz", compresslevel=3) as packed:
                for i, path in enumerate(files):
                    packed.add(path, path.relative_to(folder), filter=_anonymous)
                    progress(i + 1, len(files), "packing")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
