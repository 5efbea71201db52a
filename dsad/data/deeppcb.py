"""DeepPCB (Tang et al., 2019): pairs of a tested board and its defect-free template.

Layout: ``PCBData/groupXXXXX/XXXXX/NNNNNNNN_{test,temp}.jpg``, boxes of the defects in
``groupXXXXX/XXXXX_not/NNNNNNNN.txt``, and the lists ``trainval.txt`` (1,000 pairs) and ``test.txt``
(500) with lines "image annotation", where the image's name lacks ``_test`` or ``_temp``.
``config.data.root`` is PCBData or the folder it lies in.

Training images are the templates of trainval.txt; the test has both images of the pairs of
test.txt, the tested one anomalous. The tested images of trainval.txt are not used. A copy without
lists is cut by ``config.data.seed`` instead: a third of the pairs is tested.

``deeppcb:pairs`` compares each tested image with its own template, as one does who has a golden
board: a pair is a category, its template the one training image, and no normal image is tested.

Defects are annotated by boxes alone: "x1 y1 x2 y2 type", x2 and y2 just outside. Their masks are
the filled boxes, so pixel numbers are coarse, as the protocol says. ``Record.group`` is the pair,
such as "group00041/00041000": by it the template of a tested image is found, ``template`` of it.
"""

import io
import pathlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageDraw

from dsad.core.types import Record
from dsad.data import decode, files, heldout
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, FaultError, chosen, error, variant, warning
from dsad.data.decode import MaskRule

CATEGORY = "pcb"
#: By the numbers in annotations.
KINDS = ("open", "short", "mouse_bite", "spur", "copper", "pin_hole")
#: Pairs in a list, and boxes of each kind.
PUBLISHED = {
    "trainval": (1000, (1283, 1028, 1379, 1142, 1010, 1031)),
    "test": (500, (659, 478, 586, 483, 464, 470)),
}
ABOUT = About(
    title="DeepPCB", licence="research only (README; its file: MIT)",
    citation="Tang et al., Online PCB Defect Detector on a New PCB Defect Dataset, 2019",
    address="https://github.com/tangsanli5201/DeepPCB", masks="filled boxes, coarse",
    columns=("train", "good", "bad"), counts={CATEGORY: (1000, 500, 500)},
    protocols={
        "": "one-class: templates train",
        "pairs": "each tested image against its own template; no normal image is tested",
    },
    remarks=(
        "Boxes instead of masks: numbers of pixels are coarse.",
        "Modes are mixed: 62 files are RGB, the others grey.",
    ),
    marks=("PCBData", "group[0-9]*/[0-9]*_not"),
)  # fmt: skip
_IMAGE = re.compile(r"(?P<folder>group\d+/\d+)/(?P<name>\d+)\.jpg")
_FILE = re.compile(r"group\d+/(?:\d+/\d+_(?:test|temp)\.jpg|\d+_not/\d+\.txt)")


#: No number of pixels has so many.
_DIGITS = 10


class Box(NamedTuple):
    """A defect: pixels x1 to x2 - 1 of rows y1 to y2 - 1, and its kind from 1."""

    x1: int
    y1: int
    x2: int
    y2: int
    kind: int


class Pair(NamedTuple):
    """Paths of a tested image, its template and its boxes."""

    tested: str
    template: str
    boxes: str

    @property
    def group(self) -> str:
        """Which pair it is."""
        return _group(self.tested)

    @property
    def name(self) -> str:
        """Its number, as a category."""
        return pathlib.PurePosixPath(self.group).name


def _group(path: str) -> str:
    first, *_, name = path.split("/")
    return f"{first}/{name.partition('_')[0]}"


def template(path: str) -> str:
    """The path of the template of a tested image."""
    return path.removesuffix("_test.jpg") + "_temp.jpg"


def boxes(text: str, path: str) -> list[Box]:
    """The boxes of an annotation file of content ``text``; FaultError (K4) names bad lines."""
    found, faults = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        words = re.split(
            r"[,\s]+", line.strip()
        )  # the owner's text says commas, the files have none
        if words == [""]:
            continue
        numbers = [int(word) for word in words if word.isdecimal() and len(word) < _DIGITS]
        if len(words) != 5 or len(numbers) != 5:
            text = f"line {number}: {line!r}; expected x1 y1 x2 y2 type, whole numbers."
            faults.append(error("K4", path, text))
            continue
        box = Box(*numbers)
        if not 1 <= box.kind <= len(KINDS) or box.x1 >= box.x2 or box.y1 >= box.y2:
            text = f"line {number}: {line!r}; expected x1 < x2, y1 < y2 and a type from 1 to 6."
            faults.append(error("K4", path, text))
        else:
            found.append(box)
    if faults:
        raise FaultError(*faults)
    return found


