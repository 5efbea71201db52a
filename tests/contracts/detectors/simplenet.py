"""Oracle of SimpleNet: the trained adaptor and discriminator, in float64."""

import functools
import operator

import numpy as np

from dsad.core.recipe import OptimConfig, Recipe
from tests.contracts.detectors import common, patchcore

# Adam would divide what rounding leaves of gradients that are none by itself.
RECIPE = Recipe(steps=200, batch_size=8, optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9))
SMALL = {"hidden": 64, "noise": 4.0, "recipe": RECIPE}
POOLED = {"pooling": "published", "level_dim": 9, "pooled_dim": 8, "zero_borders": True}
CONFIGS = [SMALL, {**SMALL, **POOLED, "noise_unit": "absolute"}]


def maps_of(seed, count):
    """Around the origin: as far from it as in ``common``, float32 loses digits of the logits."""
    return {n: m - 8 for n, m in common.maps_of(seed, count).items()}


def logits(state, cells):
    """Of cells (b, h, w, d) before the adaptor."""
    part = lambda *path: np.float64(functools.reduce(operator.getitem, path, state))  # noqa: E731
    if "adaptor" in state:
        cells = cells @ part("adaptor", "kernel")
    hidden = cells @ part("discriminator", "conv1", "kernel")
    gap = hidden - part("statistics", "norm1", "mean")
    unit = gap / np.sqrt(part("statistics", "norm1", "var") + 1e-5)
    unit = unit * part("discriminator", "norm1", "scale") + part("discriminator", "norm1", "bias")
    kernel = part("discriminator", "conv2", "kernel")
    return (np.where(unit > 0, unit, 0.2 * unit) @ kernel)[..., 0]


def oracle(config, state, test):
    maps = -logits(state, patchcore.embedded(config, test))
    return maps, maps.max(axis=(1, 2))
