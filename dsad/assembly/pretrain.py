"""A pretraining run from its config: data, objective, optimiser and loop joined."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from rich.console import Console

from dsad.assembly import workdir
from dsad.core import config as core_config
from dsad.core import distributed, paths
from dsad.core.chips import chip_of
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.flops import training_flops_per_image
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.types import Dataset, Objective, RunInfo, Specs
from dsad.data import base as data_base
from dsad.data import facts as image_facts
from dsad.data.pipeline import Pipeline, make_pipeline
from dsad.models.weights import pretrained
from dsad.terminal import console
from dsad.train.cache import device_store, rows_here
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.log import Clock, Work
from dsad.train.loop import Loop, train
from dsad.train.optim import OptimConfig, make_optimizer, make_schedule
from dsad.train.state import abstract_state, initial_state
from dsad.train.step import make_step
from dsad.train.writer import MetricWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything of a run but its objective, whose keys belong to the method.

    ``epochs`` or ``steps`` sets the length; ``steps`` wins when it is not 0.
    """

    seed: int = 0
    batch_size: int = 256
    epochs: float = 400.0
    steps: int = 0
    accumulate: int = 1
    log_every: int = 10
    init_from: str = ""
    precision: Literal["default", "high", "highest"] = "default"
    compilation_cache: str = ""
    data: data_base.DataConfig = dataclasses.field(default_factory=data_base.DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise ConfigError("batch_size, epochs, steps: expected positive numbers.")
        if self.log_every < 1 or self.accumulate < 1:
            raise ConfigError("log_every, accumulate: expected at least 1.")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The built parts of a run."""

    config: PretrainConfig
    objective: Objective
    mesh: jax.sharding.Mesh
    pipeline: Pipeline
    info: RunInfo
    specs: Specs
    tx: Any
    schedule: Any
    abstract: Any
    step: Any
    store: Any
    fetch: Any


def lengths(config: PretrainConfig, samples: int) -> tuple[float, int]:
    """Updates per epoch and of the whole run.

    No sample is dropped, so an epoch may be a fraction of updates, except where the published
    schedule is followed.
    """
    per_epoch = samples / config.batch_size
    if config.optim.published_schedule:
        per_epoch = float(max(1, samples // config.batch_size))
    return per_epoch, config.steps or max(1, math.ceil(config.epochs * per_epoch))


def build(config: Any, dataset: Dataset | None = None, progress: Any = None) -> Run:
    """Data, mesh, objective, optimiser and compiled-on-first-use step of a config."""
    cfg, module, method = parse(config)
    if cfg.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cfg.compilation_cache))
    if cfg.precision != "default":
        jax.config.update("jax_default_matmul_precision", cfg.precision)
    if jax.process_count() > 1 and not distributed.started():
        raise ConfigError(
            f"{jax.process_count()} processes share the devices here: give --distributed to each "
            "of them."
        )
    mesh = make_mesh(cfg.mesh)
    if cfg.batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size: expected a multiple of the {mesh.size} devices, "
            f"found {cfg.batch_size}."
        )
    source = distributed.together(lambda: dataset or data_base.load(cfg.data)).source("train")
    per_epoch, total = lengths(cfg, len(source))
    info = RunInfo(
        total_steps=total,
        batch_size=cfg.batch_size,
        samples=len(source),
        classes=len({r.category for r in source.records}),
    )
    objective = module.build(method, info)
    facts = image_facts.check(getattr(objective, "facts", ()))  # optional, of each image
    on_device, rows = cfg.data.cache == "device", None
    if on_device and distributed.count() > 1:
        rows = rows_here(stored_shapes(len(source), cfg.data.canvas, facts), mesh)
    read = functools.partial(
        make_pipeline,
        source,
        canvas=cfg.data.canvas,
        cache=cfg.data.cache,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        facts=facts,
        rows=rows,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        progress=progress,
    )
    pipeline = distributed.together(read)
    schedule = make_schedule(
        cfg.optim,
        batch_size=cfg.batch_size,
        steps_per_epoch=per_epoch,
        total_steps=info.total_steps,
    )
    tx = make_optimizer(cfg.optim, schedule)
    specs = Specs(batch_size=cfg.batch_size, canvas=cfg.data.canvas)
    abstract = abstract_state(objective, tx, specs, mesh, cfg.mesh.min_fsdp_size, cfg.mesh.rules)
    store, fetch = None, None
    if on_device:
        store, fetch = device_store(pipeline.store or {}, mesh)
        pipeline = dataclasses.replace(pipeline, store=None)  # one copy is enough
    step = make_step(
        objective, tx, schedule, abstract, mesh=mesh, seed=cfg.seed, fetch=fetch,
        accumulate=cfg.accumulate,
    )  # fmt: skip
    return Run(
        config=cfg, objective=objective, mesh=mesh, pipeline=pipeline, info=info, specs=specs,
        tx=tx, schedule=schedule, abstract=abstract, step=step, store=store, fetch=fetch,
    )  # fmt: skip


def stored_shapes(samples: int, canvas: int, facts: Any = ()) -> dict[str, Any]:
    """Shapes of what the pipeline stores for so many samples: a batch without index and epoch."""
    number = jax.ShapeDtypeStruct((samples,), jnp.int32)
    return {
        "image": jax.ShapeDtypeStruct((samples, canvas, canvas, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((samples, 2), jnp.int32),
        "category": number,
        "facts": {
            name: jax.ShapeDtypeStruct((samples, *a.shape[1:]), a.dtype)
            for name, a in image_facts.empty(facts, 1).items()
        },
    }


def prepare(config: Any, out: Console, dataset: Dataset | None = None) -> Run:
    """Build a run with progress; everything that can be refused is refused here."""
    with console.progress("reading images", out) as tell:
        run = build(config, dataset, progress=tell)
    _describe(run, out)
    return run


def pretrain(
    run: Run, path: epath.Path, out: Console, *, resume: bool = False, source: Any = None
) -> bool:
    """Train or continue in a claimed directory; True when complete, False when asked to stop.

    ``source`` is what ``read_source`` found, if that was asked already.
    """
    with distributed.failing_together(path):
        try:
            complete = _pretrain(run, path, out, resume, source)
        except WorkdirError as error:
            error.code = 3
            raise
    if complete:
        workdir.mark_complete(path, run.info.total_steps)
    return complete


def _pretrain(run: Run, path: epath.Path, out: Console, resume: bool, source: Any) -> bool:
    checkpointer = Checkpointer(path, run.config.checkpoint, say=out.print)
    checkpointer.check(run.abstract, run.info.total_steps)
    batches: Any = run.pipeline.iterator()
    clock = Clock()
    if resume and (latest := distributed.on_main(checkpointer.latest)) is not None:
        state, meta = checkpointer.restore(run.abstract, latest)
        batches.set_state(meta["data"])
        clock = Clock(meta.get("clock"))
        out.print(f"resumed at step {int(state.step)} of {run.info.total_steps}")
    else:
        if resume:
            out.print("no complete checkpoint yet: starting at step 0")
        state = _first_state(run, source or read_source(run), out)
    writer = MetricWriter(path, resume_step=int(state.step), quiet=not distributed.is_main())
    try:
        with console.progress("pretraining", out) as tell:
            loop = Loop(
                step=run.step, batches=batches, store=run.store, mesh=run.mesh,
                total_steps=run.info.total_steps, batch_size=run.config.batch_size,
                log_every=run.config.log_every, writer=writer, checkpointer=checkpointer,
                meta={"total_steps": run.info.total_steps},
                on_log=console.training_note(tell), clock=clock, work=_work(run),
            )  # fmt: skip
            state, complete = train(loop, state)
    finally:
        batches.close()
        writer.close()
        checkpointer.close()
    return complete


def _work(run: Run) -> Work:
    """What an image costs the model, and what a device could do."""
    count, facts = run.info.batch_size, getattr(run.objective, "facts", ())
    number = jax.ShapeDtypeStruct((count,), jnp.int32)
    batch = stored_shapes(count, run.config.data.canvas, facts)
    batch |= {"index": number, "epoch": number}
    chip = chip_of(jax.devices()[0])
    params, extra = run.abstract.params, run.abstract.extra
    return Work(
        lambda: training_flops_per_image(run.objective, params, extra, batch),
        chip.peak_flops if chip else 0.0,
    )


def _first_state(run: Run, source: Any, out: Console) -> Any:
    state = initial_state(run.objective, run.tx, run.specs, run.abstract, run.config.seed)
    params, extra = state.params, state.extra
    if source is not None:
        params, extra, report = run.objective.adopt(source, params, extra)
        out.print(f"from {source['origin']}: {report}")
    extra = run.objective.prepare(params, extra, _one_epoch(run))
    state = dataclasses.replace(state, params=params, extra=extra)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, run.abstract))


def read_source(run: Run) -> Any:
    """The weights that ``init_from`` names, checked against the run; None without any.

    A source for the objective's ``adopt``: ``params``, ``extra``, ``facts``, and ``origin``, text.
    Raises ConfigError for what does not fit, before anything is claimed.
    """
    spec = run.config.init_from
    if not spec:
        return None
    source = _of_run(spec) if is_run(spec) else _published(run.objective, spec)
    jax.eval_shape(
        lambda params, extra: run.objective.adopt(source, params, extra)[:2],
        run.abstract.params, run.abstract.extra,
    )  # fmt: skip
    return source


def _of_run(spec: str) -> dict[str, Any]:
    path, step = _run_spec(spec)
    cfg, module, method = parse(workdir.read(path)["config"])
    info = RunInfo(total_steps=1, batch_size=cfg.batch_size, samples=1, classes=1)
    earlier = Checkpointer(path, CheckpointConfig(), read_only=True)
    params, extra, step = earlier.weights(step)
    earlier.close()
    return {
        "params": params,
        "extra": extra,
        "facts": getattr(module.build(method, info), "stage_facts", {}),
        "origin": f"{path} step {step}",
    }


def _published(objective: Objective, spec: str) -> dict[str, Any]:
    imported = getattr(objective, "imported", None)  # optional: not part of the seam
    if imported is None:
        raise ConfigError(
            f"config.init_from={spec!r}: expected the directory of a pretraining run; this "
            "objective takes no published weights."
        )
    try:
        weights = pretrained.read(spec)
    except ConfigError as error:
        raise ConfigError(
            f"config.init_from={spec!r}: neither a pretraining run (no checkpoints there) nor "
            f"weights: {error}"
        ) from error
    facts = {"mean": weights.mean, "std": weights.std, "side": weights.input_size}
    facts = {k: v for k, v in facts.items() if v is not None}
    return {**imported(weights), "facts": facts, "origin": weights.source}


def _run_spec(spec: str) -> tuple[str, int | None]:
    """Directory and step of ``[run:]DIR[@STEP]``."""
    path = spec.removeprefix("run:")
    directory, at, step = path.rpartition("@")
    return (directory, int(step)) if at and step.isdigit() else (path, None)


def is_run(spec: str) -> bool:
    """Whether a spec names a pretraining run: ``run:DIR`` or a directory with checkpoints."""
    folder = _run_spec(spec)[0]
    return spec.startswith("run:") or (paths.directory(folder) / "checkpoints").is_dir()


def _one_epoch(run: Run) -> Iterator[Any]:
    """Batches that cover every sample once, for objectives that look at the data first."""
    fetch = jax.jit(run.fetch) if run.fetch else lambda store, inputs: inputs
    count = -(-run.info.samples // run.info.batch_size)
    for inputs in itertools.islice(run.pipeline.iterator(), count):
        yield fetch(run.store, place_batch(inputs, run.mesh))


def _describe(run: Run, out: Console) -> None:
    shapes = jax.tree.leaves(run.abstract.params)
    devices = f"{run.mesh.size} {jax.devices()[0].platform} device(s)"
    out.print(
        f"{run.info.samples} normal images, {run.info.total_steps} steps of "
        f"{run.config.batch_size} images, {sum(math.prod(x.shape) for x in shapes):,} trainable "
        f"parameters, mesh {dict(run.mesh.shape)} on {devices}"
    )
