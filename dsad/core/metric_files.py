"""What a run logged: one JSON object per line, in a bucket in several parts."""

import json

from etils import epath

from dsad.core import paths
from dsad.core.errors import WorkdirError


def read_metrics(path: str | epath.PathLike) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl`` and of its parts in a bucket, in order of steps.

    A last line cut by a kill is left out; raises WorkdirError for any other that is no JSON.
    """
    path = paths.directory(path)
    rows = _read(path)
    if paths.is_remote(path) and (parts := parts_of(path)).is_dir():
        # A kill while a start joins the parts may leave lines in both.
        seen = {row["step"] for row in rows}
        later = [row for part in sorted(parts.iterdir()) for row in _read(part)]
        rows += [row for row in later if row["step"] not in seen]
    return rows


def parts_of(path: epath.Path) -> epath.Path:
    """The folder beside a ``metrics.jsonl`` that holds its newest lines in a bucket."""
    return path.with_name(path.name + ".parts")


def _read(path: epath.Path) -> list[dict[str, float]]:
    lines = path.read_text().split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise WorkdirError(
                    f"{path}: line {number} is not JSON ({error}); mend or remove that line."
                ) from error
    return rows
