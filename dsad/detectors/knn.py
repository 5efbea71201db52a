"""Nearest-neighbour detector: distance of every cell to the closest normal cell.

PatchCore's features and scores (Roth et al., "Towards Total Recall in Industrial Anomaly
Detection") with every normal row, or a random subset, as the memory instead of a coreset, and
with plain instead of squared distances.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import FeatureSource, Inside, Scores, highest
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    DetectorConfig,
    FeatureDetector,
    Subset,
    bank_state,
    joined,
    prepared_state,
)
from dsad.ops.neighbors import Precision, nearest


class Config(DetectorConfig):
    """Which features enter the bank and how distances become scores.

    Attributes:
      layers: feature maps to concatenate, on the grid of the first.
      neighbourhood: side of the square of cells averaged around each cell.
      k: the score is the mean distance to the k nearest rows.
      bank_rows: 0 keeps every row, else at most that many, a uniformly random subset.
      precision: of the search: "exact", "certified", which finds the same rows faster where the
        hardware multiplies bfloat16, or "auto" by the hardware (``ops.neighbors.nearest``).

    """

    layers: tuple[str, ...] = field(("layer2", "layer3"), distinct=True, filled=True)
    neighbourhood: int = field(3, at_least=1, odd=True)
    k: int = field(1, at_least=1)
    bank_rows: int = field(0, at_least=0)
    precision: Precision = "auto"

    def check(self) -> None:
        if 0 < self.bank_rows < self.k:
            raise Refused("bank_rows", f"0 (all rows) or at least k = {self.k}", self.bank_rows)


class Knn(FeatureDetector[Config]):
    """The detector; its state is {"bank": (M, d) float32, "rows": () int32}.

    The bank is padded to a bucket, so that categories share compiled programs; ``rows`` count.
    """

    _leaves_out = True

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Cell descriptors (b, gh, gw, d): neighbourhood means, on the grid of the first layer."""
        return joined(features, self.layers, self.config.neighbourhood)

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The bank of the normal images' rows, in the order of the source.

        With ``bank_rows``, each row draws a random priority from (key, sample index, cell) and the
        lowest ones stay: one pass, memory of twice the subset, and the same subset for any order or
        batching of the source. A ``mesh`` of several processes splits the bank over its devices;
        on the host each holds it whole while fitting. Raises DataError without rows or with NaN or
        infinite features.
        """
        return bank_state(self._bank(source, key), mesh)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): mean distance to the k nearest rows; image (b,): its maximum.

        ``mesh`` splits the search over the devices.
        """
        embedded, bank = self.embed(features), state.get("prepared", state["bank"])
        queries = embedded.reshape(-1, embedded.shape[-1])
        distances, _ = nearest(
            queries, bank, self.config.k, mesh=mesh, valid=state["rows"],
            precision=self.config.precision,
        )  # fmt: skip
        maps = jnp.mean(distances, axis=1).reshape(embedded.shape[:3])
        return Scores(map=maps, image=highest(maps, inside))

    def prepared(self, state: Tree) -> Tree:
        """The state with a bank that is searched at once."""
        return prepared_state(state, self.config.k, self.config.precision)

    def _bank(self, source: FeatureSource, key: jax.Array) -> np.ndarray:
        most, key = self.config.bank_rows, rng.named(key, "knn bank")
        rows, subset = [], Subset(most)
        for cells in self._cells(source):
            values, index = cells.values, cells.index
            counted = cells.counted(values.shape[1:3]).ravel()
            flat = values.reshape(-1, values.shape[-1])[counted]
            if not most:
                rows.append(flat)
                continue
            count = len(counted) // len(index)
            bits = rng.priorities(key, index, (count,)).ravel()
            cell = np.tile(np.arange(count), len(index))
            places = np.stack([bits, np.repeat(index, count), cell])
            subset.add(flat, places[:, counted])
        if len(subset):
            kept, (_, image, cell) = subset.found()
            rows = [kept[np.lexsort((cell, image))]]
        bank = np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)
        if len(bank) < self.config.k:
            raise DataError(
                f"detector knn: expected at least k = {self.config.k} feature rows of normal "
                f"images, found {len(bank)}. Check the train split."
            )
        return bank


build = Knn
