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
from dsad.data.base import joined
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
#: Numbers of missing files that a message spells out, as ranges.
_RANGES = 8
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


def absent(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """A line for every folder of which files are missing, with their numbers as ranges."""
    there, total, missing = set(found), collections.Counter[str](), collections.defaultdict(list)
    for path in sorted(wanted):
        folder, _, name = path.rpartition("/")
        total[folder] += 1
        if path not in there:
            missing[folder].append(int(name[:3]))
    lines = []
    for folder, numbers in missing.items():
        ends = [n for n in numbers if n - 1 not in numbers]
        ranges = [(a, next(b for b in numbers if b >= a and b + 1 not in numbers)) for a in ends]
        texts = [f"{a:03d}" if a == b else f"{a:03d} to {b:03d}" for a, b in ranges[:_RANGES]]
        more = ", ..." if len(ranges) > _RANGES else ""
        count = f"{len(numbers)} of {total[folder]}"
        lines.append(f"{folder}: {count} files are missing: {', '.join(texts)}{more}")
    return lines


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


def quartered(scores: np.ndarray) -> np.ndarray:
    """Means of 4 × 4 pixels: (h // 4, w // 4) f32; the rest at the right and below is left out."""
    h, w = _quarter((scores.shape[0], scores.shape[1]))
    return scores[: 4 * h, : 4 * w].reshape(h, 4, w, 4).mean((1, 3), dtype=np.float32)


# --- writing --------------------------------------------------------------------------------


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

        for name, shape in _threaded(save, _scored(model, source)):
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


def _threaded(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results in order, of threads that are never far ahead of who takes them."""
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
        above = model.evaluation.morphology.applied(scores > limit)
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


# --- checking -------------------------------------------------------------------------------


def check(
    folder: str | pathlib.Path,
    counts: Mapping[str, int] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    progress: Progress = silent,
) -> list[str]:
    """All faults of a submission, a line each; none for one that the server can take.

    Args:
      folder: holds the trees.
      counts: images of each private set by object; the published ones by default.
      shapes: (h, w) of images, by path without suffix; without them the two files of an image are
        compared with each other.
      progress: told of every image.

    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder; expected one that holds {MAPS}."]
    if meant := _meant(folder):
        return [f"{folder}: holds no {MAPS}, but {meant} does. Name that folder."]
    names = expected(PUBLISHED if counts is None else counts)
    trees = [tree for tree in SUFFIXES if tree == MAPS or (folder / tree).exists()]
    wanted = {f"{tree}/{name}{SUFFIXES[tree]}" for tree in trees for name in names}
    folders = {str(above) for path in wanted for above in pathlib.PurePosixPath(path).parents}
    found, foreign = set(), collections.defaultdict(list)
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if path.is_dir() and place in folders:
            continue
        found.add(place)
        if place not in wanted:
            foreign[path.parent].append(place)
    faults = absent(found, wanted)
    for places in foreign.values():
        more = f", and {len(places) - 1} more there" if len(places) > 1 else ""
        advice = "Remove them." if more else "Remove it."
        faults.append(f"{places[0]}{more}: no part of a submission. {advice}")

    def look(name: str) -> list[str]:
        there = [tree for tree in trees if f"{tree}/{name}{SUFFIXES[tree]}" in found]
        return _faults_of(folder, name, there, (shapes or {}).get(name))

    for i, lines in enumerate(_threaded(look, names)):
        faults += lines
        progress(i + 1, len(names), f"{len(faults)} faults")
    return faults


def _meant(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder that holds the maps, where that is next to the given one."""
    if (folder / MAPS).is_dir():
        return None
    above = folder.resolve().parent
    near = [p for p in sorted(folder.iterdir()) if (p / MAPS).is_dir()]
    return above if folder.resolve() == above / MAPS else next(iter(near), None)


def _faults_of(
    folder: pathlib.Path, name: str, trees: Sequence[str], shape: Shape | None
) -> list[str]:
    """Of the files of one image, which may be of its ``shape``, or a quarter of that."""
    faults, seen = [], {}
    for tree in trees:
        place = f"{tree}/{name}{SUFFIXES[tree]}"
        try:
            seen[place] = (_map if tree == MAPS else _mask)(folder / place).shape
        except ValueError as error:
            faults.append(f"{place}: {error}")
    sizes = list(seen.values())
    # Without the image its mask is taken for whole, unless that is a quarter of the map.
    full = shape or (sizes[-1] if sizes else (0, 0))
    if not shape and sizes and sizes[-1] == _quarter(sizes[0]):
        full = sizes[0]
    of = "its image" if shape else "its other file"
    for place, size in seen.items():
        if size not in (full, _quarter(full)):
            whole, quarter, found = (f"{h} × {w}" for h, w in (full, _quarter(full), size))
            faults.append(f"{place}: expected {whole} pixels as {of}, or {quarter}; found {found}.")
    return faults


def _quarter(shape: Shape) -> Shape:
    return shape[0] // 4, shape[1] // 4


def _map(path: pathlib.Path) -> np.ndarray:
    """A map as it has to be; raises ValueError."""
    try:
        with tifffile.TiffFile(path) as file:
            pages, values = len(file.pages), file.asarray()
    except Exception as error:  # of a damaged file the library raises nearly every type there is
        raise ValueError(f"not readable as TIFF ({error}). Write it again.") from error
    if pages != 1 or values.ndim != 2 or values.dtype != np.float16:
        shape = " × ".join(map(str, values.shape))
        raise ValueError(
            f"expected one page of two dimensions, float16; found {pages} of {shape}, "
            f"{values.dtype}."
        )
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(f"expected finite scores, found {bad} NaN or infinite.")
    return values


def _mask(path: pathlib.Path) -> np.ndarray:
    """A mask as it has to be; raises ValueError."""
    try:
        with PIL.Image.open(path) as image:
            about, values = (image.format, image.mode), np.asarray(image)
    except Exception as error:  # likewise
        raise ValueError(f"not readable as PNG ({error}). Write it again.") from error
    if about != ("PNG", "L"):
        raise ValueError(f"expected a PNG of mode L, found {' of '.join(map(str, about))}.")
    if other := sorted(set(np.unique(values).tolist()) - {0, 255}):
        raise ValueError(f"expected the values 0 and 255, found also {listed(other[:5])}.")
    return values
