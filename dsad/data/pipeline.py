"""The input pipeline: one global sample order, resumable batches of host arrays.

The order (``dsad.data.order``) is the same in all cache modes, for any number of worker processes
and of training processes, and so is the position that a checkpoint keeps: the number of the next
batch. Grain reads the batches ahead, in threads and processes; this is the only module that knows
it, and imports it when a pipeline is made because that takes seconds.
"""

import atexit
import dataclasses
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from dsad.core import batch as batches
from dsad.core.batch import BatchSpec
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import Progress, Source
from dsad.data import canvases as images
from dsad.data.companions import CompanionDraws
from dsad.data.feature_files import FeatureFile
from dsad.data.order import OnePass, Order

CacheMode = Literal["device", "host", "none"]


class _Stream:
    """Rows decoded when they are asked for, by the threads of whichever process asks."""

    def __init__(self, source: Source, spec: BatchSpec, threads: int):
        self.reader, self.spec, self.threads = images.reader_of(source, spec), spec, threads
        self._start()

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pool"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def rows(self, index: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        samples, place = np.unique(index, return_inverse=True)  # references repeat
        arrays = batches.zeros(self.spec.read, len(samples))
        run = self._pool.map if self._pool else map
        for _ in run(
            lambda row: images.fill(arrays, row, self.reader, int(samples[row])),
            range(len(samples)),
        ):
            pass
        return _taken({name: arrays[name] for name in names}, place)


