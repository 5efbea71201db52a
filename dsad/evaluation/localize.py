"""The localization run: features, detector, anomaly maps on original pixels, metrics."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from dsad.core.config import listed
from dsad.core.detection import Detector, MapWrapper
from dsad.core.errors import ConfigError
from dsad.core.hosts import spans
from dsad.core.types import Backbone, Dataset, Progress, silent
from dsad.evaluation import (
    channels,
    fitting,
    recalibration,
    rules,
    stamp,
    support,
    thresholds,
)
from dsad.evaluation import seeds as over_seeds
from dsad.evaluation.categories import Categories
from dsad.evaluation.compiled import Device
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.parts import Parts
from dsad.evaluation.results import Results, merge, read_results, write_results
from dsad.evaluation.support import ALL, Sampling, Sets
from dsad.evaluation.ticks import Ticks

__all__ = ["EvalConfig", "Results", "localize", "read_results", "write_results"]


def localize(
    backbone: Backbone | None,
    detector: Detector,
    dataset: Dataset,
    config: EvalConfig,
    *,
    mesh: Mesh,
    key: jax.Array,
    progress: Progress = silent,
    name: str = "",
    categories: Sequence[str] | None = None,
    details: Mapping[str, Any] | None = None,
    train: fitting.Train | None = None,
    sampling: Sampling | Sets = ALL,
    map_wrappers: Mapping[str, MapWrapper] | None = None,
    given: fitting.Given | None = None,
    keep: fitting.Keeper | None = None,
    folder: str | epath.PathLike | None = None,
    backbone_of: Callable[[str], Backbone] | None = None,
    measured: bool = True,
) -> Results:
    """Fit and score every category; all pixel numbers are on original-resolution masks.

    Args:
      backbone: of images (b, s, s, 3), None with ``backbone_of``.
      detector: fitted once per category, on what its traits say.
      dataset: its "train" and "test" splits are used, and for thresholds "validation" if there.
      config: see ``EvalConfig``.
      mesh: batches are split over all its devices; numbers do not depend on their count.
      key: of the run; each category's detector gets a key by the category's name and the seed.
      progress: called with images done, images in all, and what is going on.
      name: of the run, for the stamp.
      categories: some of ``dataset.categories``; all by default.
      details: fields for the stamp, see ``stamp.make_stamp``.
      train: for detectors that train, such as ``assembly.detectors.Trainer()``: its result goes
        to their ``fit``.
      sampling: the training images that are used, or the sets that ``fitting.supports`` gave for
        these categories; its seeds vary the detector's key, several give mean and deviation.
      map_wrappers: by name, from the inside out: what changes the backbone's maps; each is adapted
        to every support set.
      given: what was fitted before, with its thresholds; then no training image is needed.
      keep: takes what is fitted, such as ``assembly.model.Writer(DIR)``.
      folder: where ``config.save_maps`` puts ``anomaly_maps`` (``anomaly_maps_seed<s>`` with
        several seeds), where ``train`` keeps what it trained, and where measured categories are
        kept: a stopped evaluation goes on with the next one, unless it has several processes or
        ``keep``.
      backbone_of: instead of ``backbone``, the backbone of each category, loaded when it is due.
      measured: False only fits, and sets thresholds; no test image is needed.

    Raises:
      ConfigError: an unknown category, a layer the backbone does not have, a detector that trains
        without ``train``, what ``keep`` cannot take, and, as DataError, what
        ``fitting.supports`` refuses.
      MetricError: scores that are not finite.
      DsadError: a fault that several processes found, or found differently, with all messages.

    A mesh of several processes splits images, bank and counts over them; all must make the same
    call. Numbers are then the same everywhere; gallery and curves are those of process 0 alone.

    """
    chosen = tuple(categories or dataset.categories)
    if unknown := [c for c in chosen if c not in dataset.categories]:
        raise ConfigError(
            f"config.data.categories: {listed(unknown)} not in {dataset.name}, "
            f"which has: {listed(dataset.categories)}."
        )
    if config.image_size < 1:
        raise ConfigError(
            "config.evaluation.image_size: expected the side of the network's input, found 0."
        )
    if config.save_maps != "none" and folder is None:
        raise ConfigError(
            "config.evaluation.save_maps: a folder is needed to save anomaly maps in."
        )
    sets = sampling if isinstance(sampling, Sets) else fitting.supports(
        detector, dataset, chosen, config, sampling, fitted=given is not None, measured=measured
    )  # fmt: skip
    pooled = sets.sampling.pooled
    if pooled and backbone_of:
        raise ConfigError("one model for all categories needs one backbone, found one for each.")
    if detector.traits.trains_on and train is None:
        raise ConfigError("localize: this detector trains; expected train=, found None.")
    if map_wrappers and detector.traits.trains_on == "images" and not config.preprocessing.single:
        raise ConfigError(
            'config.evaluation.resize: "windows" do not go with a detector that trains on images '
            "behind a map wrapper. Take the wrapper from config.backbone, or another resize."
        )
    if detector.traits.trains_on == "labelled":
        _check_labelled(map_wrappers or {}, config)
    protocol = {**settings(detector, config, sets, tuple(map_wrappers or ())), "detector_state": {}}
    if given:
        known = ("support", "thresholds", "decisions")
        protocol |= {name: given.stamp[name] for name in known if name in protocol}
    run = Categories(
        dataset, detector, config, key, train, sets, dict(map_wrappers or {}), given, folder,
        Ticks(progress, 0), measured,
        further_names=channels.names(config) if channels.known(dataset, chosen) else (),
    )  # fmt: skip
    run.ticks.total = run.count(chosen)
    progress(0, run.ticks.total, "compiling …")
    results = Results()
    groups = [chosen] if pooled else [(c,) for c in chosen]
    parts = Parts(folder) if folder and len(groups) > 1 and not (keep or spans(mesh)) else None
    identity = ""
    for group in groups:
        network = backbone_of(group[0]) if backbone_of else backbone
        assert network is not None, "expected a backbone, or backbone_of"
        if config.recalibrate and not given:
            recalibration.check(network)
        if run.device is None:
            run.device = Device(network, detector, config, mesh, tuple(run.map_wrappers.values()))
            protocol = stamp.make_stamp(
                dataset, chosen, config=config, detector=detector, backbone=network, key=key,
                name=name, details={**protocol, **(details or {})},
            )  # fmt: skip
        elif backbone_of:
            run.device.use(network)
        if parts and (backbone_of or not identity):  # a name of weights does not tell them
            identity = run.device.identity(stamp.describe_backbone(network))
        title = "all categories" if pooled else group[0]
        if parts or (folder is not None and detector.traits.trains_on):
            sources = [dataset.source(split, c) for c in group for split in ("train", "test")]
            if sets.validated:
                sources += [support.validation(dataset, c) for c in group]
            hosts = run.device.hosts
            run.version = hosts.from_main(support.version(sources if hosts.main else []))
        origin = f"{run.version} {identity}"
        part = parts.read(title, protocol, origin) if parts else None
        if part:
            run.ticks.done += run.count(group)
            run.tick(title, "measured before")(0)
        else:
            part = run.made = Results(stamp=copy.deepcopy(protocol))
            if keep:
                keep.check(detector, network, run.seeds)
            if backbone_of:
                each = part.stamp["backbone"].setdefault("per_category", {})
                each[group[0]] = stamp.describe_backbone(network)
            fitted = run.group(group, title)
            if keep:
                keep.keep(title, group, network, fitted, part)
            if parts:
                parts.write(title, part, origin)
        merge(results, part)
    results.support.update(support.listing(sets))
    if measured:
        over_seeds.conclude(results, (*config.metric_names, *run.further_names))
    return results


def _check_labelled(map_wrappers: Mapping[str, MapWrapper], config: EvalConfig) -> None:
    """Refuse what does not go with a detector that trains the network on labelled images."""
    into = config.preprocessing
    if not (into.whole and into.everything):
        raise ConfigError(
            "config.evaluation.resize: this detector learns from whole images and masks; expected "
            f'"stretched" with config.evaluation.crop = 1, found "{into.method}" with {into.crop}.'
        )
    if map_wrappers:
        raise ConfigError(
            "config.backbone: this detector trains the network itself, found around it: "
            f"{listed(map_wrappers)}. Name the network alone."
        )


def settings(
    detector: Detector, config: EvalConfig, sets: Sets, map_wrappers: Sequence[str]
) -> dict[str, Any]:
    """What a stamp says of a run beside its parts: details for ``stamp.make_stamp``.

    ``map_wrappers`` are their names.
    """
    return {
        "model": "one for all categories" if sets.sampling.pooled else "one per category",
        "support": support.describe(sets, fitting.split_of(detector)),
        "thresholds": thresholds.describe(config.false_alarm_rate, config.holdout, sets.validated),
        "map_wrappers": list(map_wrappers),
        **_decisions(config, sets),
        **({"batch_norm": recalibration.RULE} if config.recalibrate else {}),
        **({"further_numbers": config.about_further} if config.further else {}),
    }


def _decisions(config: EvalConfig, sets: Sets) -> dict[str, Any]:
    if not config.decisions:
        return {}
    normals = thresholds.NORMALS[sets.validated]
    return {
        "decisions": rules.describe(config.decisions, config.sigmas, normals),
        "morphology": stamp.plain(config.morphology),
    }
