"""Oracle of ProtoAD: first-neighbour clusters by cosine and every similarity, in float64."""

import numpy as np

from tests.contracts.detectors.common import joined

# The test features lie in a narrow cone, where a partition would average defects away.
CONFIGS = [
    {"layers": ("layer2", "layer3"), "neighbourhood": 3, "image_levels": 0, "level": 0},
    {"layers": ("layer2", "layer3"), "image_levels": 1, "level": 1},
]
SYMBOLIC = True


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def clustered(rows, levels):
    """Unit means of clusters found by flooding the graph of nearest neighbours."""
    means, members = rows, [[i] for i in range(len(rows))]
    for _ in range(levels):
        cosine = means @ means.T - 3 * np.eye(len(means))
        closest = cosine.argmax(axis=1)
        label = np.arange(len(means))
        for _ in range(len(means)):
            for i, j in enumerate(closest):
                label[i] = label[j] = min(label[i], label[j])
        members = [
            np.concatenate([members[i] for i in np.flatnonzero(label == v)])
            for v in np.unique(label)
        ]
        means = unit(np.stack([rows[m].mean(axis=0) for m in members]))
    return means


def oracle(config, normal, test):
    side = config.get("neighbourhood", 1)
    cells = [unit(joined(maps, side, order=0)) for maps in (normal, test)]
    rows = [clustered(image.reshape(-1, 11), config["image_levels"]) for image in cells[0]]
    prototypes = clustered(np.concatenate(rows), config["level"])
    maps = 1 - (cells[1] @ prototypes.T).max(axis=3)
    return maps, maps.max(axis=(1, 2))
