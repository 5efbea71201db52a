"""Support sets: which training images a model may see, and which are kept for its thresholds."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from dsad.core.config import Settings, as_dict, field
from dsad.core.errors import ConfigError
from dsad.core.types import Dataset, Record, Sample, Source
from dsad.data.combined import file_lines, joined, selected
from dsad.data.heldout import group, rank

#: Said in the stamp.
RULE = "lowest SHA-256 of (seed, category, path), in path order"
#: Likewise, of anomalous images, by the split that they are drawn from.
ANOMALOUS = {
    "train": "as many anomalous ones, drawn alike from the training images",
    "test": "as many anomalous ones, drawn alike from the test images for want of any in training",
}
#: Likewise, of those that stand for normal ones.
CONTAMINATED = (
    "anomalous test images, drawn alike, are so large a share of the training images and count as "
    "normal there; thresholds are set by normal images alone"
)
UNTESTED = "a seed's draw is not tested by it, nor what is in one group with it"
#: Likewise, by the split that a detector is fitted on.
WHOLE = {
    "train": "all training images",
    "test": "the test images themselves, without their labels",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Support:
    """Training images of one category and seed, as paths in path order.

    ``bank`` are for the detector; without those ``held_out`` of them it is fitted once more, to set
    thresholds. ``anomalous`` of the bank are such, for a detector that learns from labels or as a
    contamination; images that are ``untested`` belong to the test split, and are in the bank or in
    one group with images there. Paths are the identity of the images, so neither the order of files
    nor of records matters.
    """

    bank: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    anomalous: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the lines of a field's name, tab, path."""
        lines = [f"{n}\t{p}\n" for n, found in dataclasses.asdict(self).items() for p in found]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class SupportConfig(Settings, place="support"):
    """What a support set is made into before a detector is fitted.

    Attributes:
      rotations: n: every image n times, rotated by 360°/n each about its centre, on a canvas of its
        size, bilinearly, mirrored beyond its borders (AnomalyDINO: 8). 1: as it is.
      brightness: b: every image, before it is rotated, times a factor from 1 - b to 1 + b, drawn
        from its category and path (SuperADD: 0.2). 0: as it is.

    """

    rotations: int = field(1, at_least=1)
    brightness: float = field(0.0, at_least=0, at_most=1)

    def applied(self, source: Source) -> Source:
        """The source with all its rotations, those of an image after each other."""
        source = _Brightened(source, self.brightness) if self.brightness else source
        return _Rotated(source, self.rotations) if self.rotations > 1 else source

    def describe(self) -> dict[str, Any]:
        """For the stamp: rotations, and a brightness that is changed."""
        return {k: v for k, v in as_dict(self).items() if v or k != "brightness"}


#: Nothing is changed.
AS_DRAWN = SupportConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which training images are used, and for how many fits.

    ``shots`` of each category (0: all) are drawn by every one of ``seeds``; ``support`` is what
    becomes of them, and ``pooled`` fits one detector on those of all categories together.
    ``contamination`` is the share of anomalous test images that is added to them.
    """

    shots: int = 0
    contamination: float = 0.0
    seeds: tuple[int, ...] = (0,)
    support: SupportConfig = AS_DRAWN
    pooled: bool = False


#: Every training image, once.
ALL = Sampling()


@dataclasses.dataclass(frozen=True)
class Sets:
    """The support sets of every category and seed, and the sampling that they come from.

    ``validated``: the data set's validation images set the thresholds, and none is held out.
    """

    sampling: Sampling
    by_category: Mapping[str, Mapping[int, Support]]
    validated: bool = False

    def pool(self, dataset: Dataset, category: str, split: str) -> Source:
        """Where the images of the category's banks are."""
        source = dataset.source(split, category)
        if any(own.untested for own in self.by_category[category].values()):
            return joined([source, dataset.source("test", category)])
        return source

    def tested(self, dataset: Dataset, category: str, seed: int) -> Source:
        """The test images for what was fitted on the category's support set."""
        source = dataset.source("test", category)
        own = self.by_category.get(category, {}).get(seed)
        if own is None or not own.untested:
            return source
        out = set(own.untested)
        return selected(source, [i for i, r in enumerate(source.records) if r.path not in out])


class _Brightened:
    """Every sample with its image brighter or darker."""

    def __init__(self, source: Source, reach: float) -> None:
        self._source, self._reach, self.records = source, reach, source.records

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Sample:
        sample, digits = self._source[index], 13
        drawn = int(rank(sample.record.path, 0, sample.record.category)[:digits], 16) / 16**digits
        image = sample.image * (1 + self._reach * (2 * drawn - 1))
        return dataclasses.replace(sample, image=image.round().clip(0, 255).astype(np.uint8))


