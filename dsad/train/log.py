"""The lines of metrics: device scalars fetched late, and what the time went to.

On every line, besides the objective's scalars (means over the line's steps; ``lr`` of the last):

    images_per_s            images of all devices per second of wall time
    images_per_s_per_chip   the same per device
    step_ms                 wall time per update
    input_wait_ms           of it, waiting for the next batch
    model_gflops_per_chip   matrix products and convolutions of the model, forward and backward,
                            without recomputation, in 10^9 per second and device
    mfu                     that as a share of the device's peak (where the peak is known)
    peak_memory_mib         most memory in use on a device so far (of the process, on CPUs)
    goodput                 share of the wall time since the run was first started, with pauses and
                            repeated steps, in which updates were computed that still count
    probe_seconds           what the measurement of the state took, on lines that have one

Of several processes, memory is that of the fullest and the wait that of the slowest one, both as
they were at the line before: to ask for them now would wait for the devices.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dsad.core import distributed
from dsad.core.errors import NonFiniteError
from dsad.train.writer import MetricWriter, non_finite

OnLog = Callable[[int, int, dict[str, float]], None]


class Work:
    """What the computing of an image amounts to, for the log.

    ``flops_per_image`` gives the floating-point operations of the model for an image, forward and
    backward. It is called at once in a thread, since it may trace the model again, while the first
    step is compiled. ``peak_flops``: of one device per second; 0 where it is not known.
    """

    def __init__(self, flops_per_image: Callable[[], float] | None = None, peak_flops: float = 0.0):
        self.peak_flops = peak_flops
        self._found: Future[float] | None = None
        if flops_per_image is not None:
            with_thread = ThreadPoolExecutor(1)
            self._found = with_thread.submit(flops_per_image)
            with_thread.shutdown(wait=False)

    @property
    def flops_per_image(self) -> float:
        """The number, waited for; 0 where nobody can tell."""
        return self._found.result() if self._found else 0.0


class Clock:
    """Where the seconds of a run went; continued after a restart from ``saved``."""

    def __init__(self, saved: dict[str, float] | None = None):
        saved = saved or {}
        self.started = saved.get("started", time.time())
        self.productive = saved.get("productive_s", 0.0)
        self.mark = time.perf_counter()
        self.waited = self.stalled = 0.0

    def saved(self) -> dict[str, float]:
        """What goes into a checkpoint."""
        return {"started": self.started, "productive_s": self.productive}

    def restart(self) -> None:
        """Begin an interval: what was before it (compiling, reading) computed no update."""
        self.mark, self.waited, self.stalled = time.perf_counter(), 0.0, 0.0

    def interval(self) -> tuple[float, float]:
        """End the interval and begin the next: its seconds, and those spent waiting for input.

        Time in which a checkpoint or a probe held up the loop is not part of either.
        """
        seconds = time.perf_counter() - self.mark - self.stalled
        waited = self.waited
        self.productive += max(0.0, seconds - waited)
        self.restart()
        return seconds, waited

    def goodput(self) -> float:
        """Productive seconds by wall time since the first start, at most 1."""
        return min(1.0, self.productive / max(time.time() - self.started, 1e-9))


@dataclasses.dataclass(kw_only=True)
class Log:
    """Holds device scalars until they are fetched, checked and written."""

    total_steps: int
    batch_size: int
    every: int
    writer: MetricWriter | None
    settings: str
    kept: Callable[[], str]
    clock: Clock
    work: Work
    on_log: OnLog
    pending: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    steps_timed: int = 0
    asked: Any = None

    def add(self, step: int, scalars: Any) -> None:
        """Take the scalars of a step that may still be running."""
        self.pending.append((step, scalars))

    def start_clock(self) -> None:
        """After the first step, which also compiles and is not timed."""
        jax.block_until_ready(self.pending[-1][1])
        self.clock.restart()
        self.steps_timed = -1

    def throttle(self, ahead: int) -> None:
        """Wait until at most ``ahead`` steps are in flight: each holds its batch in memory."""
        if len(self.pending) > ahead:
            jax.block_until_ready(self.pending[-1 - ahead][1])

    def line(self, step: int, row: dict[str, float]) -> None:
        """Write a line and tell it."""
        if self.writer is not None:
            self.writer.write(step, row)
        self.on_log(step, self.total_steps, row)

    def flush(self, keep: int, also: Callable[[], dict[str, float]] | None = None) -> None:
        """Fetch, check and write all but the last ``keep`` steps.

        ``also`` is called when all of them were finite; the line of the last one holds the result.
        Raises NonFiniteError naming step and metrics, before anything of that step is saved.
        """
        ready = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(ready) :]
        host = jax.device_get([scalars for _, scalars in ready])
        for (step, _), row in zip(ready, host, strict=True):
            scalars = {k: float(v) for k, v in row.items()}
            if bad := non_finite(scalars):
                raise NonFiniteError(
                    f"step {step}: {', '.join(bad)} became non-finite; the run stopped and kept "
                    f"{self.kept()}. Lower {self.settings}.lr or lengthen "
                    f"{self.settings}.warmup_epochs."
                )
            self.rows.append(scalars)
            self.steps_timed += 1
            further = also() if also and step == ready[-1][0] else {}
            if further or step % self.every == 0 or step == self.total_steps:
                self._write(step, further)

    def finish(self, step: int) -> None:
        """The line of an interval that a stop cut short."""
        if self.rows:
            self._write(step, {})

    def _write(self, step: int, further: dict[str, float]) -> None:
        row = {k: float(np.mean([r[k] for r in self.rows])) for k in self.rows[0]}
        row["lr"] = self.rows[-1]["lr"]
        waited = 0.0
        if self.steps_timed > 0:
            seconds, waited = self.clock.interval()
            row |= self._speed(seconds)
            waited *= 1e3 / self.steps_timed
        asked = distributed.largest([waited, peak_memory() / 2**20])
        late = asked if distributed.count() == 1 or self.asked is None else self.asked
        self.asked = asked
        worst, memory = np.asarray(late).tolist()
        if "step_ms" in row:
            row["input_wait_ms"] = worst
        row["peak_memory_mib"] = memory
        row["goodput"] = self.clock.goodput()
        self.rows, self.steps_timed = [], 0
        self.line(step, row | further)

    def _speed(self, seconds: float) -> dict[str, float]:
        speed = self.steps_timed * self.batch_size / seconds
        row = {
            "images_per_s": speed,
            "images_per_s_per_chip": speed / jax.device_count(),
            "step_ms": 1e3 * seconds / self.steps_timed,
        }
        if cost := self.work.flops_per_image:
            flops = row["images_per_s_per_chip"] * cost
            row["model_gflops_per_chip"] = flops / 1e9
            if self.work.peak_flops:
                row["mfu"] = flops / self.work.peak_flops
        return row


def peak_memory() -> float:
    """Bytes in use at most so far, of the fullest local device; on CPUs those of the process."""
    found = [d.memory_stats() for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in found if s and "peak_bytes_in_use" in s]
    if peaks:
        return float(max(peaks))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
