"""Values of ranking curves whose scores are known only up to a bin, with rigorous error bounds.

Each step of such a curve is a bin of scores. Its ends are exact, inside it the curve lies between
two extreme orders: all positives first, or all negatives first. A ``settled`` bin holds a single
score, so its items tie and the step is exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dsad.evaluation.metrics import ranking

#: "auroc", "ap", "f1_max", of exact steps "trapezoid", or the FPR limit of an overlap area.
What = str | float
#: What sums in float64 may be off, added to every bound.
ROUNDING = 1e-10


class Bounded(NamedTuple):
    """A value, the largest possible distance from the exact one, and each step's share in it."""

    value: float
    bound: float
    slack: np.ndarray  # (s,) f64


def exact(what: What) -> Callable[[ranking.Steps], float]:
    """The function of exact steps."""
    if isinstance(what, str):
        return {
            "auroc": ranking.auroc,
            "ap": ranking.average_precision,
            "f1_max": ranking.f1_max,
            "trapezoid": ranking.trapezoid,
        }[what]
    return lambda steps: ranking.overlap_area(steps, what)


def bounded(what: What, steps: ranking.Steps, settled: np.ndarray) -> Bounded:
    """The value over binned steps; ``settled`` (s,) bool."""
    if isinstance(what, str):
        rules = {"auroc": _auroc, "ap": _average_precision, "f1_max": _f1_max}
        found = rules[what](steps, settled)
    else:
        found = _overlap_area(steps, settled, what)
    return found._replace(bound=found.bound + ROUNDING)


def _auroc(steps: ranking.Steps, settled: np.ndarray) -> Bounded:
    """A tie counts one half, the middle of both orders."""
    pairs = np.diff(steps.hits, prepend=0) * (steps.reached - steps.above).astype(np.float64)
    slack = np.where(settled, 0.0, 0.5 * pairs / (float(steps.positives) * steps.negatives))
    return Bounded(ranking.auroc(steps), float(slack.sum()), slack)


def _overlap_area(steps: ranking.Steps, settled: np.ndarray, limit: float) -> Bounded:
    """Rectangles above and below the straight line of each bin, cut at the limit."""
    before = np.concatenate([[0.0], steps.covered[:-1]])
    rise = steps.covered - before
    start = np.minimum(steps.above / steps.negatives, limit)
    full = (steps.reached - steps.above) / steps.negatives
    width = np.minimum(steps.reached / steps.negatives, limit) - start
    share = np.divide(width, full, out=np.ones_like(full), where=full > 0)
    under = 0.5 * rise * share * width  # between the line and the lower order
    over = rise * width - under
    under, over = (np.where(settled, 0.0, x) / limit for x in (under, over))
    value = ranking.overlap_area(steps, limit)
    return Bounded(value, float(max(under.sum(), over.sum())), np.maximum(under, over))


def _f1_max(steps: ranking.Steps, settled: np.ndarray) -> Bounded:
    """The best of the bins' ends is reached; inside a bin all positives may come first."""
    best = ranking.f1_max(steps)
    top = 2 * steps.hits / (steps.positives + steps.hits + steps.above)
    slack = np.where(settled, 0.0, np.maximum(top - best, 0.0))
    return Bounded(best, float(slack.max()), slack)


def _average_precision(steps: ranking.Steps, settled: np.ndarray) -> Bounded:
    """Positives evenly among the negatives of their bin, between both orders.

    Highest: the positives tie, in front of the negatives. Lowest: they follow the negatives one
    by one, the sum of (h + i) / (h + i + c) over i = 1 … d, with h hits and c negatives so far.
    """
    hits = steps.hits.astype(np.float64)
    gain = np.diff(hits, prepend=0.0)
    before = hits - gain
    above, reached = steps.above.astype(np.float64), steps.reached.astype(np.float64)
    tied = gain * hits / (hits + reached)
    high = gain * hits / (hits + above)
    # 1 / x is convex, so its sum is at most its integral over the half steps around it.
    low = gain - reached * np.log1p(gain / (before + reached + 0.5))
    low = np.where(gain == 1, hits / (hits + reached), low)
    slope = 1 + (reached - above) / gain
    first, items = before + 0.5, before + above + 0.5
    even = gain / slope + (first - items / slope) / slope * np.log1p(slope * gain / items)
    value, low, high = np.clip(even, low, high), np.minimum(low, high), high
    value, low, high = (np.where(settled, tied, x) / steps.positives for x in (value, low, high))
    total = float(value.sum())
    bound = max(float(high.sum()) - total, total - float(low.sum()))
    return Bounded(total, bound, high - low)
