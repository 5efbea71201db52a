"""Nearest-neighbour detector: distance of every cell to the closest normal cell.

PatchCore's features and scores (Roth et al., "Towards Total Recall in Industrial Anomaly
Detection") with every normal row, or a random subset, as the memory instead of a coreset, and
with plain instead of squared distances.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import FeatureSource, Inside, Scores, highest
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    DetectorConfig,
    FeatureDetector,
    bank_state,
    check_rows,
    joined,
    normal_rows,
    prepared_state,
    searched,
)
from dsad.ops.neighbors import Precision


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

        ``bank_rows`` as of ``normal_rows``. A ``mesh`` of several processes splits the bank over
        its devices; on the host each holds it whole while fitting. Raises DataError without rows or
        with NaN or infinite features.
        """
        cfg, key = self.config, rng.named(key, "knn bank")
        bank = normal_rows(self._cells(source), key, cfg.bank_rows)
        check_rows("knn", bank, cfg.k)
        return bank_state(bank, mesh)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): mean distance to the k nearest rows; image (b,): its maximum.

        ``mesh`` splits the search over the devices.
        """
        cfg = self.config
        found = searched(state, self.embed(features), cfg.k, mesh, cfg.precision)
        maps = jnp.mean(found, axis=3)
        return Scores(map=maps, image=highest(maps, inside))

    def prepared(self, state: Tree) -> Tree:
        """The state with a bank that is searched at once."""
        return prepared_state(state, self.config.k, self.config.precision)


build = Knn
