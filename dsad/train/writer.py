"""Metric files: one JSON object per line, and TensorBoard events without TensorFlow."""

import json
import math
from collections.abc import Mapping

from etils import epath


class MetricWriter:
    """Writes scalars to ``<workdir>/metrics.jsonl`` and ``<workdir>/tensorboard``.

    On a resumed run, lines after ``resume_step`` belong to steps that will be repeated; they are
    dropped, so that the file has one line per logged step. A ``quiet`` writer writes nothing: of
    several processes one writes.
    """

    def __init__(self, workdir: str | epath.PathLike, *, resume_step: int = 0, quiet: bool = False):
        self.quiet = quiet
        if quiet:
            return
        # Imported here: protobuf costs time that no other command needs to pay.
        from tensorboardX import SummaryWriter

        self.path = epath.Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._lines = self.path.open("a")
        self._events = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"), purge_step=resume_step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line; flushed, so that a killed run keeps what it logged."""
        if self.quiet:
            return
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self.quiet:
            return
        self._lines.close()
        self._events.close()


def read_metrics(path: str | epath.PathLike) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``; a last line cut by a kill is left out."""
    path = epath.Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def non_finite(scalars: Mapping[str, float]) -> list[str]:
    """Names of the scalars that are NaN or infinite."""
    return [name for name, value in scalars.items() if not math.isfinite(value)]
