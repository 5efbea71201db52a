"""Data sets in published layouts, each a small declaration of where its files lie.

A :class:`Layout` says by regular expressions which files are images, which masks, and which are
known and not read. The tree is listed once. A mask belongs to the image with the same values of the
named groups ``split``, ``category``, ``group``, ``kind``, ``stem`` and ``camera``; masks of one
image that differ in ``part`` are joined. Nothing depends on the order in which files are listed.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from dsad.core.types import Record
from dsad.data import decode, files
from dsad.data._places import walk
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, FaultError, chosen, error, variant, warning
from dsad.data.decode import MaskRule

#: The folder of a category, at the beginning of a pattern.
CATEGORY = r"(?P<category>[^/]+)"
#: Splits by the names of their folders.
SPLITS = {
    "train": "train", "Train": "train", "validation": "validation", "test": "test", "Test": "test",
    "test_public": "test", "test_private": "private", "test_private_mixed": "private_mixed",
}  # fmt: skip
#: Kinds of normal images.
NORMAL = ("good", "ok")
#: Every value but 0 is a defect.
ANY_VALUE = MaskRule(threshold=0, values=None)
#: The kind of test images whose labels only the owner knows.
UNLABELLED = "unlabelled"
#: The named groups that an image and its masks have in common.
_SHARED = ("split", "category", "group", "kind", "stem", "camera")
#: What is lost where a category has no image of a split.
_LOST = {
    "train": "nothing can be fitted on",
    "validation": "no threshold can be set with normal images of",
    "test": "nothing can be measured on",
}
_THREADS = 8


class Pattern(NamedTuple):
    """Regular expressions of files: of the folder, from the root, and of the name in it."""

    folder: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files of a data set lie.

    Named groups are ``category``, ``split`` (a key of ``SPLITS``), ``kind``, ``stem``, ``camera``,
    ``group`` (in a folder: the folder, in a name: within its folder) and ``part`` of masks. Images
    and masks without ``split`` are of the test.

    Attributes:
      images: of all splits; those of a folder without ``kind`` may be unlabelled.
      masks: likewise.
      aside: regular expressions of paths that belong to the set and are not read.
      expected: the layout in a line, for people.
      mask: path of a mask for people, with the groups of its image in braces.
      category: the only one, where no folder names it.
      splits: those of which every category has images.
      rule: how masks are read.
      label: by what an image is known to be anomalous: its "kind"; its mask having "pixels" that
        are not zero, at full size; or a "mask" being there.

    """

    images: tuple[Pattern, ...]
    masks: tuple[Pattern, ...]
    aside: tuple[str, ...] = ()
    expected: str
    mask: str
    category: str = ""
    splits: tuple[str, ...] = ("train", "test")
    rule: MaskRule = ANY_VALUE
    label: Literal["kind", "pixels", "mask"] = "kind"

    def matched(self, patterns: Iterable[Pattern], path: str) -> dict[str, str] | None:
        """The named groups of a path, or of an image folder ("folder/"), None of another one."""
        folder, _, name = path.rpartition("/")
        for pattern in patterns:
            above = re.fullmatch(pattern.folder, folder)
            match = re.fullmatch(pattern.name, name) if above and name else above
            if above and match:
                names = dict.fromkeys(_SHARED, "") | {"category": self.category, "split": "test"}
                groups = names | above.groupdict() | (match.groupdict() if name else {})
                return {key: value or "" for key, value in groups.items()}
        return None


class _Image(NamedTuple):
    path: str
    groups: Mapping[str, str]

    @property
    def record(self) -> Record:
        """The record as far as the path tells it; of images with a kind."""
        groups, kind = self.groups, self.groups["kind"]
        group = groups["group"]
        if group and f"/{group}/" not in f"/{self.path}":
            group = f"{self.path.rpartition('/')[0]}/{group}"
        normal = kind in NORMAL
        return Record(
            path=self.path, category=groups["category"], label=int(not normal),
            kind="good" if normal else kind, group=group, camera=groups["camera"],
        )  # fmt: skip