class _Store:
    """Rows gathered from the arrays of ``canvases``."""

    def __init__(self, store: dict[str, Any]):
        self.store = store

    def rows(self, index: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        return _taken({name: self.store[name] for name in names}, index)


def _taken(arrays: Any, index: np.ndarray) -> Any:
    if isinstance(arrays, dict):
        return {name: _taken(part, index) for name, part in arrays.items()}
    return arrays[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Complete:
    """From what is drawn to the whole batch; goes to worker processes."""

    spec: BatchSpec
    source: _Stream | _Store
    columns: dict[str, np.ndarray]
    features: Mapping[str, np.ndarray | FeatureFile]

    def __call__(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return self.spec.complete(drawn, self._rows)

    def _rows(self, index: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        read = [name for name in names if name in self.spec.read]
        rows = self.source.rows(index, read) if read else {}
        rest = [name for name in names if name not in read]
        return rows | _taken(
            batches.selected({**self.columns, "features": self.features}, rest), index
        )


class WorkerBatches:
    """Batches made by worker processes, in the order and with the position of a single process.

    The position is the number of the next batch, whatever the number of workers. Processes start
    with the first batch that is asked for and end with ``close``, with the iterator, or with this
    process, however that ends. Raises DataError of an unreadable file as the worker saw it.
    """

    def __init__(self, dataset: Any, read_options: Any, workers: int, prefetch: int):
        self._dataset, self._read_options = dataset, read_options
        self._workers, self._prefetch = workers, prefetch
        self._next, self._batches, self._closed = 0, None, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._closed:
            raise ValueError("the batches are closed.")
        if self._batches is None:
            self._batches = self._started()
        try:
            batch = next(self._batches)
        except DataError:
            self.close()
            raise
        except RuntimeError as problem:
            self.close()
            if "terminated unexpectedly" not in str(problem):
                raise
            raise DataError(
                f"a process of config.data.workers={self._workers} ended while it read images "
                f"({problem}). It was probably out of memory, or /dev/shm is too small (containers "
                "give it 64 MB): lower config.data.workers, config.data.prefetch or "
                "config.batch_size, or give the container more (docker run --shm-size)."
            ) from problem
        self._next += 1
        return _kept(batch)

    def _started(self) -> Any:
        import grain
        from absl import flags

        # grain reads its own flags, which nobody has parsed in a notebook, a test or dsad's
        # commands: the defaults then.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        rest = self._dataset[self._next :].to_iter_dataset(self._read_options)
        options = grain.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=self._prefetch
        )
        _OPEN.add(self)
        return iter(rest.mp_prefetch(options, worker_init_fn=_settle_worker))

    def get_state(self) -> dict[str, Any]:
        """The position: the number of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position, of any number of workers."""
        self._stop()
        self._next = state["next_index"]

    def _stop(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()
            del batches  # and what it had read ahead
            _wait_for_unlinks()

    def close(self) -> None:
        """End the worker processes."""
        self._closed = True
        self._stop()

    def __del__(self) -> None:
        try:  # noqa: SIM105 - the interpreter may be half gone, and contextlib with it
            self.close()
        except Exception:
            pass


#: Those with workers. They are closed before multiprocessing ends the threads that grain needs to
#: remove its shared memory: the last registered is called first.
_OPEN: "weakref.WeakSet[WorkerBatches]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_OPEN):
        iterator.close()


def _kept(value: Any) -> Any:
    """The same memory without grain's array around it, nested dicts as they are.

    That array removes the name of its memory when it is deleted, which is too late for a batch that
    lives as long as the interpreter; here grain's array goes at once, and the memory with the last
    plain array that maps it.
    """
    from grain.multiprocessing import SharedMemoryArray

    if isinstance(value, dict):
        return {name: _kept(part) for name, part in value.items()}
    if not isinstance(value, SharedMemoryArray):
        return value
    try:
        with open(f"/dev/shm/{value.metadata.name}", "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    except FileNotFoundError:  # a system that has no directory of its shared memory
        return np.array(value)
    return np.ndarray(value.shape, value.dtype, buffer=memory)


def _wait_for_unlinks() -> None:
    """Until grain has removed the shared memory of all deleted arrays, which a thread of it does.

    There is no public way to wait; without its thread there is nothing to wait for.
    """
    from grain.multiprocessing import SharedMemoryArray

    pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        try:
            pool.apply(int)  # its only thread takes the requests in order
        except ValueError:  # ended already
            return


def _settle_worker(number: int, count: int) -> None:
    """Make a worker live exactly as long as its parent wants it to."""
    del number, count
    # A terminal or a job scheduler signals all processes at once, but the training still wants
    # batches until it has saved.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # killed, so nobody else will end this process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Batches in a fixed order.

    ``spec`` describes the batches of the step; ``store`` holds the cached arrays of ``canvases``,
    or None. With cache "device" the batches are what ``BatchSpec.drawn`` says, and the caller
    gathers the rest from the store.
    """

    spec: BatchSpec
    store: dict[str, Any] | None
    samples: int
    batch_size: int
    _order: Order
    _once: OnePass
    _complete: _Complete | None
    _making: int
    _workers: int
    _prefetch: int

    def iterator(self) -> Any:
        """A fresh iterator over this process's batches, without end.

        It has ``get_state`` and ``set_state`` ({"next_index": the next batch's number}, for any
        cache mode, number of workers and of processes) and ``close``, which ends its threads and
        processes. Without workers it is a grain DatasetIterator.
        """
        return self._batches(self._order)

    def one_pass(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Every batch of ``OnePass``, this process's part, and how many rows of it all count."""
        rest = self._batches(self._once)
        try:
            for number, batch in enumerate(rest):
                yield batch, self._once.rows(number)
        finally:
            rest.close()

    @property
    def unaccompanied(self) -> int:
        """Samples for which not a single one of the companions asked for exists."""
        draws = self._order.companions
        return draws.unaccompanied() if draws else 0

    def with_features(self, features: Mapping[str, np.ndarray | FeatureFile]) -> "Pipeline":
        """The same batches with rows of these arrays (N, ...) as their ``features``."""
        spec = dataclasses.replace(self.spec, features=batches.fields_of(features))
        complete, store = self._complete, self.store
        if complete:
            complete = dataclasses.replace(complete, spec=spec, features=features)
        if store is not None:
            store = {**store, "features": features}
        return dataclasses.replace(self, spec=spec, store=store, _complete=complete)

    def _batches(self, order: Order) -> Any:
        import grain

        dataset: Any = grain.MapDataset.source(order)
        if self._complete:
            dataset = dataset.map(self._complete)
        options = grain.ReadOptions(num_threads=self._making, prefetch_buffer_size=self._prefetch)
        if self._workers:
            return WorkerBatches(dataset, options, self._workers, self._prefetch)
        return iter(dataset.to_iter_dataset(options))


def _refuse(samples: int, batch_size: int, process_index: int, process_count: int) -> None:
    if samples < 1:
        raise ConfigError("the training split has no sample; check config.data.")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch size {batch_size}: expected a positive multiple of the {process_count} "
            "processes; every process reads an equal part."
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} does not exist.")


def make_pipeline(
    source: Source,
    spec: BatchSpec,
    *,
    cache: CacheMode,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
    prefetch: int = 2,
    progress: Progress | None = None,
) -> Pipeline:
    """The endless pipeline of this process's part (B = batch_size / process_count) of each batch.

    Batches hold what ``spec`` says, with cache "device" only what is drawn. They run across the
    ends of epochs, nothing is dropped. Process p of P takes the p-th of P equal parts of every
    batch, so that the global batch is the same array for any number of processes. Facts are found
    once per image (by every worker). Of the store only ``rows`` are read, if given. With cache
    "none", ``workers`` processes decode; ``prefetch`` batches are kept ready.
    """
    samples = len(source)
    _refuse(samples, batch_size, process_index, process_count)
    if cache not in ("device", "host", "none"):
        raise ConfigError(f"config.data.cache: expected device, host or none; found {cache!r}.")
    if workers and cache != "none":
        raise ConfigError(f"config.data.workers={workers}: expected 0 with cache {cache!r}.")
    store, complete = None, None
    if cache != "none":
        store = images.canvases(source, spec, rows=rows, progress=progress)
    if cache != "device":
        threads = max(1, images.THREADS // max(1, workers))
        reader = _Store(store) if store else _Stream(source, spec, threads)
        columns = images.columns(source, spec)
        complete = _Complete(spec=spec, source=reader, columns=columns, features={})
    asked = spec.needs.companions
    draws = CompanionDraws(source.records, asked, seed) if asked else None
    orders = (samples, batch_size, seed, process_index, process_count, draws)
    return Pipeline(
        spec=spec, store=store, samples=samples, batch_size=batch_size, _order=Order(*orders),
        _once=OnePass(*orders), _complete=complete,
        # Images are spread over the threads of a batch; a second batch in the making fills the gap
        # that the slowest image of the first one leaves.
        _making=min(2, prefetch) if cache == "none" else 1,
        _workers=workers, _prefetch=prefetch,
    )  # fmt: skip
