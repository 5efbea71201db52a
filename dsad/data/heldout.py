"""Which normal images are held out: drawn by hash, so on every machine alike, groups as a whole.

Of a model that was fitted before all are that it was not fitted on.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence

from dsad.core.errors import DataError
from dsad.core.types import Record, Source
from dsad.data import defective, files

#: Said in the stamp.
RULE = "lowest SHA-256 of (seed, category, group or path), groups as a whole"


def rank(name: str, seed: int, category: str) -> str:
    """Where an image or a group of a category stands in the order of random draws."""
    return hashlib.sha256(f"{seed}\t{category}\t{name}".encode(errors="surrogatepass")).hexdigest()


def order(record: Record, seed: int) -> tuple[str, str]:
    """Where a record stands in the order of its category, which has groups after each other."""
    names = (record.group or record.path, record.path)
    first, second = (rank(name, seed, record.category) for name in names)
    return first, second


def group(record: Record) -> tuple[str, str]:
    """Images of one group are alike, and one of no group is like no other."""
    return record.category, f"group {record.group}" if record.group else record.path


def divided(
    records: Sequence[Record], share: float, seed: int, tested: Iterable[Record] = ()
) -> tuple[list[Record], list[Record]]:
    """Records of one category as those that stay and those held out, at least one of any ``share``.

    Held out first are those with a group of the ``tested``. They, and the last group, may make them
    more than their share; nothing may stay then.
    """
    if not share:
        return list(records), []
    count = max(1, round(share * len(records)))
    held = {group(r) for r in tested if r.group}
    count -= sum(group(r) in held for r in records)
    rest = sorted((r for r in records if group(r) not in held), key=lambda r: order(r, seed))
    held |= {group(r) for r in rest[: max(0, count)]}
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[group(record) in held].append(record)
    return sides


def contents(source: Source, paths: Collection[str] | None = None) -> list[str]:
    """Tells every image by its file, wherever that lies; empty for images that are not encoded.

    With ``paths`` those of the images with one of them.
    """
    if not isinstance(source, files.EncodedSource):
        return []
    rows = [i for i, r in enumerate(source.records) if paths is None or r.path in paths]
    return [hashlib.sha256(source.encoded(i)).hexdigest()[:16] for i in rows]


def left(data: files.FileDataset, fitted: Collection[str], category: str = "") -> files.FileDataset:
    """Own images to measure a model with: those that it was ``fitted`` on are not tested.

    ``fitted`` are their ``contents``. A single category gets the name ``category``, as the folder
    that it is named by may be another one. Raises DataError where nothing is left to test.
    """
    if category and len(data.categories) == 1:
        splits = {
            split: tuple(dataclasses.replace(r, category=category) for r in records)
            for split, records in data.splits.items()
        }
        data = dataclasses.replace(data, categories=(category,), splits=splits)
    # Of drawn defects there is no file.
    real = [r for r in data.splits["test"] if not (r.label and data.procedural)]
    known = [content in fitted for content in contents(files.FileSource(data, real))]
    sides: dict[tuple[bool, bool], list[Record]] = collections.defaultdict(list)
    for record, is_known in zip(real, known, strict=True):
        sides[bool(record.label), is_known].append(record)
    seen, new = sides[False, True], sides[False, False]
    learnt, bad = sides[True, True], sides[True, False]
    test = defective.doubled(new) if data.procedural else [*new, *bad]
    if not test:
        rest = f"on all {len(learnt)} abnormal ones" if learnt else "no abnormal one is named"
        raise DataError(
            f"{data.name}: the model was fitted on all {len(seen)} normal images, and {rest}: "
            "nothing is left to test. Name other good images with "
            "--config.data.normal=DIR, or bad ones with --config.data.abnormal=DIR."
        )
    train = files.by_path([*data.splits["train"], *seen, *learnt])
    splits = {**data.splits, "train": train, "test": files.by_path(test)}
    text = f"{len(new):,} normal images tested, {len(seen):,} that the model was fitted on are not"
    if learnt:
        text += f"; {len(bad):,} abnormal ones are, {len(learnt):,} that it learnt from are not"
    if leaks := len(files.split_groups(splits)):
        text += f"; {leaks:,} groups are tested of which it was fitted on other images"
    about = {**data.protocol, "split": text, "split_hash": files.split_hash(splits)}
    return dataclasses.replace(data, splits=splits, protocol=about)
