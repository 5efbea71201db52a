"""Oracle of the reconstruction error: singular vectors and residuals, in float64."""

import numpy as np

from tests.contracts.detectors.common import upsampled

CONFIGS = [
    {"layers": ("layer2", "layer3"), "pool": 1},
    {"layers": ("layer2", "layer3"), "pool": 1, "mode": "patch", "variance": 0.8},
    {"layers": ("layer2",), "pool": 1, "components": 3},
]
SYMBOLIC = True


def residual(config, normal, test):
    """Squared errors per cell of one layer, and the normal rows' total variance."""
    rows, others = np.float64(normal), np.float64(test)
    last = normal.shape[3] if config.get("mode") == "patch" else normal[0].size
    rows, mean = rows.reshape(-1, last), rows.reshape(-1, last).mean(axis=0)
    _, values, axes = np.linalg.svd(rows - mean, full_matrices=False)
    share = np.cumsum(values**2) / np.sum(values**2)
    kept = config.get("components") or int(np.sum(share <= config.get("variance", 0.97))) + 1
    gaps = others.reshape(-1, last) - mean
    errors = gaps - gaps @ axes[:kept].T @ axes[:kept]
    return np.sum(errors.reshape(others.shape) ** 2, axis=3), np.sum(values**2) / len(rows)


def oracle(config, normal, test):
    maps, images = 0.0, 0.0
    for name in config["layers"]:
        errors, variance = residual(config, normal[name], test[name])
        errors = errors / (variance if len(config["layers"]) > 1 else 1.0)
        images = images + errors.sum(axis=(1, 2))
        maps = maps + upsampled(errors) * errors[0].size / 30
    return maps, images
