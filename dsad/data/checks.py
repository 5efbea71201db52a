"""The full check of a data set: every file decoded, every fault collected, none raised.

The checks K1 to K15 are those of :data:`TITLES`; K0 is the layout itself. A check that a layout
makes meaningless (no groups, no annotation file) is reported as skipped with the reason.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.ndimage

from dsad.core.types import Dataset, Progress, Record, Source, silent
from dsad.data import decode
from dsad.data.base import DataConfig, Fault, FaultError, IndexedDataset, error, indexed, warning
from dsad.data.canvases import nearest_pixels, size_on
from dsad.data.files import EncodedSource, FileDataset, split_groups

#: What each check asks for.
TITLES = {
    "K0": "the folders of the layout exist and no class is empty",
    "K1": "every anomalous image has its mask, every mask its image",
    "K2": "a mask has the size of its image",
    "K3": "the image mode needs no undeclared lossy conversion",
    "K4": "mask values lie in the declared set",
    "K5": "the mask of an anomalous image is not empty",
    "K6": "the mask of a normal image is empty",
    "K7": "one file per stem and folder",
    "K8": "every file decodes completely",
    "K9": "no stray, hidden or copied file",
    "K10": "the order does not depend on the file system",
    "K11": "annotation and folder agree on the label",
    "K12": "the counts are the published ones",
    "K13": "groups stay on one side of the split",
    "K14": "no image occurs twice, least of all in two splits",
    "K15": "no defect region vanishes at the working size",
}
#: What to do about a fault of each check, whatever else its message says.
REMEDIES = {
    "K0": "point config.data.root to the published layout, or copy what is missing",
    "K1": "add the mask, remove the one without image, or leave pixels unmeasured for such images "
    'with config.data.missing_masks="image_only"',
    "K2": "export the mask again at the size of its image",
    "K3": "convert the file to 8-bit RGB or grey, or name its mode in config.data.lossy",
    "K4": "binarise the mask at its full size and save it again",
    "K5": "draw the defect, or count the image among the normal ones",
    "K6": "move the image to the anomalous ones, or empty the mask",
    "K7": "rename or remove one of the two",
    "K8": "copy the file again from the published archive",
    "K9": "remove the file, or rename it as the layout asks",
    "K10": "report this: the reader of the data set has to sort",
    "K11": "correct the label or move the file; the list wins",
    "K12": "copy the published archive again, or state the difference",
    "K13": "keep all images of the group on one side of the split",
    "K14": "remove one of the two, or state the overlap beside the numbers",
    "K15": "work at a larger size, or state that these defects cannot be found",
}
_SKIPPED = {name: "no files" for name in ("K3", "K4", "K7", "K9")} | {
    "K11": "labels are generated",
    "K12": "no published table",
    "K13": "no groups",
}
_THREADS = max(2, min(16, os.cpu_count() or 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One category in the summary table.

    ``sizes`` reads "width×height", as ranges when images differ; ``area`` is the median defect
    area in percent of the image; ``vanished`` of ``regions`` 8-connected defect regions have no
    pixel left on the canvas.
    """

    category: str
    train: int
    validation: int = 0
    good: int
    bad: int
    kinds: int
    without_mask: int
    sizes: str
    modes: str
    area: float | None
    regions: int
    vanished: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All faults and one row per category; ``ok`` when no fault is an error.

    ``skipped`` maps checks that do not apply to the reason.
    """

    name: str
    faults: tuple[Fault, ...]
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    protocol: Mapping[str, object]

    @property
    def ok(self) -> bool:
        """Whether the data set can be used."""
        return not any(f.severity == "error" for f in self.faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one decoded image shows."""

    record: Record
    split: str
    faults: tuple[Fault, ...]
    size: tuple[int, int] | None = None  # height, width
    mode: str = ""
    digest: str = ""
    mask_digest: str = ""
    area: float | None = None
    regions: int = 0
    vanished: int = 0


def vanishing(mask: np.ndarray, side: int) -> tuple[int, int]:
    """8-connected regions of a mask (h, w), and how many vanish on a canvas of ``side``.

    The mask is sampled by nearest neighbour at the size the image has on the canvas.
    """
    found: Any = scipy.ndimage.label(mask, np.ones((3, 3), bool))  # the stubs say int or tuple
    labels, regions = found[0], int(found[1])
    left = np.unique(nearest_pixels(labels, size_on(side, *mask.shape)))
    return regions, regions - int((left > 0).sum())


