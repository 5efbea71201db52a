"""What bench topics share: interleaved rounds, memory growth, peers and the two floors."""

import contextlib
import functools
import importlib
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsad.terminal import console


def installed(module: str) -> bool:
    """Whether there is such a module, which is then imported: that is not to be timed."""
    if importlib.util.find_spec(module) is None:
        return False
    importlib.import_module(module)
    return True


def missing(label: str, package: str) -> str:
    """What is printed instead of a peer's row."""
    return f"{label}: not installed: pip install {package}"


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
    with growing() as growth:
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
    made = {name: Timing(None, []) for name in calls}
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
    """Largest growth of the resident set, in bytes."""

    bytes = 0


@contextlib.contextmanager
def growing() -> Iterator[Growth]:
    """The growth within the block, polled."""
    before, growth = resident(), Growth()

    def look(_: float = 0.0) -> None:
        growth.bytes = max(growth.bytes, resident() - before)

    with console.every(0.005, look):
        yield growth
    look()


def resident() -> int:
    """Resident memory of this process in bytes; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
