"""What an objective computes of every sample once, before the first step: where it is kept."""

import contextlib
import math
import pathlib
import shutil
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath
from rich.console import Console

from dsad.assembly.pretrain import Run
from dsad.core import distributed, hosts, paths
from dsad.core.batch import Batch, Field, shapes
from dsad.core.chips import chip_of
from dsad.core.errors import ConfigError
from dsad.core.mesh import replicated
from dsad.core.platform import SPARED, free_memory
from dsad.core.types import PerSample
from dsad.data.feature_files import FeatureFile
from dsad.terminal import console
from dsad.train.state import TrainState

#: Below the directory of a run: files of features.
FOLDER = "features"


def size(run: Run) -> int:
    """Bytes of the features of all samples."""
    rows = shapes(run.spec.features, run.info.samples)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(rows))


def check_room(run: Run, folder: epath.Path | None = None) -> None:
    """Refuse features that do not fit where they will be kept; ``folder``: the run's, on disk.

    Features of a data set on the devices take memory of the host as well, while they are computed;
    every worker process holds those in memory by itself.
    """
    if not run.spec.features:
        return
    needed, on_disk = size(run), run.config.feature_store == "disk"
    copies = 1 if on_disk else 1 + run.config.data.workers
    if on_disk and run.store is not None:
        raise ConfigError(
            "config.feature_store=disk: expected images that are no array on the devices, found "
            "config.data.cache=device. Set --config.data.cache=host or none, or "
            "--config.feature_store=memory."
        )
    if on_disk and folder is not None and paths.is_remote(folder):
        raise ConfigError(
            f"config.feature_store=disk: expected a --workdir on a disk of this machine, found "
            f"{folder}."
        )
    often = f" ({copies} times, for the workers too)" if copies > 1 else ""
    needed *= copies
    room = {"the memory of this machine": None if on_disk else free_memory()}
    if on_disk and folder is not None:
        room = {f"the disk of {folder}": (paths.free(folder) or 0) + _held(folder)}
    if run.store is not None and (chip := chip_of(run.mesh.devices.flat[0])):
        shard = run.store["features"]
        parts = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                 for x in jax.tree.leaves(shard)]  # fmt: skip
        if sum(parts) > SPARED * chip.hbm_bytes:
            room["a device"] = int(SPARED * chip.hbm_bytes)
            needed = sum(parts)
    for where, free in room.items():
        if free is not None and needed > free:
            raise ConfigError(
                f"the features of {run.info.samples:,} samples take {paths.size(needed)}{often}, "
                f"and {where} has {paths.size(free)} for them. Keep them in files with "
                "--config.feature_store=disk --config.data.cache=host, compute fewer or coarser "
                "ones, or have the objective compute them anew in every step."
            )


def _place(folder: epath.Path) -> pathlib.Path:
    """Where this process has its files."""
    return pathlib.Path(folder) / FOLDER / f"process{distributed.index()}"


def _held(folder: epath.Path) -> int:
    """Bytes of files that are written anew."""
    return sum(512 * file.stat().st_blocks for file in _place(folder).glob("*"))


def discard(folder: epath.Path) -> None:
    """Remove this process's files, which no other start reads."""
    if not paths.is_remote(folder):
        shutil.rmtree(_place(folder), ignore_errors=True)
        with contextlib.suppress(OSError):  # of other processes there may be more
            _place(folder).parent.rmdir()


def computed(
    run: Run,
    state: TrainState,
    batches: Iterable[Batch],
    out: Console,
    folder: epath.Path | None = None,
) -> dict[str, np.ndarray | FeatureFile]:
    """Features (N, ...) of all samples, by name: in memory, or in files below ``folder``.

    Every process holds, or reads, all of them. A run that is resumed computes them again.
    """
    assert isinstance(run.objective, PerSample)
    check_room(run, folder)
    compute = jax.jit(run.objective.per_sample, out_shardings=replicated(run.mesh))
    count, done = run.info.samples, 0
    place: pathlib.Path | None = None
    if run.config.feature_store == "disk" and folder is not None:
        place = _place(folder)
        place.mkdir(parents=True, exist_ok=True)

    def empty(name: str, field: Field) -> np.ndarray | FeatureFile:
        shape = (count, *field.shape)
        if place is None:
            return np.empty(shape, field.dtype)
        return FeatureFile(place / name, shape, field.dtype, create=True)

    arrays = {name: empty(name, field) for name, field in run.spec.features.items()}
    with console.progress(f"computing features, {paths.size(size(run))}", out) as tell:
        tell(0, count, "compiling …")
        for batch in batches:
            rows = jax.tree.map(hosts.whole, compute(state.params, state.extra, batch))
            end = done + len(batch["index"])
            for name, array in arrays.items():
                array[done:end] = rows[name]
            done = end
            tell(done, count, "")
    return arrays
