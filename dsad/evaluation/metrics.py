"""Exact image and pixel metrics of anomaly localization, and the same as mergeable states.

Definitions: AUROC is the area of TPR over FPR with ties counted one half; AP is the sum over
distinct scores of (recall gained) · (precision there), not a trapezoid; AUPRO is MVTec AD's:
8-connected defect regions of the whole test set weigh the same, FPR counts the defect-free pixels
of all images, the curve starts at (0, 0), is interpolated at the FPR limit and the area is divided
by the limit. Pixel metrics pool all images, normal ones included. Sums run in float64 on the host.

Maps are (N, H, W) float or a list of (H, W) of unequal sizes, masks the same with bool (or
integers, non-zero on defects); numpy or jax arrays. Undefined metrics raise MetricError.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from dsad.core.errors import MetricError
from dsad.evaluation import ranking

#: A metric's state: a dict of arrays that hosts exchange and concatenate.
State = dict[str, np.ndarray]


def image_auroc(scores: Any, labels: Any) -> float:
    """AUROC of image scores (n,) and labels (n,), 0 normal and 1 anomalous."""
    return ranking.auroc(_image_steps(_image_state(scores, labels), "image AUROC"))


def pixel_auroc(maps: Any, masks: Any) -> float:
    """AUROC over the pixels of all maps."""
    return ranking.auroc(_pixel_steps(_pixel_state(maps, masks, regions=False), "pixel AUROC"))


def average_precision(scores: Any, labels_or_masks: Any) -> float:
    """AP of image scores and labels (n,), or of the pixels of maps and masks."""
    if _is_flat(scores):
        return ranking.average_precision(
            _image_steps(_image_state(scores, labels_or_masks), "image AP")
        )
    state = _pixel_state(scores, labels_or_masks, regions=False)
    return ranking.average_precision(_pixel_steps(state, "pixel AP"))


def aupro(maps: Any, masks: Any, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to ``fpr_limit``, divided by it."""
    _check_limit(fpr_limit)
    steps = _pixel_steps(_pixel_state(maps, masks, regions=True), "AUPRO")
    return ranking.overlap_area(steps, fpr_limit)


def aupro_key(fpr_limit: float) -> str:
    """The result key of an AUPRO: ``aupro_30`` for the limit 0.3, ``aupro_05`` for 0.05."""
    return f"aupro_{round(100 * fpr_limit):02d}"


def pixel_metrics(
    maps: Any, masks: Any, fpr_limit: float = 0.3, *, curve_points: int = 0
) -> dict[str, Any]:
    """``pixel_auroc``, ``pixel_ap`` and ``aupro_30`` (by the limit) from a single sort.

    With ``curve_points`` > 0 also ``curves``: {"roc": {"fpr", "tpr"}, "pr": {"recall",
    "precision"}, "pro": {"fpr", "pro"}} with at most that many points each, "pro" up to the limit.
    """
    _check_limit(fpr_limit)
    steps = _pixel_steps(_pixel_state(maps, masks, regions=True), "pixel metrics")
    found: dict[str, Any] = {
        "pixel_auroc": ranking.auroc(steps),
        "pixel_ap": ranking.average_precision(steps),
        aupro_key(fpr_limit): ranking.overlap_area(steps, fpr_limit),
    }
    if curve_points > 0:
        found["curves"] = ranking.curves(steps, fpr_limit, curve_points)
    return found


# The mergeable form: states hold every score, so merging is concatenation and any order of
# updates and merges gives the same value.


@dataclasses.dataclass(frozen=True)
class _Exact:
    def merge(self, left: State, right: State, /) -> State:
        """The state of both parts together."""
        return {name: np.concatenate([left[name], right[name]]) for name in left}


class _ImageMetric(_Exact):
    def empty(self) -> State:
        """No image seen: ``scores`` (0,) and ``labels`` (0,)."""
        return {"scores": np.zeros(0, np.float32), "labels": np.zeros(0, bool)}

    def update(self, state: State, scores: Any, labels: Any, /) -> State:
        """Add image scores (n,) and labels (n,)."""
        return self.merge(state, _image_state(scores, labels))


