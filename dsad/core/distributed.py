"""Several processes as one program: start-up, agreement, shared errors.

One process per host of a pod (or per GPU of a node) runs the same command; their devices form one
mesh. Everything here is trivial with a single process.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core import paths
from dsad.core.errors import ConfigError, DsadError

T = TypeVar("T")

#: Seconds between two looks for the failure of another process, on a disk and in a bucket.
_LOOK_EVERY, _LOOK_EVERY_REMOTE = 2.0, 10.0


def start(
    *, coordinator: str = "", num_processes: int = 0, process_id: int = -1, auto: bool = False
) -> None:
    """Join the other processes; call before anything asks for a device.

    Args:
      coordinator: HOST:PORT on which process 0 listens; empty and not ``auto``: a single process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      auto: let JAX find all three: TPU pods, SLURM, Open MPI, Kubernetes.

    Raises ConfigError for values that are missing or contradict each other.

    """
    if not coordinator and not auto:
        if num_processes > 0 or process_id >= 0:
            raise ConfigError(
                "--num-processes and --process-id need --coordinator=HOST:PORT, on which process 0 "
                "listens; or leave all three out and give --distributed on a cluster."
            )
        return
    if coordinator and auto:
        raise ConfigError("--distributed finds the coordinator itself: leave out --coordinator.")
    if coordinator:
        _check(coordinator, num_processes, process_id)
    # What simulated pods of CPUs talk through; other platforms have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if auto:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        where = coordinator or "the cluster's coordinator"
        failed = ConfigError(
            f"cannot join {where}: {str(error).splitlines()[0]} Are all processes running the same "
            "command, and is the port open? Without a cluster that JAX knows give "
            "--coordinator=HOST:PORT --num-processes=N --process-id=I."
        )
        failed.code = 3  # the others may only be late
        raise failed from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator: expected HOST:PORT, found {coordinator!r}.")
    if num_processes < 1:
        raise ConfigError(f"--num-processes: expected at least 1, found {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id: expected 0 to {num_processes - 1}, found {process_id}; every process "
            "has a number of its own."
        )


def started() -> bool:
    """Whether this program is one of several processes (or was started as if)."""
    return jax.distributed.is_initialized()


def index() -> int:
    """Number of this process, from 0."""
    return jax.process_index() if started() else 0


def count() -> int:
    """How many processes run this program."""
    return jax.process_count() if started() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks to people."""
    return index() == 0


# --- agreement ------------------------------------------------------------------------------


def gather(array: Any) -> np.ndarray:
    """The host arrays of all processes, (count, ...); all must have one shape and dtype."""
    array = np.asarray(array)
    if count() == 1:
        return array[None]
    # As bytes: on the devices 64-bit numbers would be cut to 32 bits.
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data)).reshape(count(), data.size)
    return np.stack([np.frombuffer(r.tobytes(), array.dtype).reshape(array.shape) for r in rows])


def largest(values: Sequence[float]) -> Any:
    """Element-wise maximum over the processes, as something for ``np.asarray`` to wait for.

    Unlike ``gather`` this returns at once: devices that are busy are not waited for.
    """
    local = np.asarray(values, np.float32)
    if count() == 1:
        return local
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    rows = np.broadcast_to(local, (jax.local_device_count(), len(local)))
    split = NamedSharding(mesh, PartitionSpec("all"))
    found = jax.make_array_from_process_local_data(split, rows)
    return _maximum(found, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=1)
