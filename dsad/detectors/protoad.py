"""ProtoAD: cosine distance of every cell to the closest prototype of the normal cells.

Huang et al., "A Prototype-Based Neural Network for Image Anomaly Detection and Localization"
(2023). Prototypes are unit means of first-neighbour clusters (``ops.finch``); with x and m_k of
unit norm the score is 1 - max_k <x, m_k> = min_k |x - m_k|² / 2, computed in the second form, which
keeps its digits where x is close to a prototype.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import FeatureSource, Inside, Scores, highest
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import DetectorConfig, FeatureDetector, Subset, joined
from dsad.ops import finch
from dsad.ops.images import per_image
from dsad.ops.neighbors import bucket, nearest


class Config(DetectorConfig):
    """Which features are clustered, and how far.

    Clustering all cells at once costs 2 · n² · d operations for n cells (hours on a CPU for 200
    images of 56 × 56 cells); ``image_levels`` and ``rows`` bound n. The level used in the
    publication is not stated.

    Attributes:
      layers: feature maps to concatenate, repeated onto the grid of the first and normalised
        together.
      neighbourhood: side of the square of cells averaged before (1 as published).
      image_levels: first cluster the cells of each image by themselves, so many levels deep; 0: not
        at all.
      rows: at most so many of what remains are clustered together, a uniformly random subset; 0:
        all.
      level: 0 keeps every row as a prototype, 1 takes the finest partition, and so on.
      prototypes: coarser levels follow until there are at most so many; 0: no cap.

    """

    layers: tuple[str, ...] = field(("layer1", "layer2", "layer3"), distinct=True, filled=True)
    neighbourhood: int = field(1, at_least=1, odd=True)
    image_levels: int = field(2, at_least=0)
    rows: int = field(0, at_least=0)
    level: int = field(1, at_least=0)
    prototypes: int = field(10_000, at_least=0)


class ProtoAd(FeatureDetector[Config]):
    """The detector; its state is {"prototypes": (K, d) float32}, of unit norm.

    The last prototype is repeated, which changes no score, up to a bucket, so that categories share
    compiled programs.
    """

    _leaves_out = True

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Cell descriptors (b, gh, gw, d) on the grid of the first layer, not yet normalised."""
        return joined(features, self.layers, self.config.neighbourhood, "nearest")

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Prototypes of the normal cells.

        The random subset depends on (key, sample index, row) only, so the prototypes are the same
        for any order or batching of the source, up to rounding and their order. Cells whose
        features are all zero have no direction and are left out. Raises DataError without cells,
        or with NaN or infinite features.
        """
        subset = Subset(self.config.rows)
        for unit, places in self._per_image(source, rng.named(key, "protoad rows")):
            subset.add(unit, places)
        rows = subset.found()[0] if len(subset) else np.zeros((0, 0), np.float32)
        if not len(rows):
            raise DataError(
                "detector protoad: expected at least 1 normal cell with features other than zero, "
                "found 0. Check the train split."
            )
        found = finch.prototypes(rows, self.config.level, self.config.prototypes, mesh=mesh)
        return {"prototypes": jnp.asarray(_bucketed(found))}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): 1 - the largest cosine to a prototype; image (b,): its maximum.

        Cells of zeros score 1. ``mesh`` splits the images over the devices. Memory beyond the
        features: that of ``nearest`` for the cells of one image.
        """
        maps = per_image(_distances, state["prototypes"], self.embed(features), mesh)
        return Scores(map=maps, image=highest(maps, inside))

    def _per_image(
        self, source: FeatureSource, key: jax.Array
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Unit rows (m, d) of one image, and their draw, sample index and number (3, m)."""
        for cells in self._cells(source):
            counted = cells.counted(cells.values.shape[1:3])
            draws = rng.priorities(key, cells.index, (counted.shape[1],))
            parts = zip(cells.values, cells.index, draws, counted, strict=True)
            for image, sample, drawn, which in parts:
                rows = finch.normalised(image.reshape(-1, image.shape[-1])[which])
                rows = rows[rows.any(axis=1)]
                rows = finch.prototypes(rows, self.config.image_levels)
                number = np.arange(len(rows))
                yield rows, np.stack([drawn[number], np.full(len(rows), sample), number])


def _distances(prototypes: jax.Array, image: jax.Array) -> jax.Array:
    """Cosine distances (gh, gw) of the cells (gh, gw, d) of an image to the closest prototype."""
    queries, some = finch.unit(image.reshape(-1, image.shape[-1]))
    gaps, _ = nearest(queries, prototypes)
    distances = jnp.where(some, 0.5 * jnp.square(gaps[:, 0]), 1.0)
    return distances.reshape(image.shape[:2])


def _bucketed(prototypes: np.ndarray) -> np.ndarray:
    """The prototypes with the last one repeated up to their bucket."""
    missing = bucket(len(prototypes), 64) - len(prototypes)
    return np.pad(prototypes, ((0, missing), (0, 0)), mode="edge")


build = ProtoAd
