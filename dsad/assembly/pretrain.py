"""A pretraining run from its config, without data: what the devices are going to do."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import ml_collections
from jax.sharding import Mesh

from dsad.core import batch as batches
from dsad.core import config as core_config
from dsad.core import distributed
from dsad.core.batch import BatchSpec
from dsad.core.config import Settings, field
from dsad.core.errors import ConfigError
from dsad.core.flops import training_flops_per_image
from dsad.core.mesh import MeshConfig, batch_sharding, make_mesh
from dsad.core.platform import planned_for
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Objective, PerSample, Record, RunInfo
from dsad.data import base as data_base
from dsad.data import facts as image_facts
from dsad.evaluation.probe import HeldOut, ProbeConfig, hold_out
from dsad.train.cache import Gather, abstract_store, fetch_with
from dsad.train.checkpoint import CheckpointConfig
from dsad.train.optim import make_optimizer, make_schedule
from dsad.train.state import TrainState, abstract_state
from dsad.train.step import Step, make_step, placed_key


class PretrainConfig(Settings, place="config"):
    """Everything of a run but its objective, whose keys belong to the method.

    Attributes:
      seed: of all random draws: weights, order of the images, views.
      batch_size: images per update over all devices.
      epochs: length of the training in passes over the images, unless ``steps`` is set.
      steps: length of the training in updates; 0: ``epochs`` sets it.
      accumulate: parts that a batch is computed in, one after the other, to save memory.
      log_every: updates per line of metrics.
      pictures: images that the report of the run shows as the objective sees them, at the first and
        at the last update; 0: none.
      init_from: earlier weights to start from: a run, a file, or a hub name; empty: none;
        "random": none, for an objective that asks for some.
      feature_store: where features lie that an objective computes of every sample once, unless
        ``data.cache`` has them on the devices: in "memory", or on the "disk" of the run.
      precision: of matrix products in float32: "default" is the device's fastest.
      compilation_cache: folder that keeps compiled programs for the next start; empty: none.

    """

    seed: int = field(0, at_least=0)
    batch_size: int = field(256, at_least=1)
    epochs: float = field(400.0, above=0)
    steps: int = field(0, at_least=0)
    accumulate: int = field(1, at_least=1)
    log_every: int = field(10, at_least=1)
    pictures: int = field(4, at_least=0)
    init_from: str = ""
    feature_store: Literal["memory", "disk"] = "memory"
    precision: Literal["default", "high", "highest"] = "default"
    compilation_cache: str = ""
    data: data_base.DataConfig = data_base.DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()


def default_config(objective: str) -> ml_collections.ConfigDict:
    """Every key of a pretraining run with its default, for config files to change."""
    module = core_config.resolve("objectives", objective)
    config = ml_collections.ConfigDict(core_config.as_dict(PretrainConfig()))
    config.objective = {"name": objective, **core_config.as_dict(module.Config())}
    return config.lock()


def parse(config: Any) -> tuple[PretrainConfig, Any, Any]:
    """(run config, objective module, objective config) from nested dicts; strict."""
    values = dict(core_config.require(config, "objective", "configs/ds2.py").items())
    method = dict(values.pop("objective").items())
    module = core_config.resolve("objectives", method.pop("name"))
    run = core_config.build_dataclass(PretrainConfig, values)
    return run, module, core_config.build_dataclass(module.Config, method, "config.objective")


def lengths(config: PretrainConfig | Recipe, samples: int) -> tuple[float, int]:
    """Updates per epoch and of the whole run.

    No sample is dropped, so an epoch may be a fraction of updates, except where the published
    schedule is followed.
    """
    per_epoch = samples / config.batch_size
    if config.optim.published_schedule:
        per_epoch = float(max(1, samples // config.batch_size))
    return per_epoch, config.steps or max(1, math.ceil(config.epochs * per_epoch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a run has to know of its data: ``samples`` is None where nobody can tell."""

    samples: int | None
    classes: int = 1

    @classmethod
    def of(cls, records: Sequence[Record]) -> "DataFacts":
        """Those of the images that are trained on."""
        return cls(samples=len(records), classes=len({r.category for r in records}))


