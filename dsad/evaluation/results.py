"""Results of a localization run, and their files."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError
from dsad.data.defective import NOTE
from dsad.evaluation.stamp import plain

#: The file of the numbers; written last, so that its evaluation is complete.
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a localization run measured.

    A number that is not defined is None; ``categories[c]["notes"]`` say why, and which seeds were
    measured once. ``categories[c]`` has the numbers, ``counts`` and ``seconds``; ``mean`` the
    numbers, over the categories that define them, and ``mean_over`` how many these are where it is
    not all of them; ``kinds[c][kind]`` the numbers of normal images and that kind, with ``images``;
    ``images[c]`` one entry per test image in source order; ``scales[c]`` the median and the 99.9th
    percentile of the map on normal images, and the scales of panels; ``cases[c]`` the image numbers
    shown, by section of ``gallery.choose_cases``. ``gallery`` and ``curves`` are arrays by name,
    see ``gallery.pictures``, ``panels.pictures`` and ``numbers.measure``.

    With several seeds the numbers of ``categories``, ``kinds`` and ``mean`` are means over them;
    images, scales, cases, gallery and curves are those of the first. ``seeds[s]`` holds the
    numbers of one seed, ``{"categories": {c: numbers}, "mean": numbers}``, and ``std``, of the
    same form, their sample standard deviation; it is empty for one seed. ``support[c][s]`` lists
    support sets (``support.listing``), ``thresholds[c][s]`` is what ``thresholds.measure`` gives.
    """

    stamp: dict[str, Any] = dataclasses.field(default_factory=dict)
    categories: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    mean: dict[str, float | None] = dataclasses.field(default_factory=dict)
    mean_over: dict[str, int] = dataclasses.field(default_factory=dict)
    kinds: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    images: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict, repr=False)
    scales: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    cases: dict[str, dict[str, list[int]]] = dataclasses.field(default_factory=dict)
    gallery: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    curves: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    seeds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    std: dict[str, Any] = dataclasses.field(default_factory=dict)
    support: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    thresholds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def metric_names(self) -> list[str]:
        """The keys of the numbers, in the order of the table."""
        return list(self.mean)

    @property
    def about_defects(self) -> str:
        """That no real defect was there to be found, as a sentence; empty if there was."""
        defects = self.stamp.get("dataset", {}).get("defects")
        return f"defects: {defects}" if defects == NOTE else ""

    @property
    def about_means(self) -> str:
        """Which means leave categories out, as a sentence; empty if none does."""
        units = {_unit(m): n for m, n in self.mean_over.items()}
        total = len(self.categories)
        parts = [f"of {unit} numbers over {n} of {total}" for unit, n in units.items()]
        return f"mean {', '.join(parts)} categories" if parts else ""


def _unit(metric: str) -> str:
    return {"image": "image", "spro": "sPRO"}.get(metric.partition("_")[0], "pixel")


def shown(value: float | None, form: str = ".3f") -> str:
    """A number of the results as text, a dash where it is not defined."""
    return "–" if value is None else format(value, form)


def merge(into: Results, part: Results) -> None:
    """Add the results of further categories, before means over all are taken."""
    for field in dataclasses.fields(Results):
        _merge(getattr(into, field.name), getattr(part, field.name))


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


#: Fields in a packed file of their own, and those in the readable one.
_PACKED = ("gallery", "curves")
_JSON = tuple(f.name for f in dataclasses.fields(Results) if f.name not in _PACKED)
#: Name of the array that ties the packed files to their results.
_STAMP = "stamp_sha256"


def write_results(results: Results, workdir: str | epath.PathLike) -> epath.Path:
    """Write ``gallery.npz``, ``curves.npz`` and then ``results.json``; returns the latter's path.

    A reader never sees half a file. Raises WorkdirError for a disk or bucket that takes none.
    """
    folder = paths.directory(workdir)
    for name in _PACKED:
        write_arrays(folder / f"{name}.npz", getattr(results, name), results.stamp)
    return write_numbers(folder, {name: getattr(results, name) for name in _JSON})


def write_arrays(
    path: epath.Path, arrays: Mapping[str, np.ndarray], stamp: Mapping[str, Any]
) -> None:
    """Write a packed file that belongs to the results with this stamp."""
    packed = io.BytesIO()
    content: dict[str, Any] = {**arrays, _STAMP: np.array(_digest(stamp))}
    np.savez_compressed(packed, **content)
    paths.write_whole(path, packed.getvalue())


def write_numbers(folder: epath.Path, content: Mapping[str, Any]) -> epath.Path:
    """Write ``results.json``, which completes an evaluation; returns its path."""
    text = json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False)
    return paths.write_whole(folder / RESULTS, text)


def _digest(stamp: Mapping[str, Any]) -> str:
    text = json.dumps(plain(stamp), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_results(workdir: str | epath.PathLike) -> Results:
    """The results in a folder; raises WorkdirError if a file is missing or is not one of ours."""
    folder = paths.directory(workdir)
    fields = read_numbers(folder, _JSON)
    for name in _PACKED:
        fields[name] = read_arrays(folder / f"{name}.npz", fields["stamp"])
    return Results(**fields)


def read_numbers(folder: epath.Path, names: Sequence[str]) -> dict[str, Any]:
    """The fields ``names`` of ``results.json``; WorkdirError without the file or one of them."""
    path = folder / RESULTS
    if not path.is_file():
        raise WorkdirError(
            f"{path}: no such file. Expected the workdir of a finished `dsad evaluate`."
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(
            f"{path}: not valid JSON ({error}). Run `dsad evaluate` again."
        ) from error
    missing = [n for n in names if not isinstance(content, dict) or n not in content]
    if missing:
        raise WorkdirError(
            f"{path}: no {', '.join(missing)} in it; it was not written by this version of "
            "`dsad evaluate`. Run it again."
        )
    return {n: content[n] for n in names}


def read_arrays(path: epath.Path, stamp: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a packed file; WorkdirError unless it belongs to the results of this stamp."""
    arrays = _arrays(path)
    if str(arrays.pop(_STAMP, "")) != _digest(stamp):
        raise WorkdirError(
            f"{path}: does not belong to the numbers in results.json (their stamps differ). "
            "Run `dsad evaluate` again."
        )
    return arrays


def _arrays(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as packed:
            return {name: packed[name] for name in packed.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise WorkdirError(
            f"{path}: cannot be read ({error}). Run `dsad evaluate` again."
        ) from error