class _Rotated:
    """Sample ``i * rotations + r`` is sample i, rotated for the r-th time."""

    def __init__(self, source: Source, rotations: int) -> None:
        self._source, self._rotations = source, rotations
        self.records: Sequence[Record] = [r for r in source.records for _ in range(rotations)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self._source[index // self._rotations]
        angle = 360 / self._rotations * (index % self._rotations)
        if not angle:
            return sample

        def turned(values: np.ndarray, order: int) -> np.ndarray:
            return ndimage.rotate(values, angle, reshape=False, order=order, mode="mirror")

        mask = sample.mask
        mask = mask if mask is None else turned(mask.astype(np.uint8), 0).astype(bool)
        return dataclasses.replace(sample, image=turned(sample.image, 1), mask=mask)


def subset(source: Source, paths: Sequence[str]) -> Source:
    """The samples of a source with the given paths, in their order."""
    place = {r.path: i for i, r in enumerate(source.records)}
    return selected(source, [place[p] for p in paths])


def validation(dataset: Dataset, category: str) -> Source:
    """The normal validation images of a category."""
    source = dataset.source("validation", category)
    return selected(source, [i for i, r in enumerate(source.records) if r.label == 0])


def draw(paths: Sequence[str], shots: int, seed: int, category: str) -> tuple[str, ...]:
    """``shots`` of the paths (0: all), in path order, drawn from (seed, category, path).

    A path's rank is the SHA-256 of the three, so the draw is the same on every machine, for any
    order of the files, and the one-shot set lies in the two-shot set of the same seed.
    """
    ranked = sorted(paths, key=lambda path: rank(path, seed, category))
    return tuple(sorted(ranked[:shots] if shots else paths))


def choose(
    dataset: Dataset,
    categories: Sequence[str],
    *,
    shots: int,
    seeds: Sequence[int],
    holdout: Callable[[int], tuple[int, int]] | None = None,
    labelled: bool = False,
    measured: bool = True,
    contamination: float = 0.0,
) -> dict[str, dict[int, Support]]:
    """The support set of every category and seed, of normal training images alone.

    ``holdout`` says how many groups and how many images of so many to hold out, at least. With
    ``labelled`` there are as many anomalous images beside the normal ones, of the training split,
    or of the test split where that has none; with ``contamination`` so many anomalous test images,
    at least one, that they are this share of all. If the test is ``measured``, some have to be
    left. Raises ConfigError with all faults at once.
    """
    if shots < 0:
        raise ConfigError(f"shots: expected 0 (all training images) or more, found {shots}.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds: expected distinct integers ≥ 0, found {list(seeds)}.")
    made: dict[str, dict[int, Support]] = {}
    faults = []
    for category in categories:
        # Sets for methods with labels, such as visa:highshot, have defects in training too.
        train = dataset.source("train", category).records
        records = {r.path: r for r in train if not r.label}
        paths = list(records)
        if len(paths) < shots:
            faults.append(f"{category}: {len(paths)} training images, shots = {shots}")
            continue
        made[category] = {}
        for seed in seeds:
            drawn = draw(paths, shots, seed, category)
            held: tuple[str, ...] = ()
            if holdout:
                held = hold_out([records[p] for p in drawn], seed, *holdout(len(drawn)))
            made[category][seed] = Support(bank=drawn, held_out=held)
        if labelled:
            faults += _add_labelled(dataset, category, shots, made[category], measured)
        elif contamination:
            size = shots or len(paths)
            count = max(1, round(size * contamination / (1 - contamination)))
            asked = f"contamination = {contamination:g} of {size + count} training images"
            faults += _add_anomalous(
                dataset, category, "test", count, made[category], asked, measured
            )
        if holdout and not all(x.held_out for x in made[category].values()):
            what = "image" if len(paths) == 1 or shots == 1 else "group"
            faults.append(
                f"{category}: a single training {what} cannot both fill the detector and set the "
                "threshold (evaluation.false_alarm_rate > 0)"
            )
    if faults:
        raise ConfigError(
            f"{dataset.name}: support sets cannot be drawn:\n  " + "\n  ".join(faults) + "\n"
            "Add images, lower config.shots or config.contamination, leave these categories out, "
            "or do without a threshold with --config.evaluation.false_alarm_rate=0."
        )
    return made


def anomalous_split(dataset: Dataset, category: str) -> str:
    """The split that anomalous images are drawn from: "train" where there are any, else "test"."""
    labels = [record.label for record in dataset.source("train", category).records]
    return "train" if 1 in labels else "test"


def _add_labelled(
    dataset: Dataset, category: str, shots: int, sets: dict[int, Support], measured: bool
) -> list[str]:
    split = anomalous_split(dataset, category)
    if split == "test" and not shots and measured:
        return [f"{category}: no anomalous training image; config.shots above 0 draws test images"]
    return _add_anomalous(dataset, category, split, shots, sets, f"shots = {shots}", measured)


def _add_anomalous(
    dataset: Dataset, category: str, split: str, count: int, sets: dict[int, Support], asked: str,
    measured: bool,
) -> list[str]:  # fmt: skip
    """Adds ``count`` images (0: all) to the sets of every seed; gives the faults that leave none.

    ``asked`` says which key asks for them, for people.
    """
    test = dataset.source("test", category).records
    known = {r.path: r for r in (*dataset.source("train", category).records, *test)}
    paths = [r.path for r in dataset.source(split, category).records if r.label == 1]
    if not paths or len(paths) < count:
        return [f"{category}: {len(paths)} anomalous images, {asked}"]
    for seed, own in sets.items():
        drawn = draw(paths, count, seed, category)
        bank = tuple(sorted((*own.bank, *drawn)))
        groups = {group(known[path]) for path in bank}
        out = tuple(sorted(r.path for r in test if group(r) in groups))
        left = sum(r.label == 1 and r.path not in out for r in test)
        if measured and not left:
            return [f"{category}: {asked} leaves no anomalous image to test, seed {seed}"]
        sets[seed] = dataclasses.replace(own, bank=bank, anomalous=drawn, untested=out)
    return []


def hold_out(records: Sequence[Record], seed: int, groups: int, images: int) -> tuple[str, ...]:
    """Paths, in their order, of at least so many whole groups and so many images; at most half.

    An image of no group is one. Ranked by (seed, category, group), so that the order is random and
    the same everywhere; a group that would take more than half of the images is passed over.
    """
    members: dict[str, list[str]] = {}
    for r in records:
        members.setdefault(f"group {r.group}" if r.group else r.path, []).append(r.path)
    held: list[str] = []
    taken, category = 0, records[0].category if records else ""
    for name in sorted(members, key=lambda name: rank(name, seed, category)):
        if taken >= groups and len(held) >= images:
            break
        if len(held) + len(members[name]) <= len(records) // 2:
            held, taken = held + members[name], taken + 1
    return tuple(sorted(held))


def version(sources: Iterable[Source]) -> str:
    """SHA-256 over size and time of the files of all samples, where the sources tell of files."""
    digest = hashlib.sha256()
    for source in sources:
        for line in file_lines(source, range(len(source))):
            digest.update(line.encode())
    return digest.hexdigest()


def describe(sets: Sets, split: str = "train") -> dict[str, Any]:
    """For the stamp: counts and one hash over all sets; the paths are in the results."""
    sampling, chosen, digest = sets.sampling, sets.by_category, hashlib.sha256()
    for category in sorted(chosen):
        for seed in sorted(chosen[category]):
            digest.update(f"{category}\t{seed}\t{chosen[category][seed].sha256}\n".encode())
    added = {c: s for c, s in chosen.items() if any(x.anomalous for x in s.values())}
    untested = {c: {str(n): len(x.untested) for n, x in s.items()} for c, s in added.items()}
    about: dict[str, Any] = {}
    if sampling.contamination:
        rule = f"{CONTAMINATED}; {UNTESTED}"
        images = {c: {str(n): len(x.anomalous) for n, x in s.items()} for c, s in added.items()}
        share = sampling.contamination
        about = {"contamination": {"share": share, "rule": rule, "images": images}}
    elif added:
        about = {"anomalous": _anomalous_rule(added)}
    return {
        "shots": sampling.shots or "all",
        "rule": RULE if sampling.shots else WHOLE[split],
        **about,
        **({"untested": untested} if added else {}),
        "seeds": list(sampling.seeds),
        **sampling.support.describe(),
        "sha256": digest.hexdigest(),
    }


def _anomalous_rule(labelled: Mapping[str, Mapping[int, Support]]) -> str:
    """Where anomalous images were drawn from, and what of the test that leaves out."""
    every = [own for by_seed in labelled.values() for own in by_seed.values()]
    drawn = any(set(own.anomalous) & set(own.untested) for own in every)
    rule = ANOMALOUS["test" if drawn else "train"]
    return f"{rule}; {UNTESTED}" if any(own.untested for own in every) else rule


def listing(sets: Sets) -> dict[str, Any]:
    """For the results: per category and seed the hash, the count, and the paths if drawn."""
    made: dict[str, Any] = {}
    for category, by_seed in sets.by_category.items():
        made[category] = {}
        for seed, support in by_seed.items():
            row: dict[str, Any] = {"sha256": support.sha256, "images": len(support.bank)}
            if sets.sampling.shots:
                row["paths"] = list(support.bank)
            for name in ("held_out", "anomalous", "untested"):
                if paths := getattr(support, name):
                    row[name] = list(paths)
            made[category][str(seed)] = row
    return made