class _Tree:
    """The files of a root as what the layout says they are; faults of all that does not fit."""

    def __init__(self, layout: Layout, root: pathlib.Path, faults: list[Fault]):
        self.layout, self.faults = layout, faults
        self.images: dict[tuple[str, ...], _Image] = {}
        self.masks: dict[tuple[str, ...], dict[str, str]] = {}
        self.empty: dict[str, str] = {}  # category by image folder without image
        self.twice: dict[str, tuple[str, str]] = {}  # category, and the other path, by path
        self.others: list[str] = []
        listed = [(p, f) for p, f in walk(root, faults, stray=_any)] if root.is_dir() else []
        paths = sorted(path for found, _ in listed for path in found)
        folders = sorted(folder for _, found in listed for folder in found)
        self.prefix = ""
        if not any(layout.matched(layout.images, path) for path in paths):
            self.prefix = f"{files.folder_name(root)}/"  # the root may be one category
        for path in paths:
            self._file(path)
        used = {image.path.rpartition("/")[0] for image in self.images.values()}
        for folder in folders:
            groups = layout.matched(layout.images, f"{self.prefix}{folder}/")
            if groups and folder not in used:
                self.empty[folder] = groups["category"]

    @property
    def categories(self) -> tuple[str, ...]:
        """All that have an image, or a folder for images."""
        found = {image.groups["category"] for image in self.images.values()}
        return tuple(sorted(found | set(self.empty.values())))

    def _file(self, path: str) -> None:
        full, layout = self.prefix + path, self.layout
        name = path.rpartition("/")[2]
        if files.stray(name, (pathlib.PurePosixPath(name).suffix.lower(),)):
            self.others.append(path)  # hidden, or a copy
        elif groups := layout.matched(layout.images, full):
            key = tuple(groups[name] for name in _SHARED)
            other = self.images.setdefault(key, _Image(path, groups)).path
            if other != path:
                self.twice[path] = groups["category"], other
        elif groups := layout.matched(layout.masks, full):
            parts = self.masks.setdefault(tuple(groups[name] for name in _SHARED), {})
            other = parts.setdefault(groups.get("part", ""), path)
            if other != path:
                self.twice[path] = groups["category"], other
        elif not (
            (full.count("/") < 2 and files.is_text(name))
            or any(re.fullmatch(pattern, full) for pattern in layout.aside)
        ):
            self.others.append(path)

    def report(self, categories: tuple[str, ...]) -> None:
        """K0, K1, K7 and K9 in the categories that are read."""
        left_out = set(self.categories) - set(categories)
        expected = f"expected {self.layout.expected}."
        for folder, category in self.empty.items():
            if category not in left_out:
                text = f"empty class: the folder holds no image; {expected}"
                self.faults.append(error("K0", folder, text))
        for path, (category, other) in self.twice.items():
            if category not in left_out:
                self.faults.append(files.repeated(pathlib.PurePath(path).stem, path, other))
        for key, masks in self.masks.items():
            if key not in self.images and key[1] not in left_out:
                self.faults += map(files.orphan_mask, masks.values())
        read = [image.path for image in self.images.values()] + list(self.empty)
        read += [path for masks in self.masks.values() for path in masks.values()]
        within = {str(above) for path in read for above in pathlib.PurePosixPath(path).parents}
        whole: Counter[str] = Counter()
        for path in self.others:
            if (self.prefix + path).partition("/")[0] in left_out:
                continue
            name = path.rpartition("/")[2]
            above = [str(p) for p in pathlib.PurePosixPath(path).parents if str(p) not in within]
            if above and above[-1] not in self.empty:
                whole[above[-1]] += 1  # one line for a folder in which nothing is known
            else:
                reason = files.stray(name) or "no name of the layout"
                self.faults.append(files.ignored(path, reason))
        for folder, count in whole.items():
            text = f"no folder of the layout ({count} file{'s' if count > 1 else ''})"
            self.faults.append(files.ignored(folder, text))


def _any(name: str) -> str:
    """No file is passed over unseen."""
    del name
    return ""


