"""Which test images a report shows, their small pictures, and the colour scale of their maps."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.core.types import Source
from dsad.evaluation.hosts import ALONE, Hosts
from dsad.evaluation.scored import Scored

#: Longest side in pixels of the stored pictures and masks: what a click on a picture shows.
PICTURE_SIDE = 1600
#: Longest side of the stored maps: of ALL test images, so that runs show each other's cases.
#: After a Gaussian of 4 px at 224 px nothing is lost at this size.
MAP_SIDE = 160
#: Those of ``choose_cases`` that are decided wrongly at a threshold, and the others.
WRONG, OTHERS = ("missed", "false_alarms"), ("worst", "median", "best", "normal")


def normal_scale(
    own: Sequence[int],
    maps: Sequence[np.ndarray],
    hosts: Hosts = ALONE,
    limit: int = 10_000_000,
) -> dict[str, float]:
    """Median and 99.9th percentile of the map values of normal images (evenly thinned).

    ``maps`` are those of this process, of the images with the numbers ``own``.
    """
    pixels = int(hosts.total(np.int64(sum(m.size for m in maps))))
    step = max(1, pixels // limit)
    few = {i: m.ravel()[::step].copy() for i, m in zip(own, maps, strict=True)}
    thinned = hosts.to_main(few)
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


def choose_cases(
    images: Sequence[Mapping[str, Any]], count: int, threshold: float | None = None
) -> dict[str, list[int]]:
    """Image numbers per section of the gallery, none twice.

    ``missed`` are at most ``count`` defective images whose score is not above the threshold, the
    lowest first, ``false_alarms`` good ones above it, the highest first; without a threshold a
    third of ``count`` with such scores. Of the other defective images as many from each end and
    from the middle, ranked by the pixel AUROC within the image (by the score where no mask defines
    it for any), are ``worst``, ``median`` and ``best``; ``normal`` are other good ones.
    """
    each = -(-count // 3)
    shown = each if threshold is None else count
    low = [i for i, x in enumerate(images) if x["label"] == 1]
    low.sort(key=lambda i: (images[i]["score"], images[i]["path"]))
    high = [i for i, x in enumerate(images) if x["label"] == 0]
    high.sort(key=lambda i: (-images[i]["score"], images[i]["path"]))
    missed, alarms = low[:each], high[:each]
    if threshold is not None:
        missed = [i for i in low if images[i]["score"] <= threshold]
        alarms = [i for i in high if images[i]["score"] > threshold]
    wrong = {*missed, *alarms}
    rest = [i for i in low if i not in wrong]
    by = "pixel_auroc" if any(images[i]["pixel_auroc"] is not None for i in rest) else "score"
    rest = [i for i in rest if images[i][by] is not None]
    rest.sort(key=lambda i: (images[i][by], images[i]["path"]))
    worst = rest[: min(each, -(-len(rest) // 3))]
    rest = rest[len(worst) :]
    best = rest[::-1][: min(each, -(-len(rest) // 2))]
    rest = rest[: len(rest) - len(best)]
    middle = max(0, (len(rest) - each) // 2)
    return {
        "missed": missed[:shown],
        "false_alarms": alarms[:shown],
        "worst": worst,
        "median": rest[middle : middle + each],
        "best": best,
        "normal": [i for i in high if i not in wrong][:each],
    }


def pictures(
    category: str,
    source: Source,
    scored: Scored,
    scale: Mapping[str, float],
    cases: Mapping[str, Sequence[int]],
) -> dict[str, np.ndarray]:
    """Arrays by name for ``gallery.npz``.

    ``image/<category>/<number>``, the bytes of a JPEG (n,) uint8, and ``mask/...`` (h, w) bool for
    the cases, at most 1600 px; ``map/<category>/<number>`` (h, w) float16 for every test image, at
    most 160 px, in the units of ``to_units``. Cases are decoded only where scoring decoded nothing.
    Process 0 gets the pictures of all, the others none.
    """
    hosts, numbers = scored.hosts, sorted({n for section in cases.values() for n in section})
    maps = dict(zip(scored.own, scored.maps, strict=True))
    maps = hosts.to_main(_small_maps(maps, scale))
    truth = zip(scored.own, scored.masks, strict=True)
    masks = hosts.to_main({n: _small_mask(m) for n, m in truth if n in numbers and m is not None})
    images = hosts.to_main({n: scored.pictures[n] for n in numbers if n in scored.pictures})
    missing = [n for n in numbers if hosts.main and n not in images]
    images |= hosts.together(lambda: {n: picture(source[n].image) for n in missing})
    made = {f"map/{category}/{n}": maps[n] for n in sorted(maps)}
    made |= {f"image/{category}/{n}": images[n] for n in sorted(images)}
    return {**made, **{f"mask/{category}/{n}": masks[n] for n in sorted(masks)}}


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


def picture(image: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8, shrunk to ``PICTURE_SIDE`` at most, as the bytes (n,) of a JPEG."""
    return np.frombuffer(jpeg(shrunk(image, PICTURE_SIDE), 90), np.uint8)


def opened(stored: np.ndarray) -> np.ndarray:
    """The pixels (h, w, 3) uint8 of a stored picture."""
    return np.asarray(PIL.Image.open(io.BytesIO(stored.tobytes())))


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """A picture (h, w, 3) uint8 as a file; colours at full resolution, for thin lines."""
    packed = io.BytesIO()
    PIL.Image.fromarray(image).save(packed, "JPEG", quality=quality, subsampling=0, optimize=True)
    return packed.getvalue()


def shrunk(image: np.ndarray, side: int = PICTURE_SIDE) -> np.ndarray:
    """An image (h, w, 3) uint8 of ``side`` at most."""
    size = fit(image.shape, side)
    if size == (image.shape[1], image.shape[0]):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.LANCZOS))


def _small_mask(mask: np.ndarray) -> np.ndarray:
    whole = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
    small = np.asarray(whole.resize(fit(mask.shape, PICTURE_SIDE), PIL.Image.Resampling.BOX))
    # A quarter of a small pixel is enough, or small defects would vanish from the picture.
    return small >= min(64, int(small.max()) or 64)


def fit(shape: Sequence[int], side: int) -> tuple[int, int]:
    """(width, height) of an image of shape (height, width, ...) shrunk to ``side`` at most."""
    height, width = shape[0], shape[1]
    ratio = min(1.0, side / max(height, width))
    return max(1, round(width * ratio)), max(1, round(height * ratio))