def held_out(cfg: PretrainConfig, records: Sequence[Record]) -> HeldOut | None:
    """Which of the images that a config names are kept from the training; None without a probe."""
    return hold_out(records, cfg.probe, cfg.seed) if cfg.probe.every else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run that decide what the devices do, as shapes, shardings and functions.

    Attributes:
      spec: of the batches.
      abstract: the training state.
      inputs, store: what ``step`` takes between the state and the ``key``; without a cache on the
        devices the inputs are the batch, and ``store`` and ``gather``, see ``train.cache``, None.

    """

    config: PretrainConfig
    objective: Objective
    mesh: Mesh
    info: RunInfo
    spec: BatchSpec
    tx: Any
    schedule: Any
    abstract: TrainState
    step: Step
    inputs: Any
    store: Any
    gather: Gather | None
    data: DataFacts

    @property
    def total_steps(self) -> int | None:
        """None where the number of samples is not known."""
        known = self.data.samples is not None or self.config.steps
        return self.info.total_steps if known else None

    @functools.cached_property
    def key(self) -> jax.Array:
        """Of all random draws, on the devices."""
        return placed_key(jax.random.key(self.config.seed), self.mesh)

    @property
    def batch(self) -> Any:
        """The whole batch."""
        return batches.shapes(self.spec.whole, self.info.batch_size, batch_sharding(self.mesh))

    @property
    def platform(self) -> str:
        """Of the mesh's devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    def model_flops_per_image(self) -> float:
        """See ``core.flops.training_flops_per_image``."""
        with self.tracing():
            params, extra = self.abstract.params, self.abstract.extra
            return training_flops_per_image(self.objective, params, extra, self.batch)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Within it, programs are traced for the devices of the mesh, as the config says."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(planned_for(self.platform))
            if self.config.precision != "default":
                stack.enter_context(jax.default_matmul_precision(self.config.precision))
            yield


def assemble(config: Any, devices: list[Any] | None, data: DataFacts) -> Run:
    """Mesh, objective, optimiser and step of a config; nothing is read, allocated or compiled.

    ``devices`` need not exist; None takes those that are there. Raises ConfigError for what cannot
    be built, and where the data would live on the devices but their number is not known.
    """
    cfg, module, method = parse(config)
    mesh = make_mesh(cfg.mesh, devices)
    if cfg.batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size: expected a multiple of the {mesh.size} devices, "
            f"found {cfg.batch_size}."
        )
    # Lengths only shift constants of the schedule, so any will do where nobody knows.
    per_epoch, total = lengths(cfg, data.samples or cfg.batch_size)
    info = RunInfo(
        total_steps=total, batch_size=cfg.batch_size, samples=data.samples or cfg.batch_size,
        classes=data.classes,
    )  # fmt: skip
    objective: Objective = module.build(method, info)
    schedule = make_schedule(
        cfg.optim, batch_size=cfg.batch_size, steps_per_epoch=per_epoch, total_steps=total
    )
    tx = make_optimizer(cfg.optim, schedule)
    with planned_for(mesh.devices.flat[0].platform):
        abstract = abstract_state(objective, tx, mesh, cfg.mesh.min_fsdp_size, cfg.mesh.rules)
        spec = _batch_spec(objective, abstract, cfg)
    fields, store, gather = spec.whole, None, None
    if cfg.data.cache == "device":
        if data.samples is None:
            raise ConfigError(
                "config.data.cache=device keeps all images on the devices, and their number is not "
                "known: name the data with config.data.root (dsad plan: or give --samples=N)."
            )
        fields, (store, gather) = spec.drawn, abstract_store(spec, data.samples, mesh)
    step = make_step(
        objective, tx, lambda state: schedule(state.step), abstract, mesh=mesh,
        accumulate=cfg.accumulate, fetch=fetch_with(gather, spec) if gather else None,
    )  # fmt: skip
    return Run(
        config=cfg, objective=objective, mesh=mesh, info=info, spec=spec, tx=tx, schedule=schedule,
        abstract=abstract, step=step, store=store, gather=gather,
        inputs=batches.shapes(fields, cfg.batch_size, batch_sharding(mesh)),
        data=data,
    )  # fmt: skip


def _batch_spec(objective: Objective, abstract: TrainState, cfg: PretrainConfig) -> BatchSpec:
    """What the objective asks for, with the shapes of what it computes per sample."""
    needs = objective.traits.needs
    spec = BatchSpec(canvas=cfg.data.canvas, needs=needs, facts=image_facts.fields(needs.facts))
    if not isinstance(objective, PerSample):
        return spec
    batch = batches.shapes(spec.whole, cfg.batch_size)
    features = jax.eval_shape(objective.per_sample, abstract.params, abstract.extra, batch)
    return dataclasses.replace(spec, features=batches.fields_of(features))


def use_settings(cfg: PretrainConfig) -> None:
    """Let the settings of a config that are the process's take effect."""
    if cfg.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cfg.compilation_cache))
    if cfg.precision != "default":
        jax.config.update("jax_default_matmul_precision", cfg.precision)
    if jax.process_count() > 1 and not distributed.started():
        raise ConfigError(
            f"{jax.process_count()} processes share the devices here: give --distributed to each "
            "of them."
        )
