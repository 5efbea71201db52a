"""Checkpoints of state, data position and config as one unit."""

import contextlib
import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from dsad.core import digests, distributed, paths, tree
from dsad.core.config import Settings, field
from dsad.core.errors import WorkdirError
from dsad.train import _damage, _orbax
from dsad.train.state import TrainState

#: What marks a checkpoint in a bucket as complete; on a disk its directory's name does.
_COMMITTED = "commit_success.txt"
#: Lies beside the checkpoints of every run.
_MARK = "dsad"
#: Ends the name of a checkpoint in the making on a disk.
_MAKING = ".orbax-checkpoint-tmp"
#: Checkpoints in the making, and those that are being deleted.
_LEFTOVER = re.compile(rf"\d+{re.escape(_MAKING)}.*|deleted-\d+")


class CheckpointConfig(Settings, place="config.checkpoint"):
    """When states are saved and which stay.

    Attributes:
      every: steps between two checkpoints.
      minutes: a checkpoint at the latest so long after the last one; 0: by steps only.
      keep: so many of the newest stay.
      permanent: those at steps divisible by it stay for good; 0: none.

    """

    every: int = field(500, at_least=1)
    minutes: float = field(0.0, at_least=0)
    keep: int = field(2, at_least=1)
    permanent: int = field(0, at_least=0)

    def removed(self, steps: list[int]) -> list[int]:
        """Which of these checkpoints do not stay."""
        temporary = [s for s in sorted(steps) if not (self.permanent and s % self.permanent == 0)]
        return temporary[: -self.keep]


