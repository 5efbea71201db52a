"""Every fault of a submission at once, before a server is asked; see ``assembly.submission``."""

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import PIL.Image
import tifffile

from dsad.assembly.submission import (
    MAPS,
    PUBLISHED,
    SUFFIXES,
    Shape,
    expected,
    quarter_of,
    threaded,
)
from dsad.core.config import listed
from dsad.core.types import Progress, silent

#: Numbers of missing files that a message spells out, as ranges.
_RANGES = 8


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

    for i, lines in enumerate(threaded(look, names)):
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
    if not shape and sizes and sizes[-1] == quarter_of(sizes[0]):
        full = sizes[0]
    of = "its image" if shape else "its other file"
    for place, size in seen.items():
        if size not in (full, quarter_of(full)):
            whole, quarter, found = (f"{h} × {w}" for h, w in (full, quarter_of(full), size))
            faults.append(f"{place}: expected {whole} pixels as {of}, or {quarter}; found {found}.")
    return faults


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
