"""Ranking metrics from counts: memory that does not grow with the images, hosts add up.

Scores are counted by the leading bits of the order-preserving integer form of float32 (sign,
exponent, first bits of the mantissa), so there is no range to declare. Inside a bin the order is
unknown: every value comes with a rigorous bound of its error (``bounds``). Where the bound is too
large, ``Counts.refined`` gives the bins of another pass over the same maps, which splits each
leading bin by as many of the remaining bits as its share in the bound asks for; a bin split by all
of them holds a single score each, and is exact.

All scores are counted in chunks on the device: int32 counts leave it into int64 on the host.
Defect pixels, a few percent, are counted and weighed on the host in float64.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.errors import MetricError
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import bins, bounds, inputs, ranking
from dsad.evaluation.metrics.bounds import Bounded
from dsad.evaluation.metrics.spro import FULL, units

#: Largest error bound that is accepted without another pass.
TOLERANCE = 1e-5
#: Leading bits of the first pass: sign, exponent and 9 bits of the mantissa.
LEADING = 18
#: A bin's share is planned this much below the tolerance: scores within a bin are not even.
_MARGIN = 4.0
#: Bits added at least where a planned split did not suffice.
_MORE = 3

State = dict[str, np.ndarray]


# --- what is counted ------------------------------------------------------------------------


class Truth(Protocol):
    """What of one image (or of all image scores) is no negative, and what counts as positive."""

    @property
    def union(self) -> np.ndarray:
        """Flat indices of what is not negative."""
        ...

    @property
    def groups(self) -> int:
        """Number of regions or channels."""
        ...

    def positives(self, scores: Any, /) -> tuple[np.ndarray, np.ndarray | None]:
        """Of the flat scores (n,): the positive ones, and the size of the group of each."""
        ...


class Marked(NamedTuple):
    """Truth of labels or of a mask: flat indices of the positives, sizes of their regions."""

    union: np.ndarray
    sizes: np.ndarray | None = None
    groups: int = 0

    def positives(self, scores: Any, /) -> tuple[np.ndarray, np.ndarray | None]:
        """See ``Truth``."""
        return inputs.taken(scores, self.union), self.sizes


def truths(unit: str, scores: Any, truth: Any, *more: Any) -> tuple[list[Any], Sequence[Truth]]:
    """Flat float32 scores and truth per image; ``unit`` images, pixels, regions or channels.

    The arguments are those of the exact metrics. Regions are labelled here, once for all passes.
    """
    if unit == "images":
        values, labels = inputs.labelled(scores, truth)
        return [_single(values, "scores")], [Marked(np.flatnonzero(labels))]
    maps = inputs.unchecked(scores)
    if unit == "channels":
        found: Sequence[Truth] = units(maps, truth, *(more or (FULL,)))
    else:
        masks = inputs.masks_for(maps, truth)
        found = [_marked(mask, regions=unit == "regions") for mask in masks]
    return [_single(m.reshape(-1), f"maps[{i}]") for i, m in enumerate(maps)], found


def _marked(mask: np.ndarray, *, regions: bool) -> Marked:
    at = np.flatnonzero(mask)
    return Marked(at, *inputs.region_sizes(mask)) if regions else Marked(at)


def _single(values: Any, what: str) -> Any:
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not np.array_equal(single, values):
        raise MetricError(
            f"{what}: streaming counts float32 scores, found {values.dtype} that float32 rounds. "
            'Cast them with .astype(np.float32), or use method="exact".'
        )
    return single


# --- the state ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of images, pixels, regions or channels (``unit``), whose states add up.

    States are arrays: per slot, in the order of the raw bits, all scores but those of defects
    (``normal``), positives (``defect``) int64 and the sum of 1 / size over these (``weight``)
    float64; ``regions`` (1,); ``extra`` (2^leading,), the bits that split each leading bin.
    """

    unit: str
    leading: int = LEADING

    def __post_init__(self) -> None:
        if not 12 <= self.leading <= 20:
            raise MetricError(f"leading: expected 12 to 20 bits, found {self.leading}.")

    def empty(self, extra: np.ndarray | None = None) -> State:
        """Nothing counted; ``extra`` by ``refined``."""
        extra = np.zeros(1 << self.leading, np.uint8) if extra is None else extra
        slots = bins.Layout.of(extra).slots
        return {
            "normal": np.zeros(slots, np.int64),
            "defect": np.zeros(slots, np.int64),
            "weight": np.zeros(slots, np.float64),
            "regions": np.zeros(1, np.int64),
            "extra": extra,
        }

    def add(
        self,
        state: State,
        flat: Sequence[Any],
        truth: Sequence[Truth],
        count: Callable[[Iterable[Any], bins.Layout], np.ndarray] = bins.count_device,
    ) -> State:
        """Count what ``truths`` returned INTO ``state``, and return it."""
        layout = bins.Layout.of(state["extra"])
        every = count(_packed(flat), layout)
        if layout.infinite(every):
            for i, scores in enumerate(flat):
                inputs.check_finite(np.asarray(scores), f"maps[{i}]")
        state["normal"] += every
        marked = [(s, t) for s, t in zip(flat, truth, strict=True) if t.union.size]
        if not marked:
            return state
        positives = [t.positives(scores) for scores, t in marked]
        slots = np.concatenate([layout.slot(scores) for scores, _ in positives])
        defect = np.bincount(slots, minlength=layout.slots)
        state["defect"] += defect
        if self.unit == "channels":  # saturation: fewer are positive than are not negative
            defect = bins.count_host((inputs.taken(s, t.union) for s, t in marked), layout)
        state["normal"] -= defect
        sizes = [size for _, size in positives if size is not None]
        if sizes:
            weights = 1.0 / np.concatenate(sizes)
            state["weight"] += np.bincount(slots, weights, minlength=layout.slots)
        state["regions"] += sum(t.groups for _, t in marked)
        return state

    def steps(self, state: State, name: str) -> tuple[ranking.Steps, np.ndarray, np.ndarray]:
        """Curves over the slots with positives, from the highest down; their leading bins, settled.

        Settled (s,) bool: a slot of a single score.
        """
        layout = bins.Layout.of(state["extra"])
        normal, defect, weight, leading = (
            layout.ascending(a)[::-1]
            for a in (state["normal"], state["defect"], state["weight"], layout.bin_of_slot)
        )
        negatives, positives = int(normal.sum()), int(defect.sum())
        unit = "images" if self.unit == "images" else "pixels"
        inputs.check_classes(negatives, positives, name, unit)
        at = np.flatnonzero(defect)
        reached, hits = np.cumsum(normal), np.cumsum(defect)[at]
        covered = hits / positives
        if self.unit in ("regions", "channels"):
            covered = np.minimum(np.cumsum(weight)[at] / int(state["regions"][0]), 1.0)
        steps = ranking.Steps(
            threshold=np.full(at.size, np.nan),
            above=(reached - normal)[at],
            reached=reached[at],
            hits=hits,
            covered=covered,
            positives=positives,
            negatives=negatives,
        )
        leading = leading[at]
        return steps, leading, layout.extra[leading] == 32 - self.leading

    def measure(
        self, state: State, wanted: Mapping[str, bounds.What], name: str = "metrics"
    ) -> dict[str, Bounded]:
        """Values with bounds by the keys of ``wanted``."""
        steps, _, settled = self.steps(state, name)
        return {key: bounds.bounded(what, steps, settled) for key, what in wanted.items()}

    def refined(
        self,
        state: State,
        wanted: Mapping[str, bounds.What],
        tolerance: float = TOLERANCE,
        name: str = "metrics",
    ) -> State | None:
        """An empty state for another pass, or None if every bound is at most ``tolerance``."""
        steps, leading, settled = self.steps(state, name)
        extra = state["extra"].astype(np.float64)
        again = bool(extra.any())
        planned = extra.copy()
        for what in wanted.values():
            found = bounds.bounded(what, steps, settled)
            if found.bound <= tolerance:
                continue
            if what == "f1_max":  # a maximum: every bin by itself
                share = np.zeros(extra.size)
                np.maximum.at(share, leading, found.slack)
                parts = share * 2**extra * (_MARGIN / tolerance)
            else:  # a sum: the fewest slots, if a split divides a bin's share evenly
                share = np.bincount(leading, found.slack, extra.size)
                root = np.sqrt(share * 2**extra)
                parts = root * root.sum() * (_MARGIN / tolerance)
            bits = np.ceil(np.log2(np.maximum(parts, 1.0)))
            if again:
                uneven = share > tolerance / (_MARGIN * np.count_nonzero(share))
                bits = np.where(uneven, np.maximum(bits, extra + _MORE), bits)
            planned = np.maximum(planned, bits)
        if np.array_equal(planned, extra):
            return None
        return self.empty(np.minimum(planned, 32 - self.leading).astype(np.uint8))


