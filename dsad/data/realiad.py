"""Real-IAD (Wang et al., CVPR 2024): 30 kinds of objects, each object seen by five cameras.

Layout, as published: ``realiad_<256|512|1024|raw>/<category>/{OK,NG/<CODE>}/S####/`` holds
``<category>_####_{OK|NG_<CODE>}_C<1..5>_<time>.jpg`` and, of defects that this camera sees, a mask
of the same stem and suffix .png. Beside the images lie the lists ``realiad_jsons/<list>/
<category>.json`` with ``meta`` {prefix, normal_class}, ``train`` and ``test``, whose items are
{category, anomaly_class, image_path, mask_path or null}. ``config.data.root`` is the folder of the
images, or the one that holds it and the lists.

``realiad``: the list ``realiad_jsons``, all cameras, every view an image of its own: 36,465
training images, all normal, and 114,585 test images, 51,329 of them anomalous.

``realiad:single``: the list ``realiad_jsons_sv``, the top camera C1 alone: 10,408 and 19,802,
9,415 of them anomalous. The noisy lists (``realiad_jsons_fuiad_*``) train on anomalous images and
are not read.

Labels are those of the list, not of the folder: 26,881 images of NG objects are labelled OK (their
camera does not see the defect). ``Record.group`` is the folder of the object, such as
"NG/BX/S0001", so that its views stay together; ``Record.camera`` is "C1" (top) to "C5".
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsad.core.config import listed
from dsad.core.types import Record
from dsad.data import _realiad_folders as places
from dsad.data import decode, files
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, error, variant, warning
from dsad.data.decode import MaskRule

CATEGORIES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint",
    "mounts", "pcb", "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll",
    "regulator", "rolled_strip_base", "sim_card_set", "switch", "tape", "terminalblock",
    "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb", "usb_adaptor", "vcpill",
    "wooden_beads", "woodstick", "zipper",
)  # fmt: skip
#: Kinds by the code of a list's ``anomaly_class``.
KINDS = {
    "OK": "good", "AK": "pit", "BX": "deformation", "CH": "abrasion", "HS": "scratch",
    "PS": "damage", "QS": "missing_part", "YW": "foreign_object", "ZW": "contamination",
}  # fmt: skip
CAMERAS = ("C1", "C2", "C3", "C4", "C5")
_NAME = re.compile(r".+_(C[1-5])_\d+")
_OBJECT = re.compile(r"(?:OK|NG/[^/]+)/S\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """Lists of one kind: where they lie, their cameras, their counts over all categories.

    ``unseen`` are test images of NG objects that count as normal; None is unknown.
    """

    places: tuple[str, ...]
    cameras: tuple[str, ...] = CAMERAS
    train: int
    test: int
    bad: int | None
    unseen: int | None = None
    split: str

    @property
    def folder(self) -> str:
        """For people."""
        return self.places[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A data set in this layout.

    Attributes:
      about: what is known of it.
      lists: by the variant of its name.
      prefix: what the names of its folders of images and lists begin with.
      categories: how many there are.
      suffix: of images.
      name: of an image without suffix; the first group is the camera.
      kinds: by the class in a list; None: every class is a kind of its own, and a view of a
        defective object without a mask counts as normal.

    """

    about: About
    lists: Mapping[str, Lists]
    prefix: str
    categories: int
    suffix: str = ".jpg"
    name: re.Pattern[str] = _NAME
    kinds: Mapping[str, str] | None = None


PUBLISHED = {
    "": Lists(
        places=("realiad_jsons/realiad_jsons", "realiad_jsons"),
        train=36_465, test=114_585, bad=51_329, unseen=26_881,
        split="published, multi-view (every view of five cameras an image)",
    ),
    "single": Lists(
        places=("realiad_jsons/realiad_jsons_sv", "realiad_jsons_sv"), cameras=("C1",),
        train=10_408, test=19_802, bad=9_415, split="published, single view (camera C1)",
    ),
}  # fmt: skip
ABOUT = About(
    title="Real-IAD", licence="CC BY-NC-SA 4.0 (on request)",
    citation="Wang et al., Real-IAD, CVPR 2024", address="on request from the owners",
    masks="every value but 0 is a defect", columns=("train", "test", "bad"),
    categories=len(CATEGORIES),
    counts={
        f"all categories, {lists.folder}": (lists.train, lists.test, lists.bad or 0)
        for lists in PUBLISHED.values()
    },
    protocols={name: lists.split for name, lists in PUBLISHED.items()},
    remarks=("26,881 views of defective objects are labelled OK: their camera sees no defect.",),
    marks=("*/OK/S[0-9]*/*_C[1-5]_*", "realiad_*"),
)  # fmt: skip
FAMILY = Family(
    about=ABOUT, lists=PUBLISHED, prefix="realiad_", categories=len(CATEGORIES), kinds=KINDS
)


