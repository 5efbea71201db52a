"""Training of an assembled run: its images are read, then the loop goes from step 0 or on."""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console

from dsad.assembly import features, runs, unfolding, workdir
from dsad.assembly.pretrain import DataFacts, Run, assemble, held_out, parse, use_settings
from dsad.assembly.strips import Strips
from dsad.core import distributed
from dsad.core.batch import Batch
from dsad.core.chips import chip_of
from dsad.core.config import listed
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import place_batch, replicated
from dsad.core.types import (
    Dataset,
    EarlierWeights,
    HasPictures,
    HasProjectors,
    PerSample,
    Progress,
    Record,
    Source,
)
from dsad.data import base as data_base
from dsad.data import combined
from dsad.data.pipeline import Pipeline, make_pipeline
from dsad.evaluation.probe import HeldOut, Probe, default_layers
from dsad.terminal import console
from dsad.train.cache import fetch_with, put_store, rows_here
from dsad.train.checkpoint import Checkpointer
from dsad.train.log import Clock, Work
from dsad.train.loop import Loop, train
from dsad.train.state import TrainState, initial_state
from dsad.train.writer import MetricWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A run with its images: batches, and what of them lives on the devices, or None.

    ``earlier`` are the weights that it starts from, if they were asked for before the images;
    ``probe`` measures its states on the images ``held`` out, if the config wants it. So many images
    have ``defects``.
    """

    run: Run
    pipeline: Pipeline
    store: Any
    earlier: EarlierWeights | None = None
    held: HeldOut | None = None
    probe: Callable[[TrainState], dict[str, float]] | None = None
    defects: int = 0

    @functools.cached_property
    def pass_functions(self) -> tuple[Any, Any]:
        """What completes a batch of ``passes`` and what cuts the last one, compiled once."""
        fetch: Any = lambda store, inputs: inputs  # noqa: E731
        if self.store is not None:
            assert self.run.gather is not None
            fetch = jax.jit(fetch_with(self.run.gather, self.pipeline.spec))
        cut = jax.jit(
            lambda batch, rows: jax.tree.map(lambda a: a[:rows], batch),
            static_argnums=1, out_shardings=replicated(self.run.mesh),
        )  # fmt: skip
        return fetch, cut


def build(
    config: Any,
    dataset: Dataset | None = None,
    progress: Progress | None = None,
    *,
    weights: bool = False,
) -> Training:
    """A run of a config on the devices of this machine, with its images.

    With ``weights`` those that ``init_from`` names are read first, and refused if they do not fit.
    """
    cfg, _, _ = parse(config)
    use_settings(cfg)
    source = distributed.together(
        lambda: combined.training_source(dataset or data_base.load(cfg.data), cfg.data.split)
    )
    held = held_out(cfg, source.records)
    trained = combined.selected(source, held.training) if held else source
    run = assemble(config, None, DataFacts.of(trained.records))
    _check_needs(run, trained.records)
    earlier = distributed.together(lambda: runs.checked_weights(run)) if weights else None
    probe = _probe(run, source, held) if held else None
    training = read(run, trained, progress)
    defects = sum(bool(record.label) for record in trained.records)
    return dataclasses.replace(training, earlier=earlier, held=held, probe=probe, defects=defects)


def _probe(run: Run, source: Source, held: HeldOut) -> Callable[[TrainState], dict[str, float]]:
    """What measures the states of a run; ConfigError for maps and images that it cannot take."""
    cfg, objective = run.config, run.objective
    if isinstance(objective, HasProjectors):
        raise ConfigError(
            "config.probe.every: expected 0, since the maps of this objective are those of its "
            "frozen encoder, whatever its projectors learn. Measure them with dsad evaluate and "
            "--config.backbone=projected:RUN:BACKBONE."
        )
    side = cfg.probe.image_size or runs.image_size(objective) or cfg.data.canvas
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    params, extra = run.abstract.params, run.abstract.extra
    try:
        maps = jax.eval_shape(objective.features, params, extra, image)
    except ConfigError as error:
        raise ConfigError(f"config.probe.image_size: {error}") from error
    further = runs.further(objective, params, extra)
    layers = cfg.probe.layers or default_layers(maps)
    have = [*maps, *further]
    missing = [name for name in layers if name not in have]
    if missing or not layers:
        raise ConfigError(
            f"config.probe.layers: expected some of the objective's feature maps, {listed(have)}; "
            f"found {listed(missing)}. Name others, or set config.probe.every=0."
        )
    network = functools.partial(
        runs.RunBackbone, function=objective.features, mean=objective.mean, std=objective.std,
        arch=type(objective).__name__, image_size=None, description="", further=further,
    )  # fmt: skip
    probe = Probe(
        source, held, cfg.probe, layers=layers, image_size=side, mesh=run.mesh, seed=cfg.seed
    )
    return lambda state: probe(network(params=state.params, extra=state.extra))


def read(run: Run, source: Source, progress: Progress | None = None) -> Training:
    """Read the images as ``config.data`` says; on the devices lies what they keep."""
    cfg, rows = run.config, None
    spec = dataclasses.replace(run.spec, features={})  # which are computed from what is read
    places = {name: place for name, place in (run.store or {}).items() if name != "features"}
    if places and distributed.count() > 1:
        rows = rows_here(places, len(source))
    pipeline = distributed.together(
        lambda: make_pipeline(
            source, spec, cache=cfg.data.cache, batch_size=cfg.batch_size, seed=cfg.seed,
            process_index=jax.process_index(), process_count=jax.process_count(), rows=rows,
            workers=cfg.data.workers, prefetch=cfg.data.prefetch, progress=progress,
        )
    )  # fmt: skip
    store = None
    if places:
        store = put_store(pipeline.store, places)
        pipeline = dataclasses.replace(pipeline, store=None)  # one copy is enough
    return Training(run=run, pipeline=pipeline, store=store)


def prepare(
    config: Any, out: Console, dataset: Dataset | None = None, *, continued: bool = False
) -> Training:
    """Build a run with progress; everything that can be refused is refused here.

    A run that is ``continued`` has its weights already; the earlier stage may be gone.
    """
    with console.progress("reading images", out) as tell:
        training = build(config, dataset, progress=tell, weights=not continued)
    _check_companions(training, out)
    features.check_room(training.run)
    if training.held:
        out.print(f"{training.held}, every {training.run.config.probe.every} steps")
    run, shapes = training.run, jax.tree.leaves(training.run.abstract.params)
    kind = {"train": "normal", "test": "test", "all": "normal and test"}[run.config.data.split]
    if kind == "normal" and training.defects:
        kind = f"training ({training.defects} with defects)"
    out.print(
        f"{run.info.samples} {kind} images, {run.info.total_steps} steps of "
        f"{run.config.batch_size} images, {sum(math.prod(x.shape) for x in shapes):,} trainable "
        f"parameters, mesh {dict(run.mesh.shape)} on {run.mesh.size} {run.platform} device(s)"
    )
    return training


def _check_needs(run: Run, records: Sequence[Record]) -> None:
    """Refuse data without the defects that the objective learns from, or with some it denies."""
    needs, defects = run.spec.needs, sum(bool(record.label) for record in records)
    if needs.normal and defects:
        raise ConfigError(
            f"config.data.split: the objective takes all images for normal, and {defects} of the "
            f"{len(records)} images of split {run.config.data.split} have defects. Set "
            "config.data.split to train, or name other data."
        )
    if (needs.label or needs.mask) and not defects:
        raise ConfigError(
            f"config.data.split: the objective learns from defects, and none of the {len(records)} "
            f"images of split {run.config.data.split} has one. Set config.data.split to test or "
            "all, or name other data."
        )


def _check_companions(training: Training, out: Console) -> None:
    alone, samples = training.pipeline.unaccompanied, training.pipeline.samples
    if alone:
        companions = training.run.spec.needs.companions
        assert companions is not None
        kind = "normal " if companions.label == 0 else ""
        what = (
            f"{alone} of {samples} images have no companion: no other {kind}image of the same "
            f"{listed(companions.same)}"
        )
        if alone == samples:
            raise ConfigError(f"config.data: {what}.")
        out.print(what)


def pretrain(training: Training, path: epath.Path, out: Console, *, resume: bool = False) -> bool:
    """Train or continue in a claimed directory; True when complete, False when asked to stop."""
    with distributed.failing_together(path):
        try:
            complete = _pretrain(training, path, out, resume)
        except WorkdirError as error:
            error.code = 3
            raise
    if complete:
        workdir.mark_complete(path, training.run.info.total_steps)
    return complete


def _pretrain(training: Training, path: epath.Path, out: Console, resume: bool) -> bool:
    run = training.run
    checkpointer = Checkpointer(path, run.config.checkpoint, say=out.print)
    checkpointer.check(run.abstract, run.info.total_steps)
    position, clock = None, Clock()
    if resume and (kept := checkpointer.restore_newest(run.abstract)) is not None:
        state, meta = kept
        position, clock = meta["data"], Clock(meta.get("clock"))
        out.print(f"resumed at step {int(state.step)} of {run.info.total_steps}")
    else:
        if resume:
            out.print("no complete checkpoint yet: starting at step 0")
        state = first_state(training, training.earlier or runs.checked_weights(run), out)
    training = with_features(training, state, out, path)
    if position is None:
        state = prepared(training, state)
    strips = _strips(training, path)
    if strips and not int(state.step):
        strips.write(state)
    batches: Any = training.pipeline.iterator()
    if position is not None:
        batches.set_state(position)
    # A start at step 0 measures that step again.
    resume_step = int(state.step) or -1
    writer = MetricWriter(path, resume_step=resume_step, quiet=not distributed.is_main())
    try:
        with console.progress("pretraining", out) as tell:
            tell(int(state.step), run.info.total_steps, "compiling …")
            loop = Loop(
                step=run.step, batches=batches, store=training.store, key=run.key,
                mesh=run.mesh,
                total_steps=run.info.total_steps, batch_size=run.config.batch_size,
                log_every=run.config.log_every, writer=writer, checkpointer=checkpointer,
                meta={"total_steps": run.info.total_steps},
                on_log=_told(tell, out), clock=clock, work=_work(run), probe=training.probe,
                probe_every=run.config.probe.every,
            )  # fmt: skip
            state, complete = train(loop, state)
        if strips and complete:
            strips.write(state)
    finally:
        batches.close()
        writer.close()
        checkpointer.close()
        features.discard(path)
    return complete


def _strips(training: Training, path: epath.Path) -> Strips | None:
    """What draws the first images that the run trains on, where its objective shows some."""
    run, count = training.run, training.run.config.pictures
    if not count or not isinstance(run.objective, HasPictures):
        return None
    batches: Any = training.pipeline.iterator()
    try:
        fetch, _ = training.pass_functions
        batch = fetch(training.store, place_batch(next(batches), run.mesh))
        return Strips(run.objective, batch, run.key, path, count)
    finally:
        batches.close()


def _told(tell: Progress, out: Console) -> Callable[[int, int, dict[str, float]], None]:
    """A line for every probe, a note beside the bar for every line with a loss."""
    note = console.training_note(tell)

    def on_log(step: int, total: int, row: dict[str, float]) -> None:
        if "probe_seconds" in row:
            out.print(console.probe_line(step, row))
        if "loss" in row or not row:
            note(step, total, row)

    return on_log


def _work(run: Run) -> Work:
    """What an image costs the model, and what a device could do."""
    chip = chip_of(jax.devices()[0])
    return Work(run.model_flops_per_image, chip.peak_flops if chip else 0.0)


def first_state(training: Training, earlier: EarlierWeights | None, out: Console) -> TrainState:
    """The state at step 0, with earlier weights; ``prepared`` comes after ``with_features``."""
    run = training.run
    state = initial_state(run.objective, run.tx, run.abstract, run.config.seed)
    params, extra = state.params, state.extra
    if earlier is not None:
        if unfolding.is_folded(earlier):
            # Views show an image larger than a view is: its canvas is nearer to their scale.
            side = run.config.data.canvas
            earlier = unfolding.unfolded(earlier, run.objective, passes(training), side)
            out.print(f"{earlier.origin}: its folded batch norms have statistics of the data again")
        params, extra, report = run.objective.adopt(earlier, params, extra)
        out.print(f"from {earlier.origin}: {report}")
    return _placed(run, dataclasses.replace(state, params=params, extra=extra))


def prepared(training: Training, state: TrainState) -> TrainState:
    """The state at step 0 with what the objective makes of all samples, features included."""
    extra = training.run.objective.prepare(state.params, state.extra, lambda: passes(training))
    return _placed(training.run, dataclasses.replace(state, extra=extra))


def _placed(run: Run, state: TrainState) -> TrainState:
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, run.abstract))


def passes(training: Training) -> Generator[Batch]:
    """Batches in which every sample occurs exactly once; the last one is cut to its samples."""
    run, (fetch, cut) = training.run, training.pass_functions
    for inputs, rows in training.pipeline.one_pass():
        batch = fetch(training.store, place_batch(inputs, run.mesh))
        yield batch if rows == run.info.batch_size else cut(batch, rows)


def with_features(
    training: Training, state: TrainState, out: Console, folder: epath.Path | None = None
) -> Training:
    """The same training with what the objective computes of every sample once.

    ``folder`` is the run's directory, for features that are kept on its disk.
    """
    run = training.run
    if not isinstance(run.objective, PerSample):
        return training
    computed = features.computed(run, state, passes(training), out, folder)
    pipeline, store = training.pipeline.with_features(computed), training.store
    if store is not None:
        store = {**store, "features": put_store(computed, run.store["features"])}
    return dataclasses.replace(training, pipeline=pipeline, store=store)
