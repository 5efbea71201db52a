"""Thresholds from normal images at a stated false-alarm rate, and what they achieve.

What is measured, and what a saved model is, was fitted on all normal training images. It cannot set
thresholds with these: its scores of them are too low. Validation images do, where the data set has
some; else a second, split fit without some held-out training images scores those. The image
threshold is their split-conformal quantile: with n scores the ceil((n + 1)(1 - rate))-th smallest,
so that a new normal image exchangeable with them exceeds it, in the fit that scored them, with
probability at most ``rate`` (Vovk et al., "Algorithmic Learning in a Random World", 2005). Images
of one group are alike: then groups, K of them, are exchangeable, and every image of a group of size
m has the weight 1 / m of K + 1 (Lee, Barber and Willett, "Distribution-free inference with
hierarchical data", 2023). No test image has a part in any threshold.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import bins
from dsad.evaluation.metrics.streaming import LEADING
from dsad.evaluation.scored import Scored

#: Said in the stamp: what sets the thresholds, by whether the data set has validation images.
NORMALS = {False: "held-out training images", True: "validation images"}
_RULES = {
    "image": "conformal quantile of {}, weighted by group",
    "pixel": "quantile of the pooled pixels of {}, original pixels",
}
FIT_RULE = "bounds belong to a second fit without the held-out images, numbers to that on all"
VALIDATED_FIT = "bounds and numbers belong to one fit"
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


#: Pixels of maps that are sorted in one place; more are counted where they are.
HELD = 1 << 26


class Threshold(NamedTuple):
    """``value`` is exceeded by a new normal image with a probability of at most ``bound``."""

    value: float
    bound: float


def needed(rate: float) -> int:
    """The held-out images or groups without which no threshold has a bound of at most ``rate``."""
    return math.ceil(1 / rate - 1e-9) - 1


def image_threshold(
    scores: Sequence[float] | np.ndarray, rate: float, weights: Sequence[float] | None = None
) -> Threshold:
    """Threshold and its bound on the false-alarm rate, from scores (n,) of held-out normals.

    An image is flagged when its score is above the threshold. ``weights`` (n,) are 1 / size of
    each image's group, 1 without groups. The bound is at most ``rate`` unless there are too few
    groups for it: then the threshold is the largest score and the bound 1 / (groups + 1).
    """
    values, reached, groups = _reached(scores, weights)
    place = np.searchsorted(reached, (groups + 1) * (1 - rate) - 1e-9)
    place = min(int(place), values.size - 1)
    share = float(1 - reached[place] / (groups + 1))
    if values.size != groups:  # which group comes next is chance, and so is the weight it adds
        share = max(rate, 1 / (groups + 1))
    return Threshold(float(values[place]), share)


def exceeding(
    scores: Sequence[float] | np.ndarray, value: float, weights: Sequence[float] | None = None
) -> float:
    """The share of normals above ``value``, where a further one would be, too."""
    values, reached, groups = _reached(scores, weights)
    below = np.searchsorted(values, value, side="right")
    return float(1 - (reached[below - 1] if below else 0.0) / (groups + 1))


def percentile(
    scores: Sequence[float] | np.ndarray, value: float, weights: Sequence[float] | None = None
) -> float:
    """How many of 100 held-out normals, by weight, have a score below ``value``."""
    values, reached, groups = _reached(scores, weights)
    below = np.searchsorted(values, value, side="left")
    return float(100 * (reached[below - 1] if below else 0.0) / groups)


def _reached(
    scores: Sequence[float] | np.ndarray, weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ascending scores, the weight of those up to each, and that of all: the number of groups."""
    values = np.asarray(scores, np.float64)
    order = np.argsort(values, kind="stable")
    each = np.ones(values.size) if weights is None else np.asarray(weights, np.float64)
    reached = np.cumsum(each[order])
    return values[order], reached, round(float(reached[-1]), 6)


def pixel_threshold(maps: Sequence[np.ndarray], rate: float, hosts: Hosts = ALONE) -> float:
    """The lowest value that at most a share ``rate`` of all pixels of the maps exceeds.

    With several ``hosts`` these are the float32 maps of all of them.
    """
    pixels = int(hosts.total(np.int64(sum(m.size for m in maps))))
    place = max(1, math.ceil(pixels * (1 - rate) - 1e-9))
    if hosts.several or pixels > HELD:
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


