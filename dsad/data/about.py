"""What is known of published data sets: owner, licence, counts, protocols."""

import dataclasses
import fnmatch
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Mapping

from dsad.core.config import members

#: Modules whose data are nobody's in particular.
UNPUBLISHED = ("folder", "records", "synthetic")
#: So many folders of a root are looked into for marks: those of one data set are alike.
_FOLDERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """A published data set, the constant ``ABOUT`` of its module.

    Attributes:
      title: its published name.
      licence: as the owner words it.
      citation: authors, venue and year.
      address: the owner's page; "" where none is known.
      masks: how the value of a mask's pixel is read.
      columns: what ``counts`` count: a split's images ("train", its normal ones), "good" and "bad"
        test images, "kinds" of defects or one of them by name, and "dropped" ones.
      counts: published counts by category, or of "all" of one release; empty where none are known.
      categories: how many there are, where the counts are not by category.
      also: other counts that are published too.
      protocols: by variant of the name what goes into the stamp about the split.
      remarks: what a user must know.
      marks: globs of what no other data set has but one of the same layout; "*/" in front of one
        stands for a category, which the root itself may be.

    """

    title: str
    licence: str
    citation: str
    address: str = ""
    masks: str
    columns: tuple[str, ...] = ("train", "good", "bad")
    counts: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    categories: int = 0
    also: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    protocols: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"": "as published"})
    remarks: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    def names(self, module: str) -> list[str]:
        """Those that ``config.data.name`` takes, of a module."""
        return [f"{module}:{variant}" if variant else module for variant in self.protocols]

    @property
    def totals(self) -> dict[str, int]:
        """Counts of all categories together by column, of the first release."""
        whole = [counts for name, counts in self.counts.items() if name.startswith("all")]
        rows = whole[:1] or list(self.counts.values())
        return {name: sum(row[i] for row in rows) for i, name in enumerate(self.columns) if rows}


def every() -> dict[str, About]:
    """What is known of every published data set, by the name of its module."""
    names = [name for name in members("data") if name not in UNPUBLISHED]
    return {name: importlib.import_module(f"dsad.data.{name}").ABOUT for name in names}


def recognised(root: pathlib.Path) -> dict[str, str]:
    """Published data sets that a folder may hold, by their names, each with a path that shows it.

    Two sets of the same layout are both named. Empty for any other folder and for MVTec AD's
    layout, which sets of many owners have.
    """
    if not root.is_dir():
        return {}
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    names = functools.cache(_names)
    found: dict[str, str] = {}
    for name, item in every().items():
        for mark in item.marks:
            inside = mark.removeprefix("*/")
            for place in ("",) if inside == mark else ("", *folders[:_FOLDERS]):
                if path := _matching(root / place, inside.split("/"), names):
                    found.setdefault(name, f"{place}/{path}" if place else path)
    return found


def _names(folder: pathlib.Path) -> tuple[str, ...]:
    """Those in a folder, none of what cannot be listed."""
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _matching(
    folder: pathlib.Path, parts: list[str], names: Callable[[pathlib.Path], tuple[str, ...]]
) -> str:
    """The first path below a folder whose parts match globs, "" for none.

    Folders are listed once and no file is asked for anything, as there may be a million.
    """
    for name in fnmatch.filter(names(folder), parts[0]):
        if len(parts) == 1:
            return name
        if below := _matching(folder / name, parts[1:], names):
            return f"{name}/{below}"
    return ""
