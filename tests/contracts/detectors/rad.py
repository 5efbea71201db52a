"""Oracle of RAD: every cosine between images and between cells, in float64."""

import itertools

import numpy as np

from tests.contracts.detectors import common

CONFIGS = [
    {"layers": ("layer2", "layer3"), "neighbours": 4, "image_score": "method", "tail": 0.1},
    {"layers": ("layer2", "layer3"), "retrieval": "layer3", "neighbours": 3, "radius": 2},
    {"layers": ("layer2", "layer3"), "radius": 0},
]
SYMBOLIC = True


def maps_of(seed, count):
    token = np.random.default_rng(seed + 50).standard_normal((count, 5)).astype(np.float32)
    return {**common.maps_of(seed, count), "cls": token}


def directions(values):
    values = np.float64(values)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def similarity(image, bank, radius):
    """Highest cosine (h, w) of one image with those of a bank (k, h, w, d) in a window."""
    found = np.full(image.shape[:2], -np.inf)
    for h, w in np.ndindex(found.shape):
        rows, columns = (range(max(0, i - radius), i + radius + 1) for i in (h, w))
        for i, j in itertools.product(rows, columns):
            if i < bank.shape[1] and j < bank.shape[2]:
                found[h, w] = max(found[h, w], (bank[:, i, j] @ image[h, w]).max())
    return found


def oracle(config, normal, test):
    own = config.get("retrieval", "cls")
    known, asked = (
        directions(m[own] if own == "cls" else np.float64(m[own]).mean(axis=(1, 2)))
        for m in (normal, test)
    )
    chosen = np.argsort(-asked @ known.T, axis=1)[:, : config.get("neighbours", 150)]
    maps = []
    for name in config["layers"]:
        bank, cells = directions(normal[name]), directions(test[name])
        radius = config.get("radius", 1)
        found = [1 - similarity(c, bank[k], radius) for c, k in zip(cells, chosen, strict=True)]
        maps.append(common.upsampled(np.stack(found)))
    maps = np.mean(maps, axis=0)
    most = max(1, int(config.get("tail", 0.01) * maps[0].size))
    return maps, np.sort(maps.reshape(len(maps), -1), axis=1)[:, -most:].mean(axis=1)