def measure(
    scored: Scored | None, held_out: Scored, rate: float, groups: Sequence[str] = ()
) -> dict[str, Any]:
    """Both thresholds and, at them, rates on the test images.

    Args:
      scored: the ``scored.Scored`` of the test images, by the fit on all normal images; None where
        nothing is measured.
      held_out: that of the validation images, or of held-out training images by the split fit.
      rate: the stated false-alarm rate.
      groups: of each held-out image, "" for one that is like no other.

    Returns what ``achieved`` does, beside ``rate``, the thresholds ``image`` and ``pixel``,
    ``image_bound``, ``held_out``, the number of images that set them, and for thresholds at
    another rate, by held-out image, ``scores``, ``maxima`` of the maps, and ``weights``.

    """
    highest = dict(zip(held_out.own, (float(m.max()) for m in held_out.maps), strict=True))
    weights = group_weights(groups or [""] * len(held_out.scores))
    image = image_threshold(held_out.scores, rate, weights)
    row = {
        "rate": rate,
        "held_out": len(held_out.scores),
        "image": image.value,
        "image_bound": image.bound,
        "pixel": pixel_threshold(held_out.maps, rate, held_out.hosts),
        "scores": held_out.scores.tolist(),
        "maxima": held_out.hosts.listed(highest),
        "weights": weights,
    }
    return row if scored is None else row | achieved(scored, row)


def group_weights(groups: Sequence[str]) -> list[float]:
    """1 / size of the group of each image, 1 for those of no group."""
    sizes = {g: groups.count(g) for g in set(groups)}
    return [1 / sizes[g] if g else 1.0 for g in groups]


def achieved(scored: Scored, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the thresholds of a row of ``measure`` do on test images.

    Returns ``image_false_alarms`` (share of normal test images), ``image_recall`` (of anomalous
    ones), ``recall_by_kind``, ``pixel_false_alarms`` (share of the pixels of normal test images),
    ``pixel_recall`` (of annotated defect pixels) and the line ``decision``. A share of nothing is
    None.
    """
    pixel = row["pixel"]
    flagged, anomalous = scored.scores > row["image"], scored.labels == 1
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
        "image_false_alarms": _share(flagged[~anomalous].sum(), (~anomalous).sum()),
        "image_recall": _share(flagged[anomalous].sum(), anomalous.sum()),
        "recall_by_kind": {
            str(k): float(flagged[anomalous & (kinds == k)].mean())
            for k in sorted(set(kinds[anomalous]))
        },
        "pixel_false_alarms": _share(normal_above, normal_pixels),
        "pixel_recall": _share(defect_above, defect_pixels),
        "decision": decision(flagged, anomalous, at_rate(row)),
    }


def decision(flagged: np.ndarray, anomalous: np.ndarray, rate: str) -> str:
    """What is found and falsely flagged among images (n,), in one line."""
    good = f"{flagged[~anomalous].sum()} of {(~anomalous).sum()} false alarms at {rate}"
    if anomalous.all():
        good = f"no good image tested, false alarms at {rate}"
    if not anomalous.any():
        return f"no defect tested, {good}"
    return f"{flagged[anomalous].sum()} of {anomalous.sum()} defects found, {good}"


def at_rate(row: Mapping[str, Any]) -> str:
    """The stated rate of a row, or what is attainable with its held-out images."""
    if row["image_bound"] <= row["rate"] + 1e-9:
        return percent(row["rate"])
    groups = round(sum(row["weights"]))
    return (
        f"{percent(row['image_bound'])} ({percent(row['rate'])} needs {needed(row['rate'])} "
        f"held-out images or groups, there are {groups})"
    )


def percent(share: float) -> str:
    """A share as text: 5 %, 0.5 %."""
    return f"{100 * share:.3g} %"


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Every number of ``COLUMNS``, and ``held_out``, over the rows of several seeds."""
    columns = {n: [row[n] for row in rows] for n in ("held_out", *(n for n, _ in COLUMNS))}
    return {n: None if None in v else float(np.mean(v)) for n, v in columns.items()}


def describe(rate: float, holdout: int, validated: bool = False) -> Any:
    """For the stamp; ``validated``: the thresholds come from validation images."""
    if rate <= 0:
        return "none"
    rules = {n: text.format(NORMALS[validated]) for n, text in _RULES.items()}
    if validated:
        whole = "all normal validation images"
        return {"false_alarm_rate": rate, **rules, "fit": VALIDATED_FIT, "held_out": whole}
    return {
        "false_alarm_rate": rate,
        **rules,
        "fit": FIT_RULE,
        "held_out": f"{needed(rate)} training images or groups, 1/{holdout} of the images if that "
        "is more, half of them at most, whole groups drawn from (seed, category, group)",
    }
