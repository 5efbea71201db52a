"""What bench topics share: interleaved rounds, memory growth and this machine's two floors."""

import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Timing(NamedTuple):
    """Median seconds of the rounds, seconds of the first call, and its memory growth in bytes."""

    median: float
    first: float
    growth: int


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time every call once per round, in turns; the first call (which compiles) is apart."""
    first: dict[str, tuple[float, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        with Growth() as growth:
            jax.block_until_ready(call())
        first[name] = (time.perf_counter() - start, growth.bytes)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(seconds[name]), *first[name]) for name in calls}


class Growth:
    """Largest growth of the resident set within the block, polled (0 where /proc is missing)."""

    bytes = 0

    def __enter__(self) -> "Growth":
        self._before, self._stop = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, _resident() - self._before)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, _resident() - self._before)


def _resident() -> int:
    status = pathlib.Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def floors(flops: float, moved: float) -> tuple[float, float, str]:
    """Seconds that this many operations and moved bytes take at least, and the measured rates."""
    side = 2048
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    rate = 2 * side**3 / _fastest(lambda: jax.block_until_ready(product(matrix)))
    block = np.ones(2**26, np.uint8)
    target = np.empty_like(block)
    bandwidth = 2 * block.size / _fastest(lambda: np.copyto(target, block))
    text = f"plain matmul {rate / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s"
    return flops / rate, moved / bandwidth, text


def _fastest(call: Callable[[], Any], rounds: int = 5) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
