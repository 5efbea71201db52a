"""``dsad bench neighbors``: neighbour search beside FAISS and scikit-learn, time and memory."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.bench import _measure
from dsad.core.errors import ConfigError
from dsad.ops.neighbors import certified_share, nearest
from dsad.terminal import console, flags

PEERS = {"faiss": ("FAISS IndexFlatL2", "faiss-cpu"), "sklearn": ("scikit-learn", "scikit-learn")}
DSAD = ("dsad exact", "dsad certified")
#: Queries whose distances are compared with float64.
CHECKED = 128


def main(argv: list[str]) -> int:
    """The command: ``dsad bench neighbors``."""
    command = flags.Command(
        "bench neighbors", "neighbour search beside FAISS and scikit-learn, time, error, memory."
    )
    command.integer("queries", 12544, "Query rows.", at_least=1)
    command.integer("rows", 20000, "Bank rows.", at_least=1)
    command.integer("depth", 384, "Features per row.", at_least=1)
    command.string("k", "1,9", "Numbers of neighbours, separated by commas.")
    command.integer("rounds", 5, "Timed rounds of everything; medians are shown.", at_least=1)
    _, values, _ = command.parse(argv)
    try:
        numbers = [int(k) for k in values.k.split(",")]
    except ValueError as error:
        raise ConfigError(f"--k: expected integers such as 1,9, found {values.k!r}.") from error
    neighbors(values.queries, values.rows, values.depth, numbers, values.rounds)
    return 0


def neighbors(
    queries: int, rows: int, depth: int, numbers: list[int], rounds: int
) -> dict[int, dict[str, _measure.Timing]]:
    """Time every k on Gaussian features; prints a table per k, returns the timings."""
    out = console.console()
    rng = np.random.default_rng(0)
    q, b = (rng.standard_normal((n, depth)).astype(np.float32) for n in (queries, rows))
    machine = _measure.machine()
    operations = 2.0 * queries * rows * depth / machine.operations
    traffic = 4.0 * depth * (queries + rows) / machine.bytes
    result = {}
    for k in numbers:
        makers = _makers().items()
        calls = {name: make(q, b, k) for name, make in makers}
        # Timed first: memory that was freed before would hide growth.
        timed = result[k] = _measure.interleaved(calls, rounds)
        errors = {n: [_error(make, q, b, k, mean) for mean in (0, 30)] for n, make in makers}
        share = certified_share(q, b, k)
        _print(out, f"k = {k}", timed, errors)
        out.print(f"certified without repeating: {share:.1%} of the queries")
    for module, (label, package) in PEERS.items():
        if not _measure.installed(module):
            out.print(_measure.missing(label, package))
    device = jax.devices()[0].device_kind
    out.print(
        f"{queries} queries × {rows} rows × {depth}, {os.cpu_count()} CPUs, {device}; "
        f"medians of {rounds} interleaved rounds. Floors: operations {operations * 1e3:.0f} ms, "
        f"bytes {traffic * 1e3:.1f} ms (plain matmul {machine.operations / 1e9:.0f} GFLOP/s, copy "
        f"{machine.bytes / 1e9:.1f} GB/s). Error: largest relative difference from float64 "
        f"brute force over {min(CHECKED, queries)} queries, features of mean 0 and 30. Memory: "
        "growth of the resident set in the first call, compilation included."
    )
    return result


Search = Callable[[], tuple[Any, Any]]
Maker = Callable[[np.ndarray, np.ndarray, int], Search]


def _makers() -> dict[str, Maker]:
    """Everything that can be timed here: name to (queries, bank, k) to a search."""
    peers = {"faiss": _faiss, "sklearn": _sklearn}
    makers = {PEERS[module][0]: peers[module] for module in PEERS if _measure.installed(module)}
    return makers | {n: functools.partial(_dsad, precision=n.split()[1]) for n in DSAD}


def _faiss(queries: np.ndarray, bank: np.ndarray, k: int) -> Search:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)

    def search() -> tuple[Any, Any]:
        squares, rows = index.search(queries, k)
        return np.sqrt(np.maximum(squares, 0)), rows

    return search


def _sklearn(queries: np.ndarray, bank: np.ndarray, k: int) -> Search:
    found = importlib.import_module("sklearn.neighbors").NearestNeighbors(
        n_neighbors=k, algorithm="brute", n_jobs=-1
    )
    found.fit(bank)
    return lambda: found.kneighbors(queries)


def _dsad(queries: np.ndarray, bank: np.ndarray, k: int, *, precision: Any) -> Search:
    on_device = jnp.asarray(queries), jnp.asarray(bank)
    return lambda: nearest(*on_device, k, precision=precision)


def _error(make: Maker, queries: np.ndarray, bank: np.ndarray, k: int, mean: float) -> float:
    """Largest relative error against float64 on some queries, all being searched as when timed."""
    queries, bank = queries + np.float32(mean), bank + np.float32(mean)
    found = np.asarray(make(queries, bank, k)()[0])[:CHECKED]
    exact = np.empty((len(found), k))
    for row, query in enumerate(queries[:CHECKED].astype(np.float64)):
        squares = np.square(query - bank).sum(axis=1)
        exact[row] = np.sqrt(np.sort(np.partition(squares, k - 1)[:k]))
    return float(np.max(np.abs(found - exact) / exact))


def _print(
    out: Any, title: str, timed: dict[str, _measure.Timing], errors: dict[str, list[float]]
) -> None:
    columns = ("", "ms", "× dsad exact", "first call ms", "memory MB", "error", "at mean 30")
    table = console.table(*columns, title=title, whole=True)
    for name, timing in timed.items():
        first = timing.first
        assert first is not None  # every call was made apart once
        table.add_row(
            name, f"{timing.median * 1e3:.0f}", f"{timing.median / timed[DSAD[0]].median:.2f}",
            f"{first.seconds * 1e3:.0f}", f"{first.growth / 1e6:.0f}",
            *(f"{error:.1e}" for error in errors[name]),
        )  # fmt: skip
    out.print(table)
