"""Detectors that train: their batches, their steps, and results that outlive a stop."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from dsad.assembly.pretrain import lengths
from dsad.core import batch as batches
from dsad.core import hosts, paths, tree
from dsad.core.detection import Adopts, Detector, Measures, TrainsOnData
from dsad.core.errors import ConfigError, DataError, StoppedError
from dsad.core.mesh import replicated
from dsad.core.platform import free_memory
from dsad.core.types import Tree
from dsad.data.order import Order
from dsad.detectors._features import select
from dsad.evaluation import stamp
from dsad.evaluation.fitting import TrainingData
from dsad.evaluation.hosts import Hosts
from dsad.models.weights.names import nest
from dsad.terminal.console import training_note
from dsad.train.loop import Loop, train
from dsad.train.optim import lengths_in_state
from dsad.train.state import TrainState
from dsad.train.step import Step, make_step, placed_key
from dsad.train.stop import StopSignal

_FILE = "trained.safetensors"
_BACKBONE, _DIGEST = "backbone", "sha256"


class Program(NamedTuple):
    """``fresh(backbone, measured, lengths, key)`` makes the state that ``step`` goes on from."""

    fresh: Any
    step: Step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """``localize(train=)``: runs the objective of a detector, once per category and seed.

    Trainings whose batches and backbones have equal shapes share compiled programs: number of
    images, length, seed and weights are arguments of them.
    """

    programs: dict[Any, Program] = dataclasses.field(default_factory=dict)

    def __call__(self, detector: Detector, data: TrainingData) -> Tree:
        """{"params", "extra"} after the last step, from ``data.folder`` if it is there already.

        Raises ConfigError for a batch size that the devices do not divide, NonFiniteError for a
        loss that is none, and StoppedError if it is asked to stop; nothing is kept then.
        """
        assert isinstance(detector, TrainsOnData)
        file = data.folder / _FILE if data.folder else None
        processes = Hosts.of(data.mesh)
        if file and processes.from_main(file.exists()):
            kept = processes.together(lambda: _read(file))
            if kept is not None:
                return kept
        trained = jax.tree.map(hosts.whole, self._train(detector, data))
        if file:
            processes.together(lambda: _write(file, trained) if processes.main else None)
        return trained

    def _train(self, detector: TrainsOnData, data: TrainingData) -> Tree:
        recipe, mesh = detector.recipe, data.mesh
        if recipe.batch_size % mesh.size:
            raise ConfigError(
                f"config.detector.recipe.batch_size: expected a multiple of the {mesh.size} "
                f"devices, found {recipe.batch_size}."
            )
        measured = {}
        if isinstance(detector, Measures):
            measured = detector.measured(data.features, data.images)
        samples, network = _samples(detector, data)
        count = len(jax.tree.leaves(samples)[0])
        drawn = _Batches(samples, count, recipe.batch_size, data)
        program = self._program(detector, drawn.specs, (network, measured), mesh)
        per_epoch, total = lengths(recipe, count)
        key = placed_key(data.key, mesh)
        counts = np.asarray([per_epoch, total], np.float32)
        state = program.fresh(network, measured, counts, key)
        loop = Loop(
            step=program.step, batches=drawn, store=None, key=key, mesh=mesh, total_steps=total,
            batch_size=recipe.batch_size, log_every=max(1, total // 100),
            settings="config.detector.recipe.optim",
            on_log=training_note(
                lambda n, of, note: data.progress(n, of, f"steps  {note}".rstrip())
            ),
        )  # fmt: skip
        state, complete = train(loop, state)
        if not complete:
            stopped = StoppedError(
                f"stopped at step {int(state.step)} of {total} of the detector of {data.title}, "
                f"seed {data.seed}; the same command again trains only this one and the next."
            )
            stopped.code = StopSignal.code or stopped.code
            raise stopped
        extra = {name: part for name, part in state.extra.items() if name != _BACKBONE}
        return {"params": state.params, "extra": extra}

    def _program(self, detector: TrainsOnData, specs: Tree, given: Any, mesh: Any) -> Program:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        leaves, structure = jax.tree.flatten((specs, shapes))
        name = (detector, mesh, structure, tuple((x.shape, x.dtype) for x in leaves))
        if name not in self.programs:
            self.programs[name] = _built(detector, specs, shapes, mesh)
        return self.programs[name]


def _built(detector: TrainsOnData, specs: Tree, given: tuple[Any, Tree], mesh: Any) -> Program:
    recipe, (network, measured) = detector.recipe, given
    objective = detector.objective(specs, network)
    tx, rate = lengths_in_state(recipe.optim, recipe.batch_size)

    def fresh(network: Any, measured: Tree, lengths: jax.Array, key: jax.Array) -> TrainState:
        params, extra = objective.init(key)
        extra = {**extra, **measured}
        own = jax.tree.map(jnp.copy, network)  # the steps give away what they are given
        if isinstance(objective, Adopts):
            params, extra = objective.adopt(params, extra, own)
        elif network is not None:
            extra = {**extra, _BACKBONE: own}
        opt_state: Any = tx.init(params)
        opt_state = {**opt_state, "lengths": lengths}
        step = jnp.zeros((), jnp.int32)
        return TrainState(step=step, params=params, extra=extra, opt_state=opt_state)

    everywhere = replicated(mesh)
    numbers = jax.ShapeDtypeStruct((2,), jnp.float32)
    shapes = jax.eval_shape(fresh, network, measured, numbers, jax.eval_shape(jax.random.key, 0))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    step = make_step(objective, tx, rate, abstract, mesh=mesh)
    return Program(jax.jit(fresh, out_shardings=everywhere), step)


def _samples(detector: Any, data: TrainingData) -> tuple[dict[str, Any], Any]:
    """What a batch has of each image, on the host, and the backbone that its steps need."""
    if detector.traits.trains_on == "images":
        if data.backbone is None:
            raise ConfigError(
                "config.backbone: this detector trains through it; expected a backbone that is a "
                "pytree of arrays. Register its class with jax.tree_util.register_dataclass."
            )
        parts = list(data.images())
        if not sum(map(len, parts)):
            raise _nothing(data)
        return _sized(np.concatenate(parts)), data.backbone
    if detector.traits.trains_on == "labelled":
        return _labelled(data), data.network
    names, rows, index = (*detector.layers, *detector.traits.tokens), [], []
    for batch in data.features:
        valid = np.asarray(batch.valid, bool)
        index.append(np.asarray(batch.index)[valid])
        rows.append([hosts.whole(x)[valid] for x in select(batch.maps, names)])
        if len(rows) == 1:
            _check_room(data, rows[0])
        finite = [np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in rows[-1]]
        if not np.all(finite):
            broken = index[-1][~np.all(finite, axis=0)].tolist()
            raise DataError(
                f"{data.title}: NaN or infinite features of {batch.category} samples {broken}; "
                "expected finite ones. Check the weights."
            )
    if not sum(map(len, index)):
        raise _nothing(data)
    # The order of the source does not matter.
    places = np.split(
        np.argsort(np.argsort(np.concatenate(index))), np.cumsum([len(i) for i in index])[:-1]
    )
    columns = {}
    for name in reversed(names):
        columns[name] = _column([row.pop() for row in rows], places)
    return {"features": columns}, None


def _sized(images: np.ndarray) -> dict[str, np.ndarray]:
    size = np.tile(np.asarray(images.shape[1:3], np.int32), (len(images), 1))
    return {"image": images, "size": size}


def _labelled(data: TrainingData) -> dict[str, np.ndarray]:
    """Images, labels and masks; there have to be normal and anomalous ones."""
    assert data.labelled is not None
    rows = list(data.labelled())
    if not rows:
        raise _nothing(data)
    label = np.asarray([row.label for row in rows], np.int32)
    if len(np.unique(label)) < 2:
        raise DataError(
            f"{data.title}: this detector learns from normal and anomalous images, found "
            f"{np.sum(label == 0)} normal and {np.sum(label == 1)} anomalous. Name a data set with "
            "labelled defects, such as visa:fewshot, or set config.shots."
        )
    return {
        **_sized(np.stack([row.image for row in rows])),
        "label": label,
        "mask": np.stack([row.mask for row in rows]),
        "masked": np.asarray([row.masked for row in rows], np.int32),
    }


def _check_room(data: TrainingData, rows: Sequence[np.ndarray]) -> None:
    """Refuse more features than fit into memory, from those of the first images."""
    needed = sum(x.nbytes for x in rows) // max(len(rows[0]), 1) * data.count
    free = free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"{data.title}: this detector trains on the features of {data.count:,} images at once, "
            f"which take {paths.size(needed)}, and the memory of this machine has "
            f"{paths.size(free)} for them. Lower config.evaluation.image_size or config.shots, "
            "name fewer config.detector.layers, or fewer categories of one model for all."
        )


def _column(parts: list[np.ndarray], places: Sequence[np.ndarray]) -> np.ndarray:
    """One array with parts (n, ...) at their ``places``; a part goes as soon as it is copied."""
    whole = np.empty((sum(map(len, places)), *parts[0].shape[1:]), parts[0].dtype)
    for where in reversed(places):
        whole[where] = parts.pop()
    return whole


def _nothing(data: TrainingData) -> DataError:
    return DataError(f"{data.title}: expected images to train a detector on, found 0.")


class _Batches:
    """Endless whole batches of samples in memory: this process's rows, a new order every epoch."""

    def __init__(self, samples: Tree, count: int, size: int, data: TrainingData) -> None:
        high, low = stamp.key_data(data.key)
        self._samples, self._rows = samples, hosts.own_rows(data.mesh, size)
        self._order, self._at = Order(count, size, (high << 32) | low, 0, 1), 0
        number = batches.Field((), np.int32)
        fields = jax.tree.map(lambda x: batches.Field(x.shape[1:], x.dtype), samples)
        self.specs = batches.shapes({**fields, "index": number, "epoch": number}, size)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        drawn = {n: x[self._rows] for n, x in self._order[self._at].items()}
        self._at += 1
        return {**jax.tree.map(lambda x: x[drawn["index"]], self._samples), **drawn}

    def get_state(self) -> dict[str, Any]:
        return {"at": self._at}

    def set_state(self, state: dict[str, Any], /) -> None:
        self._at = state["at"]


def _write(file: epath.Path, trained: Tree) -> None:
    arrays = {n: np.asarray(x, order="C") for n, x in tree.flatten(trained).items()}
    paths.write_whole(file, safetensors.numpy.save({**arrays, _DIGEST: _digest(arrays)}))


def _read(file: epath.Path) -> Tree | None:
    """What was trained; None, with a warning, if the file is damaged."""
    try:
        arrays = safetensors.numpy.load(file.read_bytes())
        whole = np.array_equal(arrays.pop(_DIGEST), _digest(arrays))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        whole = False
    if whole:
        return {"params": {}, "extra": {}, **nest(arrays)}
    warnings.warn(f"{file} is damaged; trained again.", RuntimeWarning, stacklevel=2)
    return None


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 over names, shapes and values, as bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.shape} {x.dtype} ".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)