def _read_boxes(root: pathlib.Path, path: str) -> list[Box]:
    return boxes(decode.read_bytes(root, path).decode(errors="replace"), path)


def mask_of_boxes(root: pathlib.Path, image: str, path: str) -> bytes:
    """The content of a PNG of 0 and 255, of the image's size, with the boxes of a file filled.

    FaultError (K2, K4, K8) names the file.
    """
    found = _read_boxes(root, path)
    size = decode.stored_size(decode.read_bytes(root, image), image)
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for box in found:
        if box.x2 > size[0] or box.y2 > size[1]:
            text = f"box {tuple(box[:4])} of an image of {size[0]}×{size[1]} pixels; it must lie "
            raise FaultError(error("K2", path, f"{text}inside. Copy image and boxes again."))
        pen.rectangle((box.x1, box.y1, box.x2 - 1, box.y2 - 1), fill=255)
    content = io.BytesIO()
    mask.save(content, "PNG")
    return content.getvalue()


class _Scan:
    """Records and faults of one root."""

    def __init__(self, root: pathlib.Path, config: DataConfig, *, paired: bool):
        self.root, self.config, self.paired = root, config, paired
        self.faults: list[Fault] = []
        self.files = files.below(root, "")
        self.pairs: dict[str, list[Pair]] = {name: [] for name in PUBLISHED}
        missing = [f"{name}.txt" for name in PUBLISHED if not (root / f"{name}.txt").is_file()]
        self.listed = len(missing) < len(PUBLISHED)
        for name in missing if self.listed else ():
            text = "no such file, though the other list is there. Copy the published list there."
            self.faults.append(error("K0", name, text))
        self.kinds: dict[str, Counter[int]] = {name: Counter() for name in PUBLISHED}

    def read(self) -> dict[str, tuple[Record, ...]]:
        if self.listed:
            self._lists()
        else:
            self._cut()
        self._rest()
        train, test = [], []
        for pair in self.pairs["trainval"]:
            if not self.paired and self._there(pair.template, pair):
                train.append(self._record(pair.template, pair))
            self._count("trainval", pair)
        for pair in self.pairs["test"]:
            if self._there(pair.template, pair):
                templates = train if self.paired else test
                templates.append(self._record(pair.template, pair))
            if self._there(pair.tested, pair):
                test.append(self._record(pair.tested, pair, self._count("test", pair)))
        if not any(self.pairs.values()) and not self.faults:
            text = "no pair found; expected PCBData/groupXXXXX/XXXXX/NNNNNNNN_{test,temp}.jpg."
            self.faults.append(error("K0", str(self.root), text))
        return {"train": files.by_path(train), "test": files.by_path(test)}

    def _lists(self) -> None:
        seen: dict[str, str] = {}
        for name, pairs in self.pairs.items():
            file = self.root / f"{name}.txt"
            text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
            lines = text.splitlines()
            for number, line in enumerate(lines, start=1):
                where = f"{name}.txt:{number}"
                image, *rest = line.split() or [""]
                match = _IMAGE.fullmatch(image)
                if not match or len(rest) != 1:
                    if line.strip():
                        text = f"{line!r}; expected groupN/N/N.jpg groupN/N_not/N.txt. Copy again."
                        self.faults.append(error("K0", where, text))
                    continue
                if (other := seen.setdefault(image, where)) != where:
                    check = "K7" if other.startswith(f"{name}.") else "K14"
                    text = f"{image} again, as in {other}; remove one."
                    self.faults.append(error(check, where, text))
                    continue
                stem = f"{match['folder']}/{match['name']}"
                pairs.append(Pair(f"{stem}_test.jpg", f"{stem}_temp.jpg", rest[0]))

    def _cut(self) -> None:
        """Without lists a third of the pairs, by hash of seed and pair, is tested."""
        stems = sorted(p.removesuffix("_test.jpg") for p in self.files if p.endswith("_test.jpg"))
        pairs = [
            Pair(f"{s}_test.jpg", f"{s}_temp.jpg", "{}_not/{}.txt".format(*s.rsplit("/", 1)))
            for s in stems if _IMAGE.fullmatch(f"{s}.jpg")
        ]  # fmt: skip
        ranked = sorted(
            pairs, key=lambda p: heldout.rank(f"group {p.group}", self.config.seed, CATEGORY)
        )
        count = len(ranked) if self.paired else -(-len(ranked) // 3)
        self.pairs = {"trainval": ranked[count:], "test": ranked[:count]}
        if pairs and not self.paired:
            text = "no trainval.txt and test.txt: a third of the pairs is tested, by config.data."
            self.faults.append(warning("K0", str(self.root), f"{text}seed. Copy the lists there."))

    def _there(self, path: str, pair: Pair) -> bool:
        if path in self.files:
            return True
        what = "template" if path == pair.template else "tested image"
        text = f"no such file, the {what} of pair {pair.group}. Copy it again."
        self.faults.append(error("K1", path, text))
        return False

    def _count(self, name: str, pair: Pair) -> str:
        """The kind of a pair's defects, once they are counted."""
        if pair.boxes not in self.files:
            return ""
        try:
            kinds = [box.kind for box in _read_boxes(self.root, pair.boxes)]
        except FaultError as problem:
            self.faults += problem.faults
            return "mixed"
        self.kinds[name].update(kinds)
        return KINDS[kinds[0] - 1] if len(set(kinds)) == 1 else "mixed"

    def _record(self, path: str, pair: Pair, kind: str = "good") -> Record:
        """``kind`` is "" without boxes."""
        label = int(kind != "good")
        if not kind:
            allowed = self.config.missing_masks == "image_only"
            self.faults.append(files.missing_mask(path, pair.boxes, allowed))
        masks = (pair.boxes,) if label and kind else ()
        return Record(
            path=path, category=pair.name if self.paired else CATEGORY, label=label,
            kind=kind or "mixed", masks=masks, group="" if self.paired else pair.group,
        )  # fmt: skip

    def _rest(self) -> None:
        """Files of no pair; other folders than those of the layout."""
        used = {path for pairs in self.pairs.values() for pair in pairs for path in pair}
        for path in sorted(self.files - used - {f"{name}.txt" for name in PUBLISHED}):
            if path.endswith("_temp.jpg") and _FILE.fullmatch(path):
                reason = "a template of no listed pair"
            else:
                known = bool(_FILE.fullmatch(path))
                reason = "in no list" if known else files.stray(path) or "no name of the layout"
            self.faults.append(files.ignored(path, reason))

    @property
    def categories(self) -> tuple[str, ...]:
        """All boards as one, or each pair."""
        return tuple(sorted({p.name for p in self.pairs["test"]})) if self.paired else (CATEGORY,)

    def counts(self) -> None:
        """K12: pairs and boxes of the lists."""
        for name, (pairs, kinds) in PUBLISHED.items():
            if name == "trainval" and self.paired and not self.listed:
                continue  # all pairs are tested then
            found = tuple(self.kinds[name][k + 1] for k in range(len(KINDS)))
            if (len(self.pairs[name]), found) != (pairs, kinds):
                text = f"{len(self.pairs[name]):,} pairs with {_joined(found)} boxes; DeepPCB has "
                text += f"{pairs:,} with {_joined(kinds)} ({', '.join(KINDS)})."
                where = f"{name}.txt" if self.listed else name
                self.faults.append(files.miscounted(self.config, where, text))


def _joined(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    paired = bool(part := variant(config, tuple(ABOUT.protocols)))
    root = files.root_folder(config)
    if (root / "PCBData").is_dir():
        root = root / "PCBData"
    found = _Scan(root, config, paired=paired)
    splits: dict[str, tuple[Record, ...]] = {"train": (), "test": ()}
    if root.is_dir():
        splits = found.read()
        found.counts()
    else:
        found.faults.append(files.missing_root(root))
    categories = chosen(config, found.categories)
    splits = {k: tuple(r for r in v if r.category in categories) for k, v in splits.items()}
    found.faults += files.split_groups(splits)
    split = f"published lists; {ABOUT.protocols[part]}"
    if not found.listed:
        tested = "all pairs are" if paired else f"a third, by seed {config.seed}, is"
        split = f"no lists: {tested} tested; {ABOUT.protocols[part]}"
    return files.FileDataset(
        name=config.name, categories=categories, config=config, root=root, splits=splits,
        rule=MaskRule(), faults=tuple(found.faults), mask_content=mask_of_boxes,
        skipped={"K11": "labels come from the names alone"},
        protocol=files.protocol(
            config, splits, licence=ABOUT.licence, dataset="DeepPCB", split=split,
            masks="filled boxes: coarse", groups="a tested image and its template",
            unused=f"{len(found.pairs['trainval'])} "
            + ("pairs of trainval.txt" if paired else "tested images of training pairs"),
            citation=ABOUT.citation,
        ),
    )  # fmt: skip
