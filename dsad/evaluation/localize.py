"""The localization run: features, detector, anomaly maps on original pixels, metrics."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsad.core.config import listed
from dsad.core.errors import ConfigError, MetricError
from dsad.core.rng import named
from dsad.core.types import Dataset, Detector, Progress, Source, Tree
from dsad.evaluation import gallery, metrics, stamp
from dsad.evaluation.results import Results, read_results, write_results
from dsad.evaluation.scoring import Device, EvalConfig, Features, batches, input_affine, to_original

__all__ = ["EvalConfig", "Results", "localize", "read_results", "write_results"]


# --- the run --------------------------------------------------------------------------------


class Scored(NamedTuple):
    """The scored test images of one category, in source order, on original pixels."""

    maps: list[np.ndarray]  # (h, w) f32
    masks: list[np.ndarray | None]  # (h, w) bool
    scores: np.ndarray  # (n,) f32
    labels: np.ndarray  # (n,) int
    kinds: list[str]


def localize(
    backbone: Any,
    detector: Detector,
    dataset: Dataset,
    config: EvalConfig,
    *,
    mesh: Mesh,
    key: jax.Array,
    progress: Progress | None = None,
    name: str = "",
    categories: Sequence[str] | None = None,
    details: Mapping[str, Any] | None = None,
    train: Callable[[Detector, Features, str], Tree] | None = None,
) -> Results:
    """Fit and score every category; all pixel numbers are on original-resolution masks.

    Args:
      backbone: callable on normalised images (b, s, s, 3) f32, with ``mean`` and ``std``; if a
        pytree of arrays, it enters the compiled program as an argument.
      detector: fitted once per category on its training images.
      dataset: its "train" and "test" splits are used.
      config: see ``EvalConfig``.
      mesh: batches are split over all its devices; numbers do not depend on their count.
      key: of the run; each category's detector gets a key by the category's name.
      progress: called with images done, images in all, and what is going on.
      name: of the run, for the stamp.
      categories: some of ``dataset.categories``; all by default.
      details: fields for the stamp, see ``stamp.make_stamp``.
      train: for detectors that train: called with (detector, training features, category), it
        runs the detector's objective and returns the trained parameters for its ``fit``.

    Raises:
      ConfigError: an unknown category, or a layer the backbone does not have.
      MetricError: labels of a category that leave a metric undefined, before any compute.

    """
    chosen = tuple(categories or dataset.categories)
    unknown = [c for c in chosen if c not in dataset.categories]
    if unknown:
        raise ConfigError(
            f"config.data.categories: {listed(unknown)} not in {dataset.name}, "
            f"which has: {listed(dataset.categories)}."
        )
    check_labels(dataset, chosen)
    mark = stamp.make_stamp(
        dataset,
        chosen,
        config=config,
        detector=detector,
        backbone=backbone,
        key=key,
        name=name,
        details=details,
    )
    device = Device(backbone, detector, config, mesh)
    total = sum(len(dataset.source(s, c)) for c in chosen for s in ("train", "test"))
    done = 0

    def tick(category: str, what: str) -> Callable[[int], None]:
        def advance(n: int) -> None:
            nonlocal done
            done = min(done + n, total)
            if progress:
                progress(done, total, f"{category}: {what}")

        return advance

    made = Results(
        stamp=mark,
        categories={},
        mean={},
        kinds={},
        images={},
        scales={},
        cases={},
        gallery={},
        curves={},
    )
    for category in chosen:
        _category(made, category, device, detector, dataset, config, key, tick, train)
    made.mean.update(
        {
            m: float(np.mean([row[m] for row in made.categories.values()]))
            for m in config.metric_names
        }
    )
    return made


def check_labels(dataset: Dataset, categories: Sequence[str]) -> None:
    """Refuse categories whose test labels leave a metric undefined, all of them at once."""
    faults = []
    for category in categories:
        if not len(dataset.source("train", category)):
            faults.append(f"{category}: no training image")
        records = dataset.source("test", category).records
        labels = {r.label for r in records}
        if labels != {0, 1}:
            found = {0: "only normal", 1: "only anomalous"}.get(*labels) if labels else "no"
            faults.append(f"{category}: {found} test images, AUROC needs normal and anomalous ones")
        elif _without_masks(dataset.source("test", category)):
            faults.append(f"{category}: no anomalous test image has a mask")
    if faults:
        raise MetricError(
            f"{dataset.name}: metrics are undefined for\n  " + "\n  ".join(faults) + "\n"
            "Complete these categories or leave them out of config.data.categories."
        )


def _without_masks(source: Source) -> bool:
    """Whether no anomalous image has a mask; procedural sets have masks without files."""
    anomalous = [i for i, r in enumerate(source.records) if r.label == 1]
    if any(source.records[i].mask_path is not None for i in anomalous):
        return False
    return source[anomalous[0]].mask is None


def _category(
    made: Results,
    category: str,
    device: Device,
    detector: Detector,
    dataset: Dataset,
    config: EvalConfig,
    key: jax.Array,
    tick: Callable[[str, str], Callable[[int], None]],
    trainer: Callable[[Detector, Features, str], Tree] | None,
) -> None:
    """Fit, score and measure one category into ``made``."""
    train, test = dataset.source("train", category), dataset.source("test", category)
    features = Features(device, train, category, config, tick(category, "training features"))
    start = time.perf_counter()
    trained = trainer(detector, features, category) if trainer else None
    state = detector.fit(features, mesh=device.mesh, key=named(key, category), trained=trained)
    state = jax.block_until_ready(device.place(state))
    seconds = {"features": features.seconds, "fit": time.perf_counter() - start - features.seconds}
    start = time.perf_counter()
    scored = _score(device, state, test, config, tick(category, "scores"))
    seconds["score"] = time.perf_counter() - start
    tick(category, "metrics")(0)
    start = time.perf_counter()
    row, curves = measure(scored, config, category)
    made.kinds[category] = _kinds(scored, config)
    normals = [m for m, label in zip(scored.maps, scored.labels, strict=True) if label == 0]
    scale = gallery.normal_scale(normals)
    made.images[category] = _image_rows(test, scored)
    made.cases[category] = gallery.choose_cases(made.images[category], config.gallery)
    made.gallery.update(gallery.pictures(category, test, scored.maps, scale, made.cases[category]))
    seconds["metrics"] = time.perf_counter() - start
    counts = {
        "train": len(train),
        "normal": int(np.sum(scored.labels == 0)),
        "anomalous": int(np.sum(scored.labels == 1)),
        "anomalous_without_mask": sum(m is None for m in scored.masks),
        "anomalous_with_empty_mask": sum(
            m is not None and not bool(m.any()) and int(label) == 1
            for m, label in zip(scored.masks, scored.labels, strict=True)
        ),
    }
    rounded = {k: round(v, 3) for k, v in seconds.items()}
    made.categories[category] = {**row, "counts": counts, "seconds": rounded}
    made.scales[category] = scale
    made.curves.update({f"{category}/{k}": v for k, v in curves.items()})


def _score(
    device: Device, state: Tree, source: Source, config: EvalConfig, tick: Callable[[int], None]
) -> Scored:
    """Score the images of a source and bring their maps back to original pixels."""
    found: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    scores: list[float] = []
    for host in batches(source, config, device.batch):
        maps, image = device.score(state, device.features(host.images))
        for row, (height, width) in enumerate(host.shapes):
            affine = input_affine(height, width, config.image_size)
            found.append(to_original(maps[row], affine, height, width))
        scores.extend(image[host.valid].tolist())
        masks.extend(host.masks)
        tick(len(host.shapes))
    return Scored(
        found,
        masks,
        np.asarray(scores, np.float32),
        np.asarray([r.label for r in source.records], np.int64),
        [r.kind for r in source.records],
    )


def measure(
    scored: Scored, config: EvalConfig, category: str, *, curve_points: int = 300
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers of a category and its curves ("roc/fpr", "roc/tpr", "pr/...", "pro/...").

    Images without annotation (mask None) count in the image metrics only. Counted pixel numbers
    come with ``error_bound``, the largest error any of them can have. Raises MetricError, naming
    the category, if the labels leave a metric undefined.
    """
    kept = [i for i, m in enumerate(scored.masks) if m is not None]
    try:
        row = _image_numbers(scored.scores, scored.labels)
        pixel = metrics.pixel_metrics(
            [scored.maps[i] for i in kept],
            [scored.masks[i] for i in kept],
            config.fpr_limits,
            curve_points=curve_points,
            method=config.method,
        )
    except MetricError as error:
        raise MetricError(f"category {category}: {error}") from error
    curves = pixel.pop("curves", {})
    flat = {f"{c}/{axis}": v for c, axes in curves.items() for axis, v in axes.items()}
    return {**row, **pixel}, flat