#: Faults, image, mode and mask of a record.
_Read = tuple[list[Fault], np.ndarray | None, str, np.ndarray | None]


def _read_files(dataset: FileDataset, record: Record) -> _Read:
    """What there is of a record on disk."""
    faults: list[Fault] = []
    image, mask, mode = None, None, ""
    try:
        image, mode = decode.read_image(dataset.root, record.path, dataset.config.lossy, faults)
    except FaultError as problem:
        faults.extend(problem.faults)
    normal = dataset.normal_masks.get(record.path)
    unusable: list[Fault] = []  # of masks whose pixels say nothing
    for path in record.masks or ([normal] if normal else []):
        try:
            content = dataset.mask_content(dataset.root, record.path, path)
            rule = dataset.rules.get(record.category, dataset.rule)
            part = decode.decoded_mask(content, path, rule, unusable)
        except FaultError as problem:
            unusable.extend(problem.faults)
            continue
        if image is not None and (fault := decode.size_fault(path, part, image.shape[:2])):
            faults.append(fault)
        mask = part if mask is None or mask.shape != part.shape else mask | part
    if unusable:
        return [*faults, *unusable], image, mode, None
    if record.label == 0 and mask is not None and mask.any():
        count = int(mask.sum())
        text = f"mask of a normal image marks {count} pixels; move the image or empty the mask."
        faults.append(error("K6", normal or record.path, text))
    return faults, image, mode, mask


def _read_sample(source: Any, index: int) -> _Read:
    """What there is of a record that is no file of its own."""
    try:
        if not isinstance(source, EncodedSource):
            sample = source[index]
            return [], sample.image, "RGB", sample.mask
        image, mode = source.decoded(index)
        if source.saturated:
            source.channels(index, image.shape[:2])
        return [], image, mode, source.annotation(index, image.shape[:2])
    except FaultError as problem:
        return list(problem.faults), None, "", None


def _look(dataset: Dataset, source: Source, split: str, index: int, side: int) -> _Seen:
    record = source.records[index]
    # Defects that are drawn into files are no files.
    if isinstance(dataset, FileDataset) and not (dataset.procedural and record.label):
        faults, image, mode, mask = _read_files(dataset, record)
    else:
        faults, image, mode, mask = _read_sample(source, index)
    shown: dict[str, Any] = {}
    if image is not None:
        shown = {"size": image.shape[:2], "digest": _digest(image)}
    if record.label and mask is not None:
        shown["mask_digest"] = _digest(mask)
        if not mask.any():
            text = "the mask is empty: pixel metrics keep the image, AUPRO has no region for it."
            faults.append(warning("K5", record.masks[0] if record.masks else record.path, text))
        regions, vanished = vanishing(mask, side)
        shown |= {"area": 100.0 * float(mask.mean()), "regions": regions, "vanished": vanished}
    return _Seen(record=record, split=split, faults=tuple(faults), mode=mode, **shown)


def _digest(pixels: np.ndarray) -> str:
    """Equal for equal pixels (h, w, ...) of equal size alone."""
    size = b"%dx%d" % pixels.shape[:2]
    return hashlib.blake2b(pixels.tobytes(), digest_size=16, person=size).hexdigest()


def _contradiction(item: _Seen, twin: _Seen) -> str:
    """What makes two images of the same pixels more than a waste; "" if nothing does."""
    if twin.split != item.split or twin.record.label != item.record.label:
        return "."
    return ", but another mask." if twin.mask_digest != item.mask_digest else ""


def _shared_content(seen: Iterable[_Seen]) -> list[Fault]:
    """K14: the same path or pixels in two splits, or under two labels or masks.

    What merely occurs twice in one split is counted, once per category.
    """
    first: dict[str, _Seen] = {}
    paths: dict[str, str] = {}
    twice: dict[tuple[str, str], list[tuple[str, str]]] = {}
    faults = []
    for item in seen:
        path, split = item.record.path, item.split
        if paths.setdefault(path, split) != split:
            faults.append(error("K14", path, f"in {paths[path]} and in {split}."))
        if not item.digest:
            continue
        twin = first.setdefault(item.digest, item)
        if twin.record.path == path:
            continue
        if end := _contradiction(item, twin):
            text = f"same pixels as {twin.record.path} ({twin.split}, {twin.record.kind}){end}"
            faults.append(warning("K14", path, text))
        else:
            twice.setdefault((item.record.category, split), []).append((path, twin.record.path))
    for (category, split), pairs in twice.items():
        count = f"{len(pairs)} {split} image{'s repeat' if len(pairs) > 1 else ' repeats'}"
        text = f"{count} the pixels of another; the first is {pairs[0][0]}, as {pairs[0][1]}."
        faults.append(warning("K14", category, text))
    return faults


