"""Oracle of UniAD: its trained network, token by token, in float64."""

import numpy as np

from dsad.core.recipe import OptimConfig, Recipe
from tests.contracts.detectors import common
from tests.contracts.detectors.padim import corners

RECIPE = Recipe(steps=60, batch_size=8, optim=OptimConfig(lr=3e-3, clip=0.1))
BASE = {
    "layers": ("layer2", "layer3"), "grid": 0, "width": 8, "heads": 2, "mlp": 16, "depth": 2,
    "neighbourhood": 3, "jitter": 0.1, "recipe": RECIPE,
}  # fmt: skip
CONFIGS = [BASE, {**BASE, "scaled": False, "grid": 4, "depth": 1}]
SYMBOLIC = True


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def attended(p, q, k, v, blocked, heads):
    """Row by row over the tokens that are not blocked."""
    d = q.shape[-1]
    parts = [slice(i * d, (i + 1) * d) for i in range(3)]
    q, k, v = (
        x @ p["qkv"]["kernel"][:, s] + p["qkv"]["bias"][s]
        for x, s in zip((q, k, v), parts, strict=True)
    )
    mixed, size = np.zeros_like(q), d // heads
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        for i in range(len(q)):
            seen = ~blocked[i]
            scores = k[seen, own] @ q[i, own] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[i, own] = weights @ v[seen, own] / weights.sum()
    return linear(p["proj"], mixed)


def float64(tree):
    return {
        n: float64(x) if isinstance(x, dict) else np.float64(np.asarray(x)) for n, x in tree.items()
    }


def layers(stack):
    """The parameters of one layer after the other."""
    count = len(stack["norm1"]["scale"])
    one = lambda tree, i: {n: one(x, i) if isinstance(x, dict) else x[i] for n, x in tree.items()}  # noqa: E731
    return [one(stack, i) for i in range(count)]


def windows(grid, size):
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    near = lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= size // 2  # noqa: E731
    return np.array([[near(a, b) for b in cells] for a in cells])


def rebuilt(params, tokens, grid, heads, neighbourhood):
    """Tokens (cells, C) of one image."""
    params, blocked = float64(params), windows(grid, neighbourhood)
    p = np.array(
        [
            [*params["columns"][x], *params["rows"][y]]
            for y in range(grid[0])
            for x in range(grid[1])
        ]
    )

    def mlp(layer, x):
        return linear(layer["fc2"], np.maximum(linear(layer["fc1"], x), 0))

    m = linear(params["embed"], tokens)
    for one in layers(params["encoder"]):
        m = norm(one["norm1"], m + attended(one["attend"], m + p, m + p, m, blocked, heads))
        m = norm(one["norm2"], m + mlp(one, m))
    out = m
    for one in layers(params["decoder"]):
        y = one["queries"]
        y = norm(one["norm1"], y + attended(one["attend"], y + p, m + p, m, blocked, heads))
        y = norm(one["norm2"], y + attended(one["recall"], y + p, out + p, out, blocked, heads))
        out = norm(one["norm3"], y + mlp(one, y))
    return linear(params["head"], norm(params["norm"], out))


def oracle(config, state, test):
    size = (config["grid"],) * 2 if config["grid"] else (6, 5)
    levels = []
    for i, name in enumerate(config["layers"]):
        level = np.moveaxis(np.float64(test[name]), 3, 1)
        if level.shape[2:] != size:
            level = np.stack([common.upsampled(m, size) for m in level])
        scale = np.sqrt(np.float64(state["squares"][i])) if config.get("scaled", True) else 1
        levels.append(np.moveaxis(level, 1, 3) / scale)
    tokens = np.concatenate(levels, axis=3).reshape(len(levels[0]), size[0] * size[1], -1)
    found = [rebuilt(state["network"], x, size, config["heads"], 3) for x in tokens]
    maps = np.sqrt(np.sum((np.array(found) - tokens) ** 2, axis=2)).reshape(-1, *size)
    pixels = corners(maps, 16 * size[0], 16 * size[1])
    pooled = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16), (1, 2)).mean((3, 4))
    return maps, pooled.max((1, 2))