def _image_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "image_auroc": metrics.image_auroc(scores, labels),
        "image_ap": metrics.average_precision(scores, labels),
        "image_f1_max": metrics.f1_max(scores, labels),
    }


def _kinds(scored: Scored, config: EvalConfig) -> dict[str, dict[str, Any]]:
    """The same numbers for the normal images and one kind of defect at a time.

    Pixel numbers of a kind without any annotated defect pixel are None.
    """
    made: dict[str, dict[str, Any]] = {}
    labels = scored.labels
    pairs = zip(scored.kinds, labels, strict=True)
    for kind in sorted({k for k, label in pairs if label == 1}):
        rows = [i for i, k in enumerate(scored.kinds) if labels[i] == 0 or k == kind]
        part = Scored(
            [scored.maps[i] for i in rows],
            [scored.masks[i] for i in rows],
            scored.scores[rows],
            labels[rows],
            [scored.kinds[i] for i in rows],
        )
        defects = [m for m, k in zip(part.masks, part.kinds, strict=True) if k == kind]
        if any(m is not None and m.any() for m in defects):
            numbers, _ = measure(part, config, kind, curve_points=0)
        else:
            numbers = dict.fromkeys(config.metric_names, None)
            numbers.update(_image_numbers(part.scores, part.labels))
        made[kind] = {**numbers, "images": len(defects)}
    return made


def _image_rows(source: Source, scored: Scored) -> list[dict[str, Any]]:
    """One entry per test image, in source order; ``pixel_auroc`` where it is defined."""
    rows = []
    for i, record in enumerate(source.records):
        mask, scores = scored.masks[i], scored.maps[i]
        own = None
        if mask is not None and mask.any() and not mask.all():
            own = metrics.pixel_auroc([scores], [mask])
        rows.append(
            {
                "path": record.path,
                "kind": record.kind,
                "label": record.label,
                "score": float(scored.scores[i]),
                "max": float(scores.max()),
                "pixel_auroc": own,
            }
        )
    return rows
