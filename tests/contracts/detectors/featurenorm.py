"""Oracle of FeatureNorm: lengths in float64, resampled with corners aligned."""

import numpy as np

from tests.contracts.detectors import common
from tests.contracts.detectors.padim import corners

BOTH = {"layers": ("layer2", "layer3")}
CONFIGS = [BOTH, {"layers": ("layer3", "layer2")}]
SYMBOLIC = True
READS_SOURCE = False


def maps_of(seed, count):
    """Residuals: short vectors around the origin."""
    return {n: m - 8 for n, m in common.maps_of(seed, count).items()}


def oracle(config, normal, test):
    maps = [np.sqrt(np.linalg.norm(np.float64(test[n]), axis=3) + 1) - 1 for n in config["layers"]]
    mean = (maps[0] + corners(maps[1], *maps[0].shape[1:])) / 2
    return mean, mean.max(axis=(1, 2))
