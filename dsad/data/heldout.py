"""Which normal images are held out: drawn by hash, so on every machine alike, groups as a whole."""

import hashlib
from collections.abc import Iterable, Sequence

from dsad.core.types import Record

#: Said in the stamp.
RULE = "lowest SHA-256 of (seed, category, group or path), groups as a whole"


def rank(name: str, seed: int, category: str) -> str:
    """Where an image or a group of a category stands in the order of random draws."""
    return hashlib.sha256(f"{seed}\t{category}\t{name}".encode()).hexdigest()


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
    """Records of one category as those that stay and those held out, at least one.

    Held out first are those with a group of the ``tested``. They, and the last group, may make them
    more than their share; nothing may stay then.
    """
    count = max(1, round(share * len(records)))
    held = {group(r) for r in tested if r.group}
    count -= sum(group(r) in held for r in records)
    rest = sorted((r for r in records if group(r) not in held), key=lambda r: order(r, seed))
    held |= {group(r) for r in rest[: max(0, count)]}
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[group(record) in held].append(record)
    return sides
