"""The localization run: features, detector, anomaly maps on original pixels, metrics."""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dsad.core import paths
from dsad.core.config import listed
from dsad.core.detection import Detector, MapWrapper
from dsad.core.errors import ConfigError
from dsad.core.hosts import spans
from dsad.core.rng import named
from dsad.core.types import Backbone, Dataset, Progress, Source, Tree, silent
from dsad.evaluation import (
    fitting,
    maps,
    numbers,
    recalibration,
    rules,
    stamp,
    support,
    thresholds,
    ticks,
)
from dsad.evaluation import seeds as over_seeds
from dsad.evaluation.compiled import Device, Fitted
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.parts import Parts
from dsad.evaluation.reader import Features, Reader
from dsad.evaluation.report import gallery, panels
from dsad.evaluation.results import Results, merge, read_results, write_results
from dsad.evaluation.scored import Scored, held_out, score
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
            "evaluation.image_size: expected the side of the network's input, found 0."
        )
    if config.save_maps != "none" and folder is None:
        raise ConfigError("evaluation.save_maps: a folder is needed to save anomaly maps in.")
    sets = sampling if isinstance(sampling, Sets) else fitting.supports(
        detector, dataset, chosen, config, sampling, fitted=given is not None
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
    if given:
        _check_tested(given, dataset)
    protocol = {**settings(detector, config, sets, tuple(map_wrappers or ())), "detector_state": {}}
    if given:
        known = ("support", "thresholds", "decisions")
        protocol |= {name: given.stamp[name] for name in known if name in protocol}
    run = _Run(
        dataset, detector, config, key, train, sets, dict(map_wrappers or {}), given, folder,
        Ticks(progress, 0), measured,
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
        over_seeds.conclude(results, config.metric_names)
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


def _check_tested(given: fitting.Given, dataset: Dataset) -> None:
    """Refuse to test a model on images that it was fitted on."""
    if given.stamp["dataset"]["name"] == dataset.name:
        untested = given.stamp["support"].get("untested", {})
        if any(count for by_seed in untested.values() for count in by_seed.values()):
            raise ConfigError(
                f"config.data.name: the model was fitted on test images of {dataset.name}; measure "
                "it on other data, or fit and measure at once without --model."
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


@dataclasses.dataclass
class _Run:
    """What the categories of a run share, and the results they are collected in."""

    dataset: Dataset
    detector: Detector
    config: EvalConfig
    key: jax.Array
    train: fitting.Train | None
    sets: Sets
    map_wrappers: Mapping[str, MapWrapper]
    given: fitting.Given | None
    folder: str | epath.PathLike | None
    ticks: Ticks
    measured: bool = True
    device: Device | None = None
    statistics: dict[tuple[str, ...], Tree] = dataclasses.field(default_factory=dict)
    version: str = ""  # of the files of the categories at hand
    made: Results = dataclasses.field(default_factory=Results)

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.sets.sampling.seeds

    def count(self, categories: Sequence[str]) -> int:
        """The images to read."""
        fits = self.given is None
        return ticks.images(self.dataset, self.sets, categories, fits=fits, measured=self.measured)

    def tick(self, category: str, what: str, program: Any = None) -> Callable[[int], None]:
        def cached() -> bool:
            return self.device is not None and self.device.all_stored

        return self.ticks.of(category, what, program, cached)

    def writer(self, seed: int) -> maps.MapWriter | None:
        if self.config.save_maps == "none" or self.folder is None:
            return None
        tail = f"_seed{seed}" if len(self.seeds) > 1 else ""
        folder = paths.directory(self.folder) / f"anomaly_maps{tail}"
        writer = maps.MapWriter(folder, self.config.save_maps)
        assert self.device is not None
        if self.device.hosts.main:
            writer.note({**self.made.stamp, "seed_of_these_maps": seed})
        return writer

    def group(self, group: Sequence[str], title: str) -> Fitted:
        """Fit one detector per seed, and score and measure its categories; gives the last one."""
        assert self.device is not None
        fitted = None
        reader = Reader(self.device, self.config)
        for seed in self.seeds:
            fitted, seconds = self._fit(reader, group, title, seed)
            size = self.made.stamp["detector_state"].setdefault(title, {})
            size[str(seed)] = stamp.describe_state(fitted.state)
            if self.config.false_alarm_rate > 0:
                self._thresholds(reader, fitted, group, title, seed)
            if len(self.seeds) == 1 and fitting.split_of(self.detector) == "train":
                reader = Reader(self.device, self.config)  # lets go of the training features
            writer = self.writer(seed) if self.measured else None
            for category in group if self.measured else ():
                self._category(reader, fitted, category, seed, seconds, writer)
                seconds = {"features": 0.0, "fit": 0.0}  # of a pooled fit: stand at the first
        assert fitted is not None
        return fitted

    def _thresholds(
        self, reader: Reader, fitted: Fitted, group: Sequence[str], title: str, seed: int
    ) -> None:
        """Those of validation images, or of a fit without the held-out ones.

        A model that is given brings its own.
        """
        if self.given:
            for category in group:
                self.made.thresholds[category] = {str(seed): self.given.threshold(category)}
            return
        config, validated = self.config, self.sets.validated
        if not validated:
            fitted, _ = self._fit(reader, group, title, seed, split=True)
        for category in group:
            if validated:
                source = support.validation(self.dataset, category)
            else:
                held = self.sets.by_category[category][seed].held_out
                source = support.subset(self.dataset.source("train", category), held)
            tick = self.tick(category, thresholds.NORMALS[validated], ticks.shapes(fitted))
            name = f"{category}/{'validation' if validated else 'held out'}"
            normal = held_out(reader, fitted, source, name, tick)
            groups = [record.group for record in source.records]
            row = thresholds.measure(None, normal, config.false_alarm_rate, groups)
            if config.decisions:
                row["decisions"] = rules.limits(config.decisions, normal, row, config.sigmas)
            self.made.thresholds.setdefault(category, {})[str(seed)] = row
            if not self.measured:
                scale = gallery.normal_scale(normal.own, normal.maps, normal.hosts)
                self.made.scales[category] = scale

    def _fit(
        self, reader: Reader, group: Sequence[str], title: str, seed: int, *, split: bool = False
    ) -> tuple[Fitted, dict[str, float]]:
        """Fit the detector on all images of the support sets, or on those not held out."""
        if self.given:
            return reader.device.place(self.given.fitted(title)), {"features": 0.0, "fit": 0.0}
        which = fitting.split_of(self.detector)
        sources = {c: self.sets.pool(self.dataset, c, which) for c in group}
        sets, config = self.sets.by_category, self.sets.sampling.support
        out = {p for c in group for p in sets[c][seed].held_out} if split else set()
        chosen = {c: support.subset(x, sets[c][seed].bank) for c, x in sources.items()}
        parts = [(c, config.applied(x)) for c, x in chosen.items()]
        paths_of = {c: [p for p in sets[c][seed].bank if p not in out] for c in group}
        rest = [config.applied(support.subset(sources[c], p)) for c, p in paths_of.items()]
        what = f"{which} features" + (" of the split fit" if split else "")
        tick = self.tick(title, what, "features")
        start, done = time.perf_counter(), self.ticks.done
        statistics = self._recalibrated(reader, rest)
        spent = time.perf_counter() - start
        # Seed 0 keeps the key that a category has without seeds.
        key = named(self.key, f"{title}, seed {seed}" if seed else title)
        read = functools.partial(
            Features, reader, parts, split=which, left_out=out, rotations=config.rotations
        )
        banks: tuple[Tree, ...] = ()
        for place, wrapper in enumerate(self.map_wrappers.values()):
            source = read(ticks.quiet if banks else tick, banks=banks, by_image=True)
            bank = wrapper.adapt(
                source, mesh=reader.device.mesh, key=named(key, f"map wrapper {place}")
            )
            banks = (*banks, reader.device.place(bank))
            spent += source.seconds
        features = read(ticks.quiet if banks else tick, banks=banks)
        told = self.ticks.fitting(f"{title}, split fit" if split else title)
        trained = None
        if self.train and self.detector.traits.trains_on:
            data = fitting.training_data(
                self.detector, reader.device, self.config, self.made.stamp, features, rest,
                backbone=reader.device.frozen(banks, config.rotations), title=title, seed=seed,
                key=key, folder=self.folder, version=self.version, progress=told,
            )  # fmt: skip
            trained = self.train(self.detector, data)
        state = self.detector.fit(
            features, mesh=reader.device.mesh, key=key, progress=told, trained=trained
        )
        fitted = Fitted(banks, jax.block_until_ready(reader.device.place(state)), statistics)
        self.ticks.done = done + sum(features.images)  # also where none was read
        spent += features.seconds
        return fitted, {"features": spent, "fit": time.perf_counter() - start - spent}

    def _recalibrated(self, reader: Reader, sources: Sequence[Source]) -> Tree:
        """The encoder's statistics on these images, which it has from now on; {} leaves them."""
        if not self.config.recalibrate:
            return {}
        device, images = reader.device, tuple(r.path for x in sources for r in x.records)
        if images not in self.statistics:  # seeds may share them
            statistics = recalibration.measured(device.backbone, sources, self.config)
            self.statistics[images] = device.place(statistics)
        reader.use(self.statistics[images])
        return self.statistics[images]

    def _category(
        self,
        reader: Reader,
        fitted: Fitted,
        category: str,
        seed: int,
        seconds: dict[str, float],
        writer: maps.MapWriter | None,
    ) -> None:
        """Score and measure one category with one detector."""
        config, test = self.config, self.sets.tested(self.dataset, category, seed)
        keep = len(self.seeds) > 1
        start = time.perf_counter()
        scored = score(
            reader, fitted, test, f"{category}/test",
            self.tick(category, "scores", ticks.shapes(fitted)), keep=keep, writer=writer,
            whole=config.method == "exact",  # sorting takes all scores in one place
            picture=gallery.picture if config.gallery and seed == self.seeds[0] else None,
        )  # fmt: skip
        at = self.made.thresholds.get(category, {}).get(str(seed))
        if at:
            at |= thresholds.achieved(scored, at)
        seconds = {**seconds, "score": time.perf_counter() - start}
        self.tick(category, "metrics")(0)
        start = time.perf_counter()
        decided = None
        if at and config.decisions:
            above = rules.counts(scored, at["decisions"], config.morphology)
            decided = numbers.Decided(at["decisions"], above)
        row, curves, notes = numbers.measure(scored, config, category, decided=decided)
        kinds = numbers.by_kind(scored, config, decided)
        if seed == self.seeds[0]:
            ranked, limit = row["pixel_auroc"] is not None, at["image"] if at else None
            self._show(category, test, scored, curves, ranked, limit)
            counts = {"train": len(self.dataset.source("train", category)), **scored.counts()}
            self.made.categories[category] = {"counts": counts}
        seconds["metrics"] = time.perf_counter() - start
        over_seeds.collect(self.made, category, seed, row, kinds, seconds, notes)
        about = self.made.categories[category]
        if reader.device.store:
            seen = reader.device.from_store
            about["features_from_cache"] = {
                part: int(scored.hosts.total(np.int64(sum(seen[name].values()))))
                for part in ("train", "validation", "held out", "test")
                if (name := f"{category}/{part}") in seen
            }
        if keep:
            about["features_between_seeds"] = {
                "kept_bytes": reader.kept_bytes, "recomputed": sorted(reader.recomputed),
            }  # fmt: skip

    def _show(
        self,
        category: str,
        test: Source,
        scored: Scored,
        curves: dict[str, np.ndarray],
        ranked: bool,
        threshold: float | None,
    ) -> None:
        """Curves, image scores and pictures for the report, ``ranked`` by pixel numbers."""
        made, hosts = self.made, scored.hosts
        every = not (scored.labels == 0).any()  # without normal images the scale is that of all
        shown = [i for i, label in enumerate(scored.own_labels) if every or label == 0]
        numbers_of, its_maps = [scored.own[i] for i in shown], [scored.maps[i] for i in shown]
        scale = gallery.normal_scale(numbers_of, its_maps, hosts)
        made.images[category] = numbers.of_images(test, scored, ranked=ranked)
        cases = gallery.choose_cases(made.images[category], self.config.gallery, threshold)
        made.cases[category] = cases
        made.gallery.update(gallery.pictures(category, test, scored, scale, cases))
        assert self.device is not None
        further, tops = panels.pictures(
            self.device, self.detector, self.config, category, test, scored, cases
        )
        made.gallery.update(further)
        made.scales[category] = {**scale, **tops}
        made.curves.update({f"{category}/{k}": v for k, v in curves.items()})