class _PixelMetric(_Exact):
    _regions = False

    def empty(self) -> State:
        """No map seen: scores of ``normal`` and ``defect`` pixels."""
        return _empty_pixels(np.dtype(np.float32), self._regions)

    def update(self, state: State, maps: Any, masks: Any, /) -> State:
        """Add maps and masks; whole images only, regions are found within each mask."""
        return self.merge(state, _pixel_state(maps, masks, regions=self._regions))


class ImageAUROC(_ImageMetric):
    """Image AUROC as a mergeable state."""

    def compute(self, state: State, /) -> float:
        """The value over all merged images."""
        return ranking.auroc(_image_steps(state, "image AUROC"))


class ImageAP(_ImageMetric):
    """Image average precision as a mergeable state."""

    def compute(self, state: State, /) -> float:
        """The value over all merged images."""
        return ranking.average_precision(_image_steps(state, "image AP"))


class PixelAUROC(_PixelMetric):
    """Pixel AUROC as a mergeable state."""

    def compute(self, state: State, /) -> float:
        """The value over all merged pixels."""
        return ranking.auroc(_pixel_steps(state, "pixel AUROC"))


class PixelAP(_PixelMetric):
    """Pixel average precision as a mergeable state."""

    def compute(self, state: State, /) -> float:
        """The value over all merged pixels."""
        return ranking.average_precision(_pixel_steps(state, "pixel AP"))


@dataclasses.dataclass(frozen=True)
class AUPRO(_PixelMetric):
    """AUPRO as a mergeable state.

    ``size`` is the region size of each defect pixel, ``regions`` the region count of each update.
    """

    fpr_limit: float = 0.3
    _regions = True

    def __post_init__(self):
        _check_limit(self.fpr_limit)

    def compute(self, state: State, /) -> float:
        """The value over all merged pixels."""
        return ranking.overlap_area(_pixel_steps(state, "AUPRO"), self.fpr_limit)


def _image_state(scores: Any, labels: Any) -> State:
    values, truth = _floats(scores, "scores"), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape:
        raise MetricError(
            f"expected scores and labels of one shape (n,), found scores {values.shape} and labels "
            f"{truth.shape}."
        )
    _check_finite(values, "scores")
    if truth.dtype.kind not in "biu" or (truth.dtype != bool and not np.isin(truth, (0, 1)).all()):
        raise MetricError(
            "labels: expected bool or the integers 0 (normal) and 1 (anomalous), found "
            f"{truth.dtype} with values {np.unique(truth)[:5].tolist()}."
        )
    return {"scores": values, "labels": truth.astype(bool)}


def _image_steps(state: State, name: str) -> ranking.Steps:
    scores, labels = state["scores"], state["labels"]
    anomalous = int(labels.sum())
    if anomalous in (0, labels.size):
        raise MetricError(
            f"{name} needs normal and anomalous images; found {labels.size - anomalous} normal and "
            f"{anomalous} anomalous. Score both kinds, or leave this metric out."
        )
    return ranking.rank(scores[~labels], scores[labels])


def _empty_pixels(dtype: np.dtype, regions: bool, normal: int = 0, defect: int = 0) -> State:
    state = {"normal": np.empty(normal, dtype), "defect": np.empty(defect, dtype)}
    if regions:
        state |= {"size": np.empty(defect, np.uint32), "regions": np.zeros(0, np.int64)}
    return state


def _pixel_state(maps: Any, masks: Any, *, regions: bool) -> State:
    """Scores split by class into arrays of their final size: one pass, no second copy."""
    scores, truth = _checked(maps, masks)
    defects = [int(np.count_nonzero(mask)) for mask in truth]
    pixels = sum(mask.size for mask in truth)
    dtype = np.result_type(np.float32, *{score.dtype for score in scores})
    state = _empty_pixels(dtype, regions, pixels - sum(defects), sum(defects))
    found, at, on = 0, 0, 0
    for score, mask, count in zip(scores, truth, defects, strict=True):
        if count == 0:
            state["normal"][at : at + score.size] = score.ravel()
            at += score.size
            continue
        state["normal"][at : at + score.size - count] = score[~mask]
        state["defect"][on : on + count] = score[mask]
        if regions:
            state["size"][on : on + count], new = region_sizes(mask)
            found += new
        at, on = at + score.size - count, on + count
    if regions:
        state["regions"] = np.array([found], np.int64)
    return state


