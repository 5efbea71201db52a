"""One threshold of maps by several rules, from normal images alone, and F1 of what lies above it.

A pixel is a defect where the map is above the threshold, an image where its highest pixel is. With
TP, FP, FN over all pixels of a category together, ``pixel_f1`` is 2 TP / (2 TP + FP + FN), the
SegF1 of MVTec AD 2's server; ``image_f1`` is the same over images, its ClassF1. The rules are

    bound      the conformal quantile of the highest pixels (``thresholds.image_threshold``): of
               new normal images at most the stated share has a pixel above it
    sigma      mean + ``sigmas`` standard deviations of all pixels: MVTec AD 2's baselines, with 3
    superadd   1.421 times the 95th percentile of all pixels (SuperADD, arXiv 2605.14808, which
               takes every eighth training image)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsad.evaluation.config import Rule
from dsad.evaluation.hosts import Hosts
from dsad.evaluation.morphology import Morphology
from dsad.evaluation.scored import Scored
from dsad.evaluation.thresholds import image_threshold, pixel_threshold

#: Of the rule "superadd".
FACTOR, SHARE = 1.421, 0.05
#: Thresholds by rule; None for one that the scores do not define.
Limits = Mapping[str, float | None]


def limits(
    rules: Sequence[Rule], normal: Scored, row: Mapping[str, Any], sigmas: float
) -> dict[str, float | None]:
    """Thresholds of maps by rule.

    Args:
      rules: those that are wanted.
      normal: scored normal images that the detector was not fitted on.
      row: what ``thresholds.measure`` gave for them.
      sigmas: of the rule "sigma".

    """
    made: dict[str, float | None] = {}
    for rule in rules:
        if rule == "bound":
            made[rule] = image_threshold(row["maxima"], row["rate"], row["weights"]).value
        elif rule == "sigma":
            mean, deviation = moments(normal.maps, normal.hosts)
            made[rule] = mean + sigmas * deviation
        else:
            value = pixel_threshold(normal.maps, SHARE, normal.hosts)
            # A factor means nothing to scores that are not distances.
            made[rule] = FACTOR * value if value >= 0 else None
    return made


def moments(maps: Sequence[np.ndarray], hosts: Hosts) -> tuple[float, float]:
    """Mean and standard deviation (of the population) of all pixels, in float64, one map a time."""
    rows = [(m.size, m.mean(dtype=np.float64), m.var(dtype=np.float64)) for m in maps]
    size, mean, variance = np.asarray(rows, np.float64).reshape(-1, 3).T
    pixels, total = hosts.total(np.array([size.sum(), (size * mean).sum()]))
    centre = total / pixels
    squares = hosts.total(np.array([(size * (variance + (mean - centre) ** 2)).sum()]))
    return float(centre), math.sqrt(squares[0] / pixels)


def counts(scored: Scored, limits: Limits, morphology: Morphology) -> np.ndarray:
    """Per rule and image, in source order: TP, FP, FN of its pixels, and whether it is flagged.

    Returns (rules, n, 4) int64, the same on every process. Images without annotation have no
    pixels; nothing is above a threshold that is None.
    """
    found = np.zeros((len(limits), len(scored.labels), 4), np.int64)
    for number, scores, mask in zip(scored.own, scored.maps, scored.masks, strict=True):
        for row, limit in zip(found, limits.values(), strict=True):
            if limit is None:
                continue
            row[number, 3] = (scores > limit).any()
            if mask is not None:
                above = morphology.decided(scores, limit)
                hits = np.count_nonzero(above & mask)
                row[number, :3] = hits, above.sum() - hits, mask.sum() - hits
    return scored.hosts.total(found)


def f1(limits: Limits, counted: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``pixel_f1_<rule>`` and ``image_f1_<rule>`` of ``counts`` (rules, n, 4) and labels (n,).

    None without a threshold, and where there is no defect to be found.
    """
    made: dict[str, float | None] = {}
    anomalous = labels == 1
    for (rule, limit), row in zip(limits.items(), counted, strict=True):
        flagged = row[:, 3] == 1
        tp = int((flagged & anomalous).sum())
        images = tp, int(flagged.sum()) - tp, int(anomalous.sum()) - tp
        for unit, (hits, false, missed) in (("pixel", row[:, :3].sum(0)), ("image", images)):
            defined = limit is not None and hits + missed > 0
            value = 2 * hits / (2 * hits + false + missed) if defined else None
            made[f"{unit}_f1_{rule}"] = value if value is None else float(value)
    return made


def describe(rules: Sequence[Rule], sigmas: float, normals: str) -> dict[str, str]:
    """For the stamp: every rule in words; ``normals`` are the images that set the thresholds."""
    words = {
        "bound": f"conformal quantile of the highest pixels of {normals}",
        "sigma": f"mean + {sigmas:g} standard deviations of the pixels of {normals}",
        "superadd": f"{FACTOR:g} times the 95th percentile of the pixels of {normals}",
    }
    return {rule: f"{words[rule]}, original pixels" for rule in rules}
