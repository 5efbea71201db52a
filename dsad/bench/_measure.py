"""What bench topics share: flags, interleaved rounds, memory growth, peers and the two floors."""

import functools
import importlib
import importlib.util
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import FlagValues
from rich.table import Table

from dsad.core.errors import ConfigError
from dsad.terminal.flags import Command


def parsed(command: Command, argv: list[str]) -> tuple[Any, FlagValues]:
    """Config and flags of a topic; ConfigError for other arguments."""
    config, values, rest = command.parse(argv)
    if rest:
        raise ConfigError(f"dsad {command.name}: unexpected argument {rest[0]!r}.")
    return config, values


def table(title: str | None, *columns: str) -> Table:
    """An empty table: a column of labels, the others numbers."""
    made = Table(title=title)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return made


# --- peers ----------------------------------------------------------------------------------


def installed(module: str) -> bool:
    """Whether there is such a module, which is then imported: that is not to be timed."""
    if importlib.util.find_spec(module) is None:
        return False
    importlib.import_module(module)
    return True


def missing(label: str, package: str) -> str:
    """What is printed instead of a peer's row."""
    return f"{label}: not installed: pip install {package}"


# --- time and memory ------------------------------------------------------------------------


class Run(NamedTuple):
    """One call: wall and CPU seconds, growth of the resident set in bytes, what was returned."""

    seconds: float
    cpu: float
    growth: int
    result: Any


class Timing(NamedTuple):
    """The first call, which compiles, if it was made apart, and one run per round."""

    first: Run | None
    rounds: list[Run]

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(run.seconds for run in self.rounds)

    @property
    def result(self) -> Any:
        """What the last round returned."""
        return self.rounds[-1].result


def timed(call: Callable[[], Any], *, keep: bool = True) -> Run:
    """Run a call until its arrays are there; without ``keep`` its result is dropped."""
    with Growth() as growth:
        start, busy = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(call())
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return Run(seconds, busy, growth.bytes, result if keep else None)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    first: Collection[str] | None = None,
    keep: bool = False,
    tell: Callable[[int, str, Run], None] | None = None,
) -> dict[str, Timing]:
    """Time every call once per round, in turns.

    ``first``: the calls that are made once before, apart, because they compile (None: all).
    ``tell`` hears of every run: its round from 1 (0 for the first calls), its name, and it.
    """
    made: dict[str, Timing] = {name: Timing(None, []) for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if number == 0 and first is not None and name not in first:
                continue
            run = timed(call, keep=keep)
            if number == 0:
                made[name] = Timing(run, [])
            else:
                made[name].rounds.append(run)
            if tell is not None:
                tell(number, name, run)
    return made


class Growth:
    """Largest growth of the resident set within the block, in bytes, polled."""

    bytes = 0

    def __enter__(self) -> "Growth":
        self._before, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident() - self._before)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, resident() - self._before)


def resident() -> int:
    """Resident memory of this process in bytes; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- floors ---------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Float32 operations per second of a plain matmul, and bytes per second of a copy.

    A copy reads and writes every byte, so its traffic is twice its size.
    """

    operations: float
    bytes: float


@functools.cache
def machine() -> Machine:
    """Measured once, on the default device and, for the copy, in this process's memory."""
    side = 2048
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    block = np.ones(2**27, np.uint8)
    target = np.empty_like(block)
    return Machine(
        2 * side**3 / _fastest(lambda: product(matrix)),
        2 * block.size / _fastest(lambda: np.copyto(target, block)),
    )


def _fastest(call: Callable[[], Any]) -> float:
    return min(run.seconds for run in interleaved({"": call}, 5)[""].rounds)
