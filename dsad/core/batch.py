"""What a batch holds: one description, from which every form of it is made.

A batch on the devices is a nested dict of arrays with one row per sample:

    image       (b, H, W, 3) uint8 canvases; the image fills the top left corner
    size        (b, 2) int32, height and width of the image on its canvas
    index       (b,) int32, the sample's number in its source
    epoch       (b,) int32
    category    (b,) int32, place of the sample's category among the sorted names
    facts       {name: (b, ...)}, found by the host in the decoded original, see dsad.data.facts

and, where the objective asks for it (``Needs``):

    label       (b,) int32, 0 normal and 1 anomalous
    group       (b,) int32, number of the sample's group within the source
    mask        (b, H, W) uint8 on the canvas, 1 on defects
    masked      (b,) int32, 0 where an anomalous image has no annotation (its mask is all 0)
    features    {name: (b, ...)}, what the objective's ``per_sample`` computed once
    references  {image (b, r, H, W, 3), size (b, r, 2), features, index (b, r) int32,
                valid (b, r) bool}, see ``Companions``
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dsad.core.errors import ConfigError

Tree = Any
#: A batch on the devices.
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Companions:
    """Reference images that every sample of a batch is accompanied by.

    Drawn without repetition from (seed, epoch, sample index), never the sample itself, among the
    samples of the ``same`` category, group and camera, as far as these are named, that have the
    given ``label`` (None: any); groups and cameras are those of a category.
    Where there are fewer than ``count``, the rest is not ``valid`` and repeats the sample itself.

    Attributes:
      images: whether canvases are fetched; without, references are indices and features alone.
      features: names of the features that are fetched; empty: all.

    """

    count: int
    same: tuple[Literal["category", "group", "camera"], ...] = ("category",)
    label: int | None = 0
    images: bool = True
    features: tuple[str, ...] = ()

    def __post_init__(self):
        if self.count < 1 or not {"category", "group", "camera"}.issuperset(self.same):
            raise ConfigError(
                "companions: expected a count of 1 or more and same of category, group and camera; "
                f"found {self.count} and {self.same}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective wants in its batches beside image, size, index, epoch and category.

    ``normal``: it takes every image for one without defects.
    """

    facts: tuple[str, ...] = ()
    label: bool = False
    group: bool = False
    mask: bool = False
    normal: bool = False
    companions: Companions | None = None


class Field(NamedTuple):
    """Shape of one sample's row, and its type."""

    shape: tuple[int, ...]
    dtype: Any


_NUMBER = Field((), np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """The fields of a batch: ``canvas`` is the side of the canvases in pixels.

    ``facts`` are the fields of the facts that ``needs`` names, ``features`` those of what the
    objective computes per sample.
    """

    canvas: int
    needs: Needs = dataclasses.field(default_factory=Needs)
    facts: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    features: Mapping[str, Field] = dataclasses.field(default_factory=dict)

    @property
    def read(self) -> dict[str, Any]:
        """Fields that are read from the files of a sample."""
        canvas = (self.canvas, self.canvas)
        fields: dict[str, Any] = {
            "image": Field((*canvas, 3), np.uint8), "size": Field((2,), np.int32),
            "facts": dict(self.facts),
        }  # fmt: skip
        if self.needs.mask:
            fields |= {"mask": Field(canvas, np.uint8), "masked": _NUMBER}
        return fields

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that the records tell without a file, one number each."""
        asked = (name for name in ("label", "group") if getattr(self.needs, name))
        return ("category", *asked)

    @property
    def stored(self) -> dict[str, Any]:
        """Fields that do not change from epoch to epoch: what a cache holds of every sample."""
        fields = {**self.read, **dict.fromkeys(self.columns, _NUMBER)}
        return {**fields, "features": dict(self.features)} if self.features else fields

    @property
    def drawn(self) -> dict[str, Any]:
        """Fields that the order of the samples decides: all that the host sends to a cache."""
        fields: dict[str, Any] = {"index": _NUMBER, "epoch": _NUMBER}
        if companions := self.needs.companions:
            shape = (companions.count,)
            fields["references"] = {"index": Field(shape, np.int32), "valid": Field(shape, bool)}
        return fields

    @property
    def whole(self) -> dict[str, Any]:
        """All fields of a batch."""
        fields = {**self.stored, **self.drawn}
        if companions := self.needs.companions:
            count = companions.count
            rows = _each(
                lambda f: Field((count, *f.shape), f.dtype),
                selected(self.stored, self.of_references),
            )
            fields["references"] = {**fields["references"], **rows}
        return fields

    @property
    def of_references(self) -> tuple[str, ...]:
        """Stored fields that are gathered for references, too, as of ``selected``."""
        companions = self.needs.companions
        if not companions:
            return ()
        names = (companions.features or tuple(self.features)) if self.features else ()
        images = ("image", "size") if companions.images else ()
        return (*images, *(f"features/{name}" for name in names))

    def complete(
        self, drawn: Mapping[str, Any], rows: Callable[[Any, Sequence[str]], Tree]
    ) -> dict[str, Any]:
        """The batch behind ``drawn``.

        ``rows(index, names)`` gives stored fields of samples; for names see ``selected``.
        """
        batch = {**rows(drawn["index"], tuple(self.stored)), **drawn}
        if self.of_references:
            index = drawn["references"]["index"]
            flat = rows(index.reshape(-1), self.of_references)
            shaped = jax.tree.map(lambda a: a.reshape(*index.shape, *a.shape[1:]), flat)
            batch["references"] = {**drawn["references"], **shaped}
        return batch


def selected(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Some of the fields: "image" as it is, or "features/layer1" alone of the features."""
    chosen: dict[str, Any] = {}
    for name in names:
        outer, _, inner = name.partition("/")
        if inner:
            chosen.setdefault(outer, {})[inner] = fields[outer][inner]
        else:
            chosen[outer] = fields[outer]
    return chosen


def _each(make: Callable[[Field], Any], fields: Any) -> Any:
    if isinstance(fields, Field):
        return make(fields)
    return {name: _each(make, field) for name, field in fields.items()}


def shapes(fields: Any, rows: int, sharding: Any = None) -> Any:
    """Fields as abstract arrays of so many rows."""
    return _each(
        lambda f: jax.ShapeDtypeStruct((rows, *f.shape), np.dtype(f.dtype), sharding=sharding),
        fields,
    )


def zeros(fields: Any, rows: int) -> Any:
    """Fields as host arrays of so many rows."""
    return _each(lambda f: np.zeros((rows, *f.shape), f.dtype), fields)


def fields_of(arrays: Any) -> dict[str, Field]:
    """Fields of arrays (b, ...), or of their shapes, by name."""
    return {name: Field(tuple(a.shape[1:]), np.dtype(a.dtype)) for name, a in arrays.items()}
