"""Oracle of PatchCore: features, bank and scores from their definitions, in float64."""

import jax
import numpy as np

from dsad.core import rng
from tests.contracts.detectors.common import KEY, joined

POOLED = {"pooling": "published", "level_dim": 9, "pooled_dim": 8}
CONFIGS = [
    {"bank_fraction": 0.5},
    {"start": "published", "score": "squared", "zero_borders": True},
    {"bank_rows": 30, "reweighted": True, "neighbours": 5},
    {"bank_bytes": 1500, "projection_dim": 6, "start": "published"},
    {**POOLED, "bank": "random", "reweighted": True, "score": "squared"},
    {**POOLED, "bank": "all", "zero_borders": True},
    {"bank": "kmeans", "bank_rows": 12},
]


def bins(values, size):
    n = values.shape[-1]
    edges = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return np.stack([values[..., a:b].mean(axis=-1) for a, b in edges], axis=-1)


def squares(maps, border):
    """Every 3 × 3 square (b, h, w, c, 9) with ``border`` outside."""
    padded = np.pad(np.float64(maps), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).reshape(*maps.shape, 9)


def upsampled(values, size):
    """Bilinear, half-pixel centres, clamped, along axes 1 and 2."""
    for axis, target in ((1, size[0]), (2, size[1])):
        n = values.shape[axis]
        at = np.clip((np.arange(target) + 0.5) * n / target - 0.5, 0, n - 1)
        low = np.minimum(np.floor(at).astype(int), n - 2)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        values = (1 - share) * values.take(low, axis) + share * values.take(low + 1, axis)
    return values


def embedded(config, maps):
    pooled, zeros = config.get("pooling") == "published", config.get("zero_borders", False)
    if not pooled and not zeros:
        return joined(maps)
    levels = []
    for name in ("layer2", "layer3"):
        found = squares(maps[name], 0.0)
        if pooled:
            flat = found.reshape(*maps[name].shape[:3], -1)
            there = squares(np.ones_like(maps[name]), 0.0).reshape(flat.shape)
            level = bins(flat, config["level_dim"])
            share = bins(there, config["level_dim"])
            # Bins that lie wholly beyond the border are 0.
            level = level if zeros else np.where(share > 0, level / np.maximum(share, 1e-9), 0)
        else:
            level = found.mean(axis=-1)
        levels.append(level)
    both = np.concatenate([levels[0], upsampled(levels[1], levels[0].shape[1:3])], axis=-1)
    return bins(both, config["pooled_dim"]) if pooled else both


def farthest_first(rows, far, picks, size):
    while len(picks) < size:
        for pick in picks[-1:]:
            far = np.minimum(far, np.sum((rows - rows[pick]) ** 2, axis=1))
        far[picks] = -1
        picks.append(int(np.argmax(far)))
    return picks


def bank_of(config, rows):
    key, count = rng.named(KEY, "patchcore"), len(rows)
    size = int(config.get("bank_fraction", 0.1) * count)
    size = config.get("bank_rows", size)
    size = config.get("bank_bytes", size * 4 * rows.shape[1]) // (4 * rows.shape[1])
    kind = config.get("bank", "coreset")
    if kind == "all":
        return rows
    if kind in ("random", "kmeans"):
        key = key if kind == "random" else rng.named(key, "k-means start")
        draw = jax.random.permutation(rng.named(key, "random bank"), count)[:size]
        centres = rows[np.sort(draw)]
        for _ in range(20 if kind == "kmeans" else 0):
            nearest = np.linalg.norm(rows[:, None] - centres[None], axis=2).argmin(axis=1)
            centres = np.stack(
                [rows[nearest == c].mean(0) if (nearest == c).any() else centres[c]
                 for c in range(size)]
            )  # fmt: skip
        return centres
    space = rows
    if "projection_dim" in config:
        bound, shape = rows.shape[1] ** -0.5, (rows.shape[1], config["projection_dim"])
        named = rng.named(key, "coreset projection")
        space = rows @ np.float64(jax.random.uniform(named, shape, "float32", -bound, bound))
    if config.get("start") == "published":
        starts = np.asarray(jax.random.permutation(rng.named(key, "coreset start"), count)[:10])
        far = np.linalg.norm(space[:, None] - space[starts][None], axis=2).mean(axis=1) ** 2
        return rows[farthest_first(space, far, [int(np.argmax(far))], size)]
    first = int(jax.random.randint(rng.named(key, "start"), (), 0, count))
    return rows[farthest_first(space, np.full(count, np.inf), [first], size)]


def oracle(config, normal, test):
    rows = embedded(config, normal)
    bank = bank_of(config, rows.reshape(-1, rows.shape[-1]))
    cells = embedded(config, test)
    shape, cells = cells.shape[:3], cells.reshape(len(cells), -1, cells.shape[-1])
    gaps = np.linalg.norm(cells[:, :, None] - bank[None, None], axis=3)
    distances = gaps.min(axis=2)
    maps = distances**2 if config.get("score") == "squared" else distances
    image = maps.max(axis=1)
    if config.get("reweighted"):
        for i, worst in enumerate(distances.argmax(axis=1)):
            star = gaps[i, worst].argmin()
            around = np.linalg.norm(bank - bank[star], axis=1).argsort()
            around = around[: config.get("neighbours", 9)]
            image[i] *= 1 - np.exp(gaps[i, worst, star]) / np.exp(gaps[i, worst, around]).sum()
    return maps.reshape(shape), image