class Checkpointer:
    """Asynchronous checkpoints below ``<workdir>/checkpoints``, on a disk or in a bucket.

    A checkpoint that was not completely written is never seen, and removed when the directory is
    opened; old ones disappear in one instant as well. ``read_only`` leaves the directory as it is,
    also what a running training is just writing there, and reads for this process alone: others
    need not take part. ``say`` takes notes for the user.

    Raises WorkdirError if there is nothing to read, or if the directory cannot be written; what
    fails in the background is raised by the next ``save`` or ``wait``.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.directory = paths.directory(workdir) / "checkpoints"
        self.config = config
        self.read_only = read_only
        self.say = say
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._told = False
        self._saved_at: float | None = None
        self._making: epath.Path | None = None
        self._noted_wait = False
        if read_only and not self.directory.is_dir():
            raise WorkdirError(f"{self.directory}: no such directory; expected a pretraining run.")
        if not read_only:
            distributed.on_main(self._open)
            distributed.together(self._shared)
        self._orbax = _orbax.checkpointer(alone=read_only, before_commit=self._write_digests)

    # --- when

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` updates is saved whatever the time; pure."""
        permanent = self.config.permanent
        return step % self.config.every == 0 or bool(permanent and step % permanent == 0)

    def overdue(self, now: float) -> bool:
        """Whether the clock (seconds) asks for a checkpoint; counts from its first call.

        Processes may differ in their answers: one asks, all do what it says. While a checkpoint is
        still being written the answer is no, so that the devices never wait for the disk.
        """
        if self._saved_at is None:
            self._saved_at = now
        late = now - self._saved_at >= 60 * self.config.minutes
        return self.config.minutes > 0 and late and not self.busy

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    # --- writing

    def check(self, abstract: TrainState, total_steps: int) -> None:
        """Refuse, before anything is computed, a disk that cannot hold the checkpoints.

        Raises WorkdirError if ``keep`` and one in the making do not fit; notes if the permanent
        ones of ``total_steps`` will not.
        """
        left = paths.free(self.directory)
        if left is None:
            return
        each = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
        there = len(self.steps())
        wanted = self.config.keep + 1
        advice = "Free space there, lower config.checkpoint.keep, or choose another --workdir."
        if left < each * (wanted - there):
            raise WorkdirError(
                f"{self.directory}: {paths.size(left)} are free, and config.checkpoint.keep="
                f"{self.config.keep} and one in the making need {paths.size(each * wanted)} "
                f"({paths.size(each)} each, {there} there). {advice}"
            )
        stay = total_steps // self.config.permanent if self.config.permanent else 0
        if left < each * (wanted + stay - there):
            self.say(
                f"{self.directory}: {paths.size(left)} are free; the {stay} permanent checkpoints "
                f"of {paths.size(each)} (config.checkpoint.permanent) will not all fit."
            )

    def save(
        self,
        state: TrainState,
        data: dict[str, Any],
        meta: dict[str, Any],
        now: float | None = None,
    ) -> None:
        """Copy the state to the host and start writing it.

        ``data`` is the iterator's position, ``meta`` anything JSON can hold, ``now`` the time for
        ``overdue``. Waits for a checkpoint that is still being written, and notes a long wait.
        """
        step = int(state.step)
        begin = time.monotonic()
        self.wait()
        self._note_wait(time.monotonic() - begin)
        self._saved_at = self._saved_at if now is None else now
        items = _orbax.saved(_items(state), {"data": data, **meta})
        path = self._path(step)
        self._making = path if paths.is_remote(path) else path.with_name(f"{step}{_MAKING}")
        try:
            self._orbax.save(path, args=items)
        except Exception as error:
            raise self._unwritten(error) from error
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Block until the started save is complete; raises WorkdirError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._failure = self._failure, None
        if error is not None:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Wait, then release the writer threads."""
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception as error:  # what failed a save may come up here once more
                if not self._told:
                    raise self._unwritten(error) from error

    def _finish(self) -> None:
        """In the background: the checkpoint becomes whole, then the older ones may go."""
        try:
            self._orbax.wait_until_finished()
            if distributed.is_main():
                for step in self.config.removed(self.steps()):
                    _remove(self._path(step))
        except BaseException as error:
            self._failure = error

    def _write_digests(self) -> None:
        """In the background of process 0: all files are there, and nobody sees them yet."""
        assert self._making is not None
        digests.write(self._making)

    def _open(self) -> None:
        """Leftovers go, and an unwritable directory is found before anything is computed."""
        with paths.writing(self.directory, "Choose another --workdir, or mend this one."):
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / _MARK).write_text(
                "checkpoints of dsad pretrain\n"
            )  # a bucket has no empty directories
            for path in list(self.directory.iterdir()):
                half = path.name.isdigit() and not _whole(path)
                if half or _LEFTOVER.fullmatch(path.name):
                    path.rmtree()

    def _shared(self) -> None:
        if not (self.directory / _MARK).exists():
            raise WorkdirError(
                f"{self.directory}: this process does not see what process 0 wrote there; expected "
                "a --workdir on a disk or in a bucket that all hosts share."
            )

    def _unwritten(self, error: BaseException) -> WorkdirError:
        self._told = True
        try:
            latest = self.latest()
        except Exception as second:  # the disk itself is gone
            kept = f"The checkpoints there cannot be listed either: {paths.cause(second)}."
        else:
            kept = "No checkpoint is complete yet."
            if latest is not None:
                kept = f"The last complete checkpoint is of step {latest}; --resume goes on there."
        return paths.failure(self.directory, error, f"The run stopped. {kept}")

    def _note_wait(self, seconds: float) -> None:
        if seconds > 1 and not self._noted_wait:
            self._noted_wait = True
            self.say(
                f"training waited {seconds:.1f} s for the previous checkpoint to be written; a "
                "larger config.checkpoint.every avoids that."
            )

    # --- reading

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        found = [p for p in self.directory.iterdir() if p.name.isdigit()]
        return sorted(int(p.name) for p in found if _whole(p))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without any."""
        return max(self.steps(), default=None)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """State on the shardings of ``abstract``, and the meta dict with its ``data`` entry.

        Any mesh and any number of processes may have written it. Raises WorkdirError for another
        model's checkpoint, by paths, for a damaged one, with the way back, and for one that could
        not be read this time.
        """
        step = self._require(step)
        self._verify(step)
        try:
            found = self._orbax.restore(
                self._path(step), args=_orbax.restored(_items(abstract), meta=True)
            )
            return TrainState(**found["state"]), found["meta"]
        except Exception as error:
            if lines := self._mismatch(step, abstract):
                raise WorkdirError(
                    f"{self._path(step)}: the checkpoint does not fit this config's model:\n{lines}"
                ) from error
            more = "Use more devices, or spread the state over them with config.mesh.fsdp."
            raise self._unread(step, error, more) from error

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, Any] | None:
        """Likewise, of the newest checkpoint that is not damaged; None where there is none at all.

        A damaged one is put aside as ``damaged-STEP`` (in a bucket: removed), which is said. All
        processes call it. Raises WorkdirError if no older one is left.
        """
        while (step := distributed.on_main(self.latest)) is not None:
            try:
                return self.restore(abstract, step)
            except WorkdirError as error:
                if not (error.older_one and error.shared):
                    raise
                reason = str(error).partition(" Older ones: ")[0]
                self.say(f"{reason} Going on from the one before.")
                path = self._path(step)
                distributed.on_main(lambda p=path: _put_aside(p))
        return None

    def weights(self, step: int | None = None) -> tuple[Any, Any, int]:
        """(params, extra, step) as host arrays, whatever devices wrote them.

        Raises WorkdirError like ``restore``.
        """
        step = self._require(step)
        self._verify(step, "state/")
        device = jax.local_devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        try:
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding),
                _orbax.shapes(self._path(step) / "state"),
            )
            found = self._orbax.restore(self._path(step), args=_orbax.restored(target))["state"]
            params, extra = jax.device_get((found["params"], found["extra"]))
        except Exception as error:
            more = f"All of it is read through one device, {device}: use one with more memory."
            raise self._unread(step, error, more) from error
        return params, extra, step

    def _verify(self, step: int, below: str = "") -> None:
        """Raise WorkdirError unless the files are those that were written.

        Processes that restore together share the work, and fail together.
        """
        part, parts = (0, 1) if self.read_only else (distributed.index(), distributed.count())
        problem = None
        try:
            digests.check(self._path(step), below, part=part, parts=parts)
        except Exception as error:
            problem = self._unread(step, error)
            problem.__cause__ = error
        told = [problem and (str(problem), problem.older_one)]
        if not self.read_only:
            told = distributed.gather_objects(told[0])
        if problems := list(filter(None, told)):
            failure = WorkdirError(problems[0][0])
            failure.shared, failure.older_one = True, all(older for _, older in problems)
            raise failure from problem

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _mismatch(self, step: int, abstract: TrainState) -> str:
        """What differs between a checkpoint and a state; nothing if it cannot be read at all."""
        try:
            shapes = _orbax.shapes(self._path(step) / "state")
        except Exception:
            return ""
        return "\n".join(tree.diff(_items(abstract), shapes)[:20])

    def _unread(self, step: int, error: BaseException, more_memory: str = "") -> WorkdirError:
        path, older = self._path(step), []
        there = False
        with contextlib.suppress(OSError):  # it, or the whole disk, may be gone by now
            there = _whole(path)
            older = [s for s in self.steps() if s < step]
        return _damage.unread(path, error, older if there else None, more_memory)

    def _require(self, step: int | None) -> int:
        found = self.steps()
        if not found:
            raise WorkdirError(f"{self.directory}: no complete checkpoint found.")
        if step is not None and step not in found:
            have = ", ".join(map(str, found))
            raise WorkdirError(f"{self.directory}: no checkpoint of step {step}; found {have}.")
        return found[-1] if step is None else step


def _whole(path: epath.Path) -> bool:
    return (path / _COMMITTED).exists() if paths.is_remote(path) else path.is_dir()


def _remove(path: epath.Path) -> None:
    """Delete a checkpoint so that a kill in between never leaves a part that looks whole."""
    if paths.is_remote(path):
        (path / _COMMITTED).unlink()
        path.rmtree()
        return
    gone = path.rename(path.with_name(f"deleted-{path.name}"))
    with contextlib.suppress(OSError):  # a reader has it open on a network disk: at the next start
        gone.rmtree()


def _put_aside(path: epath.Path) -> None:
    if paths.is_remote(path):
        _remove(path)
        return
    place = path.with_name(f"damaged-{path.name}")
    if place.exists():
        place.rmtree()
    path.rename(place)


def _items(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
