"""Image and pixel metrics of anomaly localization, and the exact ones as mergeable states.

Definitions: AUROC is the area of TPR over FPR with ties counted one half; AP is the sum over
distinct scores of (recall gained) · (precision there), not a trapezoid; F1-max is the largest F1
over all thresholds; AUPRO is MVTec AD's: 8-connected defect regions of the whole test set weigh
the same, FPR counts the defect-free pixels of all images, the curve starts at (0, 0), is
interpolated at the FPR limit and the area is divided by the limit; sPRO is MVTec LOCO's, see
``spro``. Pixel metrics pool all images, normal ones included. Sums run in float64 on the host.

Maps are (N, H, W) float or a list of (H, W) of unequal sizes, masks the same with bool (or
integers, non-zero on defects); numpy or jax arrays. Undefined metrics raise MetricError.

Every function takes ``method``: "exact" sorts all scores; "streaming" counts float32 scores by
their leading bits in memory that does not grow with the images, and counts again, finer, until its
error bound is at most ``streaming.TOLERANCE`` (``streaming.measure`` also returns the bounds).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from dsad.core.errors import MetricError
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import bounds, inputs, ranking, streaming
from dsad.evaluation.metrics.inputs import region_sizes as region_sizes
from dsad.evaluation.metrics.spro import FULL, Saturation, units

#: A metric's state: a dict of arrays that hosts exchange and concatenate.
State = dict[str, np.ndarray]
Method = Literal["exact", "streaming"]


def image_auroc(scores: Any, labels: Any, *, method: Method = "exact") -> float:
    """AUROC of image scores (n,) and labels (n,), 0 normal and 1 anomalous."""
    return _value("auroc", "image AUROC", "images", method, scores, labels)


def pixel_auroc(maps: Any, masks: Any, *, method: Method = "exact") -> float:
    """AUROC over the pixels of all maps."""
    return _value("auroc", "pixel AUROC", "pixels", method, maps, masks)


def average_precision(scores: Any, labels_or_masks: Any, *, method: Method = "exact") -> float:
    """AP of image scores and labels (n,), or of the pixels of maps and masks."""
    unit = "images" if inputs.is_flat(scores) else "pixels"
    return _value("ap", f"{unit[:-1]} AP", unit, method, scores, labels_or_masks)


def f1_max(scores: Any, labels_or_masks: Any, *, method: Method = "exact") -> float:
    """Largest F1 over all thresholds, of images with labels (n,) or of the pixels of maps."""
    unit = "images" if inputs.is_flat(scores) else "pixels"
    return _value("f1_max", f"{unit[:-1]} F1-max", unit, method, scores, labels_or_masks)


def aupro(maps: Any, masks: Any, fpr_limit: float = 0.3, *, method: Method = "exact") -> float:
    """Area under the per-region overlap curve up to ``fpr_limit``, divided by it."""
    inputs.check_limit(fpr_limit)
    return _value(fpr_limit, "AUPRO", "regions", method, maps, masks)


def spro(
    maps: Any,
    channels: Any,
    saturation: Saturation | Sequence[Sequence[Saturation]] = FULL,
    fpr_limit: float = 0.05,
    *,
    method: Method = "exact",
) -> float:
    """Area under the saturated per-region overlap up to ``fpr_limit``, divided by it.

    Args:
      maps: (N, H, W) or a list of (H, W).
      channels: per image its ground-truth channels, (c, H, W) or a list of (H, W), empty for a
        normal image; one channel is one defect, and channels may overlap. Equal scores are one
        point of the curve, so it is the same with "greater than" and with "at least".
      saturation: pixels that earn full credit; one for all, or per image one per channel.
      fpr_limit: over the pixels free of any channel, normal images included.
      method: see the module.

    Source: MVTec LOCO AD's evaluation, v2.0, without the subsampling of its thresholds.

    """
    inputs.check_limit(fpr_limit)
    return _value(fpr_limit, "sPRO", "channels", method, maps, channels, saturation)


def aupro_key(fpr_limit: float) -> str:
    """The result key of an AUPRO: ``aupro_30`` for the limit 0.3, ``aupro_05`` for 0.05.

    A fraction of a percent follows a point (``aupro_05.1``): no two limits share a key.
    """
    whole, point, part = f"{100 * fpr_limit:.10g}".partition(".")
    return f"aupro_{whole:0>2}{point}{part}"


def pixel_metrics(
    maps: Any,
    masks: Any,
    fpr_limit: float | Sequence[float] = 0.3,
    *,
    curve_points: int = 0,
    method: Method = "exact",
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """``pixel_auroc``, ``pixel_ap``, ``pixel_f1_max`` and an AUPRO per limit, from a single sort.

    ``fpr_limit`` is one or several; 0.3 gives the key ``aupro_30``. With ``curve_points`` > 0 also
    ``curves``: {"roc": {"fpr", "tpr"}, "pr": {"recall", "precision"}, "pro": {"fpr", "pro"}} with
    at most that many points each, "pro" up to the first limit. Streaming adds ``error_bound``,
    the largest of the numbers' bounds; it also takes the parts of several ``hosts`` together,
    each of which passes its own maps.
    """
    limits = tuple(fpr_limit) if isinstance(fpr_limit, Sequence) else (fpr_limit,)
    for limit in limits:
        inputs.check_limit(limit)
    wanted: dict[str, bounds.What] = {
        "pixel_auroc": "auroc",
        "pixel_ap": "ap",
        "pixel_f1_max": "f1_max",
    }
    wanted |= {aupro_key(limit): limit for limit in limits}
    if _streams(method):
        measured = streaming.measure(
            "regions", wanted, maps, masks, name="pixel metrics", hosts=hosts
        )
        steps = measured.steps
        made: dict[str, Any] = {name: b.value for name, b in measured.found.items()}
        made["error_bound"] = max(b.bound for b in measured.found.values())
    else:
        if hosts.several:
            raise MetricError(f"{', '.join(wanted)}: sorting takes all maps in one process.")
        steps = _steps(_pixel_state(maps, masks, regions=True), "pixel metrics")
        made = {name: bounds.exact(what)(steps) for name, what in wanted.items()}
    if curve_points > 0:
        made["curves"] = ranking.curves(steps, limits[0], curve_points)
    return made


def _value(what: bounds.What, name: str, unit: str, method: Method, *arguments: Any) -> float:
    if _streams(method):
        measured = streaming.measure(unit, {"value": what}, *arguments, name=name)
        return measured.found["value"].value
    return bounds.exact(what)(_steps(_STATES[unit](*arguments), name))


def _streams(method: str) -> bool:
    if method not in ("exact", "streaming"):
        raise MetricError(f'method: expected "exact" or "streaming", found {method!r}.')
    return method == "streaming"


# The mergeable form: states hold every score, so merging is concatenation and any order of
# updates and merges gives the same value.


@dataclasses.dataclass(frozen=True)
class Exact:
    """One metric over images, pixels, regions or channels (``unit``) as a mergeable state.

    ``what`` is "auroc", "ap", "f1_max", or the FPR limit of an overlap. States are arrays: all
    scores by class; for overlaps ``size``, the pixels of each defect pixel's region (S of its
    channel), and ``regions``, the region count of each update.
    """

    what: bounds.What
    name: str
    unit: str

    def __post_init__(self) -> None:
        if not isinstance(self.what, str):
            inputs.check_limit(self.what)

    def empty(self) -> State:
        """Nothing seen."""
        if self.unit == "images":
            return {"scores": np.zeros(0, np.float32), "labels": np.zeros(0, bool)}
        return _empty_pixels(np.dtype(np.float32), self.unit != "pixels")

    def update(self, state: State, scores: Any, truth: Any, /, *more: Any) -> State:
        """Add image scores and labels (n,), maps and masks, or maps, channels and saturation.

        Whole images only: regions are found within each mask.
        """
        return self.merge(state, _STATES[self.unit](scores, truth, *more))

    def merge(self, left: State, right: State, /) -> State:
        """The state of both parts together."""
        return {name: np.concatenate([left[name], right[name]]) for name in left}

    def compute(self, state: State, /) -> float:
        """The value over everything merged."""
        return bounds.exact(self.what)(_steps(state, self.name))


def _image_state(scores: Any, labels: Any) -> State:
    values, truth = inputs.labelled(scores, labels)
    return {"scores": values, "labels": truth}


def _empty_pixels(dtype: np.dtype, regions: bool, normal: int = 0, defect: int = 0) -> State:
    state = {"normal": np.empty(normal, dtype), "defect": np.empty(defect, dtype)}
    if regions:
        state |= {"size": np.empty(defect, np.uint32), "regions": np.zeros(0, np.int64)}
    return state


def _pixel_state(maps: Any, masks: Any, *, regions: bool) -> State:
    """Scores split by class into arrays of their final size: one pass, no second copy."""
    scores, truth = inputs.maps_and_masks(maps, masks)
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
            state["size"][on : on + count], new = inputs.region_sizes(mask)
            found += new
        at, on = at + score.size - count, on + count
    if regions:
        state["regions"] = np.array([found], np.int64)
    return state


def _channel_state(maps: Any, channels: Any, saturation: Any = FULL) -> State:
    scores = inputs.scored(maps)
    normal, defect, size, count = [], [], [], 0
    for score, own in zip(scores, units(scores, channels, saturation), strict=True):
        top, sizes = own.positives(score.ravel())
        normal.append(np.delete(score.ravel(), own.union))
        defect.append(top)
        size.append(sizes)
        count += own.groups
    dtype = np.result_type(np.float32, *{score.dtype for score in scores})
    return {
        "normal": np.concatenate([np.zeros(0, dtype), *normal]),
        "defect": np.concatenate([np.zeros(0, dtype), *defect]),
        "size": np.concatenate([np.zeros(0, np.uint32), *size]),
        "regions": np.array([count], np.int64),
    }


_STATES: dict[str, Callable[..., State]] = {
    "images": _image_state,
    "pixels": functools.partial(_pixel_state, regions=False),
    "regions": functools.partial(_pixel_state, regions=True),
    "channels": _channel_state,
}


def _steps(state: State, name: str) -> ranking.Steps:
    if "labels" in state:
        scores, labels = state["scores"], state["labels"]
        normal, defect, unit = scores[~labels], scores[labels], "images"
    else:
        normal, defect, unit = state["normal"], state["defect"], "pixels"
    inputs.check_classes(normal.size, defect.size, name, unit)
    if "size" not in state:
        return ranking.rank(normal, defect)
    return ranking.rank(normal, defect, state["size"], int(state["regions"].sum()))


#: Result keys to exact metrics; each takes scores and truth of its unit.
METRICS: dict[str, Exact] = {
    "image_auroc": Exact("auroc", "image AUROC", "images"),
    "image_ap": Exact("ap", "image AP", "images"),
    "image_f1_max": Exact("f1_max", "image F1-max", "images"),
    "pixel_auroc": Exact("auroc", "pixel AUROC", "pixels"),
    "pixel_ap": Exact("ap", "pixel AP", "pixels"),
    "pixel_f1_max": Exact("f1_max", "pixel F1-max", "pixels"),
    "aupro_30": Exact(0.3, "AUPRO", "regions"),
    "aupro_05": Exact(0.05, "AUPRO", "regions"),
    "spro_05": Exact(0.05, "sPRO", "channels"),
}
#: The same by counting.
STREAMING: dict[str, streaming.Streaming] = {
    key: streaming.Streaming(metric.what, metric.name, metric.unit)
    for key, metric in METRICS.items()
}
