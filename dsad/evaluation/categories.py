"""The categories of an evaluation, one after another: fitted, given thresholds, scored, measured.

What is asked and what is refused before is in ``evaluation.localize``.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dsad.core import paths
from dsad.core.detection import Detector, MapWrapper
from dsad.core.rng import named
from dsad.core.types import Dataset, Source, Tree
from dsad.evaluation import (
    channels,
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
from dsad.evaluation.reader import Features, Reader
from dsad.evaluation.report import gallery, panels
from dsad.evaluation.results import Results
from dsad.evaluation.scored import Scored, held_out, score
from dsad.evaluation.support import Sets
from dsad.evaluation.ticks import Ticks


@dataclasses.dataclass
class Categories:
    """What the categories of an evaluation share, and the results they are collected in.

    ``made`` are those of the group at hand, ``version`` is that of its files.
    """

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
    further_names: tuple[str, ...] = ()  # of the numbers that this data set adds
    device: Device | None = None
    statistics: dict[tuple[str, ...], Tree] = dataclasses.field(default_factory=dict)
    version: str = ""
    made: Results = dataclasses.field(default_factory=Results)

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.sets.sampling.seeds

    def count(self, categories: Sequence[str], seeds: Sequence[int] | None = None) -> int:
        """The images to read, of all seeds unless some are named."""
        return ticks.images(
            self.dataset, self.sets, categories, self.seeds if seeds is None else seeds,
            fits=self.given is None, measured=self.measured,
        )  # fmt: skip

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
        for place, seed in enumerate(self.seeds):
            if (same := self._measured(group, self.seeds[:place], seed)) is not None:
                over_seeds.repeat(self.made, group, title, same, seed)
                self.tick(title, "measured before")(self.count(group, [seed]))
                continue
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

    def _measured(self, group: Sequence[str], before: Sequence[int], seed: int) -> int | None:
        """An earlier seed with the same images, where nothing else could differ."""
        alike = not (self.detector.traits.seeded or self.map_wrappers)
        if not (alike and self.measured and self.config.save_maps == "none"):
            return None
        sets = self.sets.by_category
        same = [s for s in before if all(sets[c][s] == sets[c][seed] for c in group)]
        return same[0] if same else None

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
        if self.further_names:
            row, kinds = channels.completed(config, row, kinds)
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
