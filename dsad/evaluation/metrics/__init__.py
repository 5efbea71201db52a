"""Image and pixel metrics of anomaly localization.

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

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dsad.core.errors import MetricError
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import bounds, inputs, ranking, streaming
from dsad.evaluation.metrics.inputs import region_sizes as region_sizes
from dsad.evaluation.metrics.spro import FULL, Saturation, Units, units

Method = Literal["exact", "streaming"]


def image_auroc(scores: Any, labels: Any, *, method: Method = "exact") -> float:
    """AUROC of image scores (n,) and labels (n,), 0 normal and 1 anomalous."""
    return _value("auroc", "image AUROC", "images", method, scores, labels)


def pixel_auroc(maps: Any, masks: Any, *, method: Method = "exact") -> float:
    """AUROC over the pixels of all maps."""
    return _value("auroc", "pixel AUROC", "pixels", method, maps, masks)


def partial_auroc(maps: Any, masks: Any, fpr_limit: float = 0.05) -> float:
    """AUROC over the pixels of all maps up to an FPR, standardised by McClish; chance has 0.5.

    SuperADD's "AUROC 0.05". Not an AUPRO: every defect pixel weighs the same.
    """
    inputs.check_limit(fpr_limit)
    return ranking.partial_auroc(_sorted("pixels", "partial AUROC", maps, masks), fpr_limit)


def average_precision(scores: Any, labels_or_masks: Any, *, method: Method = "exact") -> float:
    """AP of image scores and labels (n,), or of the pixels of maps and masks."""
    unit = "images" if inputs.is_flat(scores) else "pixels"
    return _value("ap", f"{unit[:-1]} AP", unit, method, scores, labels_or_masks)


def trapezoid(scores: Any, labels: Any) -> float:
    """Trapezoidal area under precision over recall of image scores (n,) and labels (n,)."""
    return _value("trapezoid", "image AU-PR", "images", "exact", scores, labels)


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
    return f"aupro_{_percent(fpr_limit)}"


def spro_key(fpr_limit: float) -> str:
    """Likewise of an sPRO: ``spro_05`` for the limit 0.05."""
    return f"spro_{_percent(fpr_limit)}"


def _percent(fpr_limit: float) -> str:
    whole, point, part = f"{100 * fpr_limit:.10g}".partition(".")
    return f"{whole:0>2}{point}{part}"


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
    made, steps = _several("regions", wanted, "pixel metrics", maps, masks, method, hosts)
    if curve_points > 0:
        made["curves"] = ranking.curves(steps, limits[0], curve_points)
    return made


def channel_metrics(
    maps: Any,
    channels: Sequence[Units],
    fpr_limit: Sequence[float] = (0.05,),
    *,
    method: Method = "exact",
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """An sPRO per limit, 0.05 under the key ``spro_05``, otherwise as ``pixel_metrics``.

    ``channels`` are what ``spro.units`` gives.
    """
    for limit in fpr_limit:
        inputs.check_limit(limit)
    wanted: dict[str, bounds.What] = {spro_key(limit): limit for limit in fpr_limit}
    return _several("channels", wanted, "sPRO", maps, channels, method, hosts)[0]


def _several(
    unit: str, wanted: dict[str, bounds.What], name: str, maps: Any, truth: Any, method: Method,
    hosts: Hosts,
) -> tuple[dict[str, Any], ranking.Steps]:  # fmt: skip
    """The numbers ``wanted``, counted ones with their ``error_bound``, and the curves."""
    if _streams(method):
        measured = streaming.measure(unit, wanted, maps, truth, name=name, hosts=hosts)
        made: dict[str, Any] = {key: b.value for key, b in measured.found.items()}
        made["error_bound"] = max(b.bound for b in measured.found.values())
        return made, measured.steps
    if hosts.several:
        raise MetricError(f"{', '.join(wanted)}: sorting takes all maps in one process.")
    steps = _sorted(unit, name, maps, truth)
    return {key: bounds.exact(what)(steps) for key, what in wanted.items()}, steps


def _value(what: bounds.What, name: str, unit: str, method: Method, *arguments: Any) -> float:
    if _streams(method):
        measured = streaming.measure(unit, {"value": what}, *arguments, name=name)
        return measured.found["value"].value
    return bounds.exact(what)(_sorted(unit, name, *arguments))


def _streams(method: str) -> bool:
    if method not in ("exact", "streaming"):
        raise MetricError(f'method: expected "exact" or "streaming", found {method!r}.')
    return method == "streaming"


# --- by sorting -----------------------------------------------------------------------------


class _Split(NamedTuple):
    """All scores by class; for overlaps the pixels of each defect pixel's region, and their count.

    Of channels the size is S, the pixels that earn full credit.
    """

    normal: np.ndarray
    defect: np.ndarray
    size: np.ndarray | None = None
    regions: int = 0


def _images(scores: Any, labels: Any) -> _Split:
    values, truth = inputs.labelled(scores, labels)
    return _Split(values[~truth], values[truth])


def _pixels(maps: Any, masks: Any, *, regions: bool) -> _Split:
    """Scores split by class into arrays of their final size: one pass, no second copy."""
    scores, truth = inputs.maps_and_masks(maps, masks)
    defects = [int(np.count_nonzero(mask)) for mask in truth]
    pixels = sum(mask.size for mask in truth)
    dtype = np.result_type(np.float32, *{score.dtype for score in scores})
    normal, defect = np.empty(pixels - sum(defects), dtype), np.empty(sum(defects), dtype)
    size = np.empty(sum(defects), np.uint32) if regions else None
    count, at, on = 0, 0, 0
    for score, mask, marked in zip(scores, truth, defects, strict=True):
        if marked == 0:
            normal[at : at + score.size] = score.ravel()
            at += score.size
            continue
        normal[at : at + score.size - marked] = score[~mask]
        defect[on : on + marked] = score[mask]
        if size is not None:
            size[on : on + marked], new = inputs.region_sizes(mask)
            count += new
        at, on = at + score.size - marked, on + marked
    return _Split(normal, defect, size, count)


def _channels(maps: Any, channels: Any, saturation: Any = FULL) -> _Split:
    scores = inputs.scored(maps)
    dtype = np.result_type(np.float32, *{score.dtype for score in scores})
    normal, defect, size = [np.zeros(0, dtype)], [np.zeros(0, dtype)], [np.zeros(0, np.uint32)]
    count = 0
    for score, truth in zip(scores, units(scores, channels, saturation), strict=True):
        top, sizes = truth.positives(score.ravel())
        normal.append(np.delete(score.ravel(), truth.union))
        defect.append(top)
        size.append(sizes)
        count += truth.groups
    return _Split(np.concatenate(normal), np.concatenate(defect), np.concatenate(size), count)


_SPLIT: dict[str, Callable[..., _Split]] = {
    "images": _images,
    "pixels": functools.partial(_pixels, regions=False),
    "regions": functools.partial(_pixels, regions=True),
    "channels": _channels,
}


def _sorted(unit: str, name: str, *arguments: Any) -> ranking.Steps:
    split = _SPLIT[unit](*arguments)
    what = "images" if unit == "images" else "pixels"
    inputs.check_classes(split.normal.size, split.defect.size, name, what)
    return ranking.rank(*split)
