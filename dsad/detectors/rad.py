"""RAD: every cell against the same place, and those around it, in the most similar normal images.

"RAD" (ICML 2026, arXiv 2601.22763): images are found by the cosine of their class tokens; a cell's
score is 1 - cos to the nearest cell of the same layer within a window of theirs, averaged over the
layers. One bank may serve all classes (``config.one_for_all``).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    Cells,
    DetectorConfig,
    FeatureDetector,
    pixel_maps,
    select,
    tail_mean,
)
from dsad.detectors._gallery import closest, gathered, padded
from dsad.ops.images import per_image
from dsad.ops.resize import resize_maps
from dsad.ops.similarity import unit

#: As ``retrieval``: the class token of a vision transformer.
CLASS = "cls"
#: Shifts of an image that are compared with the bank at once.
SHIFTS = 9
#: Side of a published map.
SIDE = 256


class Config(DetectorConfig):
    """Which cells are compared, with which images and how far away.

    Attributes:
      layers: feature maps, each compared with itself; their distances are averaged on the grid of
        the first. ``norm3`` is the fourth block behind the final norm.
      retrieval: "cls", or a feature map whose mean cell finds the images of a network without.
      neighbours: images compared with; fewer if there are fewer.
      radius: of the window, in cells along rows and columns: 0 is the same place alone.
      gallery_images: 0 keeps every training image, else at most that many, a uniformly random
        subset.
      storage: of the cells in the bank; bfloat16 takes half the memory, and moves distances by
        about 1e-3.
      tail: the method's own image score is the mean of this share of the cells, the highest,
        rounded down to at least one.
      map_rule: "cells": a score for every cell; "published": the map has 256 × 256 pixels and is
        blurred by 5 × 5 of them (sigma 1) with zeros beyond its borders, which dims these; its
        cells are its pixels, 655 of them for a ``tail`` of 0.01.

    """

    layers: tuple[str, ...] = field(
        ("norm3", "norm6", "norm9", "norm11"), distinct=True, filled=True
    )
    retrieval: str = CLASS
    neighbours: int = field(150, at_least=1)
    radius: int = field(1, at_least=0)
    gallery_images: int = field(0, at_least=0)
    storage: Literal["float32", "bfloat16"] = "float32"
    sigma: float = field(1.75, at_least=0)
    image_score: Literal["method", "max", "top"] = "top"
    tail: float = field(0.01, above=0, at_most=1)
    map_rule: Literal["cells", "published"] = "cells"

    def check(self) -> None:
        if self.sigma and self.map_rule == "published":
            raise Refused("sigma", '0 with map_rule = "published", which blurs', self.sigma)


class Rad(FeatureDetector[Config]):
    """The detector; its state is {"pooled": (n, d), "gallery": {layer: (n, h, w, d)}}.

    All are of unit length; "pooled" is padded as SPADE's. The state takes 4 · n · Σ h · w · d
    bytes, half of it in bfloat16: 9.6 MB an image for four layers of a ViT-B at 448 pixels; fitting
    holds it twice on the host. Scoring adds K images' cells of one layer, and 9 shifted images.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the feature maps it reads."""
        own = self.config.retrieval
        return tuple(dict.fromkeys((*self.config.layers, *((own,) if own != CLASS else ()))))

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up, and whether it reads class tokens."""
        tokens = (CLASS,) if self.config.retrieval == CLASS else ()
        drawn = self.config.gallery_images > 0
        # A mean cell is of all cells, and published pixels lie between cells, also those outside.
        alone = bool(tokens) and self.config.map_rule == "cells"
        return dataclasses.replace(super().traits, tokens=tokens, seeded=drawn, leaves_out=alone)

    def embed(self, features: FeatureMaps) -> dict[str, Any]:
        """{"pooled": (b, d), "gallery": {layer: (b, h, w, d)}} of a batch, of unit length."""
        maps = dict(zip(self.layers, select(features, self.layers), strict=True))
        own = self.config.retrieval
        pooled = features[CLASS] if own == CLASS else jnp.mean(maps[own], axis=(1, 2))
        gallery = {n: unit(maps[n]) for n in self.config.layers}
        return {"pooled": unit(pooled), "gallery": gallery}

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The features of the normal images, in the order of the source.

        Cells that do not count are zeros, whose cosine to all is 0. ``gallery_images`` as of
        ``gathered``. Raises DataError without images, or with NaN or infinite features.
        """
        cfg = self.config

        def kept(cells: Cells, maps: np.ndarray) -> np.ndarray:
            counted = cells.counted(maps.shape[1:3]).reshape(*maps.shape[:3], 1)
            return (maps * counted).astype(jnp.dtype(cfg.storage))

        key = rng.named(key, "rad gallery")
        state = gathered(self._cells(source), key, cfg.gallery_images, kept, "rad")
        return jax.tree.map(jnp.asarray, padded(state, cfg.neighbours, cfg.gallery_images))

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): mean over the layers of 1 - cos; image (b,): mean of its highest cells.

        As published, the map is (b, 256, 256).
        Maps of other grids are brought to the first bilinearly. ``mesh`` splits the images over the
        devices.
        """
        found = per_image(self._one, state, self.embed(features), mesh)
        maps = [found[n] for n in self.config.layers]
        grid = (maps[0].shape[1], maps[0].shape[2])
        maps = [m if m.shape[1:] == grid else resize_maps(m, grid) for m in maps]
        mean = sum(maps[1:], start=maps[0]) / len(maps)
        if self.config.map_rule == "published":
            mean = pixel_maps(mean, SIDE, 1.0, 2, "constant")
        return Scores(map=mean, image=tail_mean(mean, self.config.tail, inside))

    def _one(self, state: Tree, image: Any) -> dict[str, jax.Array]:
        """1 - cos (h, w) of every layer, of one image."""
        _, chosen = closest(state["pooled"], image["pooled"], self.config.neighbours)
        return {
            name: _distances(maps, state["gallery"][name][chosen], self.config.radius)
            for name, maps in image["gallery"].items()
        }


def _distances(maps: jax.Array, bank: jax.Array, radius: int) -> jax.Array:
    """Least 1 - cos (h, w) of unit cells (h, w, d) to those of a bank (k, h, w, d) in a window.

    The image is shifted, not the bank, which is read once for several shifts. The distance comes
    from the difference to the cell that was found: next to 0 it keeps its digits.
    """
    height, width, _ = maps.shape
    reach = [range(-min(radius, n - 1), min(radius, n - 1) + 1) for n in (height, width)]
    shifts = jnp.asarray([(i, j) for i in reach[0] for j in reach[1]], jnp.int32)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]

    def one(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = jnp.roll(maps, shift, axis=(0, 1)).astype(bank.dtype)
        products = jnp.einsum(
            "hwd,khwd->khw", there, bank, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        best, image = (
            jnp.roll(of(products, axis=0), -shift, axis=(0, 1)) for of in (jnp.max, jnp.argmax)
        )
        row, column = rows + shift[0], columns + shift[1]
        exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return jnp.where(exists, best, -jnp.inf), image

    best, image = lax.map(one, shifts, batch_size=SHIFTS)
    chosen = jnp.argmax(best, axis=0)
    image = jnp.take_along_axis(image, chosen[None], axis=0)[0]
    found = bank[image, rows + shifts[chosen, 0], columns + shifts[chosen, 1]].astype(jnp.float32)
    empty = jnp.sum(jnp.square(found), axis=2) < 0.5  # a cell that does not count
    return jnp.where(empty, 1.0, jnp.sum(jnp.square(maps - found), axis=2) / 2)


build = Rad
