"""Oracle of PaDiM: every covariance and its inverse, in float64."""

import numpy as np

from dsad.detectors.padim import channel_subset

BOTH = {"layers": ("layer2", "layer3")}
CONFIGS = [
    {**BOTH, "channels": 0},
    {**BOTH, "channels": 4},
    {**BOTH, "channels": 4, "form": "low_rank"},
    {**BOTH, "channels": 0, "form": "full"},
    {**BOTH, "channels": 0, "joint": False},
]


def repeated(maps):
    """Both layers on the grid 6 × 5: the deep cell that holds each shallow cell's centre."""
    rows, columns = (np.arange(6) + 0.5) * 3 / 6, (np.arange(5) + 0.5) * 3 / 5
    deep = np.float64(maps["layer3"])[:, rows.astype(int)][:, :, columns.astype(int)]
    return np.concatenate([np.float64(maps["layer2"]), deep], axis=3)


def distances(normal, test):
    """Mahalanobis distances, position by position."""
    maps = np.empty(test.shape[:3])
    for at in np.ndindex(*test.shape[1:3]):
        rows = normal[:, *at]
        inverse = np.linalg.inv(np.cov(rows.T, ddof=1) + 0.01 * np.eye(rows.shape[1]))
        gap = test[:, *at] - rows.mean(axis=0)
        maps[:, *at] = np.sqrt(np.einsum("nc,cd,nd->n", gap, inverse, gap))
    return maps


def corners(maps, height, width):
    """Bilinear resampling that maps corner cells onto corner cells."""
    made = np.empty((len(maps), height, width))
    for i, j in np.ndindex(height, width):
        y, x = i * (maps.shape[1] - 1) / (height - 1), j * (maps.shape[2] - 1) / (width - 1)
        up, left = min(int(y), maps.shape[1] - 2), min(int(x), maps.shape[2] - 2)
        y, x = y - up, x - left
        top = (1 - x) * maps[:, up, left] + x * maps[:, up, left + 1]
        low = (1 - x) * maps[:, up + 1, left] + x * maps[:, up + 1, left + 1]
        made[:, i, j] = (1 - y) * top + y * low
    return made


def oracle(config, normal, test):
    if not config.get("joint", True):
        pairs = [(np.float64(normal[n]), np.float64(test[n])) for n in config["layers"]]
        first, second = (distances(*p) for p in pairs)
        maps = (first + corners(second, 6, 5)) / 2
    else:
        normal, test = repeated(normal), repeated(test)
        if config["channels"]:
            subset = channel_subset(11, config["channels"], 1024)
            normal, test = normal[..., subset], test[..., subset]
        maps = distances(normal, test)
    return maps, maps.max(axis=(1, 2))
