"""Oracle of AnomalyDINO: every cosine, principal components and masks, in float64."""

import numpy as np
from scipy import ndimage

from tests.contracts.detectors.common import joined

CONFIGS = [
    {"layers": ("layer2", "layer3"), "tail": 0.1},
    {"layers": ("layer2", "layer3"), "k": 3, "masked": ("*",), "threshold": 0.4},
    {"layers": ("layer2", "layer3"), "masked": ("tiles",), "threshold": 0.2,
     "mask_rule": "published"},
    {"layers": ("layer2", "layer3"), "fits_on": "test", "nearest_share": 0.03},
]  # fmt: skip


def directions(cells):
    return cells / np.linalg.norm(cells, axis=-1, keepdims=True)


def foreground(cells, threshold, rule):
    """Where (h, w) cells (h, w, d) are object."""
    grid, rows = cells.shape[:2], cells.reshape(-1, cells.shape[2])
    axis = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    values = ((rows - rows.mean(axis=0)) @ axis).reshape(grid)
    middle = tuple(slice(int(0.2 * n), int(0.8 * n)) for n in grid)
    outer = np.ones(grid, bool)
    outer[middle] = False
    if rule == "grid":
        mask = values * (1 if values[middle].mean() >= values[outer].mean() else -1) > threshold
        mask, cross = mask if mask.any() else ~mask, np.ones((3, 3), bool)
    else:
        mask = values > threshold
        mask = mask if mask[middle].mean() > 0.35 else -values > threshold
        mask, cross = mask.reshape(-1, 1), np.ones((3, 1), bool)
    twice = ndimage.binary_dilation(mask, cross, iterations=2)
    return ndimage.binary_erosion(twice, cross, border_value=1).reshape(grid)


def oracle(config, normal, test):
    bank = directions(joined(normal, neighbourhood=1)).reshape(-1, 11)
    raw = joined(test, neighbourhood=1)
    gaps = np.sort(1 - directions(raw) @ bank.T, axis=3)
    count = config.get("k", 1)
    if config.get("fits_on") == "test":
        count = int(np.ceil(config["nearest_share"] * len(bank)))
    maps = gaps[..., :count].mean(axis=3)
    if "masked" in config:
        rule = config.get("mask_rule", "grid")
        kept = [foreground(image, config["threshold"], rule) for image in raw]
        maps = np.where(kept, maps, 0)
    most = max(1, int(config.get("tail", 0.01) * maps[0].size))
    return maps, np.sort(maps.reshape(len(maps), -1), axis=1)[:, -most:].mean(axis=1)
