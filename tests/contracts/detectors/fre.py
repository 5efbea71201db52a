"""Oracle of the reconstruction error: singular vectors and residuals, in float64."""

import numpy as np

from tests.contracts.detectors.common import upsampled

CONFIGS = [
    {"layers": ("layer2", "layer3"), "pool": 1},
    {"layers": ("layer2", "layer3"), "pool": 1, "mode": "patch", "variance": 0.8},
    {"layers": ("layer2",), "components": 3},
]
SYMBOLIC = True


def residual(config, normal, test):
    """Squared errors per cell of one layer, and the normal rows' total variance."""
    last = normal.shape[3] if config.get("mode") == "patch" else normal[0].size
    rows = normal.reshape(-1, last)
    mean = rows.mean(axis=0)
    _, values, axes = np.linalg.svd(rows - mean, full_matrices=False)
    share = np.cumsum(values**2) / np.sum(values**2)
    kept = config.get("components") or int(np.sum(share <= config.get("variance", 0.97))) + 1
    gaps = test.reshape(-1, last) - mean
    errors = gaps - gaps @ axes[:kept].T @ axes[:kept]
    return np.sum(errors.reshape(test.shape) ** 2, axis=3), np.sum(values**2) / len(rows)


def pooled(maps, side):
    height, width = maps.shape[1] // side, maps.shape[2] // side
    parts = [
        maps[:, i : i + height * side : side, j : j + width * side : side]
        for i in range(side)
        for j in range(side)
    ]
    return np.mean(np.float64(parts), axis=0)


def oracle(config, normal, test):
    maps, images = 0.0, 0.0
    for name in config["layers"]:
        values = (pooled(m[name], config.get("pool", 2)) for m in (normal, test))
        errors, variance = residual(config, *values)
        errors = errors / (variance if len(config["layers"]) > 1 else 1.0)
        images = images + errors.sum(axis=(1, 2))
        grid = maps.shape[1:] if np.ndim(maps) else errors.shape[1:]
        maps = maps + upsampled(errors, grid) * errors[0].size / (grid[0] * grid[1])
    return maps, images
