"""Oracle of the Gaussian density of embeddings: PCA by SVD and whole covariances, in float64."""

import numpy as np

from tests.contracts.detectors.common import joined

SMALL = {"layers": ("layer2", "layer3"), "patch": 4, "stride": 2}
# The first without PCA: of 6 images it keeps too little to see a defect in other directions.
CONFIGS = [
    {**SMALL, "components": 0},
    {**SMALL, "components": 4},
    {**SMALL, "components": 4, "normalise": False},
    {**SMALL, "components": 6, "per_position": False},
    {**SMALL, "components": 6, "per_position": False, "cache_gb": 0.0},
    {**SMALL, "components": 0, "per_position": False},
]


def unit(maps):
    """The joined layers at unit length (without neighbourhood means: see ``joined``)."""
    cells = joined(maps, neighbourhood=1)
    return cells / np.linalg.norm(cells, axis=3, keepdims=True)


def distances(normal, test, components):
    """Mahalanobis distances of rows under PCA and a Ledoit-Wolf covariance, inverted as it is."""
    mean = normal.mean(axis=0)
    axes = np.eye(len(mean))
    if components:
        axes = np.linalg.svd(normal - mean, full_matrices=False)[2][:components]
    rows, others = (normal - mean) @ axes.T, (test - mean) @ axes.T
    n, p = rows.shape
    cov = rows.T @ rows / n
    mu = np.trace(cov) / p
    d2 = (np.sum(cov**2) - p * mu**2) / p
    b2 = (np.mean(np.sum(rows**2, axis=1) ** 2) - np.sum(cov**2)) / (p * n)
    shrink = min(b2, d2) / d2
    inverse = np.linalg.inv((1 - shrink) * cov + shrink * mu * np.eye(p))
    return np.sqrt(np.einsum("nc,cd,nd->n", others, inverse, others))


def heatmap(scores, normalise):
    """Kernels of 4 taps added up at stride 2."""
    sigma = np.log10(0.45 * 4 + 1) + 0.25
    taps = np.exp(-np.square(np.array([1, 0, 0, 1]) / sigma) / 2) / 2
    total = np.zeros((len(scores), 14, 12))
    cover = np.zeros((14, 12))
    for i, j in np.ndindex(6, 5):
        window = slice(2 * i, 2 * i + 4), slice(2 * j, 2 * j + 4)
        total[:, *window] += scores[:, i, j, None, None] * np.outer(taps, taps)
        cover[window] += np.outer(taps, taps)
    return total / cover if normalise else total


def oracle(config, normal, test):
    normal, test = unit(normal), unit(test)
    if config.get("per_position", True):
        scores = np.empty(test.shape[:3])
        for at in np.ndindex(6, 5):
            scores[:, *at] = distances(normal[:, *at], test[:, *at], config["components"])
    else:
        rows = distances(normal.reshape(-1, 11), test.reshape(-1, 11), config["components"])
        scores = rows.reshape(test.shape[:3])
    return heatmap(scores, config.get("normalise", True)), scores.max(axis=(1, 2))
