"""Oracle of MuSc: every distance between the tokens of the images of its fit, in float64."""

import numpy as np
from scipy import ndimage

from tests.contracts.detectors import common

LAYERS = ("layer2", "layer3")
CONFIGS = [
    {"layers": LAYERS},
    {"layers": LAYERS, "similar": "mean", "neighbours": (2, 4), "share": 0.6},
    {"layers": ("layer2",), "similar": "none", "neighbourhoods": (3,)},
]
#: Images that its fit did not see have no score; its own tests put a defect into one that it saw.
SCORES_ITS_OWN = True


def maps_of(seed, count):
    """The same six images for any seed, again and again."""
    maps = common.maps_of(0, 6)
    token = np.random.default_rng(50).standard_normal((6, 5)).astype(np.float32)
    return {n: m[np.arange(count) % 6] for n, m in {**maps, "cls": token}.items()}


def tokens_of(maps, side):
    """Unit tokens (n, cells, d) of maps (n, h, w, d)."""
    maps = np.float64(maps)
    mean, variance = (f(maps, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    normal = (maps - mean) / np.sqrt(variance + 1e-5)
    means = ndimage.uniform_filter(normal, (1, side, side, 1), mode="constant")
    flat = means.reshape(len(maps), -1, maps.shape[3])
    return flat / np.linalg.norm(flat, axis=2, keepdims=True)


def scores_of(tokens, share):
    gaps = np.linalg.norm(tokens[:, :, None, None] - tokens[None, None], axis=-1).min(-1)
    gaps[np.arange(len(gaps)), :, np.arange(len(gaps))] = np.inf
    kept = max(1, int(share * (len(gaps) - 1) + 1e-9))
    return np.sort(gaps, axis=2)[:, :, :kept].mean(2)


def smoothed(scores, vectors, neighbours):
    vectors = np.float64(vectors)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    weights, found = np.maximum(vectors @ vectors.T, 0), []
    for k in neighbours:
        kept = np.where(weights >= np.sort(weights, axis=1)[:, -k, None], weights, 0)
        found.append(kept @ scores / kept.sum(1))
    return np.mean(found, axis=0)


def oracle(config, normal, test):
    maps = [
        common.upsampled(scores_of(tokens_of(normal[n], r), config.get("share", 0.3)).reshape(
            normal[n].shape[:3]))
        for n in config["layers"]
        for r in config.get("neighbourhoods", (1, 3, 5))
    ]  # fmt: skip
    maps = np.mean(maps, axis=0)
    images = maps.max(axis=(1, 2))
    if config.get("scaled"):
        images = (images - images.min()) / (images.max() - images.min())
    similar = config.get("similar", "cls")
    if similar != "none":
        last = normal[config["layers"][-1]].mean(axis=(1, 2), dtype=np.float64)
        vectors = normal["cls"] if similar == "cls" else last
        images = smoothed(images, vectors, config.get("neighbours", (1, 2, 3)))
    again = np.arange(8) % 6
    return maps[again], images[again]
