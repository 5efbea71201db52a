"""Which test images a report shows, their small pictures, and the colour scale of their maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.core.types import Source
from dsad.evaluation.hosts import ALONE, Hosts

#: Longest side in pixels of the stored pictures and masks.
PICTURE_SIDE = 320
#: Longest side of the stored maps: of ALL test images, so that runs show each other's cases.
#: After a Gaussian of 4 px at 224 px nothing is lost at this size.
MAP_SIDE = 160
#: Sections of the gallery, with what they show.
SECTIONS = {
    "best": "Best: highest pixel AUROC within the image",
    "median": "Median",
    "worst": "Worst: lowest pixel AUROC within the image",
    "false_alarms": "False alarms: normal images with the highest score",
}


def normal_scale(
    maps: Mapping[int, np.ndarray], hosts: Hosts = ALONE, limit: int = 10_000_000
) -> dict[str, float]:
    """Median and 99.9th percentile of the map values of normal images (evenly thinned).

    ``maps`` are those of this process by the number of their image.
    """
    pixels = int(hosts.total(np.int64(sum(m.size for m in maps.values()))))
    step = max(1, pixels // limit)
    thinned = hosts.to_main({i: m.ravel()[::step] for i, m in maps.items()})
    found = [0.0, 0.0]
    if hosts.main and thinned:
        values = np.concatenate([thinned[i] for i in sorted(thinned)])
        found = np.quantile(values, [0.5, 0.999]).tolist()
    median, high = hosts.from_main(found)
    return {"median": median, "p99_9": high}


def to_units(scores: np.ndarray, scale: Mapping[str, float]) -> np.ndarray:
    """Map values in units of the normal images: 0 at their median, 1 at their 99.9th percentile."""
    spread = scale["p99_9"] - scale["median"]
    return (scores - scale["median"]) / (spread if spread > 0 else 1.0)


def choose_cases(images: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[int]]:
    """Image numbers per section.

    Anomalous images are ranked by the pixel AUROC within the image (by their score where no mask
    defines it for any), a third of ``count`` from each end and from the middle without
    repetition; as many normal images with the highest scores are the false alarms.
    """
    each = -(-count // 3)
    ranked = [i for i, x in enumerate(images) if x["pixel_auroc"] is not None]
    by = "pixel_auroc"
    if not ranked:
        ranked, by = [i for i, x in enumerate(images) if x["label"] == 1], "score"
    ranked.sort(key=lambda i: (-images[i][by], images[i]["path"]))
    best = ranked[: min(each, -(-len(ranked) // 3))]
    rest = ranked[len(best) :]
    worst = rest[::-1][: min(each, -(-len(rest) // 2))]
    rest = rest[: len(rest) - len(worst)]
    middle = max(0, min(len(ranked) // 2 - len(best) - each // 2, len(rest) - each))
    normals = [i for i, x in enumerate(images) if x["label"] == 0]
    normals.sort(key=lambda i: (-images[i]["score"], images[i]["path"]))
    return {
        "best": best,
        "median": rest[middle : middle + each],
        "worst": worst,
        "false_alarms": normals[:each],
    }


def pictures(
    category: str,
    source: Source,
    maps: Mapping[int, np.ndarray],
    scale: Mapping[str, float],
    cases: Mapping[str, Sequence[int]],
    hosts: Hosts = ALONE,
) -> dict[str, np.ndarray]:
    """Arrays by name for ``gallery.npz``.

    ``image/<category>/<number>`` (h, w, 3) uint8 and ``mask/...`` (h, w) bool for the cases, at
    most 320 px; ``map/<category>/<number>`` (h, w) float16 for every test image, at most 160 px,
    in the units of ``to_units``. ``maps`` are those of this process by the number of their image;
    process 0 gets the pictures of all, the others none.
    """
    small = hosts.to_main(_small_maps(maps, scale))
    made = {f"map/{category}/{number}": small[number] for number in sorted(small)}
    return {**made, **hosts.together(lambda: _cases(category, source, cases) if hosts.main else {})}


def _small_maps(
    maps: Mapping[int, np.ndarray], scale: Mapping[str, float]
) -> dict[int, np.ndarray]:
    made = {}
    for number, scores in maps.items():
        units = np.clip(to_units(scores, scale), -6e4, 6e4).astype(np.float32)
        small = PIL.Image.fromarray(units).resize(
            fit(units.shape, MAP_SIDE), PIL.Image.Resampling.BILINEAR
        )
        made[number] = np.asarray(small, np.float16)
    return made


def _cases(
    category: str, source: Source, cases: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for number in sorted({n for numbers in cases.values() for n in numbers}):
        sample = source[number]
        picture = PIL.Image.fromarray(sample.image)
        size = fit(sample.image.shape, PICTURE_SIDE)
        made[f"image/{category}/{number}"] = np.asarray(
            picture.resize(size, PIL.Image.Resampling.LANCZOS)
        )
        if sample.mask is not None:
            mask = PIL.Image.fromarray(sample.mask.astype(np.uint8) * 255)
            # A quarter of a small pixel is enough, or small defects would vanish from the picture.
            small = np.asarray(mask.resize(size, PIL.Image.Resampling.BOX))
            made[f"mask/{category}/{number}"] = small >= min(64, int(small.max()) or 64)
    return made


def fit(shape: Sequence[int], side: int) -> tuple[int, int]:
    """(width, height) of an image of shape (height, width, ...) shrunk to ``side`` at most."""
    height, width = shape[0], shape[1]
    ratio = min(1.0, side / max(height, width))
    return max(1, round(width * ratio)), max(1, round(height * ratio))
