"""Metric files: one JSON object per line, and TensorBoard events without TensorFlow."""

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from dsad.core import paths
from dsad.core.metric_files import parts_of, read_metrics

#: Bytes after which an object in a bucket is left alone and a new one begins.
_PART = 2**20


class MetricWriter:
    """Writes scalars to ``<workdir>/metrics.jsonl`` and ``<workdir>/tensorboard``.

    On a disk every line is appended at once, so that a killed run keeps what it logged. A bucket
    has no append: there the newest lines gather in numbered parts beside the file, written every
    ``interval`` seconds of ``clock`` and by ``flush``, and joined by ``read_metrics`` and by the
    next start. Call ``flush`` before a checkpoint is saved: then no step that it contains is
    missing.

    On a resumed run, lines after ``resume_step`` belong to steps that will be repeated; they are
    dropped, so that there is one line per logged step. A ``quiet`` writer writes nothing: of
    several processes one writes. Raises WorkdirError if the directory cannot be written, also on a
    full disk.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        resume_step: int = 0,
        quiet: bool = False,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.quiet = quiet
        if quiet:
            return
        folder = paths.directory(workdir)
        self.path = folder / "metrics.jsonl"
        self._interval, self._clock, self._flushed = interval, clock, clock()
        with paths.writing(self.path):
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            paths.write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            if (parts := parts_of(self.path)).is_dir():
                parts.rmtree()
            events = folder / "tensorboard"
            events.mkdir(parents=True, exist_ok=True)
            stamp = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            if paths.is_remote(folder):
                parts.mkdir(parents=True, exist_ok=True)
                self._lines: Any = _Parts(lambda n: parts / f"{n:06d}.jsonl")
                self._events: Any = _Parts(lambda n: events / f"{stamp}.{n:06d}", _first_event())
            else:
                self._lines = _Appending(self.path)
                self._events = _Appending(events / stamp, _first_event())
            self._events.write(_restart_event(resume_step + 1))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics."""
        if self.quiet:
            return
        with paths.writing(self.path, "The run stopped."):
            self._lines.write((json.dumps({"step": step, **scalars}) + "\n").encode())
            self._events.write(_scalar_event(step, scalars))
            if self._clock() - self._flushed >= self._interval:
                self.flush()

    def flush(self) -> None:
        """Bring what was written to where a killed process cannot lose it."""
        if self.quiet:
            return
        with paths.writing(self.path, "The run stopped."):
            self._flushed = self._clock()
            self._lines.flush()
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        if self.quiet:
            return
        with paths.writing(self.path):
            try:
                self._lines.close()
            finally:
                self._events.close()


class _Appending:
    """A file on a disk that grows."""

    def __init__(self, path: epath.Path, first: bytes = b""):
        self._file = path.open("ab")
        self.write(first)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _Parts:
    """Numbered objects of a bucket; the newest is written anew until it is large enough."""

    def __init__(self, name: Callable[[int], epath.Path], first: bytes = b""):
        self._name, self._first, self._number = name, first, 0
        self._data, self._dirty = bytearray(first), False

    def write(self, data: bytes) -> None:
        self._data += data
        self._dirty = True

    def flush(self) -> None:
        if not self._dirty:
            return
        self._name(self._number).write_bytes(bytes(self._data))
        self._dirty = False
        if len(self._data) > _PART:
            self._number, self._data = self._number + 1, bytearray(self._first)

    def close(self) -> None:
        self.flush()


# TensorBoard's records, written here and not in tensorboardX's thread: that one dies silently when
# a disk is full, and whoever logs next waits for it forever.


def _scalar_event(step: int, scalars: Mapping[str, float]) -> bytes:
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    return _event(step=step, summary=Summary(value=values))


def _restart_event(step: int) -> bytes:
    """Hides what earlier files hold of this step and of later ones."""
    from tensorboardX.proto.event_pb2 import SessionLog  # type: ignore[attr-defined]

    return _event(step=step, session_log=SessionLog(status=SessionLog.START))


def _first_event() -> bytes:
    return _event(file_version="brain.Event:2")


def _event(**fields: Any) -> bytes:
    # Imported here: protobuf costs time that no other command needs to pay.
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)


def non_finite(scalars: Mapping[str, float]) -> list[str]:
    """Names of the scalars that are NaN or infinite."""
    return [name for name, value in scalars.items() if not math.isfinite(value)]
