"""The probes by labels from their config: a backbone and a data set joined."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from dsad.assembly import datasets, runs
from dsad.assembly.evaluate import SAME, check_files, data_config
from dsad.core import config as core_config
from dsad.core import distributed
from dsad.core.config import Refused
from dsad.core.errors import ConfigError, DataError
from dsad.core.hosts import spans
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Backbone, Dataset, Record, Source
from dsad.data import base as data_base
from dsad.data import combined, heldout
from dsad.data.combined import selected
from dsad.evaluation import label_probe, label_results, stamp, support
from dsad.evaluation.label_probe import EncodeConfig, ProbeConfig, Split
from dsad.evaluation.label_results import LabelResults, Tally
from dsad.evaluation.label_vectors import Encoder, Kept, layer_of
from dsad.models import wrappers
from dsad.terminal import console


class LabelProbeConfig(core_config.Settings, place="config"):
    """Everything of the probes by labels.

    ``data.name`` "run" takes the data of the run that the backbone comes from.

    Attributes:
      backbone: an architecture, with ``weights``, or ``run:DIR[@STEP]``; ``patches:SIZE/STRIDE:``
        before either applies it to every patch of an image.
      weights: of an architecture: a file, ``hf:owner/name``, ``run:DIR``, "imagenet", or "random"
        by ``seed``; see ``models.weights.pretrained.read``.
      seed: of random weights.
      seeds: each draws a split of the images; several give mean and standard deviation.

    """

    backbone: str = "resnet18"
    weights: str = ""
    seed: int = core_config.field(0, at_least=0)
    seeds: tuple[int, ...] = core_config.field((0,), at_least=0, distinct=True, filled=True)
    data: data_base.DataConfig = data_base.DataConfig(name=SAME)
    probe: ProbeConfig = ProbeConfig()
    evaluation: EncodeConfig = EncodeConfig()
    mesh: MeshConfig = MeshConfig()

    def check(self) -> None:
        if self.probe.split == "data" and len(self.seeds) > 1:
            advice = 'Only config.probe.split="drawn" has something to draw.'
            raise Refused("seeds", 'one with config.probe.split="data"', self.seeds, advice)


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default, for config files to change."""
    return ml_collections.ConfigDict(core_config.as_dict(LabelProbeConfig())).lock()


def is_meant(config: Any) -> bool:
    """Whether a config is of probes by labels: neither a detector nor an objective is in it."""
    return "probe" in config and "detector" not in config and "objective" not in config


