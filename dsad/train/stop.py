"""When a run is asked to stop: SIGTERM, Ctrl-C, a preemption notice."""

import os
import signal
import threading
from typing import Any, ClassVar

from jax.experimental import multihost_utils

from dsad.core import distributed


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after the current step.

    With several processes JAX itself catches SIGTERM, which is also how clouds announce a
    preemption, and finds the next step that all processes can stop at. Its handler must not be
    replaced there; a Ctrl-C is passed on to it, as an exception in one process would leave the
    others waiting. ``code`` is what a shell would give to the last signal, 0 without one.
    """

    code: ClassVar[int] = 0

    def __init__(self) -> None:
        self.requested, StopSignal.code = False, 0
        self._old: dict[int, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop before the step that follows ``step``; ask once after every step."""
        if distributed.count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGINT, signal.SIGTERM)[: 2 if distributed.count() == 1 else 1]
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        del frame
        self.requested, StopSignal.code = True, 128 + number
        if signal.SIGTERM not in self._old:
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(number, self._old[number])  # a second signal acts at once

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
