"""Checkpoints of state, data position and config as one unit; the only importer of orbax."""

import dataclasses
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsad.core import tree
from dsad.core.errors import WorkdirError
from dsad.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Every so many steps, the last ``keep``; steps divisible by ``permanent`` stay (0: none)."""

    every: int = 500
    keep: int = 2
    permanent: int = 0


class Checkpointer:
    """Asynchronous checkpoints below ``<workdir>/checkpoints``.

    A checkpoint that was not completely written is never seen by ``latest`` or ``restore``.
    ``read_only`` leaves the directory as it is, also what a running training is just writing
    there. Raises WorkdirError if there is nothing to read.
    """

    def __init__(
        self, workdir: str | epath.PathLike, config: CheckpointConfig, *, read_only: bool = False
    ):
        self.directory = epath.Path(os.path.expanduser(workdir)).resolve() / "checkpoints"
        self.config = config
        if read_only and not self.directory.is_dir():
            raise WorkdirError(f"{self.directory}: no such directory; expected a pretraining run.")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.permanent or None,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Start saving; ``data`` is the iterator's position, ``meta`` anything JSON can hold."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_items(state)),  # type: ignore[call-arg]
            meta=ocp.args.JsonSave({"data": data, **meta}),  # type: ignore[call-arg]
        )
        self._manager.save(int(state.step), args=items, force=True)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """State on the shardings of ``abstract``, and the meta dict with its ``data`` entry."""
        step = self._require(step)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_items(abstract)),  # type: ignore[call-arg]
                    meta=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as error:
            raise WorkdirError(
                f"{self.directory}/{step}: the checkpoint does not fit this config's model:\n"
                f"{self._mismatch(step, abstract) or error}"
            ) from error
        return TrainState(**found["state"]), found["meta"]

    def weights(self, step: int | None = None) -> tuple[Any, Any, int]:
        """(params, extra, step) as host arrays, whatever devices wrote them."""
        step = self._require(step)
        shapes = self._shapes(step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), shapes
        )
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),  # type: ignore[call-arg]
        )["state"]
        params, extra = jax.device_get((found["params"], found["extra"]))
        return params, extra, step

    def _shapes(self, step: int) -> Any:
        with ocp.StandardCheckpointer() as reader:
            return reader.metadata(self.directory / str(step) / "state").item_metadata.tree

    def _mismatch(self, step: int, abstract: TrainState) -> str:
        def describe(x: Any) -> str:
            return f"{tuple(x.shape)} {x.dtype}"

        return "\n".join(tree.diff(_items(abstract), self._shapes(step), describe)[:20])

    def _require(self, step: int | None) -> int:
        step = self.latest() if step is None else step
        if step is None:
            raise WorkdirError(f"{self.directory}: no complete checkpoint found.")
        if step not in self._manager.all_steps():
            have = ", ".join(str(s) for s in sorted(self._manager.all_steps()))
            raise WorkdirError(f"{self.directory}: no checkpoint of step {step}; found {have}.")
        return step

    def wait(self) -> None:
        """Block until every started save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the writer threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
