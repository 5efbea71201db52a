"""The one training loop of every objective."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dsad.core.errors import ConfigError, NonFiniteError
from dsad.core.mesh import place_batch
from dsad.train.checkpoint import Checkpointer
from dsad.train.state import TrainState
from dsad.train.step import Step
from dsad.train.writer import MetricWriter, non_finite

OnLog = Callable[[int, int, dict[str, float]], None]


class DataIterator(Protocol):
    """Host batches with a position that can be saved."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any], /) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What a run consists of besides its state.

    Attributes:
      step: the compiled step.
      batches: host inputs of the step, with a position.
      store: device-resident data, or None.
      mesh: devices.
      total_steps: updates after which the run is complete.
      batch_size: images per update over all hosts, for images/s.
      log_every: updates per line of metrics.
      writer: metric files.
      checkpointer: where states go.
      checkpoint_every: updates per checkpoint.
      meta: stored with every checkpoint.
      on_log: called with (step, total, scalars) after each logged line.

    """

    step: Step
    batches: DataIterator
    store: Any
    mesh: Mesh
    total_steps: int
    batch_size: int
    log_every: int
    writer: MetricWriter
    checkpointer: Checkpointer
    checkpoint_every: int
    meta: dict[str, Any]
    on_log: OnLog = lambda step, total, scalars: None

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.checkpoint_every < 1:
            raise ConfigError("config.log_every and config.checkpoint.every: expected at least 1.")


def train(loop: Loop, state: TrainState) -> tuple[TrainState, bool]:
    """Run until ``total_steps``, or until SIGTERM or SIGINT asks to stop.

    Returns the state and whether the run is complete; either way the last state is saved.
    Raises NonFiniteError naming step and metrics, with the last good checkpoint kept.
    """
    first = step = saved = int(state.step)
    log = _Log(loop)
    with _StopSignal() as stop:
        while step < loop.total_steps and not stop.requested:
            inputs = place_batch(next(loop.batches), loop.mesh)
            with jax.transfer_guard("disallow"):
                state, scalars = loop.step(state, inputs, loop.store)
            step += 1
            log.add(step, scalars)
            if step == first + 1:
                log.start_clock()  # the first step also compiles
            saving = step % loop.checkpoint_every == 0 and step < loop.total_steps
            if saving:
                log.flush(keep=0)  # a checkpoint needs to know that its own step was finite
            elif step > first + 1 and step % loop.log_every == 1 % loop.log_every:
                # The line of the step before, with this one in flight: fetching never drains the
                # devices.
                log.flush(keep=1)
            if saving:
                loop.checkpointer.save(state, loop.batches.get_state(), loop.meta)
                saved = step
        log.flush(keep=0)
        log.finish(step)
        if step > saved:
            loop.checkpointer.save(state, loop.batches.get_state(), loop.meta)
        loop.checkpointer.wait()
    return state, step >= loop.total_steps


class _Log:
    """Holds device scalars until they are fetched, checked and written."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.pending: list[tuple[int, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.clock = time.perf_counter()
        self.steps_timed = 0

    def add(self, step: int, scalars: Any) -> None:
        self.pending.append((step, scalars))

    def start_clock(self) -> None:
        jax.block_until_ready(self.pending[-1][1])
        self.clock, self.steps_timed = time.perf_counter(), -1  # the first is not timed

    def flush(self, keep: int) -> None:
        ready = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(ready) :]
        for step, scalars in zip([s for s, _ in ready], _fetch(ready), strict=True):
            if bad := non_finite(scalars):
                self.loop.checkpointer.wait()
                latest = self.loop.checkpointer.latest()
                kept = f"checkpoint of step {latest}" if latest is not None else "no checkpoint"
                raise NonFiniteError(
                    f"step {step}: {', '.join(bad)} became non-finite; the run stopped and kept "
                    f"the {kept}. Lower config.optim.lr or lengthen config.optim.warmup_epochs."
                )
            self.rows.append(scalars)
            self.steps_timed += 1
            if step % self.loop.log_every == 0 or step == self.loop.total_steps:
                self._write(step)

    def finish(self, step: int) -> None:
        """The line of an interval that a stop cut short."""
        if self.rows:
            self._write(step)

    def _write(self, step: int) -> None:
        row = {k: float(np.mean([r[k] for r in self.rows])) for k in self.rows[0]}
        row["lr"] = self.rows[-1]["lr"]
        seconds = time.perf_counter() - self.clock
        if self.steps_timed > 0 and seconds > 0:
            row["images_per_s"] = self.steps_timed * self.loop.batch_size / seconds
        self.rows, self.clock, self.steps_timed = [], time.perf_counter(), 0
        self.loop.writer.write(step, row)
        self.loop.on_log(step, self.loop.total_steps, row)


def _fetch(ready: list[tuple[int, Any]]) -> list[dict[str, float]]:
    host = jax.device_get([scalars for _, scalars in ready])
    return [{k: float(v) for k, v in row.items()} for row in host]


class _StopSignal:
    """Turns SIGTERM and the first SIGINT into a request to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._old[number])  # a second signal acts at once

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