def region_sizes(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Region size of every True pixel of ``mask`` (h, w), in row order, and the region count.

    Regions are 8-connected: pixels that touch at a corner belong together.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return np.zeros(0, np.uint32), 0
    # Labelling only the bounding box: most defects are small.
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    found: Any = ndimage.label(box, structure=np.ones((3, 3), bool))
    inside = found[0][box]
    return np.bincount(inside)[inside].astype(np.uint32), int(found[1])


def _pixel_steps(state: State, name: str) -> ranking.Steps:
    normal, defect = state["normal"], state["defect"]
    if defect.size == 0:
        raise MetricError(
            f"{name} needs defect pixels; found none among {normal.size} pixels. Check that the "
            "masks of anomalous images are loaded, or leave this metric out."
        )
    if normal.size == 0:
        raise MetricError(
            f"{name} needs normal pixels; found none: all {defect.size} pixels are defects. Check "
            "that the masks are not inverted."
        )
    if "size" not in state:
        return ranking.rank(normal, defect)
    return ranking.rank(normal, defect, state["size"], int(state["regions"].sum()))


def _checked(maps: Any, masks: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    scores = [_floats(m, f"maps[{i}]") for i, m in enumerate(_listed(maps, "maps"))]
    truth = [_mask(m, f"masks[{i}]") for i, m in enumerate(_listed(masks, "masks"))]
    if len(scores) != len(truth):
        raise MetricError(
            f"expected one mask per map, found {len(scores)} maps, {len(truth)} masks."
        )
    for i, (score, mask) in enumerate(zip(scores, truth, strict=True)):
        if score.shape != mask.shape:
            raise MetricError(
                f"maps[{i}]: expected the shape of its mask {mask.shape}, found {score.shape}; "
                "bring the map to the mask's pixels first."
            )
        _check_finite(score, f"maps[{i}]")
    return scores, truth


def _listed(values: Any, what: str) -> Sequence[Any]:
    items = list(values) if isinstance(values, (list, tuple)) else np.asarray(values)
    if not isinstance(items, list) and items.ndim != 3:
        raise MetricError(
            f"{what}: expected (N, H, W) or a list of (H, W), found shape {items.shape}."
        )
    for i, item in enumerate(items):
        if np.ndim(item) != 2:
            raise MetricError(f"{what}[{i}]: expected (H, W), found shape {np.shape(item)}.")
    return items  # type: ignore[return-value]


def _floats(values: Any, what: str) -> np.ndarray:
    """Scores as float32 where that is exact, else float64: rounding would create ties."""
    found = np.asarray(values)
    if found.dtype.kind == "f" or found.dtype.name == "bfloat16":
        return found if found.dtype == np.float64 else found.astype(np.float32, copy=False)
    if found.dtype.kind in "iu":
        return found.astype(np.float64)
    raise MetricError(f"{what}: expected numbers, found dtype {found.dtype}.")


def _mask(values: Any, what: str) -> np.ndarray:
    found = np.asarray(values)
    if found.dtype.kind not in "biu":
        raise MetricError(
            f"{what}: expected bool (or integers, non-zero on defects), found dtype {found.dtype}; "
            "threshold resized masks explicitly."
        )
    return found if found.dtype == bool else found != 0


def _check_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values)
        first = tuple(int(i[0]) for i in np.nonzero(bad))
        raise MetricError(
            f"{what}: expected finite scores, found {int(bad.sum())} NaN or infinite of "
            f"{values.size}, the first at {first}. Find out why the detector produced them."
        )


def _is_flat(scores: Any) -> bool:
    if isinstance(scores, (list, tuple)):
        return len(scores) > 0 and np.ndim(scores[0]) == 0
    return np.ndim(scores) == 1


def _check_limit(limit: float) -> None:
    if not 0.0 < limit <= 1.0:
        raise MetricError(f"fpr_limit: expected a number in (0, 1], found {limit!r}.")


#: Result keys to metrics; the first two take image scores and labels, the others maps and masks.
METRICS: dict[str, Any] = {
    "image_auroc": ImageAUROC(),
    "image_ap": ImageAP(),
    "pixel_auroc": PixelAUROC(),
    "pixel_ap": PixelAP(),
    "aupro_30": AUPRO(),
}
