"""The one training loop of every objective."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dsad.core import distributed
from dsad.core.mesh import place_batch
from dsad.train.checkpoint import Checkpointer
from dsad.train.log import Clock, Log, OnLog, Work
from dsad.train.state import TrainState
from dsad.train.step import Step
from dsad.train.stop import StopSignal
from dsad.train.writer import MetricWriter

#: Steps that may be in flight besides the one being dispatched; the devices never wait for the
#: host, and no more batches than these lie in their memory.
_AHEAD = 1


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
      key: of the run, on the mesh.
      mesh: devices.
      total_steps: updates after which the run is complete.
      batch_size: images per update over all hosts, for images/s.
      log_every: updates per line of metrics.
      settings: the config group of the optimiser's keys, for messages.
      writer: metric files, or None.
      checkpointer: where states go, and when; None: the caller keeps the last one.
      meta: stored with every checkpoint.
      on_log: called with (step, total, scalars) after each logged line, and without scalars once
        the first step is done, which also compiles.
      clock: continued from the checkpoint's meta on a resumed run.
      work: what an image costs to compute, for the log.
      probe: measures a state, for the lines of step 0, of every ``probe_every``-th and of the last.
      now: seconds, for checkpoints by time.

    """

    step: Step
    batches: DataIterator
    store: Any
    key: jax.Array
    mesh: Mesh
    total_steps: int
    batch_size: int
    log_every: int
    settings: str = "config.optim"
    writer: MetricWriter | None = None
    checkpointer: Checkpointer | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    on_log: OnLog = lambda step, total, scalars: None
    clock: Clock = dataclasses.field(default_factory=Clock)
    work: Work = dataclasses.field(default_factory=Work)
    probe: Callable[[TrainState], dict[str, float]] | None = None
    probe_every: int = 0
    now: Callable[[], float] = time.monotonic


def train(loop: Loop, state: TrainState) -> tuple[TrainState, bool]:
    """Run until ``total_steps``, or until SIGTERM, Ctrl-C or a preemption notice asks to stop.

    Returns the state and whether the run is complete; either way the last state is saved, if any.
    Raises NonFiniteError naming step and metrics, with the last good checkpoint kept.
    """
    first = step = saved = int(state.step)
    log = _log(loop)
    if first == 0 and loop.probe:
        log.line(0, _probed(loop, state))
    with StopSignal() as stop:
        while step < loop.total_steps and not stop.reached(step):
            inputs = _next(loop)
            with jax.transfer_guard("disallow"):
                state, scalars = loop.step(state, inputs, loop.store, loop.key)
            step += 1
            log.add(step, scalars)
            if step == first + 1:
                log.start_clock()  # the first step also compiles
                loop.on_log(step, loop.total_steps, {})
            log.throttle(_AHEAD)
            saving = step < loop.total_steps and _saves(loop, step)
            probing = loop.probe and (step % loop.probe_every == 0 or step == loop.total_steps)
            if saving or probing:
                log.flush(keep=1)  # a line due at the step before is timed by that step
                # A checkpoint needs to know that its own step was finite, and so does a probe.
                log.flush(keep=0, also=functools.partial(_probed, loop, state) if probing else None)
            elif step > first + 1 and step % loop.log_every == 1 % loop.log_every:
                # The line of the step before, with this one in flight: fetching never drains the
                # devices.
                log.flush(keep=1)
            if saving:
                _save(loop, state)
                saved = step
        log.flush(keep=0)
        log.finish(step)
        if loop.checkpointer is not None:
            if step > saved:
                _save(loop, state)
            loop.checkpointer.wait()
    return state, step >= loop.total_steps


def _log(loop: Loop) -> Log:
    def kept() -> str:
        latest = None
        if loop.checkpointer is not None:
            loop.checkpointer.wait()
            latest = loop.checkpointer.latest()
        return f"the checkpoint of step {latest}" if latest is not None else "no checkpoint"

    return Log(
        total_steps=loop.total_steps, batch_size=loop.batch_size, every=loop.log_every,
        writer=loop.writer, settings=loop.settings, kept=kept, clock=loop.clock, work=loop.work,
        on_log=loop.on_log,
    )  # fmt: skip


def _probed(loop: Loop, state: TrainState) -> dict[str, float]:
    """What the probe says of a state; the step is done, and the next one waits."""
    assert loop.probe is not None
    start = time.perf_counter()
    values = loop.probe(state)
    seconds = time.perf_counter() - start
    loop.clock.stalled += seconds
    return {**values, "probe_seconds": seconds}


def _next(loop: Loop) -> Any:
    start = time.perf_counter()
    batch = next(loop.batches)
    loop.clock.waited += time.perf_counter() - start
    return place_batch(batch, loop.mesh)


def _saves(loop: Loop, step: int) -> bool:
    """Whether there is a checkpoint after this step; the same answer on every process."""
    if loop.checkpointer is None:
        return False
    if loop.checkpointer.due(step):
        return True
    if distributed.count() == 1 or not loop.checkpointer.config.minutes:
        return loop.checkpointer.overdue(loop.now())
    # Clocks differ: process 0 decides. Agreeing waits for the devices, as a line of metrics does.
    if step % loop.log_every:
        return False
    return bool(distributed.gather(np.int8(loop.checkpointer.overdue(loop.now())))[0])


def _save(loop: Loop, state: TrainState) -> None:
    assert loop.checkpointer is not None
    start = time.perf_counter()
    if loop.writer is not None:
        loop.writer.flush()  # a checkpoint never holds a step whose line may still be lost
    meta = {**loop.meta, "clock": loop.clock.saved()}
    loop.checkpointer.save(state, loop.batches.get_state(), meta, now=loop.now())
    loop.clock.stalled += time.perf_counter() - start