def _maximum(rows: jax.Array, whole: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(rows.max(axis=0), whole)


def gather_objects(value: Any) -> list[Any]:
    """What every process passed, anything JSON can hold, in the order of the processes."""
    if count() == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = gather(np.int64(len(data)))
    # A power of two, since every size compiles a program of its own.
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = gather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def barrier(name: str) -> None:
    """Wait for all processes."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def together(function: Callable[[], T]) -> T:
    """Call a function that is local to each process; if it fails on one, all raise.

    Without this, the processes that succeeded would wait for the failed one in their next
    collective. Raises DsadError with the messages of all processes that failed.
    """
    if count() == 1:
        return function()
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    found = gather_objects(_text(failure) if failure else None)
    told = [f"process {i}: {text}" for i, text in enumerate(found) if text is not None]
    if isinstance(failure, DsadError) and len(set(found)) == 1:
        failure.shared = True
        raise failure  # everyone found the same fault, such as a mistyped key
    if failure is not None and not isinstance(failure, DsadError):
        raise failure  # a defect: with its traceback here, with its message elsewhere
    if told:
        error = DsadError("\n".join(told))
        error.shared = True
        raise error from failure
    return result  # type: ignore[return-value]


def _text(error: BaseException) -> str:
    if isinstance(error, DsadError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def on_main(function: Callable[[], Any]) -> Any:
    """What the function returns on process 0 (anything JSON can hold), on every process.

    Decisions that depend on clocks or on files that change are taken once. Raises like
    ``together``.
    """
    return gather_objects(together(function if is_main() else lambda: None))[0]


# --- shared errors --------------------------------------------------------------------------


@contextlib.contextmanager
def failing_together(directory: epath.PathLike) -> Iterator[None]:
    """Within this block the failure of one process ends all of them, with its message and code.

    A process that fails leaves a note in the directory, which all share, and a thread of every
    other looks for one: those sit in a collective that will never end and cannot be interrupted.
    Process 0 is the last to go: it takes along whoever is left, before they can say why.
    """
    if count() == 1:
        yield
        return
    notes = _Notes(epath.Path(directory))
    if is_main():
        notes.clear()
    barrier("failure notes are cleared")
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(notes, over), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        over.set()
        watcher.join()
        _tell(notes, error)
        raise
    finally:
        over.set()


def _tell(notes: "_Notes", error: BaseException) -> None:
    """Leave a note, or raise what another process says if that is where it began."""
    if isinstance(error, DsadError) and error.shared:
        time.sleep(notes.look_every if is_main() else 0)
        return
    # A failed collective may be the other end of a failure that has a better message.
    time.sleep(0 if isinstance(error, DsadError) else 2 * notes.look_every)
    if found := notes.of_others():
        code, text = found
        time.sleep(notes.look_every if is_main() else 0)
        if text.partition(": ")[2] == str(error):
            return  # all found the same fault
        told = DsadError(text)
        told.code = code
        raise told from error
    notes.leave(error)
    time.sleep((3 if is_main() else 1.5) * notes.look_every)


def _watch(notes: "_Notes", over: threading.Event) -> None:
    while not over.wait(notes.look_every):
        if found := notes.of_others():
            print(f"error: {found[1]}", file=sys.stderr, flush=True)
            time.sleep(2 * notes.look_every if is_main() else 0)
            os._exit(found[0])


class _Notes:
    """Files in which processes say why they fail; the exit code in the first line."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self.own = folder / f"failure-{index()}.txt"
        self.look_every = _LOOK_EVERY_REMOTE if paths.is_remote(folder) else _LOOK_EVERY

    def clear(self) -> None:
        """Remove those of an earlier run."""
        for stale in self.folder.glob("failure-*.txt"):
            stale.unlink()

    def leave(self, error: BaseException) -> None:
        """Say it; a storage that fails, which may be the very error, must not hide the error."""
        code = error.code if isinstance(error, DsadError) else 1
        try:
            paths.write_whole(self.own, f"{code}\n{_text(error)}")
        except Exception as problem:
            print(f"cannot tell the other processes: {problem}", file=sys.stderr, flush=True)

    def of_others(self) -> tuple[int, str] | None:
        """(exit code, message) of another process that failed."""
        try:
            for path in sorted(self.folder.glob("failure-*.txt")):
                code, _, text = path.read_text().partition("\n")
                if path.name != self.own.name and text:
                    return int(code), f"process {path.stem.partition('-')[2]}: {text}"
        except Exception:  # of any storage library; its hiccup is no failure of the run
            return None
        return None


def leave(code: int) -> None:
    """End this process now if it is one of several and failed.

    A clean exit would wait for the others at a barrier that they never reach.
    """
    if code and started() and count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
