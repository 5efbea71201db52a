"""Kaputt (Höfer et al., ICCV 2025): parcels of retail logistics, good and damaged, on request.

Layout: ``query-<split>.parquet`` for the splits train, validation and test, and the images
``data/<split>/query-data/{image,crop,mask}/<capture_id>.jpg``. Of the columns are read capture_id,
defect, defect_types (words between commas, the first is the kind), item_material (the category) and
item_identifier (``Record.group``). Masks show the item, not its defect: there are image numbers
only, so ``config.data.missing_masks`` has to be "image_only".

``kaputt``: the crops of the items. ``kaputt:image``: whole photographs. Both train on the normal
queries of train; the anomalous ones of train and validation are not used, and reference images of
the items (``reference-<split>.parquet``) are not read, as some of them are said to be damaged.

Layout and columns were gathered from public programs that read this set; its files were not seen.
Reading needs pyarrow, which comes with ``dsad[records]``.
"""

import importlib.util
import pathlib
from collections import Counter
from typing import Any

from dsad.core.config import listed
from dsad.core.errors import ConfigError
from dsad.core.types import Record
from dsad.data import files
from dsad.data.about import About
from dsad.data.base import DataConfig, Fault, chosen, error, variant, warning
from dsad.data.decode import MaskRule

COLUMNS = ("capture_id", "defect", "defect_types", "item_material", "item_identifier")
SPLITS = ("train", "validation", "test")
#: Folders of images by the variant of the name.
_FOLDERS = {"": "crop", "image": "image"}
ABOUT = About(
    title="Kaputt", licence="CC BY-NC-ND 4.0 (on request)",
    citation="Höfer et al., Kaputt, ICCV 2025", address="https://www.kaputt-dataset.com",
    masks="none of defects", protocols={
        "": "published splits, one-class, crops", "image": "published splits, one-class, images",
    },
    remarks=(
        "238,421 images of 48,376 items in all, 29,316 of them defective; by split not known here.",
        "Layout and columns are those of public programs and were not verified on the files; nor "
        "was the licence.",
        "Numbers of images only: set config.data.missing_masks to image_only.",
    ),
    marks=("query-*.parquet",),
)  # fmt: skip


def _rows(root: pathlib.Path, split: str, faults: list[Fault]) -> list[dict[str, Any]]:
    """Rows of the table of a split, with the columns that are read."""
    from pyarrow import ArrowException, parquet

    name = f"query-{split}.parquet"
    try:
        table = parquet.read_table(root / name)
    except (OSError, ArrowException) as problem:
        text = f"cannot be read: {str(problem).rstrip('.')}. Copy the published table there."
        faults.append(error("K0", name, text))
        return []
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        text = f"no column {listed(missing)}; found {listed(table.column_names)}. Copy it again."
        faults.append(error("K0", name, text))
        return []
    return table.select(COLUMNS).to_pylist()


def _record(row: dict[str, Any], path: str) -> Record:
    kinds = [kind.strip() for kind in str(row["defect_types"] or "").split(",")]
    return Record(
        path=path, category=str(row["item_material"] or "unknown"), label=int(row["defect"]),
        kind=(kinds[0] or "defect") if row["defect"] else "good",
        group=str(row["item_identifier"] or ""),
    )  # fmt: skip


class _Scan:
    """Records and faults of one root."""

    def __init__(self, root: pathlib.Path, folder: str, config: DataConfig):
        self.root, self.folder, self.config = root, folder, config
        self.faults: list[Fault] = []
        self.splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
        self.dropped: Counter[str] = Counter()

    def read(self) -> tuple[str, ...]:
        """Fills the splits; returns the categories."""
        rows = {split: _rows(self.root, split, self.faults) for split in SPLITS}
        names = {str(r["item_material"] or "unknown") for rs in rows.values() for r in rs}
        categories = chosen(self.config, tuple(names)) if names else ()
        for split, found in rows.items():
            self._split(split, found, set(categories))
        bad = sum(record.label for record in self.splits["test"])
        if bad:
            text = f"{bad:,} anomalous test images, and Kaputt has no masks of defects"
            if self.config.missing_masks == "image_only":
                self.faults.append(warning("K1", "test", f"{text}: image numbers only."))
            else:
                text += '; set config.data.missing_masks="image_only" for numbers of images.'
                self.faults.append(error("K1", "test", text))
        return categories

    def _split(self, split: str, rows: list[dict[str, Any]], categories: set[str]) -> None:
        folder = f"data/{split}/query-data/{self.folder}"
        there = files.below(self.root, folder)
        seen: set[str] = set()
        for row in rows:
            path = f"{folder}/{row['capture_id']}.jpg"
            if row["defect"] not in (0, 1):
                text = f"defect {row['defect']!r} in query-{split}.parquet: expected true or false."
                self.faults.append(error("K11", path, f"{text} Copy the published table again."))
                seen.add(path)
                continue
            record = _record(row, path)
            if path in seen:
                text = f"twice in query-{split}.parquet; remove one."
                self.faults.append(error("K7", path, text))
            elif record.category in categories:
                if path not in there:
                    text = f"no such file, though query-{split}.parquet lists it; unpack it again."
                    self.faults.append(error("K8", path, text))
                elif split != "test" and record.label:
                    self.dropped[split] += 1
                else:
                    self.splits[split].append(record)
            seen.add(path)
        for path in sorted(there - seen):
            reason = files.stray(path.rpartition("/")[2]) or f"not in query-{split}.parquet"
            self.faults.append(files.ignored(path, reason))

    def shared_items(self) -> None:
        """K13, of which nothing is published: one warning."""
        items = {
            split: {(r.category, r.group) for r in records if r.group}
            for split, records in self.splits.items()
        }
        if shared := items["train"] & items["test"]:
            text = f"{len(shared):,} items of the test are in train too; the first is "
            self.faults.append(warning("K13", "test", f"{text}{min(shared)[1]}."))


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised; ConfigError without pyarrow."""
    folder = _FOLDERS[part := variant(config, tuple(_FOLDERS))]
    root = files.root_folder(config)
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("config.data.name=kaputt needs pyarrow: pip install 'dsad[records]'.")
    found = _Scan(root, folder, config)
    categories: tuple[str, ...] = ()
    if root.is_dir():
        categories = found.read()
        found.shared_items()
    else:
        found.faults.append(files.missing_root(root))
    splits = {split: files.by_path(records) for split, records in found.splits.items()}
    return files.FileDataset(
        name=config.name, categories=categories, config=config, root=root, splits=splits,
        rule=MaskRule(), faults=tuple(found.faults),
        skipped={
            **dict.fromkeys(("K2", "K4", "K5", "K6", "K15"), "no image has a mask of defects"),
            "K11": "labels come from the tables alone",
            "K12": "no counts of the splits are known",
            "K13": "whether items are on one side is not published; shared ones are warned of",
        },
        protocol=files.protocol(
            config, splits, licence=ABOUT.licence, dataset="Kaputt", split=ABOUT.protocols[part],
            unused=f"{found.dropped['train']} anomalous images of train, "
            f"{found.dropped['validation']} of validation",
            groups="the item", citation=ABOUT.citation,
        ),
    )  # fmt: skip