class _Groups:
    """Faults that many images share: one line per text, which counts and names the first."""

    def __init__(self) -> None:
        self.paths: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def add(self, check: str, text: str, path: str) -> None:
        self.paths[check, text].append(path)

    def faults(self, category: str) -> Iterable[Fault]:
        for (check, text), paths in sorted(self.paths.items()):
            count = f"{len(paths)} image{'s' if len(paths) > 1 else ''} {text}"
            yield warning(check, category, f"{count}; the first is {min(paths)}.")


class _Category:
    """Records and faults of one category."""

    def __init__(
        self, name: str, root: pathlib.Path, file: pathlib.Path, config: DataConfig,
        family: Family, published: Lists,
    ):  # fmt: skip
        self.name, self.file, self.config, self.family = name, file, config, family
        self.published = published
        self.splits: dict[str, list[Record]] = {"train": [], "test": []}
        self.normal_masks: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.many = _Groups()
        self.files = files.below(root, name)
        self.listed: dict[str, str] = {}
        self.masks: set[str] = set()
        #: Test images of NG objects that the list labels OK.
        self.unseen = 0

    @property
    def where(self) -> str:
        """The list, for people."""
        return f"{self.file.parent.name}/{self.file.name}"

    def read(self) -> None:
        content = self._content()
        if content is None:
            return
        for split, records in self.splits.items():
            items = content[split]
            for number, item in enumerate(items):
                record = self._record(split, item, f"{self.where}:{split}[{number}]", content)
                if record is not None:
                    records.append(record)
            if not items:
                text = f'"{split}" is empty; expected the images of this split.'
                self.faults.append(error("K0", self.where, text))
        self._views()
        self._rest()
        self.faults += self.many.faults(self.name)

    def _content(self) -> dict[str, Any] | None:
        """The list with its prefix and normal class checked, or None with a fault."""
        copy = "Copy the published list again."
        try:
            content = files.parsed(decode.regular_bytes(self.file))
        except (OSError, ValueError) as problem:
            self.faults.append(error("K0", self.where, f"cannot be read: {problem}. {copy}"))
            return None
        meta = content.get("meta") if isinstance(content, dict) else None
        parts = [content.get(s) for s in self.splits] if isinstance(content, dict) else [None]
        if not isinstance(meta, dict) or not all(isinstance(part, list) for part in parts):
            text = f'expected an object of "meta" and the lists "train" and "test". {copy}'
            self.faults.append(error("K0", self.where, text))
            return None
        for key, needed in {"prefix": f"{self.name}/", "normal_class": "OK"}.items():
            if meta.get(key) != needed:
                text = f'"meta" has {key} {meta.get(key)!r}; expected {needed!r}. {copy}'
                self.faults.append(error("K0", self.where, text))
        if meta.get("pre_transform"):
            text = f"its pre_transform {meta['pre_transform']!r} is not applied."
            self.faults.append(warning("K9", self.where, text))
        same = all(f.severity != "error" for f in self.faults)
        return content if same else None

    def _record(self, split: str, item: Any, where: str, content: dict[str, Any]) -> Record | None:
        """What an item says, with all its faults; None where it is no image of the split."""
        name = item.get("image_path") if isinstance(item, dict) else None
        mask = item.get("mask_path") if isinstance(item, dict) else None
        if not isinstance(name, str) or not isinstance(mask, str | None):
            text = "expected an object with the texts image_path, anomaly_class and mask_path."
            self.faults.append(error("K0", where, text))
            return None
        path = content["meta"]["prefix"] + name
        mask = content["meta"]["prefix"] + mask if mask else ""
        if (other := self.listed.setdefault(path, where)) != where:
            check = "K7" if other.partition("[")[0] == where.partition("[")[0] else "K14"
            self.faults.append(error(check, where, f"{path} again, as in {other}; remove one."))
            return None
        if mask:
            self.masks.add(mask)
        if item.get("category", self.name) != self.name:
            text = f"category {item['category']!r} in the list of {self.name}."
            self.faults.append(error("K11", where, text))
        code = item.get("anomaly_class")
        kinds = self.family.kinds
        if not isinstance(code, str) or not code or (kinds and code not in kinds):
            known = f"one of {listed(kinds)}" if kinds else "OK or the name of a defect"
            text = f"anomaly_class {code!r} of {path}: expected {known}."
            self.faults.append(error("K11", where, text))
            return None
        place = self._place(path)
        if place is None:
            return None
        if kinds is None and not mask:
            code = "OK"
        label = int(code != "OK")
        if split == "train" and label:
            text = f"{path} is anomalous ({code}): expected normal training images only; lists "
            text += "with noise in training are not read."
            self.faults.append(error("K11", where, text))
            return None
        self._compare(place, code, split, path)
        there = self._mask(path, mask, code)
        if not label and there:
            self.normal_masks[path] = there
        return Record(
            path=path, category=self.name, label=label, kind=kinds[code] if kinds else _kind(code),
            group=place, camera=self._view(path),
            masks=(there,) if label and there else (),
        )  # fmt: skip

    def _view(self, path: str) -> str:
        """The camera of a file, "" where its name tells none."""
        match = self.family.name.fullmatch(pathlib.PurePosixPath(path).stem)
        return match[1] if match else ""

    def _place(self, path: str) -> str | None:
        """The folder of the object within its category, None of what is no image of the set."""
        if path not in self.files:
            text = f"no such file, though {self.where} lists it. Unpack the images again."
            self.faults.append(error("K8", path, text))
            return None
        file = pathlib.PurePosixPath(path)
        place = file.parent.relative_to(self.name).as_posix()
        view, suffix = self._view(path), self.family.suffix
        if file.suffix != suffix or not view or not _OBJECT.fullmatch(place):
            text = f"expected {self.name}/OK/S<number> or {self.name}/NG/<code>/S<number>, and in "
            text += f"it <name>_C<1..5>_<time>{suffix}: object and camera are known by them."
            self.faults.append(error("K9", path, text))
            return None
        if view not in self.published.cameras:
            text = f"camera {view} in the list of {listed(self.published.cameras)}."
            self.faults.append(error("K9", path, text))
            return None
        return place

    def _compare(self, place: str, code: str, split: str, path: str) -> None:
        """K11: the list and the folder; the list wins."""
        folder = place.split("/")[-2]
        if _kind(code) == _kind(folder):
            return
        if code == "OK":
            self.unseen += split == "test"
            how = "labelled OK" if self.family.kinds else "without a mask"
            text = f"in NG folders {how} by the list, which is followed (no defect in view)"
        elif folder == "OK":
            text = "in OK folders labelled anomalous by the list, which is followed"
        else:
            text = "in the folder of another defect than the list says, which is followed"
        self.many.add("K11", text, path)

    def _mask(self, path: str, mask: str, code: str) -> str:
        """The mask of an image if its file exists, else "" and a fault."""
        expected = str(pathlib.PurePosixPath(path).with_suffix(".png"))
        if mask and mask != expected and self.family.suffix != ".png":
            self.many.add("K1", "with a mask of another name in the list, which is followed", path)
        if mask in self.files:
            return mask
        if code != "OK":
            allowed = self.config.missing_masks == "image_only"
            what = mask or f"{expected} (the list has null)"
            self.faults.append(files.missing_mask(path, what, allowed))
        elif mask:
            text = f"no file {mask}, though {self.where} lists it. Unpack the images again."
            self.faults.append(error("K1", path, text))
        return ""

    def _views(self) -> None:
        """K13: objects without all their views."""
        views: dict[str, list[str]] = collections.defaultdict(list)
        for record in (r for records in self.splits.values() for r in records):
            views[record.group].append(record.camera)
        expected = sorted(self.published.cameras)
        odd = [group for group, seen in sorted(views.items()) if sorted(seen) != expected]
        if odd:
            text = f"{len(odd)} of {len(views)} objects have not one image of each of "
            text += f"{listed(self.published.cameras)}; the first is {odd[0]}, which has "
            text += f"{listed(sorted(views[odd[0]]))}."
            self.faults.append(warning("K13", self.name, text))

    def _rest(self) -> None:
        """Files that the list does not name."""
        suffix = self.family.suffix
        for path in sorted(self.files - self.listed.keys() - self.masks):
            file, view = pathlib.PurePosixPath(path), self._view(path)
            image = str(file.with_suffix(suffix))
            if reason := files.stray(file.name, (suffix, ".png")):
                self.faults.append(files.ignored(path, reason))
            elif file.suffix == ".png" and image not in self.files:
                self.faults.append(files.orphan_mask(path))
            elif file.suffix in (suffix, ".png") and view:
                if view not in self.published.cameras:
                    continue  # of a camera that the list leaves out
                if file.suffix == suffix:
                    self.many.add("K9", "not in the list: ignored", path)
                elif image in self.listed:
                    text = "with a mask beside it that the list does not name: the mask is ignored"
                    self.many.add("K11", text, image)
            else:
                self.faults.append(files.ignored(path, "no name of the layout"))


