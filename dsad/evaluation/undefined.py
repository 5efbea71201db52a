"""Numbers that a category does not define, and why: a reason is told instead of a number."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsad.evaluation.metrics.inputs import check_finite
from dsad.evaluation.scored import Scored

#: Scores are constant if they spread by at most so many units in the last place of float32 of
#: their largest magnitude: rounding alone would rank them.
ULPS = 8


class _Annotated(NamedTuple):
    """An image with annotation: pixels, those of its defects, and the range of its map."""

    shape: tuple[int, int]
    defects: int
    low: float
    high: float


def reasons(scored: Scored) -> dict[str, str]:
    """Why a category has no numbers of a unit, "image" or "pixel"; empty if it has both.

    Constant scores (see ``ULPS``) have none: of images where their scores are constant, of pixels
    where all pixels are, or where every pixel is over the images, all of one size. Then all images
    have one map (that of black images still has borders), which tells nothing of any of them.
    Raises MetricError for scores that are not finite. All processes call it together.
    """
    rows = scored.hosts.listed(scored.hosts.together(lambda: _annotated(scored)))
    truth = [None if row is None else _Annotated(tuple(row[0]), *row[1:]) for row in rows]
    why = {"image": _of_images(scored), "pixel": _of_pixels(scored, truth)}
    return {unit: text for unit, text in why.items() if text}


def notes(why: Mapping[str, str]) -> list[str]:
    """What ``reasons`` found, for people; a reason of both units is one note."""
    if len(why) == 2 and len(set(why.values())) == 1:
        return [f"no numbers: {why['image']}"]
    return [f"no {unit} numbers: {text}" for unit, text in why.items()]


def _annotated(scored: Scored) -> dict[int, _Annotated | None]:
    """What is known of every image here by its number, None without annotation."""
    check_finite(scored.scores, "scores")
    for number, scores in zip(scored.own, scored.maps, strict=True):
        check_finite(scores, f"maps[{number}]")
    return {
        number: None
        if mask is None
        else _Annotated(mask.shape, int(mask.sum()), float(scores.min()), float(scores.max()))
        for number, mask, scores in zip(scored.own, scored.masks, scored.maps, strict=True)
    }


def _of_images(scored: Scored) -> str:
    if not len(scored.labels):
        return "no test image"
    for label, name in enumerate(("normal", "anomalous")):
        if not (scored.labels == label).any():
            return f"no {name} test image"
    low, high = float(scored.scores.min()), float(scored.scores.max())
    return f"all image scores are {high:.6g}" if high - low <= _rounding(low, high) else ""


def _of_pixels(scored: Scored, truth: Sequence[_Annotated | None]) -> str:
    anomalous = [row for row, label in zip(truth, scored.labels, strict=True) if label == 1]
    if not anomalous:
        return "no anomalous test image" if truth else "no test image"
    if all(row is None for row in anomalous):
        return "no anomalous test image has a mask"
    annotated = [row for row in truth if row is not None]
    defects = sum(row.defects for row in annotated)
    if not defects:
        return "every mask of an anomalous test image is empty"
    if defects == sum(height * width for (height, width), *_ in annotated):
        return "the masks mark every pixel of the test images"
    return _constant(scored, annotated)


def _constant(scored: Scored, annotated: Sequence[_Annotated]) -> str:
    lows, highs = (np.asarray(x) for x in zip(*((a.low, a.high) for a in annotated), strict=True))
    rounding = _rounding(lows.min(), highs.max())
    if highs.max() - lows.min() <= rounding:
        return f"all pixel scores are {highs.max():.6g}"
    one_size = len(annotated) > 1 and len({a.shape for a in annotated}) == 1
    if not one_size or max(np.ptp(lows), np.ptp(highs)) > rounding:
        return ""
    here = [m for m, mask in zip(scored.maps, scored.masks, strict=True) if mask is not None]
    ends = {"low": np.minimum.reduce(here), "high": np.maximum.reduce(here)} if here else {}
    every = scored.hosts.to_main({f"{scored.own[0]} {name}": x for name, x in ends.items()})
    same = False
    if scored.hosts.main:
        spread = np.maximum.reduce(list(every.values())).astype(np.float64)
        spread -= np.minimum.reduce(list(every.values()))
        same = bool(spread.max() <= rounding)
    return "all images have the same anomaly map" if scored.hosts.from_main(same) else ""


def _rounding(low: float, high: float) -> float:
    """What rounding may make scores between the two differ by."""
    return ULPS * float(np.spacing(np.float32(max(abs(low), abs(high)))))