def parse(config: Any) -> LabelProbeConfig:
    """The config from nested dicts; strict."""
    values = core_config.require(config, "probe", "configs/probe.py")
    return core_config.build_dataclass(LabelProbeConfig, dict(values.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelProbe:
    """The loaded parts: a backbone, its layer, and labelled images with their splits by seed.

    ``source`` has the normal images, those of the training split first; ``labels`` (n,) are numbers
    of ``classes``. ``version`` tells of changes to their files.
    """

    config: LabelProbeConfig
    backbone: Backbone
    layer: str
    dataset: Dataset
    source: Source
    classes: tuple[str, ...]
    labels: np.ndarray
    splits: dict[int, Split]


def prepare(config: Any, out: Console) -> LabelProbe:
    """Load everything that can be refused, before a directory is touched."""
    cfg = parse(config)
    if runs.per_category(cfg.backbone):
        raise ConfigError(
            f"config.backbone: one run per category ({cfg.backbone!r}) gives vectors that cannot "
            "be compared across classes; name one run."
        )
    runs.check_named(cfg.backbone, cfg.weights)
    cfg = dataclasses.replace(cfg, data=data_config(cfg.data, cfg.backbone))
    dataset = datasets.loaded(cfg.data, out)
    check_files(dataset, cfg.data.root)
    source, classes, splits = _divided(cfg, dataset)
    backbone = runs.backbone(wrappers.unwrap(cfg.backbone).network, cfg.weights, cfg.seed)
    side = cfg.evaluation.image_size or backbone.image_size
    if not side:
        raise ConfigError(
            f"config.evaluation.image_size: {cfg.backbone} does not tell the size of its "
            "images; set it."
        )
    sized = dataclasses.replace(cfg.evaluation, image_size=side)
    numbers = {name: i for i, name in enumerate(classes)}
    return LabelProbe(
        config=dataclasses.replace(cfg, evaluation=sized), backbone=backbone,
        layer=layer_of(backbone, cfg.probe.layer, (side, side)), dataset=dataset, source=source,
        classes=classes, splits=splits,
        labels=np.array([numbers[r.category] for r in source.records], np.int32),
    )  # fmt: skip


def _divided(
    cfg: LabelProbeConfig, dataset: Dataset
) -> tuple[Source, tuple[str, ...], dict[int, Split]]:
    """Normal images, their classes, and the split of every seed."""
    train = _normal(dataset.source("train"))
    classes = label_probe.classes_of(train.records)
    if cfg.probe.split == "drawn":
        share = cfg.probe.train_share
        return train, classes, {s: label_probe.drawn(train.records, share, s) for s in cfg.seeds}
    test = _normal(dataset.source("test"))
    known = [i for i, record in enumerate(test.records) if record.category in classes]
    if not known:
        raise DataError(
            f"config.probe.split: {dataset.name} has no normal test images, so it cannot be "
            '"data". Take "drawn", which tests on a part of the training images.'
        )
    both = combined.joined([train, selected(test, known)])
    split = Split(np.arange(len(train)), len(train) + np.arange(len(known)))
    return both, classes, {cfg.seeds[0]: split}


def _normal(source: Source) -> Source:
    return selected(source, [i for i, record in enumerate(source.records) if not record.label])


def evaluate(parts: LabelProbe, path: epath.Path, out: Console, *, name: str = "") -> LabelResults:
    """Encode, probe, and write results below a claimed directory.

    An evaluation that was stopped goes on with the images that were not encoded yet. Of several
    processes each has a part of the images, all compute the probes, and the first one writes.
    """
    cfg = parts.config
    mesh = make_mesh(cfg.mesh)
    with distributed.failing_together(path):
        encoder = Encoder(parts.backbone, parts.layer, cfg.evaluation, mesh)
        kept = None
        if not spans(mesh):
            files = [parts.dataset.source(split) for split in ("train", "test")]
            kept = Kept(path, support.version(files))
        with console.progress("encoding", out) as tell:
            vectors = encoder(parts.source, kept, tell)
        label_probe.check_finite(vectors, parts.layer)
        tally = _probed(parts, vectors, mesh, out)
        results = tally.results(_stamp(parts, encoder.pooling, name))
        distributed.on_main(lambda: _written(parts, results, path))
        if kept:
            kept.remove()
    return results


def _probed(parts: LabelProbe, vectors: np.ndarray, mesh: Mesh, out: Console) -> Tally:
    """The probes of every seed."""
    tally, cfg = Tally(parts.classes, parts.source.records), parts.config
    for seed, split in parts.splits.items():
        with console.progress(f"linear probe, seed {seed}", out) as tell:
            probed = label_probe.probe(
                vectors, parts.labels, split, len(parts.classes), cfg.probe,
                mesh=mesh, progress=tell,
            )  # fmt: skip
        tally.add(seed, split, parts.labels, probed)
    return tally


def _written(parts: LabelProbe, results: LabelResults, path: epath.Path) -> None:
    small = label_results.pictures(results.mistakes, parts.source)
    label_results.write(dataclasses.replace(results, pictures=small), path)


def _stamp(parts: LabelProbe, pooling: str, name: str) -> dict[str, Any]:
    """What the numbers mean."""
    cfg, records = parts.config, parts.source.records
    return {
        "name": name or cfg.backbone,
        "probe": "classes of normal images by k-NN and linear probe",
        "dataset": {
            "name": parts.dataset.name,
            **stamp.plain(parts.dataset.protocol),
            "records_sha256": stamp.records_hash({"all": records}),
        },
        "classes": len(parts.classes),
        "split": _about_split(cfg, records, parts.splits),
        "backbone": stamp.describe_backbone(parts.backbone),
        "layer": parts.layer,
        "pooling": pooling,
        "preprocessing": cfg.evaluation.reading.preprocessing.describe(),
        "knn": {"k": cfg.probe.k, "temperature": cfg.probe.temperature, "similarity": "cosine"},
        "linear": {
            "C": cfg.probe.C, "iterations": cfg.probe.iterations,
            "features": "standardised by the training images",
        },
        "chance": "always the most frequent training classes",
        "seed": cfg.seed,
        "seeds": list(parts.splits),
        "code": stamp.code_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _about_split(
    cfg: LabelProbeConfig, records: Sequence[Record], splits: dict[int, Split]
) -> dict[str, Any]:
    hashes = {str(seed): split.sha256(records) for seed, split in splits.items()}
    if cfg.probe.split == "data":
        return {"rule": "the data set's own", "sha256": hashes}
    rule = f"of each class, held out for the test: {heldout.RULE}"
    return {"rule": rule, "train_share": cfg.probe.train_share, "sha256": hashes}
