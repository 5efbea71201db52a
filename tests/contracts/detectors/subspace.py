"""Oracle of SubspaceAD: singular vectors of the cells and their residuals, in float64."""

import numpy as np

from tests.contracts.detectors import common
from tests.contracts.detectors.fre import residual

CONFIGS = [
    {"layers": ("layer2", "layer3"), "variance": 0.4, "tail": 0.1},
    {"layers": ("layer3",), "components": 2},
]
SYMBOLIC = True


def maps_of(seed, count):
    """Layers of equal shape."""
    maps = common.maps_of(seed, count)
    return {**maps, "layer3": common.maps_of(seed + 9, count)["layer2"]}


def corrupted(maps):
    """In both, far beyond what few axes leave."""
    for values in (maps["layer2"], maps["layer3"]):
        values[:, 2:4, 1:3] += np.resize(np.float32([8, -8]), 7)
    return maps


def oracle(config, normal, test):
    def mean(maps):
        return np.mean([np.float64(maps[name]) for name in config["layers"]], axis=0)

    chosen = {"variance": 0.99, **config, "mode": "patch"}
    maps, _ = residual(chosen, mean(normal), mean(test))
    most = max(1, int(config.get("tail", 0.01) * maps[0].size))
    return maps, np.sort(maps.reshape(len(maps), -1), axis=1)[:, -most:].mean(axis=1)