def _order_faults(name: str, sources: Mapping[str, Source]) -> list[Fault]:
    """K10: records that are not sorted by path depend on who listed the folder."""
    paths = {split: [r.path for r in source.records] for split, source in sources.items()}
    return [
        error("K10", name, f"the {split} records are not in path order.")
        for split, found in paths.items()
        if found != sorted(found)
    ]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _row(category: str, seen: list[_Seen]) -> Row:
    sizes = [s.size for s in seen if s.size is not None]
    areas = [s.area for s in seen if s.area is not None]
    modes = Counter(s.mode for s in seen if s.mode)
    test = [s for s in seen if s.split == "test"]
    bad = [s.record for s in test if s.record.label]
    return Row(
        category=category,
        train=sum(s.split == "train" for s in seen),
        validation=sum(s.split == "validation" for s in seen),
        good=len(test) - len(bad),
        bad=len(bad),
        kinds=len({r.kind for r in bad}),
        without_mask=sum(not r.masks for r in bad),
        sizes="×".join(_span([s[i] for s in sizes]) for i in (1, 0)) if sizes else "",
        modes=", ".join(sorted(modes)),
        area=float(np.median(areas)) if areas else None,
        regions=sum(s.regions for s in seen),
        vanished=sum(s.vanished for s in seen),
    )


def _vanished(row: Row, seen: list[_Seen], side: int) -> list[Fault]:
    """K15 once per category, naming the first image."""
    if row.vanished == 0:
        return []
    text = f"{row.vanished} of {row.regions} defect regions have no pixel on a canvas of {side}; "
    text += f"the first is in {next(s.record.path for s in seen if s.vanished)}."
    return [warning("K15", row.category, text)]


def check_dataset(
    dataset: IndexedDataset, *, canvas: int, progress: Progress | None = None
) -> CheckReport:
    """Check every image and mask of all splits; ``canvas`` is the working size for K15."""
    sources = {split: dataset.source(split) for split in dataset.splits}
    jobs = [(split, i) for split, source in sources.items() for i in range(len(source))]
    seen = []
    tell = progress or silent
    tell(0, len(jobs), "")
    with ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(lambda job: _look(dataset, sources[job[0]], job[0], job[1], canvas), jobs)
        for done, item in enumerate(looks, start=1):
            seen.append(item)
            tell(done, len(jobs), item.record.path)
    skipped = dataset.skipped if isinstance(dataset, FileDataset) else _SKIPPED
    if not jobs:  # nothing is sound of which nothing was seen
        skipped = {**dict.fromkeys(list(TITLES)[1:], "no image was found"), **skipped}
    faults = [
        *dataset.faults,
        *dataset.damages(),
        *(fault for item in seen for fault in item.faults),
    ]
    faults += [] if "K13" in skipped else split_groups({s: x.records for s, x in sources.items()})
    faults = list(
        dict.fromkeys(faults + _shared_content(seen) + _order_faults(dataset.name, sources))
    )
    rows = []
    for category in dataset.categories:
        mine = [s for s in seen if s.record.category == category]
        rows.append(_row(category, mine))
        faults += _vanished(rows[-1], mine, canvas)
    faults.sort(key=lambda f: (f.severity != "error", int(f.check[1:]), f.path))
    return CheckReport(
        name=dataset.name, faults=tuple(faults), rows=tuple(rows), skipped=skipped,
        protocol=dataset.protocol,
    )  # fmt: skip


def check(config: DataConfig, *, progress: Progress | None = None) -> CheckReport:
    """Check the data set of a config; faults of the index are part of the report, not raised."""
    return check_dataset(indexed(config), canvas=config.canvas, progress=progress)
