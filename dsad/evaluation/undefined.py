"""Numbers that a category does not define, and why: a reason is told instead of a number."""

from collections.abc import Mapping, Sequence

import numpy as np

from dsad.evaluation.metrics.inputs import check_finite
from dsad.evaluation.scored import Scored


def reasons(scored: Scored) -> dict[str, str]:
    """Why a category has no numbers of a unit, "image" or "pixel"; empty if it has both.

    Raises MetricError for scores that are not finite. All processes call it together.
    """
    truth = scored.hosts.listed(scored.hosts.together(lambda: _annotated(scored)))
    why = {"image": _of_images(scored), "pixel": _of_pixels(scored, truth)}
    return {unit: text for unit, text in why.items() if text}


def notes(why: Mapping[str, str]) -> list[str]:
    """What ``reasons`` found, for people; a reason of both units is one note."""
    if len(why) == 2 and len(set(why.values())) == 1:
        return [f"no numbers: {why['image']}"]
    return [f"no {unit} numbers: {text}" for unit, text in why.items()]


def _annotated(scored: Scored) -> dict[int, tuple[int, int] | None]:
    """Defect pixels and all pixels of every image by its number, None without annotation."""
    check_finite(scored.scores, "scores")
    for number, scores in zip(scored.own, scored.maps, strict=True):
        check_finite(scores, f"maps[{number}]")
    return {
        number: None if mask is None else (int(np.count_nonzero(mask)), mask.size)
        for number, mask in zip(scored.own, scored.masks, strict=True)
    }


def _of_images(scored: Scored) -> str:
    if not len(scored.labels):
        return "no test image"
    for label, name in enumerate(("normal", "anomalous")):
        if not (scored.labels == label).any():
            return f"no {name} test image"
    return ""


def _of_pixels(scored: Scored, truth: Sequence[tuple[int, int] | None]) -> str:
    anomalous = [row for row, label in zip(truth, scored.labels, strict=True) if label == 1]
    if not anomalous:
        return "no anomalous test image" if truth else "no test image"
    annotated = [row for row in truth if row is not None]
    defects, pixels = (sum(row[i] for row in annotated) for i in (0, 1))
    if all(row is None for row in anomalous):
        return "no anomalous test image has a mask"
    if not defects:
        return "every mask of an anomalous test image is empty"
    return "the masks mark every pixel of the test images" if defects == pixels else ""