class _Scan:
    """Records and faults of the categories that a config asks for."""

    def __init__(self, layout: Layout, about: About, config: DataConfig, root: pathlib.Path):
        self.layout, self.about, self.config, self.root = layout, about, config, root
        self.faults: list[Fault] = [] if root.is_dir() else [files.missing_root(root)]
        self.splits: dict[str, list[Record]] = {split: [] for split in layout.splits}
        self.dropped: list[Record] = []
        self.normal_masks: dict[str, str] = {}
        tree = _Tree(layout, root, self.faults)
        self.categories: tuple[str, ...] = ()
        if tree.categories:
            self.categories = chosen(config, tree.categories)
        elif root.is_dir():
            text = f"no image of {about.title} found; expected {layout.expected}."
            self.faults.append(error("K0", str(root), text))
            return
        tree.report(self.categories)
        images = {k: v for k, v in tree.images.items() if k[1] in self.categories}
        marked = self._marked(tree, images) if layout.label == "pixels" else {}
        for key, image in sorted(images.items(), key=lambda item: item[1].path):
            parts = tree.masks.get(key, {})
            masks = tuple(path for _, path in sorted(parts.items()))
            if layout.label != "pixels" or image.path in marked:
                self._add(image, masks, marked.get(image.path, bool(masks)))
        for category in self.categories:
            self._missing(category, set(tree.empty.values()))

    def _marked(self, tree: _Tree, images: Mapping[Any, _Image]) -> dict[str, bool]:
        """Whether the mask of an image has pixels that are not zero, by the image's path."""

        def look(item: tuple[Any, _Image]) -> bool | Fault:
            masks = tree.masks.get(item[0], {})
            if not masks:
                text = f"no mask {self._expected(item[1])}, which alone tells whether the image is "
                return error("K1", item[1].path, f"{text}normal; copy the data set again.")
            try:
                rule = self.layout.rule
                return any(decode.read_mask(self.root, m, rule).any() for m in masks.values())
            except FaultError as problem:
                return problem.faults[0]

        with ThreadPoolExecutor(_THREADS) as pool:
            looks = pool.map(look, images.items())
            seen = {i.path: seen for i, seen in zip(images.values(), looks, strict=True)}
        self.faults += [fault for fault in seen.values() if isinstance(fault, Fault)]
        return {path: bool(s) for path, s in seen.items() if not isinstance(s, Fault)}

    def _expected(self, image: _Image) -> str:
        return self.layout.mask.format(**image.groups)

    def _add(self, image: _Image, masks: tuple[str, ...], marked: bool) -> None:
        """A record of its split, with its masks; ``marked`` where masks tell the label."""
        record, split = image.record, SPLITS[image.groups["split"]]
        if self.layout.label != "kind":
            label = int(marked)
            record = dataclasses.replace(record, label=label, kind="defect" if label else "good")
        elif not record.kind:
            record = dataclasses.replace(record, label=-1, kind=UNLABELLED)
        if record.label == 1:
            if not masks:
                allowed = self.config.missing_masks == "image_only"
                expected = self._expected(image)
                self.faults.append(files.missing_mask(record.path, expected, allowed))
            record = dataclasses.replace(record, masks=masks)
        elif masks:
            self.normal_masks[record.path] = masks[0]
            for path in masks[1:]:
                text = f"one of {len(masks)} masks of the normal image {record.path}; remove them."
                self.faults.append(error("K6", path, text))
        if split == "train" and record.label:
            self.dropped.append(record)  # of use with labels only
        else:
            self.splits.setdefault(split, []).append(record)

    def _missing(self, category: str, empty: set[str]) -> None:
        """K0 of a category's splits."""
        of = {s: [r for r in rs if r.category == category] for s, rs in self.splits.items()}
        for split in self.layout.splits:
            if not of[split] and category not in empty:
                text = f"no {split} image: {_LOST[split]} the category."
                self.faults.append(warning("K0", category, text))
        if of.get("test") and all(r.label for r in of["test"]):
            text = "no normal test image: without them there are no image numbers."
            self.faults.append(warning("K0", category, text))

    def _counts(self, category: str) -> tuple[int, ...]:
        """In the columns of what is known of the set."""
        found: Counter[str] = Counter()
        found["dropped"] = sum(r.category == category for r in self.dropped)
        for split, records in self.splits.items():
            for r in (r for r in records if r.category == category):
                found.update([r.kind, "bad" if r.label else ""] if split == "test" else [split])
        kinds = {r.kind for r in self.splits.get("test", ()) if r.category == category and r.label}
        found["kinds"] = len(kinds)
        return tuple(found[column] for column in self.about.columns)

    def official(self) -> bool:
        """K12: whether all counts are published ones; adds the faults where they are not."""
        same = []
        for category in self.categories:
            counts, published = self._counts(category), self.about.counts.get(category)
            known = [c for c in (published, self.about.also.get(category)) if c]
            same.append(counts in known)
            if known and counts not in known:
                text = f"{'/'.join(map(str, counts))} {'/'.join(self.about.columns)}; "
                text += (
                    f"{self.about.title} has {' or '.join('/'.join(map(str, c)) for c in known)}."
                )
                self.faults.append(files.miscounted(self.config, category, text))
        return bool(same) and all(same)


def index(config: DataConfig, layout: Layout, about: About) -> files.FileDataset:
    """The index of a published data set with its faults, none of them raised.

    Anomalous training images are left out of the splits. Private splits are those of images of kind
    ``UNLABELLED``, label -1. Counts that differ make it a set "in the layout of" the published one.
    """
    split = about.protocols[variant(config, tuple(about.protocols))]
    root = files.root_folder(config)
    found = _Scan(layout, about, config, root)
    official = found.official()
    splits = {name: files.by_path(records) for name, records in found.splits.items()}
    found.faults += files.split_groups(splits)
    records = [r for records in splits.values() for r in records]
    skipped: dict[str, str] = {"K11": "labels come from the folders alone"}
    if layout.label != "kind":
        told = ("K5", "K6", "K11") if layout.label == "pixels" else ("K6", "K11")
        skipped |= dict.fromkeys(told, "labels come from the masks")
    if not any(r.group for r in records):
        skipped["K13"] = "the layout names no groups"
    if not set(found.categories) & set(about.counts):
        skipped["K12"] = "no published counts of these categories"
    if layout.rule.values is None:
        skipped["K4"] = about.masks
    if found.dropped:
        split += f"; {len(found.dropped):,} anomalous training images are not used"
    itself = official or not about.counts
    return files.FileDataset(
        name=config.name, categories=found.categories, config=config, root=root, splits=splits,
        rule=layout.rule, faults=tuple(found.faults), normal_masks=found.normal_masks,
        skipped=skipped,
        protocol=files.protocol(
            config, {name: rs for name, rs in splits.items() if all(r.label >= 0 for r in rs)},
            licence=f"{about.licence} ({about.title})" if itself
            else files.licence(root, found.categories),
            dataset=about.title if itself else f"{files.folder_name(root)} ({about.title} layout)",
            split=split if itself else f"as the folders give it ({split})",
            masks=about.masks, citation=about.citation,
        ),
    )  # fmt: skip
