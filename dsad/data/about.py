"""What is known of published data sets: owner, licence, counts, protocols."""

import dataclasses
import importlib
from collections.abc import Mapping

from dsad.core.config import members

#: Modules whose data are nobody's in particular.
UNPUBLISHED = ("folder", "records", "synthetic")


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
