"""Pixel numbers as the code that came with VisA counts them, to compare with its tables.

Zou et al., SPD, ECCV 2022. Its curves have at most 202 points, one per threshold: 100 percentiles
of the scores on defects, 100 equal steps between their largest and smallest, and one each beyond
the smallest and the largest of all scores. A pixel is positive strictly above a threshold, and of
none the precision is 1. Areas are trapezoids between these points, rounded to four digits. So a map
of two values that is perfect has an ROC area of 0.5, and continuous ones lie close to the exact
areas.
"""

from collections.abc import Sequence

import numpy as np

from dsad.evaluation.metrics import inputs

#: Thresholds of either kind, and how far those beyond all scores are from them.
EACH, MARGIN = 100, 1e-8


def thresholds(defect: np.ndarray, low: float, high: float) -> np.ndarray:
    """All 202 (202,) f64, falling, from scores on defects (n,) and the ends of all scores."""
    quantiles = np.percentile(defect, np.linspace(0, 100, EACH))
    steps = np.linspace(defect.min(), defect.max(), EACH)
    return np.sort(np.concatenate([quantiles, steps, [low - MARGIN, high + MARGIN]]))[::-1]


def areas(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, float]:
    """``auroc`` and ``aupr`` of the pixels of all maps; in float64, which resolves the margin."""
    scores, truth = inputs.maps_and_masks(maps, masks)
    defect = np.concatenate([s[m] for s, m in zip(scores, truth, strict=True)]).astype(np.float64)
    negatives = sum(m.size for m in truth) - defect.size
    inputs.check_classes(negatives, defect.size, "pixel numbers of VisA's code", "pixels")
    ends = [float(end) for s in scores for end in (s.min(), s.max())]
    cuts = thresholds(defect, min(ends), max(ends))
    hits = _above(defect, cuts)
    alarms = sum(_above(s[~m], cuts) for s, m in zip(scores, truth, strict=True))
    found = hits + alarms
    precision = np.divide(hits, found, out=np.ones(len(cuts)), where=found > 0)
    recall, rate = hits / defect.size, alarms / negatives
    curves = {"auroc": (recall, rate), "aupr": (precision, recall)}
    return {name: round(float(np.trapezoid(y, x)), 4) for name, (y, x) in curves.items()}


def _above(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """How many values (n,) lie strictly above each threshold."""
    rising = np.sort(values.astype(np.float64))
    return rising.size - np.searchsorted(rising, cuts, side="right")
