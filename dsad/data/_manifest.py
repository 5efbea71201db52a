"""Lists of images: CSV (comma, semicolon or tab) or JSON lines, read as a whole with all faults."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from dsad.core.config import listed, suggestion
from dsad.core.types import Record
from dsad.data import decode, files
from dsad.data.base import Fault, error, warning

COLUMNS = ("path", "label", "split", "mask", "group", "category", "kind")
NEEDED = ("path", "label")
LABELS = {"normal": 0, "good": 0, "0": 0, "abnormal": 1, "bad": 1, "1": 1}
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a list: where it stands, its record, and what else it names, or ""."""

    where: str
    record: Record
    split: str
    mask: str


class _Files:
    """Which files exist, asked of the file system once a folder."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self.names:
            try:
                self.names[folder] = frozenset(os.listdir(self.root / folder))
            except OSError:
                self.names[folder] = frozenset()
        return name in self.names[folder]


def read(file: pathlib.Path, faults: list[Fault]) -> list[Line]:
    """The lines of a list without those that cannot be understood; appends all faults by line."""
    try:
        text = decode.regular_bytes(file).decode("utf-8-sig")
    except OSError as problem:
        faults.append(error("K0", str(file), f"cannot be read: {problem.strerror}."))
        return []
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        faults.append(error("K0", f"{file.name}:{line}", "expected UTF-8; save it as that."))
        return []
    rows = list((_json_rows if file.suffix == ".jsonl" else _csv_rows)(file.name, text, faults))
    columns = dict.fromkeys(name for _, row in rows for name in row)
    if not rows or not _columns(file.name, columns, faults):
        if not faults:
            faults.append(error("K0", file.name, "names no image."))
        return []
    lines = [line for where, row in rows if (line := _line(file, where, row, faults))]
    _existing(file.parent, lines, faults)
    return lines


def _csv_rows(name: str, text: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [column.strip() for column in next(reader, [])]
        for column in COLUMNS:
            if columns.count(column) > 1:
                faults.append(error("K0", name, f"column {column!r} stands twice; leave one."))
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if len(row) == len(columns):
                yield where, dict(zip(columns, row, strict=True))
            elif row:
                count = f"{len(row)} fields, expected {len(columns)}, as the first line has"
                faults.append(error("K0", where, f"{count}; quote what has a {delimiter!r} in it."))
    except csv.Error as problem:
        faults.append(error("K0", f"{name}:{reader.line_num}", f"is no line of CSV: {problem}."))


def _json_rows(name: str, text: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = files.parsed(line)
        except ValueError as problem:
            faults.append(error("K0", where, f"is no JSON: {problem}."))
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            faults.append(error("K0", where, f"expected a JSON object, found {line.strip()[:40]}."))


def _columns(name: str, columns: dict[str, None], faults: list[Fault]) -> bool:
    """Whether the needed columns are there; tells of those that are not known."""
    unknown = [c for c in columns if c not in COLUMNS]
    missing = [c for c in NEEDED if c not in columns]
    for column in missing:
        text = f"no column {column!r}.{suggestion(column, unknown)} Found: {listed(columns)}."
        faults.append(error("K0", name, f"{text} Expected {', '.join(NEEDED)}, perhaps "
                            f"{', '.join(COLUMNS[len(NEEDED):])}."))  # fmt: skip
    for column in () if missing else unknown:
        rest = [c for c in COLUMNS if c not in columns]
        text = f"column {column!r} is ignored.{suggestion(column, rest)}"
        faults.append(warning("K9", name, text))
    return not missing


def _line(file: pathlib.Path, where: str, row: dict[str, Any], faults: list[Fault]) -> Line | None:
    values = {column: _text(row.get(column)) for column in COLUMNS}
    label, split = values["label"].lower(), values["split"].lower()
    paths = {c: _below(file.parent, values[c]) for c in ("path", "mask")}
    problems = [
        f"{c} {values[c]!r} lies outside of {file.parent}; put the list into a folder above all "
        "of its images"
        for c, path in paths.items()
        if path is None
    ]
    if not values["path"]:
        problems.append("no path")
    if "\0" in values["path"] + values["mask"]:
        problems.append("a NUL in the name of a file: was the list written as something else?")
    if label not in LABELS:
        problems.append(f"label {label!r}: expected one of {', '.join(LABELS)}")
    if split and split not in SPLITS:
        hint = suggestion(split, SPLITS)
        problems.append(f"split {split!r}: expected one of {', '.join(SPLITS)}, or nothing.{hint}")
    bad = LABELS.get(label, 0)
    if bad and split == "train":
        problems.append("an abnormal image in train: only normal ones are fitted on; write test")
    if bad and values["kind"] == "good":
        problems.append("kind 'good' of an abnormal image: name the kind of its defect, or none")
    if problems:
        faults += [error("K0", where, f"{problem}.") for problem in problems]
        return None
    path, mask = paths["path"] or "", paths["mask"] or ""
    record = Record(
        path=path, label=bad, category=values["category"] or file.stem, group=values["group"],
        kind=(values["kind"] or "bad") if bad else "good", masks=(mask,) if bad and mask else (),
    )  # fmt: skip
    return Line(where=where, record=record, split=split, mask=mask)


def _text(value: Any) -> str:
    """A value of CSV or JSON as text; true is 1."""
    return "" if value is None else str(int(value) if isinstance(value, bool) else value).strip()


def _below(folder: pathlib.Path, path: str) -> str | None:
    """A path relative to the folder, "" for none, None for one outside of it."""
    if not path:
        return ""
    path = os.path.relpath(path, folder) if os.path.isabs(path) else os.path.normpath(path)
    path = path.replace(os.sep, "/")
    return None if path.startswith("../") or path == ".." else path


def _existing(folder: pathlib.Path, lines: list[Line], faults: list[Fault]) -> None:
    """Faults of files that are missing, are no images by their names, or are named twice."""
    there = _Files(folder)
    first: dict[str, str] = {}
    absent: list[Fault] = []
    for line in lines:
        path = line.record.path
        for name in filter(None, (path, line.mask)):
            if name not in there:
                absent.append(error("K8", line.where, f"no file {name!r} in {folder}."))
        if os.path.splitext(path)[1].lower() not in files.IMAGE_SUFFIXES:
            faults.append(error("K9", line.where, f"{path!r}: {files.stray('x' + path)}."))
        if (other := first.setdefault(path, line.where)) != line.where:
            faults.append(error("K14", line.where, f"{path!r} again, as in {other}; remove one."))
    if len(lines) > 1 and not any(line.record.path in there for line in lines):
        text = f"none of its images is there, the first is {lines[0].record.path!r}; paths are "
        absent = [error("K8", lines[0].where, f"{text}relative to {folder}.")]
    faults += absent
