"""An evaluation from its config: a backbone, a detector and a data set, joined."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from rich.console import Console

from dsad.assembly import datasets, pictures, runs, saving, workdir
from dsad.assembly.detectors import Trainer
from dsad.assembly.model import Saved
from dsad.assembly.saving import Writer
from dsad.core import config as core_config
from dsad.core import distributed
from dsad.core.detection import Detector, MapWrapper, TrainsOnData
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Backbone, CanvasSource, Dataset, FeatureMaps, Progress
from dsad.data import base as data_base
from dsad.data import files, heldout
from dsad.evaluation import fitting, recalibration
from dsad.evaluation.localize import EvalConfig, Results, localize, write_results
from dsad.evaluation.parts import Parts
from dsad.evaluation.support import AS_DRAWN, Sampling, Sets, SupportConfig, subset
from dsad.models import wrappers
from dsad.models.residual_maps import ProjectedMaps
from dsad.terminal import console

#: As data name: the data of the run that the backbone comes from.
SAME = "run"


class EvaluateConfig(core_config.Settings, place="config"):
    """Everything of an evaluation but its detector, whose keys belong to the method.

    ``data.name`` "run" takes the data of the run that the backbone comes from.

    Attributes:
      backbone: an architecture, with ``weights``, or ``run:DIR[@STEP]``, where "{category}" in DIR
        names one run per category; ``patches:SIZE/STRIDE:`` before either applies it to every patch
        of an image.
      weights: of an architecture: a file, ``hf:owner/name``, ``run:DIR``, "imagenet", or "random"
        by ``seed`` ("random:5" by another); see ``models.weights.pretrained.read``.
      seed: of random weights and of the detector's random choices.
      shots: training images of each category that are used; 0: all.
      contamination: share of anomalous test images that is put among the training images of each
        category, as if they were normal; what is drawn is not tested.
      seeds: draw ``shots``, ``contamination`` and the detector's random choices; several give
        mean and standard deviation.
      one_for_all: fit a single detector on the training images of all categories.

    """

    backbone: str = "resnet18"
    weights: str = ""
    seed: int = core_config.field(0, at_least=0)
    shots: int = core_config.field(0, at_least=0)
    contamination: float = core_config.field(0.0, at_least=0, at_most=0.5)
    seeds: tuple[int, ...] = core_config.field((0,), at_least=0, distinct=True, filled=True)
    support: SupportConfig = AS_DRAWN
    one_for_all: bool = False
    data: data_base.DataConfig = data_base.DataConfig(name=SAME)
    evaluation: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def sampling(self) -> Sampling:
        """The training images that are used."""
        return Sampling(
            shots=self.shots, contamination=self.contamination, seeds=self.seeds,
            support=self.support, pooled=self.one_for_all,
        )  # fmt: skip


def default_config(detector: str) -> ml_collections.ConfigDict:
    """Every key of an evaluation with its default, for config files to change."""
    module = core_config.resolve("detectors", detector)
    config = ml_collections.ConfigDict(core_config.as_dict(EvaluateConfig()))
    config.detector = {"name": detector, **core_config.as_dict(module.Config())}
    return config.lock()


def parse(config: Any) -> tuple[EvaluateConfig, Detector]:
    """(evaluation config, detector) from nested dicts; strict."""
    values = dict(core_config.require(config, "detector", "configs/knn.py").items())
    method = dict(values.pop("detector").items())
    module = core_config.resolve("detectors", method.pop("name"))
    detector = module.build(core_config.build_dataclass(module.Config, method, "config.detector"))
    return core_config.build_dataclass(EvaluateConfig, values), detector


def data_config(given: data_base.DataConfig, backbone: str) -> data_base.DataConfig:
    """The data config to use; with name "run" the run's own, at another root if one is given."""
    if given.split != "train":
        raise ConfigError(
            f"config.data.split: {given.split!r} is for pretraining; an evaluation fits on the "
            "training images and scores the test images. Leave it out."
        )
    if given.name != SAME:
        return given
    if not runs.is_run(backbone):
        raise ConfigError(
            f"config.data.name: with backbone {backbone!r} there is no run to take the data "
            "from; name some: --config.data.name=folder --config.data.root=DIR for a folder of "
            "good images, --config.data.name=mvtec for a tree in that layout."
        )
    if runs.per_category(backbone):
        raise ConfigError(
            f"config.data.name: with one run per category ({backbone!r}) no single run has "
            "the data; name the data set, for example --config.data.name=mvtec."
        )
    data = runs.opened(runs.place(backbone).directory).config.data
    return dataclasses.replace(data, root=given.root or data.root)


