"""Oracle of SPADE: every distance between images and between cells, in float64."""

import numpy as np

from tests.contracts.detectors.common import upsampled

CONFIGS = [
    {"layers": ("layer2", "layer3"), "pooled": "layer2", "neighbours": 4},
    {"layers": ("layer2", "layer3"), "pooled": "", "kappa": 3},
]
SYMBOLIC = True


def oracle(config, normal, test):
    normal = {n: np.float64(m) for n, m in normal.items()}
    test = {n: np.float64(m) for n, m in test.items()}
    pooled = config["pooled"] or config["layers"][-1]
    means = [m[pooled].mean(axis=(1, 2)) for m in (normal, test)]
    gaps = np.linalg.norm(means[1][:, None] - means[0][None], axis=2)
    count, kappa = min(config.get("neighbours", 50), gaps.shape[1]), config.get("kappa", 1)
    chosen = np.argsort(gaps, axis=1)[:, :count]
    maps = []
    for name in config["layers"]:
        found = np.zeros(test[name].shape[:3])
        for at in np.ndindex(found.shape):
            bank = normal[name][chosen[at[0]]].reshape(-1, normal[name].shape[3])
            distances = np.sort(np.linalg.norm(bank - test[name][at], axis=1))
            found[at] = distances[:kappa].mean()
        maps.append(upsampled(found))
    return np.mean(maps, axis=0), np.sort(gaps, axis=1)[:, :count].mean(axis=1)
