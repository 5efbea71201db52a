"""What metrics accept: maps, masks, labels and limits, checked; defect regions of a mask."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy import ndimage

from dsad.core.errors import MetricError


def maps_and_masks(maps: Any, masks: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps as float arrays (h, w) and masks as bool arrays of the same shapes, one per image."""
    scores = scored(maps)
    return scores, masks_for(scores, masks)


def masks_for(maps: Sequence[Any], masks: Any) -> list[np.ndarray]:
    """Masks as bool arrays of the shapes of the maps."""
    truth = [boolean(m, f"masks[{i}]") for i, m in enumerate(listed(masks, "masks"))]
    if len(maps) != len(truth):
        raise MetricError(f"expected one mask per map, found {len(maps)} maps, {len(truth)} masks.")
    for i, (score, mask) in enumerate(zip(maps, truth, strict=True)):
        if score.shape != mask.shape:
            raise MetricError(
                f"maps[{i}]: expected the shape of its mask {mask.shape}, found {score.shape}; "
                "bring the map to the mask's pixels first."
            )
    return truth


def scored(maps: Any) -> list[np.ndarray]:
    """Finite maps (h, w), float32 or float64."""
    scores = [floats(m, f"maps[{i}]") for i, m in enumerate(listed(maps, "maps"))]
    for i, score in enumerate(scores):
        check_finite(score, f"maps[{i}]")
    return scores


def unchecked(maps: Any) -> list[Any]:
    """Maps (h, w) as ``scored``, for who finds NaN while counting; float32 jax ones stay there."""
    if isinstance(maps, jax.Array) and maps.ndim == 3 and maps.dtype == np.float32:
        return list(maps)
    return [floats(m, f"maps[{i}]") for i, m in enumerate(listed(maps, "maps"))]


def taken(scores: Any, index: np.ndarray) -> np.ndarray:
    """``scores[index]`` on the host; from a jax array only these are fetched."""
    if not isinstance(scores, jax.Array) or index.size == 0:
        return np.asarray(scores)[index]
    padded = np.zeros(1 << (index.size - 1).bit_length(), np.int32)  # few shapes to compile
    padded[: index.size] = index
    return np.asarray(scores[padded])[: index.size]


def labelled(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Finite image scores (n,) and bool labels (n,)."""
    values, truth = floats(scores, "scores"), np.asarray(labels)
    if values.ndim != 1 or truth.shape != values.shape:
        raise MetricError(
            f"expected scores and labels of one shape (n,), found scores {values.shape} and labels "
            f"{truth.shape}."
        )
    check_finite(values, "scores")
    if truth.dtype.kind not in "biu" or (truth.dtype != bool and not np.isin(truth, (0, 1)).all()):
        raise MetricError(
            "labels: expected bool or the integers 0 (normal) and 1 (anomalous), found "
            f"{truth.dtype} with values {np.unique(truth)[:5].tolist()}."
        )
    return values, truth.astype(bool)


def listed(values: Any, what: str) -> Sequence[Any]:
    """(N, H, W) or a list of (H, W), to be iterated over."""
    items = list(values) if isinstance(values, (list, tuple)) else np.asarray(values)
    if not isinstance(items, list) and items.ndim != 3:
        raise MetricError(
            f"{what}: expected (N, H, W) or a list of (H, W), found shape {items.shape}."
        )
    for i, item in enumerate(items):
        if np.ndim(item) != 2:
            raise MetricError(f"{what}[{i}]: expected (H, W), found shape {np.shape(item)}.")
    return items  # type: ignore[return-value]


def floats(values: Any, what: str) -> np.ndarray:
    """Scores as float32 where that is exact, else float64: rounding would create ties."""
    found = np.asarray(values)
    if found.dtype.kind == "f" or found.dtype.name == "bfloat16":
        return found if found.dtype == np.float64 else found.astype(np.float32, copy=False)
    if found.dtype.kind in "iu":
        return found.astype(np.float64)
    raise MetricError(f"{what}: expected numbers, found dtype {found.dtype}.")


def boolean(values: Any, what: str) -> np.ndarray:
    """A mask as bool."""
    found = np.asarray(values)
    if found.dtype.kind not in "biu":
        raise MetricError(
            f"{what}: expected bool (or integers, non-zero on defects), found dtype {found.dtype}; "
            "threshold resized masks explicitly."
        )
    return found if found.dtype == bool else found != 0


def check_finite(values: np.ndarray, what: str) -> None:
    """Raise MetricError with the place of the first score that is NaN or infinite."""
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values)
        first = tuple(int(i[0]) for i in np.nonzero(bad))
        raise MetricError(
            f"{what}: expected finite scores, found {int(bad.sum())} NaN or infinite of "
            f"{values.size}, the first at {first}. Find out why the detector produced them."
        )


def is_flat(scores: Any) -> bool:
    """Whether these are image scores (n,), not maps."""
    if isinstance(scores, (list, tuple)):
        return len(scores) > 0 and np.ndim(scores[0]) == 0
    return np.ndim(scores) == 1


def check_limit(limit: float) -> None:
    """Raise MetricError unless ``limit`` is a rate to integrate up to."""
    if not 0.0 < limit <= 1.0:
        raise MetricError(f"fpr_limit: expected a number in (0, 1], found {limit!r}.")


def check_classes(normal: int, defect: int, name: str, unit: str) -> None:
    """Raise MetricError unless both classes of a curve have items; ``unit`` images or pixels."""
    if normal and defect:
        return
    if unit == "images":
        raise MetricError(
            f"{name} needs normal and anomalous images; found {normal} normal and {defect} "
            "anomalous. Score both kinds, or leave this metric out."
        )
    if defect == 0:
        raise MetricError(
            f"{name} needs defect pixels; found none among {normal} pixels. Check that the "
            "masks of anomalous images are loaded, or leave this metric out."
        )
    raise MetricError(
        f"{name} needs normal pixels; found none: all {defect} pixels are defects. Check "
        "that the masks are not inverted."
    )


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
