"""SPADE: the nearest normal images, then the nearest cells among theirs.

Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences" (2020). An image
is scored by its mean distance to the K nearest training images in the space of globally averaged
features; a cell by its distance to the nearest cells, at any position and of the same layer, of
these K images.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import FeatureSource, Inside, Scores
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import Cells, DetectorConfig, FeatureDetector, select
from dsad.detectors._gallery import closest, gathered, padded
from dsad.ops.images import per_image
from dsad.ops.neighbors import nearest
from dsad.ops.resize import resize_maps


class Config(DetectorConfig):
    """Which features are compared, with how many images and cells.

    Attributes:
      layers: feature maps whose cells are compared, each with its own layer; the maps are averaged
        on the grid of the first.
      pooled: the feature map whose global average finds the nearest images; empty takes the last of
        ``layers``.
      neighbours: K, the images compared with; fewer if there are fewer.
      kappa: the score of a cell is the mean distance to so many nearest cells.
      gallery_images: 0 keeps every training image, else at most that many, a uniformly random
        subset.

    """

    layers: tuple[str, ...] = field(("layer1", "layer2", "layer3"), distinct=True, filled=True)
    pooled: str = "layer4"
    neighbours: int = field(50, at_least=1)
    kappa: int = field(1, at_least=1)
    gallery_images: int = field(0, at_least=0)


class Spade(FeatureDetector[Config]):
    """The detector; its state is {"pooled": (n, d), "gallery": {layer: (n, cells, d)}}, float32.

    Where n is padded (to ``_gallery.BUCKET``) the rows of "pooled" are infinite and never among the
    nearest.
    The state takes 4 · n · Σ cells · d bytes: 1.4 MB per image for ResNet-18 and 5.6 MB for a wide
    ResNet-50 at 224 pixels, layers 1 to 3; fitting holds it twice on the host. Scoring adds,
    whatever the batch, up to three copies of K images' cells of one layer (3 · 4 · K · cells · d
    bytes) and the tiles of ``nearest``.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the feature maps it reads."""
        return tuple(dict.fromkeys((*self.config.layers, self._pooled)))

    @property
    def _pooled(self) -> str:
        return self.config.pooled or self.config.layers[-1]

    def embed(self, features: FeatureMaps) -> dict[str, Any]:
        """{"pooled": (b, d), "gallery": {layer: (b, h, w, d)}} of a batch."""
        maps = dict(zip(self.layers, select(features, self.layers), strict=True))
        return {
            "pooled": jnp.mean(maps[self._pooled], axis=(1, 2)),
            "gallery": {n: maps[n] for n in self.config.layers},
        }

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The features of the normal images, in the order of the source.

        With ``gallery_images``, each image draws a random priority from (key, sample index) and
        the lowest ones stay: memory of the subset only, and the same subset for any order or
        batching of the source. Raises DataError without images, with fewer cells than kappa, or
        with NaN or infinite features.
        """
        cfg = self.config
        state = gathered(
            self._cells(source), rng.named(key, "spade gallery"), cfg.gallery_images, _gallery
        )
        self._check_cells(state)
        state = padded(state, cfg.neighbours, cfg.gallery_images)
        return jax.tree.map(jnp.asarray, state)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): mean over the layers of the distances; image (b,): mean over K images.

        Distances are Euclidean; maps of deeper layers are brought to the first grid bilinearly.
        ``mesh`` splits the images over the devices.
        """
        grids = [(m.shape[1], m.shape[2]) for m in select(features, self.config.layers)]
        image, gaps = per_image(self._one, state, self.embed(features), mesh)
        maps = [
            resize_maps(gaps[n].reshape(-1, *grid), grids[0])
            for n, grid in zip(self.config.layers, grids, strict=True)
        ]
        return Scores(map=sum(maps[1:], start=maps[0]) / len(maps), image=image)

    def _one(self, state: Tree, image: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Image score () and the distances (cells,) of every layer, of one image."""
        squares, chosen = closest(state["pooled"], image["pooled"], self.config.neighbours)
        found = {}
        for name, maps in image["gallery"].items():
            queries = maps.reshape(-1, maps.shape[-1])
            bank = state["gallery"][name][chosen].reshape(-1, queries.shape[1])
            distances, _ = nearest(queries, bank, self.config.kappa)
            found[name] = jnp.mean(distances, axis=1)
        return jnp.mean(jnp.sqrt(squares)), found

    def _check_cells(self, state: Any) -> None:
        used = min(self.config.neighbours, len(state["pooled"]))
        for name, gallery in state["gallery"].items():
            if used * gallery.shape[1] < self.config.kappa:
                raise DataError(
                    f"detector spade: expected at least kappa = {self.config.kappa} cells of "
                    f"{name} in the {used} nearest images, found {used * gallery.shape[1]}. Lower "
                    "detector.kappa."
                )


def _gallery(cells: Cells, maps: np.ndarray) -> np.ndarray:
    """Cells (n, cells, d) of maps (n, h, w, d); in the place of one that does not count, another.

    So all images have as many, and none has a cell that does not count.
    """
    counted = cells.counted(maps.shape[1:3])
    number = np.where(counted, np.arange(counted.shape[1]), counted.argmax(axis=1)[:, None])
    flat = maps.reshape(*counted.shape, maps.shape[-1])
    return flat if counted.all() else np.take_along_axis(flat, number[..., None], axis=1)


build = Spade
