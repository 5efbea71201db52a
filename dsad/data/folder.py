"""Own images: folders of good and bad ones, a list of images, or any images to pretrain on.

``config.data.normal`` names the normal images: a folder, or a glob. In a folder either images lie,
which are one category, or folders, which are the categories, with images at any depth below them;
both is refused, as nobody can tell what is meant. The images of a glob are one category, unless a
folder in it is written ``{category}`` ("pics/{category}/good", "pics/{category}/ok_*.png"). A
single category has the name of the folder that holds ``normal``.

``abnormal``, ``masks`` and ``test_normal`` have the same categories: as folders in theirs, or as
``{category}``. Folders in an ``abnormal`` folder, below the category if there are several, are
the kinds of defects; all other abnormal images are of kind "bad". A mask has the path of its image
below ``masks``, with any suffix, and perhaps "_mask" after the name; if no mask lies in a folder,
names alone are compared. Without ``masks`` there are numbers of images only.

``manifest`` is a list instead, CSV with a first line of names or JSON lines: ``path`` and ``label``
(normal or abnormal, good or bad, 0 or 1), and perhaps ``split`` (train, test), ``mask``, ``group``,
``category``, ``kind``; paths are relative to its folder.

Where no normal test images are named, the share ``holdout`` of the normal ones, at least one a
category, is held out for the test by ``heldout.RULE``; groups that have an abnormal image come
first, as no group is on both sides. Without abnormal images the test images
are these, clean and with a procedural defect each, which their kinds and the protocol say.

With ``root`` alone, ``<category>/**/<name>.<suffix>``, everything is normal and trained on, and
nothing is measured. That index opens no file and asks for no file's size: it can hold the 1.28
million images of ImageNet, with ``data.cache="none"``. Copies, hidden files and other suffixes are
always ignored with a warning.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping

from dsad.core.config import listed
from dsad.core.types import Record
from dsad.data import _manifest, defective, files, heldout
from dsad.data._places import CATEGORY, Place, parse, walk
from dsad.data.base import DataConfig, Fault, chosen, error, variant, warning
from dsad.data.decode import MaskRule

_MASKED = ("K1", "K2", "K4", "K5", "K6", "K15")


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised; Refused for a place that does not exist."""
    variant(config)
    if config.manifest:
        return _listed(config)
    return _placed(config) if config.normal else _unlabelled(config)


# --- everything is normal and trained on ----------------------------------------------------


def _images(root: pathlib.Path, faults: list[Fault], start: str) -> list[str]:
    """Paths of all images in the folder ``start`` and the folders below it."""
    return [path for images, _ in walk(root, faults, start) for path in images]


def _root_name(root: pathlib.Path) -> str:
    return root.resolve().name or "images"  # the root of a file system has no name


def _empty(path: str) -> Fault:
    text = "empty class: no image in the folder or below it; remove it or fill it."
    return error("K0", path, text)


def _index(root: pathlib.Path, config: DataConfig, faults: list[Fault]) -> dict[str, list[str]]:
    """Image paths by category, of those that the config asks for."""
    loose, folders = next(walk(root, faults), ([], []))
    if not loose and not folders:
        suffixes = ", ".join(files.IMAGE_SUFFIXES)
        text = f"no image and no folder with images; expected files with {suffixes}."
        faults.append(error("K0", str(root), text))
        return {}
    if not loose:
        found = {name: _images(root, faults, name) for name in chosen(config, tuple(folders))}
        faults += [_empty(name) for name, paths in found.items() if not paths]
        return found
    name = _root_name(root)
    chosen(config, (name,))
    faults += _mixed(root, loose, folders, "Move the loose ones into a folder of their own.")
    return {name: loose}


def _mixed(root: pathlib.Path, loose: list[str], folders: list[str], advice: str) -> list[Fault]:
    """Faults of folders beside images: with images in them, they might be categories."""
    faults: list[Fault] = []
    for folder in sorted(folders):
        if below := _images(root, faults, folder):
            text = (
                f"{len(below)} images here and {len(loose)} directly in the folder above, such as "
                f"{min(loose)}: expected either folders, one for each category, or a single folder "
                f"of images. {advice}"
            )
            faults.append(error("K0", folder, text))
        else:
            faults.append(files.ignored(folder, "no image in the folder or below it"))
    return faults


def _unlabelled(config: DataConfig) -> files.FileDataset:
    root = files.root_folder(config)
    faults = [] if root.is_dir() else [files.missing_root(root)]
    found = _index(root, config, faults) if root.is_dir() else {}
    train = ((category, path) for category, paths in found.items() for path in paths)
    splits = {"train": files.normals(train), "test": ()}
    return files.FileDataset(
        name="folder", categories=tuple(sorted(found)), config=config, root=root, splits=splits,
        rule=MaskRule(), faults=tuple(faults),
        protocol=files.protocol(
            config, splits, licence=files.licence(root),
            dataset=f"{_root_name(root)} (folder of images)",
            split="all images train, none is held out",
        ),
        skipped={
            **dict.fromkeys(_MASKED, "no image has a mask"),
            "K7": "nothing is matched by stem",
            "K11": "every image counts as normal",
            "K12": "no published table",
            "K13": "the layout names no groups",
            "K14": "there is no test image",
        },
    )  # fmt: skip


# --- good and bad ones ----------------------------------------------------------------------


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
        if test and not train:
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
        groups = any(r.group for r in train + test)
        test = test + self.abnormal if self.real else defective.doubled(test)
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
        why = dict.fromkeys(_MASKED, "no masks are named") if not self.masked else {}
        if not self.real:
            why = dict.fromkeys(("K1", "K2", "K4", "K6"), "defects are procedural")
        if not (self.masked and self.config.masks):
            why["K7"] = "nothing is matched by stem"
        why |= {"K11": "labels come from one place alone", "K12": "no published table"}
        return why if groups else {**why, "K13": "no groups are named"}


def _listed(config: DataConfig) -> files.FileDataset:
    """The images of a list."""
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


def _placed(config: DataConfig) -> files.FileDataset:
    """The images of folders and globs."""
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
            normal = normal.within()
        elif folders:
            advice = "Or take them all as one category with a glob that ends in /**/*, or "
            advice += "name the loose ones with one that ends in /*."
            faults += _mixed(root, loose, folders, advice)
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
    flat = not any("/" in name for name in masks)
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
    has = {k: {r.category for r in v or ()} for k, v in vars(made).items()
           if k in ("normal", "tested", "abnormal")}  # fmt: skip
    for category in made.categories:
        if category not in has["normal"]:
            made.faults.append(_empty(category))
        if made.tested is not None and category not in has["tested"]:
            text = "no normal test image: there are no image numbers."
            made.faults.append((warning if made.real else error)("K0", category, text))
        if made.real and category not in has["abnormal"]:
            text = "no abnormal image: nothing is measured of it."
            made.faults.append(warning("K0", category, text))
    if not made.categories and not made.faults:
        made.faults.append(error("K0", made.config.place, "no category with normal images."))
