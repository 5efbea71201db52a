"""Own images with labels: from places or from a list to a data set with a test split."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping

from dsad.core.config import listed
from dsad.core.types import Record
from dsad.data import _manifest, defective, files, heldout
from dsad.data._places import CATEGORY, Place, empty_class, labels, mixed, parse, walk
from dsad.data.base import DataConfig, Fault, chosen, error, warning
from dsad.data.decode import MaskRule

#: Checks that need masks.
MASKED = ("K1", "K2", "K4", "K5", "K6", "K15")


@dataclasses.dataclass(kw_only=True)
class _Labelled:
    """Images with labels on the way to a data set; ``tested`` are normal ones named as such.

    ``real`` says that abnormal images are named, ``masked`` that masks are.
    """

    config: DataConfig
    root: pathlib.Path
    name: str
    categories: tuple[str, ...]
    real: bool
    masked: bool
    normal: list[Record] = dataclasses.field(default_factory=list)
    tested: list[Record] | None = None
    abnormal: list[Record] = dataclasses.field(default_factory=list)
    normal_masks: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def held_out(self, category: str) -> tuple[list[Record], list[Record]]:
        """Normals of a category for training and test."""
        mine = [r for r in self.normal if r.category == category]
        if self.tested is not None:
            return mine, [r for r in self.tested if r.category == category]
        bad = [r for r in self.abnormal if r.category == category]
        train, test = heldout.divided(mine, self.config.holdout, self.config.seed, bad)
        if test and not train and self.config.holdout < 1:
            groups = len({r.group for r in test if r.group})
            text = f"all {len(test)} normal images are held out"
            text += f" with their {groups} groups" if groups else ""
            advice = "nothing is left to fit on. Name more images, or the test images by a split."
            self.faults.append(error("K13" if groups else "K0", category, f"{text}: {advice}"))
        return train, test

    def dataset(self) -> files.FileDataset:
        """The data set, with a test split in any case."""
        config = self.config
        train: list[Record] = []
        test: list[Record] = []
        for category in self.categories:
            for side, part in zip((train, test), self.held_out(category), strict=True):
                side += part
        count = f"{len(test):,} of {len(train) + len(test):,} normal images"
        split = f"{count} held out (share {config.holdout:g}, seed {config.seed}, {heldout.RULE})"
        if self.tested is not None:
            split = f"{count} named for the test"
        elif config.holdout == 0:
            split = f"all {len(train):,} normal images train, none is tested"
        groups = any(r.group for r in train + test)
        if self.real:
            test = test + self.abnormal
        elif self.tested is not None or config.holdout:
            test = defective.doubled(files.by_path(test))
        splits = {"train": files.by_path(train), "test": files.by_path(test)}
        faults = self.faults + (files.split_groups(splits) if groups else [])
        return files.FileDataset(
            name="folder", categories=self.categories, config=config, root=self.root,
            splits=splits, rule=MaskRule(), faults=tuple(faults), skipped=self.skipped(groups),
            normal_masks=self.normal_masks, procedural=not self.real,
            protocol=files.protocol(
                config, splits, licence=files.licence(self.root),
                dataset=f"{self.name} (own images)", split=split,
                defects="real" if self.real else defective.NOTE,
                groups="named" if groups else "none named",
            ),
        )  # fmt: skip

    def skipped(self, groups: bool) -> dict[str, str]:
        """Checks that do not apply, and why."""
        why = {"K11": "labels come from one place alone", "K12": "no published table"}
        if not self.real:
            why |= dict.fromkeys(("K1", "K2", "K4", "K6"), "defects are procedural")
        elif not self.masked:
            why |= dict.fromkeys(MASKED, "no masks are named")
        if not (self.masked and self.config.masks):
            why["K7"] = "nothing is matched by stem"
        return why if groups else {**why, "K13": "no groups are named"}


def of_list(config: DataConfig) -> files.FileDataset:
    """The images of a list, with all faults."""
    file = pathlib.Path(os.path.abspath(os.path.expanduser(config.manifest)))
    faults: list[Fault] = []
    lines = _manifest.read(file, faults)
    known = tuple(sorted({line.record.category for line in lines}))
    categories = chosen(config, known) if known else ()
    lines = [line for line in lines if line.record.category in categories]
    told = any(line.split for line in lines if not line.record.label)
    made = _Labelled(
        config=config, root=file.parent, name=file.name, categories=categories, faults=faults,
        real=any(line.record.label for line in lines), tested=[] if told else None,
        masked=any(line.mask for line in lines),
    )  # fmt: skip
    for line in lines:
        record, side = line.record, made.normal
        if record.label:
            side = made.abnormal
            if made.masked and not line.mask:
                allowed = config.missing_masks == "image_only"
                faults.append(files.missing_mask(line.where, "in its column", allowed))
        elif made.tested is not None:
            side = made.tested if line.split == "test" else made.normal
            if not line.split:
                text = "no split, though other lines have one; write train or test, or no split."
                faults.append(error("K0", line.where, text))
        if not record.label and line.mask:
            made.normal_masks[record.path] = line.mask
        side.append(record)
    _incomplete(made)
    return made.dataset()


def of_places(config: DataConfig) -> files.FileDataset:
    """The images of folders and globs, with all faults; Refused for a place that does not exist."""
    start = os.path.abspath(os.path.expanduser(config.root or "."))
    texts = {k: vars(config)[k] for k in ("normal", "abnormal", "masks", "test_normal")}
    places = {key: parse(key, text, start) for key, text in texts.items() if text}
    normal = places["normal"]
    within = [p.base for key, p in places.items() if key in ("abnormal", "test_normal")]
    root = pathlib.Path(os.path.commonpath([normal.holder, *within, *[start][: bool(config.root)]]))
    faults: list[Fault] = []
    name = os.path.basename(normal.holder) or "images"
    known, places = _categories(root, name, places, faults)
    categories = chosen(config, known) if known else ()
    made = _Labelled(
        config=config, root=root, name=name, categories=categories, faults=faults,
        real="abnormal" in places, masked="masks" in places,
        tested=[] if "test_normal" in places else None,
    )  # fmt: skip
    paths: dict[str, set[str]] = {key: set() for key in places}
    for category in categories:
        found = {key: _there(p, category, root, faults) for key, p in places.items()}
        for key, images in found.items():
            paths[key].update(images.values())
        made.normal += files.normals((category, path) for path in found["normal"].values())
        if made.tested is not None:
            made.tested += files.normals((category, p) for p in found["test_normal"].values())
        if made.real:
            made.abnormal += _defects(made, category, places["abnormal"], found)
    for key in ("abnormal", "masks", "test_normal"):
        if categories and key in paths and not paths[key]:
            faults.append(empty_class(f"config.data.{key}={texts[key]}"))
    faults += _overlaps(paths, texts)
    _incomplete(made)
    return made.dataset()


def _there(place: Place, category: str, root: pathlib.Path, faults: list[Fault]) -> dict[str, str]:
    """The images of a category in a place, see ``Place.images``."""
    there = place.at(category) if place.by_category else place
    return there.images(root, faults) if there else {}


def _categories(
    root: pathlib.Path, name: str, places: dict[str, Place], faults: list[Fault]
) -> tuple[tuple[str, ...], dict[str, Place]]:
    """All categories there are, and the places with their categories."""
    normal = places["normal"]
    if not normal.pattern:
        start = os.path.relpath(normal.base, root)
        loose, folders = next(walk(root, [], start), ([], []))
        if folders and not loose:
            faults += labels(root, folders)
            normal = normal.within()
        elif folders:
            advice = "Or take them all as one category with a glob that ends in /**/*, or "
            advice += "name the loose ones with one that ends in /*."
            faults += mixed(root, loose, folders, advice)
    if not normal.by_category:
        known = (name,)
    else:
        known = tuple(c for c in normal.folders() if normal.at(c))
    made = {"normal": normal}
    for key, place in places.items():
        if key != "normal":
            made[key] = _alike(place, normal.by_category, known, faults)
    return known, made


def _alike(place: Place, several: bool, known: tuple[str, ...], faults: list[Fault]) -> Place:
    """A place with categories if ``normal`` has ``several``; appends what does not fit."""
    where = f"config.data.{place.key}"
    if place.by_category == several:
        return place
    if not several:
        text = f"{CATEGORY} stands here but not in config.data.normal; write it in both."
        faults.append(error("K0", where, text))
        return place
    if place.pattern:
        text = f"a glob without {CATEGORY}, while normal has categories ({listed(known)}); "
        faults.append(error("K0", where, f"{text}write {CATEGORY} for their folders."))
        return place
    loose, folders = next(walk(pathlib.Path(place.base), []), ([], []))
    odd = sorted(set(folders) - set(known)) + loose[:1]
    if odd:
        text = (
            f"{odd[0]} is no folder of a category; config.data.normal has the folders "
            f"{listed(known)}. If these are no categories, end config.data.normal in /**/*."
        )
        faults.append(error("K0", where, text))
    return place.within()


def _defects(
    made: _Labelled, category: str, place: Place, found: Mapping[str, dict[str, str]]
) -> Iterable[Record]:
    """Records of the abnormal images of a category, with their masks."""
    images, masks = found["abnormal"], found.get("masks", {})
    there = place.at(category) if place.by_category else place
    kinds = there is not None and not there.pattern  # a glob says nothing of kinds
    flat = bool(masks) and not any("/" in name for name in masks)
    mask_of: dict[str, str] = {}
    if made.masked:
        stems = _stems(images, flat, made.faults)
        mask_of = files.paired(stems, _stems(masks, flat, made.faults), made.faults)
        allowed = made.config.missing_masks == "image_only"
        for stem, path in stems.items():
            if stem not in mask_of:
                expected = f"{stem}_mask.png or {stem}.png in {made.config.masks}"
                made.faults.append(files.missing_mask(path, expected, allowed))
    for name, path in images.items():
        kind = name.partition("/")[0] if kinds and "/" in name else "bad"
        if kind == "good":
            text = "a folder 'good' of abnormal images; rename it, or name the folders beside it."
            made.faults.append(error("K0", path, text))
        mask = mask_of.get(_stem(name, flat))
        shown = (mask,) if mask else ()
        yield Record(path=path, category=category, label=1, kind=kind, masks=shown)


def _stem(name: str, flat: bool) -> str:
    return os.path.splitext(os.path.basename(name) if flat else name)[0]


def _stems(found: Mapping[str, str], flat: bool, faults: list[Fault]) -> dict[str, str]:
    """Paths by stem, of names without their folders if ``flat``; appends those that occur twice."""
    made: dict[str, str] = {}
    for name, path in found.items():
        if (other := made.setdefault(_stem(name, flat), path)) != path:
            faults.append(files.repeated(_stem(name, flat), path, other))
    return made


def _overlaps(paths: Mapping[str, set[str]], texts: Mapping[str, str]) -> list[Fault]:
    """K14: files that two places name."""
    faults = []
    keys = list(paths)
    for i, key in enumerate(keys):
        for other in keys[i + 1 :]:
            if both := sorted(paths[key] & paths[other]):
                text = (
                    f"{len(both)} images such as this are named by {key}={texts[key]} and by "
                    f"{other}={texts[other]}; name each by one of them, with globs if need be."
                )
                faults.append(error("K14", both[0], text))
    return faults


def _incomplete(made: _Labelled) -> None:
    """Appends a fault for every category without images that it needs."""
    fits, tests = made.config.holdout < 1, made.config.holdout > 0
    has = {k: {r.category for r in v or ()} for k, v in vars(made).items()
           if k in ("normal", "tested", "abnormal")}  # fmt: skip
    for category in made.categories:
        if category not in has["normal"] | has["tested"] and (fits or not made.real):
            made.faults.append(empty_class(category))
        elif category not in has["normal"] and fits:
            made.faults.append(warning("K0", category, "no training image: nothing can be fitted."))
        if tests and made.tested is not None and category not in has["tested"]:
            text = "no normal test image: there are no image numbers."
            made.faults.append((warning if made.real else error)("K0", category, text))
        if tests and made.real and category not in has["abnormal"]:
            text = "no abnormal image: nothing is measured of it."
            made.faults.append(warning("K0", category, text))
    if not made.categories and not made.faults:
        made.faults.append(error("K0", made.config.place, "no category with normal images."))
