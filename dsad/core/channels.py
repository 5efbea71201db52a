"""Defects of an image that count each by itself, as in sPRO."""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dsad.core.errors import MetricError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saturation:
    """Pixels of a defect that earn full credit; ``name`` is that of the kind of defect.

    Relative: floor(threshold · area) with a threshold in (0, 1]. Absolute: min(threshold, area),
    a whole number of pixels. At least one pixel either way: a relative threshold on a tiny defect
    would otherwise give none, and 0 / 0. Raises MetricError for any other threshold.
    """

    threshold: float
    relative: bool
    name: str = ""

    def __post_init__(self) -> None:
        valid = 0 < self.threshold <= 1 if self.relative else 1 <= self.threshold < math.inf
        if not valid or (not self.relative and self.threshold != int(self.threshold)):
            expected = "a share in (0, 1]" if self.relative else "a whole number of pixels ≥ 1"
            kind = "relative" if self.relative else "absolute"
            raise MetricError(
                f"saturation: expected {expected} for a {kind} threshold, found {self.threshold!r}."
            )

    def pixels(self, area: int) -> int:
        """Pixels S that saturate a defect of ``area`` pixels."""
        wanted = math.floor(self.threshold * area) if self.relative else int(self.threshold)
        return max(1, min(wanted, area))


class Channel(NamedTuple):
    """One annotated defect: its pixels (h, w) bool, and how many of them are enough to find."""

    mask: np.ndarray
    saturation: Saturation


@runtime_checkable
class HasChannels(Protocol):
    """A source that may know every defect of an image by itself: ``saturated`` if it does."""

    @property
    def saturated(self) -> bool: ...

    def channels(self, index: int, shape: tuple[int, int]) -> list[Channel]:
        """The defects of a sample whose image has ``shape`` (h, w); they may share pixels."""
        ...
