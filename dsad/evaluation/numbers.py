"""From scored images to numbers: of a category, of each kind of defect, of each image."""

from typing import Any, NamedTuple

import numpy as np

from dsad.core.errors import DsadError, MetricError
from dsad.core.types import Source
from dsad.evaluation import metrics, rules, undefined
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.metrics import visa
from dsad.evaluation.scored import Scored


class Decided(NamedTuple):
    """Thresholds by rule, and what ``rules.counts`` found above them."""

    limits: rules.Limits
    counts: np.ndarray


def measure(
    scored: Scored,
    config: EvalConfig,
    category: str,
    *,
    curve_points: int = 300,
    decided: Decided | None = None,
) -> tuple[dict[str, float | None], dict[str, np.ndarray], list[str]]:
    """The numbers of a category, its curves ("roc/fpr", "roc/tpr", "pr/...", "pro/..."), and notes.

    Images without annotation (mask None) count in the image metrics only. Numbers that are not
    defined are None, and a note says why. Counted pixel numbers come with ``error_bound``, the
    largest error any of them can have. F1 is taken at the thresholds that ``decided`` has. With
    several processes the exact pixel numbers are those of process 0, which alone has all maps, and
    so are the curves. Images with channels have sPRO besides. Raises MetricError, naming the
    category, for scores that are not finite.
    """
    kept, hosts = [i for i, m in enumerate(scored.masks) if m is not None], scored.hosts
    sorting = hosts.several and config.method == "exact"

    def numbers() -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(config.metric_names)
        if "image" not in why:
            row |= _image_numbers(scored.scores, scored.labels)
            if "visa" in config.further:
                row["image_aupr_visa"] = metrics.trapezoid(scored.scores, scored.labels)
        if "pixel" not in why:
            row |= metrics.pixel_metrics(
                [scored.maps[i] for i in kept],
                [scored.masks[i] for i in kept],
                config.fpr_limits,
                curve_points=curve_points,
                method=config.method,
                hosts=ALONE if sorting else hosts,
            )
            row |= _further(scored, kept, config, ALONE if sorting else hosts)
            if scored.channels is not None:
                found = metrics.channel_metrics(
                    [scored.maps[i] for i in kept], [scored.channels[i] for i in kept],
                    config.fpr_limits, method=config.method, hosts=ALONE if sorting else hosts,
                )  # fmt: skip
                bounds = [x["error_bound"] for x in (row, found) if "error_bound" in x]
                row |= {**found, **({"error_bound": max(bounds)} if bounds else {})}
        return row

    try:
        why = undefined.reasons(scored)
        row = hosts.together(numbers if hosts.main else dict) if sorting else numbers()
    except DsadError as error:  # of several processes perhaps
        told = MetricError(f"category {category}: {error}")
        told.shared = error.shared
        raise told from error
    curves = row.pop("curves", {})
    if sorting:
        row = hosts.from_main(row)
    if decided is not None:
        row |= rules.f1(decided.limits, decided.counts, scored.labels)
    flat = {f"{c}/{axis}": v for c, axes in curves.items() for axis, v in axes.items()}
    return row, flat, undefined.notes(why)


def _further(scored: Scored, kept: list[int], config: EvalConfig, hosts: Hosts) -> dict[str, float]:
    """Pixel numbers of ``config.further`` over the images ``kept``."""
    found: dict[str, float] = {}
    anomalous = [i for i in kept if scored.own_labels[i] == 1]
    for kind, rows in (("anomalous", anomalous), ("partial", kept), ("visa", kept)):
        if kind not in config.further:
            continue
        maps = [scored.maps[i] for i in rows]
        masks = [mask for i in rows if (mask := scored.masks[i]) is not None]
        if kind == "partial":
            found["pixel_auroc_partial_05"] = metrics.partial_auroc(maps, masks, 0.05)
        elif kind == "visa":
            found |= {f"pixel_{n}_visa": x for n, x in visa.areas(maps, masks).items()}
        else:
            row = metrics.pixel_metrics(maps, masks, (), method=config.method, hosts=hosts)
            found |= {f"{n}_anomalous": row[n] for n in ("pixel_auroc", "pixel_ap")}
    return found


def _image_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "image_auroc": metrics.image_auroc(scores, labels),
        "image_ap": metrics.average_precision(scores, labels),
        "image_f1_max": metrics.f1_max(scores, labels),
    }


def by_kind(
    scored: Scored, config: EvalConfig, decided: Decided | None = None
) -> dict[str, dict[str, Any]]:
    """The same numbers for the normal images and one kind of defect at a time."""
    made: dict[str, dict[str, Any]] = {}
    labels = scored.labels
    pairs = zip(scored.kinds, labels, strict=True)
    for kind in sorted({k for k, label in pairs if label == 1}):
        rows = [i for i, k in enumerate(scored.kinds) if labels[i] == 0 or k == kind]
        part = scored.part(rows)
        own = None if decided is None else decided._replace(counts=decided.counts[:, rows])
        numbers, _, _ = measure(part, config, kind, curve_points=0, decided=own)
        made[kind] = {**numbers, "images": part.kinds.count(kind)}
    return made


def of_images(source: Source, scored: Scored, *, ranked: bool) -> list[dict[str, Any]]:
    """One entry per test image, in source order; ``pixel_auroc`` where it is defined."""

    def own_rows() -> dict[int, dict[str, Any]]:
        rows = {}
        for i, mask, scores in zip(scored.own, scored.masks, scored.maps, strict=True):
            record, own = source.records[i], None
            if ranked and mask is not None and mask.any() and not mask.all():
                own = metrics.pixel_auroc([scores], [mask])
            rows[i] = {
                "path": record.path,
                "kind": record.kind,
                "label": record.label,
                "score": float(scored.scores[i]),
                "max": float(scores.max()),
                "pixel_auroc": own,
            }
        return rows

    return scored.hosts.listed(scored.hosts.together(own_rows))
