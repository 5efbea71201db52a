"""The step of a config as shapes: nothing is allocated, on devices that need not exist."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.assembly import pretrain
from dsad.core.errors import ConfigError
from dsad.core.flops import training_flops_per_image
from dsad.core.mesh import batch_sharding, make_mesh
from dsad.core.platform import planned_for
from dsad.core.types import Objective, RunInfo, Specs
from dsad.data import facts as image_facts
from dsad.train.cache import abstract_store
from dsad.train.optim import make_optimizer, make_schedule
from dsad.train.state import TrainState, abstract_state
from dsad.train.step import Step, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRun:
    """The parts of ``pretrain.Run`` that decide what the devices do, as shapes and shardings.

    ``inputs`` and ``store`` are what the step takes after the state; ``batch`` is the batch behind
    them. ``total_steps`` is None where the number of samples is not known.
    """

    config: pretrain.PretrainConfig
    objective: Objective
    mesh: Mesh
    abstract: TrainState
    step: Step
    inputs: Any
    store: Any
    batch: Any
    samples: int | None
    total_steps: int | None

    @property
    def platform(self) -> str:
        """Of the mesh's devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def held(self) -> dict[str, int]:
        """Bytes of one device's part of what stays there from step to step, by kind."""
        state = self.abstract
        kinds = {
            "weights": state.params, "optimiser": state.opt_state,
            "statistics, teacher and other state": (state.extra, state.step),
            "batch": self.inputs, "data set on the device": self.store,
        }  # fmt: skip
        found = {k: sum(map(_part_bytes, jax.tree.leaves(tree))) for k, tree in kinds.items()}
        return {kind: size for kind, size in found.items() if size}

    def lower(self) -> jax.stages.Lowered:
        """The step traced and lowered for the platform of its mesh."""
        with self._tracing():
            return self.step.lower(self.abstract, self.inputs, self.store)

    def model_flops_per_image(self) -> float:
        """See ``core.flops.training_flops_per_image``."""
        with self._tracing():
            params, extra = self.abstract.params, self.abstract.extra
            return training_flops_per_image(self.objective, params, extra, self.batch)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(planned_for(self.platform))
            if self.config.precision != "default":
                precision = jax.default_matmul_precision(self.config.precision)
                stack.enter_context(precision)
            yield


def abstract_run(
    config: Any, devices: list[Any], *, samples: int | None = None, classes: int = 1
) -> AbstractRun:
    """The run that ``dsad pretrain`` would make of a config on these devices, without data.

    Raises ConfigError for what cannot be built, and where the data would live on the devices but
    ``samples``, their number, is not given.
    """
    cfg, module, method = pretrain.parse(config)
    mesh = make_mesh(cfg.mesh, devices)
    if cfg.batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size: expected a multiple of the {mesh.size} devices, "
            f"found {cfg.batch_size}."
        )
    # Lengths only shift constants of the schedule, so any will do where nobody knows.
    per_epoch, total = pretrain.lengths(cfg, samples or cfg.batch_size)
    info = RunInfo(
        total_steps=total, batch_size=cfg.batch_size, samples=samples or cfg.batch_size,
        classes=classes,
    )  # fmt: skip
    objective = module.build(method, info)
    schedule = make_schedule(
        cfg.optim, batch_size=cfg.batch_size, steps_per_epoch=per_epoch, total_steps=total
    )
    tx = make_optimizer(cfg.optim, schedule)
    specs = Specs(batch_size=cfg.batch_size, canvas=cfg.data.canvas)
    with planned_for(mesh.devices.flat[0].platform):
        abstract = abstract_state(
            objective, tx, specs, mesh, cfg.mesh.min_fsdp_size, cfg.mesh.rules
        )
    names = image_facts.check(getattr(objective, "facts", ()))
    batch = _batch(cfg.batch_size, cfg.data.canvas, names, batch_sharding(mesh))
    inputs, store, fetch = batch, None, None
    if cfg.data.cache == "device":
        if samples is None:
            raise ConfigError(
                "config.data.cache=device keeps all images on the devices; say how many with "
                "--samples=N."
            )
        stored = pretrain.stored_shapes(samples, cfg.data.canvas, names)
        store, fetch = abstract_store(stored, mesh)
        inputs = {name: batch[name] for name in ("index", "epoch")}
    step = make_step(
        objective, tx, schedule, abstract, mesh=mesh, seed=cfg.seed, fetch=fetch,
        accumulate=cfg.accumulate,
    )  # fmt: skip
    return AbstractRun(
        config=cfg, objective=objective, mesh=mesh, abstract=abstract, step=step, inputs=inputs,
        store=store, batch=batch, samples=samples,
        total_steps=total if samples is not None or cfg.steps else None,
    )  # fmt: skip


def _part_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _batch(rows: int, canvas: int, names: Any, sharding: Any) -> dict[str, Any]:
    """What ``data.pipeline`` yields for so many rows."""
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    shapes = {**pretrain.stored_shapes(rows, canvas, names), "index": number, "epoch": number}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
