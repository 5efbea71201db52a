"""Oracle of GLASS: what the trained discriminator says, in float64, and images to train on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.recipe import OptimConfig, Recipe
from tests.contracts.detectors import common, patchcore, simplenet

# Adam would divide what rounding leaves of gradients that are none by itself.
RECIPE = Recipe(steps=40, batch_size=8, optim=OptimConfig(name="sgd", lr=0.3, momentum=0.9))
SMALL = {"hidden": 32, "noise": 0.3, "ascent": 0.05, "steps": 10, "recipe": RECIPE}
CONFIGS = [
    {**SMALL, "hypothesis": "hypersphere"},
    {**SMALL, "hypothesis": "manifold", "adaptor": False, "mining": 0.0, "steps": 5},
]
#: Pixels of the patches that a cell is of, and its channels.
CELLS = {"layer2": (4, 4, 7), "layer3": (8, 10, 4)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear maps of patches of 24 × 20 pixels, as ``ImageMaps``."""

    kernels: dict[str, jax.Array]

    def __call__(self, images, index):
        def cells(name):
            height, width, _ = CELLS[name]
            grid = (len(images), 24 // height, height, 20 // width, width, 3)
            patches = (jnp.asarray(images, jnp.float32) / 127.5 - 1).reshape(grid)
            rows = jnp.moveaxis(patches, 2, 3).reshape(*grid[:2], grid[3], -1)
            return rows @ self.kernels[name]

        return {name: cells(name) for name in CELLS}


def network():
    rng = np.random.default_rng(5)
    shapes = {name: (3 * h * w, d) for name, (h, w, d) in CELLS.items()}
    draws = {name: rng.normal(0, 1.7 * shape[0] ** -0.5, shape) for name, shape in shapes.items()}
    return Linear({name: jnp.asarray(x, jnp.float32) for name, x in draws.items()})


def maps_of(seed, count):
    """Maps of noise, which come with it."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 24, 20, 3), np.uint8)
    maps = network()(images, np.arange(count))
    return {**{n: np.array(x) for n, x in maps.items()}, "image": np.float32(images)}


def corrupted(maps):
    """A defect beyond the noise, which a training of seconds has to find."""
    for _ in range(3):
        common.corrupted(maps)
    return maps


def images_of(source):
    """The noise behind the maps of a source, in the order of its samples."""
    rows = {}
    for batch in source:
        for image, index in zip(batch.maps["image"], batch.index, strict=True):
            rows[int(index)] = np.uint8(image)
    yield np.stack([rows[i] for i in sorted(rows) if i >= 0])


def oracle(config, state, test):
    maps = 1 / (1 + np.exp(-simplenet.logits(state, patchcore.embedded(config, test))))
    return maps, maps.max(axis=(1, 2))