def _kind(code: str) -> str:
    """A kind by the words of a list, whose spelling varies."""
    return "good" if code == "OK" else "_".join(code.lower().split())


def _counted(counts: Sequence[int | None]) -> str:
    return "/".join("?" if n is None else f"{n:,}" for n in counts)


def _check_counts(
    parts: list[_Category], published: Lists, config: DataConfig, faults: list[Fault]
) -> None:
    """K12, where all categories are read; unknown counts fit any."""
    train, test = (sum(len(part.splits[s]) for part in parts) for s in ("train", "test"))
    bad = sum(r.label for part in parts for r in part.splits["test"])
    counts, expected = (train, test, bad), (published.train, published.test, published.bad)
    if any(b is not None and a != b for a, b in zip(counts, expected, strict=True)):
        text = f"{_counted(counts)} train/test/anomalous images; the published list has "
        faults.append(files.miscounted(config, published.folder, f"{text}{_counted(expected)}."))
    unseen = sum(part.unseen for part in parts)
    if published.unseen not in (None, unseen):
        text = f"{unseen:,} test images of NG objects are labelled OK; the published list has "
        faults.append(files.miscounted(config, published.folder, f"{text}{published.unseen:,}."))


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return index(config, FAMILY)


def index(config: DataConfig, family: Family) -> files.FileDataset:
    """Likewise of a data set in this layout."""
    published, about = family.lists[variant(config, tuple(family.lists))], family.about
    root = files.root_folder(config)
    faults = [] if root.is_dir() else [files.missing_root(root)]
    images = places.image_root(root, family.prefix, faults) if root.is_dir() else root
    parts: list[_Category] = []
    if not faults and (lists := places.list_folder(root, images, published.places, faults)):
        names = places.readable_categories(images, lists, family.prefix, config, faults)
        for name in names:
            file = lists / f"{name}.json"
            parts.append(_Category(name, images, file, config, family, published))
            parts[-1].read()
            faults += parts[-1].faults
    categories = tuple(part.name for part in parts)
    splits = {
        s: files.by_path(r for part in parts for r in part.splits[s]) for s in ("train", "test")
    }
    faults += files.split_groups(splits)
    skipped = {"K4": "any grey; every value but 0 is a defect"}
    if len(categories) == family.categories:
        _check_counts(parts, published, config, faults)
    else:
        text = f"the published counts are of all {family.categories} categories together"
        skipped["K12"] = text
    return files.FileDataset(
        name=config.name, categories=categories, config=config, root=images, splits=splits,
        rule=MaskRule(threshold=0, values=None), faults=tuple(faults), skipped=skipped,
        normal_masks={p: m for part in parts for p, m in part.normal_masks.items()},
        protocol=files.protocol(
            config, splits, licence=f"{about.licence} ({about.title})", dataset=about.title,
            split=published.split, images=files.folder_name(images),
            labels="the published list, not the folder", groups="the photographed object",
            masks=about.masks, citation=about.citation,
        ),
    )  # fmt: skip
