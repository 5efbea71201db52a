"""Exact ranking curves from one sort: ROC, precision and recall, and per-region overlap.

Only the scores of positive items move a curve upwards. So it is enough to sort the negatives by
value, to sort the positives with their weights, and to count the negatives above and at each
distinct positive score; between two such scores every curve is a straight line. No index array
of all items is ever built.
"""

import dataclasses

import numpy as np

_SIGN = np.uint32(0x80000000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The curves at the distinct scores of the positives, from the highest score down.

    Every array has shape (s,): ``threshold``; negatives strictly ``above`` it and at least it
    (``reached``), int64; positives at least it (``hits``), int64; and ``covered``, the sum of
    the weights of those positives, float64 in [0, 1].
    """

    threshold: np.ndarray
    above: np.ndarray
    reached: np.ndarray
    hits: np.ndarray
    covered: np.ndarray
    positives: int
    negatives: int


def rank(
    negative: np.ndarray,
    positive: np.ndarray,
    size: np.ndarray | None = None,
    groups: int = 0,
) -> Steps:
    """Sort once; equal scores become one step.

    ``negative`` (a,) and ``positive`` (b,) are finite floats, both non-empty. With ``size`` (b,),
    the number of pixels in the region of each positive, and ``groups``, the number of regions,
    a positive weighs 1 / (groups · size); without, 1 / b.
    """
    negative = np.sort(negative)
    values, sizes = _sorted_positives(positive, size)
    total = values.size
    start = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    threshold = values[start]
    hits = total - start
    if sizes is None:
        covered = hits / total
    else:
        weight = 1.0 / (sizes[::-1].astype(np.float64) * groups)
        covered = np.minimum(np.cumsum(weight)[::-1][start], 1.0)
    below = np.searchsorted(negative, threshold, side="left")
    up_to = below.copy()
    tied = np.flatnonzero(negative[np.minimum(below, negative.size - 1)] == threshold)
    # Ties between the two classes are rare in real maps, so the second search is short.
    up_to[tied] = np.searchsorted(negative, threshold[tied], side="right")
    return Steps(
        threshold=threshold[::-1],
        above=(negative.size - up_to)[::-1],
        reached=(negative.size - below)[::-1],
        hits=hits[::-1],
        covered=covered[::-1],
        positives=total,
        negatives=negative.size,
    )


def _sorted_positives(
    positive: np.ndarray, size: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    if size is None:
        return np.sort(positive), None
    if positive.dtype != np.float32:
        order = np.argsort(positive, kind="stable")
        return positive[order], size[order]
    # Sorting (score, size) packed into one integer is several times faster than an argsort.
    bits = (positive + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 = 0.0: the zeros tie
    keys = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    packed = (keys.astype(np.uint64) << np.uint64(32)) | size.astype(np.uint64)
    packed.sort()
    keys = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(keys & _SIGN, keys & ~_SIGN, ~keys)
    return bits.view(np.float32), (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def auroc(steps: Steps) -> float:
    """Area under TPR over FPR; a tie between the classes counts one half."""
    gain = np.diff(steps.hits, prepend=0).astype(np.float64)
    beaten = steps.negatives - 0.5 * (steps.above + steps.reached)
    return float(np.sum(gain * beaten) / (float(steps.positives) * steps.negatives))


def partial_auroc(steps: Steps, limit: float) -> float:
    """Area under TPR over FPR up to ``limit``, standardised: 0.5 by chance, 1 if perfect.

    (1 + (A - limit² / 2) / (limit - limit² / 2)) / 2, McClish, "Analyzing a Portion of the ROC
    Curve" (1989).
    """
    x, y = cut(*vertices(steps, steps.hits / steps.positives), limit)
    chance = limit**2 / 2
    return 0.5 * (1 + (float(np.trapezoid(y, x)) - chance) / (limit - chance))


def average_precision(steps: Steps) -> float:
    """Sum over the steps of (recall gained) · (precision there)."""
    gain = np.diff(steps.hits, prepend=0) / steps.positives
    return float(np.sum(gain * (steps.hits / (steps.hits + steps.reached))))


def trapezoid(steps: Steps) -> float:
    """Area under straight lines between the points of precision over recall, from (0, 1) on.

    Optimistic: a constant score has (1 + prevalence) / 2.
    """
    before = np.concatenate([[0], steps.hits[:-1]])
    scored = before + steps.above
    start = np.divide(before, scored, out=np.ones(len(scored)), where=scored > 0)
    end = steps.hits / (steps.hits + steps.reached)
    return float(np.sum((steps.hits - before) * (start + end)) / (2 * steps.positives))


def f1_max(steps: Steps) -> float:
    """Largest F1 = 2 · hits / (positives + items at least the threshold) over all thresholds."""
    # Between two positive scores a lower threshold only adds false positives.
    return float(np.max(2 * steps.hits / (steps.positives + steps.hits + steps.reached)))


def vertices(steps: Steps, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All corners of the curve of ``height`` (s,) over FPR, from (0, 0) to (1, 1)."""
    before = np.concatenate([[0.0], height[:-1]])
    x = np.stack([steps.above, steps.reached], axis=1).ravel() / steps.negatives
    y = np.stack([before, height], axis=1).ravel()
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def cut(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve with x <= limit; its last point is interpolated at the limit."""
    inside = int(np.searchsorted(x, limit, side="right"))
    if inside == x.size:
        return x, y
    share = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
    last = y[inside - 1] + share * (y[inside] - y[inside - 1])
    return np.append(x[:inside], limit), np.append(y[:inside], last)


def overlap_area(steps: Steps, limit: float) -> float:
    """AUPRO: mean region overlap over FPR, integrated up to ``limit`` and divided by it."""
    x, y = cut(*vertices(steps, steps.covered), limit)
    return float(np.trapezoid(y, x) / limit)


def thin(x: np.ndarray, y: np.ndarray, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` of a curve's points, evenly spaced along it, both ends included."""
    if x.size <= points:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    wanted = np.linspace(0.0, length[-1], points)
    keep = np.unique(np.minimum(np.searchsorted(length, wanted), x.size - 1))
    keep[-1] = x.size - 1
    return x[keep], y[keep]


def curves(steps: Steps, limit: float, points: int = 500) -> dict[str, dict[str, np.ndarray]]:
    """ROC, precision-recall and PRO curve (up to ``limit``), each of at most ``points`` points."""
    fpr, tpr = thin(*vertices(steps, steps.hits / steps.positives), points)
    recall = np.concatenate([[0.0], steps.hits / steps.positives])
    precision = steps.hits / (steps.hits + steps.reached)
    recall, precision = thin(recall, np.concatenate([precision[:1], precision]), points)
    pro_fpr, pro = thin(*cut(*vertices(steps, steps.covered), limit), points)
    return {
        "roc": {"fpr": fpr, "tpr": tpr},
        "pr": {"recall": recall, "precision": precision},
        "pro": {"fpr": pro_fpr, "pro": pro},
    }
