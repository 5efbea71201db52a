"""Thresholds from normal training images at a stated false-alarm rate, and what they achieve.

The images that set the thresholds are held out from the detector, whose scores of its own
training images would be too low. The image threshold is the split-conformal quantile: with n
held-out scores, the ceil((n + 1)(1 - rate))-th smallest, so that a new normal image exchangeable
with them exceeds it with probability at most ``rate`` (Vovk et al., "Algorithmic Learning in a
Random World", 2005). No test image has a part in any threshold.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import bins
from dsad.evaluation.metrics.streaming import LEADING
from dsad.evaluation.scored import Scored

#: Said in the stamp.
IMAGE_RULE = "conformal quantile of held-out training images"
PIXEL_RULE = "quantile of the pooled pixels of held-out training images, original pixels"
#: Fields of a table of thresholds, with their headings.
COLUMNS = (
    ("image", "Image threshold"),
    ("image_bound", "Bound on false alarms"),
    ("image_false_alarms", "False alarms, test normals"),
    ("image_recall", "Anomalous images found"),
    ("pixel", "Pixel threshold"),
    ("pixel_false_alarms", "Flagged pixels, test normals"),
    ("pixel_recall", "Defect pixels found"),
)
#: The columns that are map or image scores; the others are shares.
VALUES = ("image", "pixel")


def image_threshold(scores: Any, rate: float) -> tuple[float, float]:
    """Threshold and its bound on the false-alarm rate, from scores (n,) of held-out normals.

    An image is flagged when its score is above the threshold. The bound is at most ``rate``
    unless n is too small for it: then the threshold is the largest score and the bound 1/(n + 1).
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    n = ordered.size
    place = min(n, math.ceil((n + 1) * (1 - rate) - 1e-9))
    return float(ordered[place - 1]), 1 - place / (n + 1)


def pixel_threshold(maps: Sequence[np.ndarray], rate: float, hosts: Hosts = ALONE) -> float:
    """The lowest value that at most a share ``rate`` of all pixels of the maps exceeds.

    With several ``hosts`` these are the float32 maps of all of them.
    """
    pixels = int(hosts.total(np.int64(sum(m.size for m in maps))))
    place = max(1, math.ceil(pixels * (1 - rate) - 1e-9))
    if hosts.several:
        return _by_counting(maps, place, hosts)
    values = np.concatenate([np.ravel(m) for m in maps])
    return float(np.partition(values, place - 1)[place - 1])


def _by_counting(maps: Sequence[np.ndarray], place: int, hosts: Hosts) -> float:
    """The ``place``-th smallest value: its leading bits by one count, the others by a second."""
    extra = np.zeros(1 << LEADING, np.uint8)

    def slot_of_place() -> tuple[int, bins.Layout]:
        layout = bins.Layout.of(extra)
        counts = hosts.total(bins.count_host((np.ravel(m) for m in maps), layout))
        reached = np.cumsum(layout.ascending(counts))
        at = np.searchsorted(reached, place)
        return int(layout.ascending(np.arange(layout.slots))[at]), layout

    leading, _ = slot_of_place()
    extra[leading] = 32 - LEADING
    slot, layout = slot_of_place()
    bits = (leading << 32 - LEADING) + slot - int(layout.start[leading])
    return float(np.uint32(bits).view(np.float32))


def measure(scored: Scored, held_out: Scored, rate: float) -> dict[str, Any]:
    """Both thresholds and, at them, rates on the test images.

    Args:
      scored: the ``scored.Scored`` of the test images.
      held_out: that of the held-out normal images.
      rate: the stated false-alarm rate.

    Returns ``image_false_alarms`` (share of normal test images), ``image_recall`` (of anomalous
    ones), ``recall_by_kind``, ``pixel_false_alarms`` (share of the pixels of normal test images)
    and ``pixel_recall`` (of annotated defect pixels), beside the thresholds, ``image_bound`` and
    ``held_out``, the number of images that set them. A share of nothing is None.

    """
    image, bound = image_threshold(held_out.scores, rate)
    pixel = pixel_threshold(held_out.maps, rate, held_out.hosts)
    flagged, anomalous = scored.scores > image, scored.labels == 1
    kinds = np.asarray(scored.kinds)
    normal_above = normal_pixels = defect_above = defect_pixels = 0
    for scores, mask, label in zip(scored.maps, scored.masks, scored.own_labels, strict=True):
        if label == 0:
            normal_above += int((scores > pixel).sum())
            normal_pixels += scores.size
        elif mask is not None:
            defect_above += int((scores[mask] > pixel).sum())
            defect_pixels += int(mask.sum())
    own = np.asarray([normal_above, normal_pixels, defect_above, defect_pixels], np.int64)
    normal_above, normal_pixels, defect_above, defect_pixels = scored.hosts.total(own).tolist()
    return {
        "held_out": len(held_out.scores),
        "image": image,
        "image_bound": bound,
        "image_false_alarms": _share(flagged[~anomalous].sum(), (~anomalous).sum()),
        "image_recall": _share(flagged[anomalous].sum(), anomalous.sum()),
        "recall_by_kind": {
            str(k): float(flagged[anomalous & (kinds == k)].mean())
            for k in sorted(set(kinds[anomalous]))
        },
        "pixel": pixel,
        "pixel_false_alarms": _share(normal_above, normal_pixels),
        "pixel_recall": _share(defect_above, defect_pixels),
    }


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Every number of ``COLUMNS``, and ``held_out``, over the rows of several seeds."""
    columns = {n: [row[n] for row in rows] for n in ("held_out", *(n for n, _ in COLUMNS))}
    return {n: None if None in v else float(np.mean(v)) for n, v in columns.items()}


def describe(rate: float, holdout: int) -> Any:
    """For the stamp."""
    if rate <= 0:
        return "none"
    return {
        "false_alarm_rate": rate,
        "image": IMAGE_RULE,
        "pixel": PIXEL_RULE,
        "held_out": f"the first of every {holdout} training images in path order, unseen by fit",
    }
