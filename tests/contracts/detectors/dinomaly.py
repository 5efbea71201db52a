"""Oracle of Dinomaly: its trained network with explicit attention, in float64."""

import numpy as np
from scipy import special

from dsad.core.recipe import OptimConfig, Recipe
from tests.contracts.detectors.uniad import float64, linear

RECIPE = Recipe(steps=60, batch_size=8, optim=OptimConfig(name="stableadamw", lr=1e-2, clip=0.1))
BASE = {
    "layers": ("layer2", "layer3"), "groups": 1, "heads": 2, "mlp": 2, "recipe": RECIPE,
    "image_score": "method",
}  # fmt: skip
CONFIGS = [BASE, {**BASE, "groups": 2, "heads": 4, "easy": 0.5, "ramp": 10}]
SYMBOLIC = True


def maps_of(seed, count):
    """Two layers of one size, whose vectors point roughly one way."""
    rng = np.random.default_rng(seed)
    way = np.resize(np.float32([2, -1, 1, 3]), 8)
    make = lambda: (way + 0.5 * rng.standard_normal((count, 6, 5, 8))).astype(np.float32)  # noqa: E731
    return {"layer2": make(), "layer3": make(), "unused": make()}


def corrupted(maps):
    """The cells of rows 2 and 3, columns 1 and 2, point another way."""
    for name in ("layer2", "layer3"):
        maps[name][:, 2:4, 1:3] += np.resize(np.float32([-4, 4]), 8)
    return maps


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-8) * p["scale"] + p["bias"]


def gelu(x):
    return x / 2 * (1 + special.erf(x / np.sqrt(2)))


def attended(q, k, v):
    """The N × N weights of positive features, rows divided by their sums."""
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    weights = q @ k.T
    return weights / weights.sum(1, keepdims=True) @ v


def decoder(state, x, heads):
    """Outputs of all blocks for tokens (cells, C) of one image."""
    state, outputs = float64(state), []
    x = linear(state["bottleneck"]["fc2"], gelu(linear(state["bottleneck"]["fc1"], x)))
    for i in range(len(state["blocks"]["qkv"]["bias"])):
        p = {n: {k: v[i] for k, v in part.items()} for n, part in state["blocks"].items()}
        q, k, v = np.split(linear(p["qkv"], norm(p["norm1"], x)), 3, axis=1)
        split = [np.split(y, heads, axis=1) for y in (q, k, v)]
        mixed = np.hstack([attended(*parts) for parts in zip(*split, strict=True)])
        x = x + linear(p["proj"], mixed)
        x = x + linear(p["fc2"], gelu(linear(p["fc1"], norm(p["norm2"], x))))
        outputs.append(x)
    return outputs


def cosine(a, b):
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def oracle(config, state, test):
    layers = [np.float64(test[n]).reshape(-1, 30, 8) for n in config["layers"]]
    maps = np.zeros((len(layers[0]), 30))
    for i in range(len(maps)):
        images = [x[i] for x in layers]
        outputs = decoder(state, np.mean(images, axis=0), config["heads"])[::-1]
        if config["groups"] == 1:
            maps[i] = 1 - cosine(np.mean(images, axis=0), np.mean(outputs, axis=0))
        else:
            maps[i] = np.mean([1 - cosine(*pair) for pair in zip(images, outputs, strict=True)], 0)
    maps = maps.reshape(-1, 6, 5)
    return maps, maps.max((1, 2))
