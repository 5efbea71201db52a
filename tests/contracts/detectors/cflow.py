"""Oracle of CFLOW: densities under its trained flows, in float64."""

import numpy as np

from dsad.core.recipe import OptimConfig, Recipe
from tests.contracts.detectors import common
from tests.contracts.detectors.padim import corners

RECIPE = Recipe(steps=20, batch_size=8, optim=OptimConfig(lr=2e-3))
BASE = {"layers": ("layer2", "layer3"), "blocks": 2, "recipe": RECIPE}
CONFIGS = [BASE, {**BASE, "clamp": "scaled", "tokens": 64}]
SYMBOLIC = True


def maps_of(seed, count):
    """Around the origin, as a density that is not learned to the end asks for."""
    return common.maps_of(seed, count, shift=-8)


def corrupted(maps):
    """A defect in both levels, each of which adds at most 1."""
    maps["layer3"][:, 1, :2] += np.float32([4, -4, 4, -4])
    return common.corrupted(maps)


def code(height, width):
    """The position code, entry by entry."""
    table = np.empty((height, width, 128))
    for k in range(32):
        w = 10000.0 ** (-2 * k / 64)
        for at, places in ((0, np.arange(width)[None, :]), (64, np.arange(height)[:, None])):
            table[:, :, at + 2 * k] = np.sin(places * w)
            table[:, :, at + 2 * k + 1] = np.cos(places * w)
    return table


def density(params, rotations, x, q, clamp):
    """Ll (n,) of vectors (n, C) under conditions (n, 128), block by block."""
    p = {n: np.float64(v) for n, v in params.items() if n in ("gain", "offset")}
    fc1, fc2 = ({n: np.float64(v) for n, v in params[k].items()} for k in ("fc1", "fc2"))
    channels, total = x.shape[1], np.zeros(len(x))
    half = -(-channels // 2)
    for b in range(len(rotations)):
        hidden = np.hstack([x[:, :half], q]) @ fc1["kernel"][b] + fc1["bias"][b]
        raw = 0.1 * (np.maximum(hidden, 0) @ fc2["kernel"][b] + fc2["bias"][b])
        s, t = raw[:, : channels - half], raw[:, channels - half :]
        s = 1.9 * np.tanh(s if clamp == "plain" else s / 1.9)
        gain = 0.2 * np.log1p(np.exp(p["gain"][b] / 2))
        x = np.hstack([x[:, :half], x[:, half:] * np.exp(s) + t])
        x = (gain * x + p["offset"][b]) @ np.float64(rotations[b]).T
        total = total + s.sum(1) + np.log(gain).sum()
    return (total - np.sum(x**2, 1) / 2) / channels - 0.5 * np.log(2 * np.pi)


def oracle(config, state, test):
    maps = 0.0
    for i, name in enumerate(config["layers"]):
        x = np.float64(test[name])
        q = np.broadcast_to(code(*x.shape[1:3]), (*x.shape[:3], 128)).reshape(-1, 128)
        found = density(
            state["flows"][name], state["rotations"][name], x.reshape(-1, x.shape[3]), q,
            config.get("clamp", "plain"),
        )  # fmt: skip
        level = 1 - np.exp(found.reshape(x.shape[:3]) - np.float64(state["tops"][i]))
        maps = maps + (level if i == 0 else corners(level, 6, 5))
    return maps, maps.max((1, 2))