def _packed(flat: Sequence[Any]) -> Iterator[Any]:
    """The same scores in fewer arrays, so that small maps fill a chunk."""
    waiting: list[Any] = []
    size = 0
    for scores in flat:
        if waiting and size + scores.size > bins.CHUNK:
            yield _one(waiting)
            waiting, size = [], 0
        waiting.append(scores)
        size += scores.size
    if waiting:
        yield _one(waiting)


def _one(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    together = jnp if isinstance(parts[0], jax.Array) else np
    return together.concatenate(parts)


# --- metrics --------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Values with bounds by name, the binned curves they come from, and the passes it took."""

    found: dict[str, Bounded]
    steps: ranking.Steps
    passes: int


def measure(
    unit: str,
    wanted: Mapping[str, bounds.What],
    *arguments: Any,
    name: str = "metrics",
    tolerance: float = TOLERANCE,
    leading: int = LEADING,
    hosts: Hosts = ALONE,
) -> Measured:
    """All ``wanted`` values of scores in memory, each within ``tolerance`` of the exact one.

    Args:
      unit: images, pixels, regions (for AUPRO) or channels (for sPRO).
      wanted: key to "auroc", "ap", "f1_max" or the FPR limit of an overlap.
      arguments: scores and truth as for the exact metrics.
      name: of what is measured, for errors.
      tolerance: of the error bounds; as many passes as it needs.
      leading: bits of the first pass.
      hosts: the processes whose scores are measured together; each passes its own.

    """
    flat, truth = hosts.together(lambda: truths(unit, *arguments))
    return passes(Counts(unit, leading), wanted, flat, truth, name=name, tolerance=tolerance,
                  hosts=hosts)  # fmt: skip


def passes(
    counts: Counts,
    wanted: Mapping[str, bounds.What],
    flat: Sequence[Any],
    truth: Sequence[Truth],
    *,
    name: str = "metrics",
    tolerance: float = TOLERANCE,
    hosts: Hosts = ALONE,
) -> Measured:
    """``measure`` of what ``truths`` returned."""

    def counted(empty: State) -> State:
        own = hosts.together(lambda: counts.add(empty, flat, truth))
        # The bins are split alike everywhere; all else adds up.
        return {n: x if n == "extra" else hosts.total(x) for n, x in own.items()}

    state, done = counted(counts.empty()), 1
    while (finer := counts.refined(state, wanted, tolerance, name)) is not None:
        state, done = counted(finer), done + 1
    return Measured(counts.measure(state, wanted, name), counts.steps(state, name)[0], done)