def check_files(dataset: Dataset, root: str) -> None:
    """Refuse a data set that was prepared as canvases."""
    if isinstance(dataset.source("train"), CanvasSource):
        raise ConfigError(
            f"config.data: {dataset.name} at {root} holds canvases for training, which "
            "are smaller than the images. Evaluate on the files that they were prepared from."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loaded parts of an evaluation; with one run per category ``backbone`` is None.

    ``saved`` are the models that it measures, if they were fitted before.
    """

    config: EvaluateConfig
    backbone: Backbone | None
    detector: Detector
    dataset: Dataset
    sets: Sets
    saved: Saved | None = None

    def stored(self) -> dict[str, Any]:
        """The config that a saved model is measured with again."""
        name = type(self.detector).__module__.rpartition(".")[2]
        cfg = self.config
        config = dataclasses.replace(cfg, data=data_config(cfg.data, cfg.backbone))
        detector = {"name": name, **core_config.as_dict(self.detector.config)}
        return {**core_config.as_dict(config), "detector": detector}

    def map_wrappers(self) -> dict[str, MapWrapper]:
        """From the inside out; projectors of a run are told apart by their description."""
        spec = wrappers.unwrap(self.config.backbone)
        return {
            f"{name} ({wrapper.read().description})"
            if isinstance(wrapper, ProjectedMaps) and not self.saved else name: wrapper
            for name, wrapper in zip(spec.names, spec.maps, strict=True)
        }  # fmt: skip

    def looks(self) -> dict[str, Any]:
        """Of the normal images that the detectors are fitted on, by category."""
        made = {}
        for category, by_seed in self.sets.by_category.items():
            source, test = (self.dataset.source(split, category) for split in ("train", "test"))
            own = next(iter(by_seed.values()))
            normal = [path for path in own.bank if path not in own.anomalous]
            contents = heldout.contents(source) + heldout.contents(test, own.untested)
            made[category] = {**pictures.looks(subset(source, normal)), "contents": contents}
        return made


#: Relative difference of the maps of one encoder: bfloat16, in which a run may have computed them,
#: leaves 0.01 after twelve blocks; other weights differ by about 1.
ALIKE = 0.1
#: What may differ from the evaluation that fitted a model: the images, and how they are computed.
FREE = (
    "config.data", "config.mesh", "config.evaluation.batch_size", "config.evaluation.workers",
    "config.evaluation.cache_mb", "config.evaluation.feature_cache",
    "config.evaluation.cache_layers", "config.evaluation.gallery", "config.evaluation.save_maps",
    "config.evaluation.method", "config.evaluation.fpr_limit", "config.evaluation.further",
    "config.evaluation.morphology",
)  # fmt: skip


def prepare(
    config: Any,
    out: Console,
    dataset: Dataset | None = None,
    saved: Saved | None = None,
    *,
    network: Backbone | None = None,
    measured: bool = True,
) -> Evaluation:
    """Load everything that can be refused, before a directory is touched.

    ``dataset`` and ``network`` are what the config names, where that was loaded before. ``saved``
    are models to measure; only ``FREE`` keys may differ from those they were fitted with. Then all
    own images that they were not fitted on are tested; with ``measured`` False none is, and all
    normal ones are fitted on.
    """
    cfg, detector = parse(config)
    if not measured:
        saving.check(detector, None, cfg.seeds)
    check_patches(cfg.backbone, detector)
    if not saved:
        runs.check_named(cfg.backbone, cfg.weights)
    if dataset is None:
        data = data_config(cfg.data, cfg.backbone)
        if data.labelled and (saved or not measured):
            data = dataclasses.replace(data, holdout=1.0 if saved else 0.0)
        cfg = dataclasses.replace(cfg, data=data)
        dataset = datasets.loaded(data, out)
        if saved and data.labelled:
            assert isinstance(dataset, files.FileDataset)
            dataset = heldout.left(dataset, saved.contents, saved.category)
    check_files(dataset, cfg.data.root)
    sets = fitting.supports(
        detector, dataset, dataset.categories, cfg.evaluation, cfg.sampling,
        fitted=saved is not None, measured=measured,
    )  # fmt: skip
    if saved:
        _check_saved(saved, config, cfg, dataset)
        backbone = saved.backbone(saved.titles()[0]) if saved.shares_backbone else None
        return Evaluation(
            config=cfg, backbone=backbone, detector=detector, dataset=dataset, sets=sets,
            saved=saved,
        )  # fmt: skip
    if runs.per_category(cfg.backbone):
        if cfg.one_for_all:
            raise ConfigError("config.one_for_all: one run per category cannot share a detector.")
        specs = [runs.of_category(cfg.backbone, category) for category in dataset.categories]
        opened = [runs.opened(runs.place(spec).directory) for spec in specs]
        backbone, side = None, runs.image_size(opened[0].objective)
    else:
        spec = wrappers.unwrap(cfg.backbone).network
        backbone = network or runs.backbone(spec, cfg.weights, cfg.seed)
        side = backbone.image_size
        _check_projected(cfg.backbone, backbone, detector.layers)
        if cfg.evaluation.recalibrate:
            recalibration.check(backbone)
        if isinstance(detector, TrainsOnData) and detector.traits.trains_on == "labelled":
            detector.objective({}, backbone)  # which refuses other networks and layers
    cfg = sized(cfg, side)
    return Evaluation(config=cfg, backbone=backbone, detector=detector, dataset=dataset, sets=sets)


def sized(cfg: EvaluateConfig, side: int | None) -> EvaluateConfig:
    """The config with the backbone's own side of images where it names none; ConfigError without.

    ``side`` is None where the backbone does not tell it.
    """
    if cfg.evaluation.image_size:
        return cfg
    if not side:
        raise ConfigError(
            f"config.evaluation.image_size: {cfg.backbone} does not tell the size of its "
            "images; set it."
        )
    settings = dataclasses.replace(cfg.evaluation, image_size=side)
    return dataclasses.replace(cfg, evaluation=settings)


def _check_saved(saved: Saved, config: Any, cfg: EvaluateConfig, dataset: Dataset) -> None:
    """Refuse a model that was fitted otherwise, or not for these categories."""
    wanted = ml_collections.ConfigDict(config).to_dict()
    lines = [
        line
        for line in workdir.differences(saved.config(), wanted)
        if not any(line.startswith((f"{key}:", f"{key}.")) for key in FREE)
    ]
    if lines:
        raise ConfigError(
            f"{saved.directory}: was fitted with other settings (there → now):\n  "
            + "\n  ".join(lines)
            + "\nLeave these keys as they were, or fit again."
        )
    have = saved.titles()
    missing = [c for c in dataset.categories if c not in have and not cfg.one_for_all]
    if missing:
        raise ConfigError(
            f"{saved.directory}: no model of {core_config.listed(missing)}; it has: "
            f"{core_config.listed(have)}. Name categories with --config.data.categories."
        )
    untested = saved.stamp["support"].get("untested", {})
    drawn = any(count for by_seed in untested.values() for count in by_seed.values())
    # Of own images those that it was fitted on are known by their contents, and left out.
    if drawn and not cfg.data.labelled and saved.stamp["dataset"]["name"] == dataset.name:
        raise ConfigError(
            f"config.data.name: the model was fitted on test images of {dataset.name}; measure it "
            "on other data, or fit and measure at once without --model."
        )


@jax.jit
def _maps(network: Any, pixels: jax.Array) -> FeatureMaps:
    """Compiled once per architecture, not for each cell of a comparison."""
    return network(pixels)


def _check_projected(spec: str, backbone: Any, layers: Sequence[str]) -> None:
    """Refuse projectors of other layers, or that were trained on another encoder's maps."""
    for wrapper in wrappers.unwrap(spec).maps:
        if not isinstance(wrapper, ProjectedMaps):
            continue
        own = runs.backbone(f"run:{wrapper.run}", "", 0)
        projectors = wrapper.read().params  # which refuses runs without any
        pixels = np.random.default_rng(0).normal(size=(1, 112, 112, 3)).astype(np.float32)
        known, given = (jax.eval_shape(_maps, network, pixels) for network in (own, backbone))
        if missing := [name for name in layers if name in given and name not in projectors]:
            raise ConfigError(
                f"config.detector.layers: {wrapper.run} has no projector of "
                f"{core_config.listed(missing)}; it has some of: {core_config.listed(projectors)}."
            )
        names = [name for name in layers if name in known and name in given]
        if not names:
            continue  # which the detector will refuse
        theirs, ours = (_maps(network.only(names), pixels) for network in (own, backbone))
        for name in names:
            here, there = np.asarray(ours[name]), np.asarray(theirs[name])
            same = here.shape == there.shape
            if not same or np.linalg.norm(here - there) > ALIKE * np.linalg.norm(here):
                raise ConfigError(
                    f"config.backbone={spec!r}: the projectors of {wrapper.run} were trained on "
                    f"maps of {own.description} ({own.arch}), whose {name} differs from that of "
                    f"{backbone.arch} ({backbone.description}). Name the same encoder and weights."
                )


def check_patches(spec: str, detector: Detector) -> None:
    """Refuse a detector of patches on features of others: its map would lie beside the image."""
    wanted = detector.traits.patches
    if not wanted or wrappers.unwrap(spec).network.startswith(f"patches:{wanted}:"):
        return
    raise ConfigError(
        f"config.backbone: this detector draws its maps for patches:{wanted}:BACKBONE (its keys "
        f"patch and stride), found {spec!r}. Set --config.backbone=patches:{wanted}:..., or "
        "--config.detector.patch and --config.detector.stride to those of the backbone."
    )


def evaluate(
    parts: Evaluation,
    path: epath.Path,
    out: Console,
    *,
    name: str = "",
    writer: Writer | None = None,
) -> Results:
    """Localize with one backbone and write results below a claimed directory.

    ``writer`` keeps what is fitted. Of several processes the first one writes, and has the gallery
    and the curves. A stopped evaluation goes on: with the next category, with what was trained.
    """
    with distributed.failing_together(path), console.progress(name or "localizing", out) as tell:
        results = localized(parts, tell, name=name, keep=writer, folder=path)
        if writer:
            distributed.together(lambda: write_model(writer, parts, results))
        distributed.together(lambda: _written(results, path) if distributed.is_main() else None)
    return results


def write_model(writer: Writer, parts: Evaluation, results: Results) -> None:
    """Complete the models of an evaluation; the first process does."""
    if distributed.is_main():
        writer.finish(parts.stored(), results, parts.looks())


def localized(
    parts: Evaluation,
    progress: Progress,
    *,
    name: str = "",
    keep: fitting.Keeper | None = None,
    folder: epath.Path | None = None,
    measured: bool = True,
) -> Results:
    """What ``localize`` makes of the parts; see there."""
    cfg, saved = parts.config, parts.saved
    parts_of_spec = wrappers.unwrap(cfg.backbone)

    def of_category(category: str) -> Backbone:
        if saved:
            return saved.backbone(category)
        spec = runs.of_category(parts_of_spec.network, category)
        return runs.backbone(spec, cfg.weights, cfg.seed)

    return localize(
        parts.backbone, parts.detector, parts.dataset, cfg.evaluation,
        map_wrappers=parts.map_wrappers(),
        mesh=make_mesh(cfg.mesh), key=runs.key_for(cfg.seed), progress=progress,
        name=name or cfg.backbone, sampling=parts.sets, given=saved, keep=keep, folder=folder,
        backbone_of=None if parts.backbone is not None else of_category, train=Trainer(),
        details={"model_sha256": saved.sha256} if saved else None, measured=measured,
    )  # fmt: skip


def _written(results: Results, path: epath.Path) -> None:
    """The results; what was kept on the way is of no more use then."""
    write_results(results, path)
    Parts(path).remove()
    if (trained := path / fitting.TRAINED).exists():
        trained.rmtree()
