"""PatchCore: distance of every cell to the closest of a coreset of normal cells.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022. The defaults follow
the paper, with 3 × 3 means concatenated over the layers and an exact greedy coreset in the full
feature space; what the published code does differently (pooling over flattened neighbourhoods,
zeros beyond the borders, a random projection, a mean-distance start, squared scores) are options.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import hosts, rng
from dsad.core.config import Refused, field
from dsad.core.detection import FeatureSource, Inside, Scores, highest, within
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import FeatureDetector, OrderedRows, bank_state, prepared_state
from dsad.detectors._patches import PatchConfig, patch_features
from dsad.ops.coreset import budget_rows, greedy_coreset, kmeans_rows, random_rows
from dsad.ops.neighbors import Precision, nearest


class Config(PatchConfig):
    """Which rows stay in the memory and how distances become scores.

    Attributes:
      bank: "coreset" (greedy k-centre), "random", "kmeans" (centres) or "all" rows.
      bank_fraction: size of the bank as a share of the rows.
      bank_rows, bank_bytes: size of the bank instead, where above 0.
      projection_dim: the coreset compares rows after a random projection to that many dimensions
        (published: 128); 0 compares the rows themselves.
      start: the coreset begins with a random row, or by the published rule of ten
        (``ops.coreset.greedy_coreset``).
      score: "distance" (paper) or "squared" (published code).
      reweighted: the image score, the largest of the map, is weighted by how unusual the nearest
        row is among its ``neighbours`` (paper, eq. 7).
      neighbours: rows that ``reweighted`` looks at.
      precision: of the search: "exact", "certified", which finds the same rows faster where the
        hardware multiplies bfloat16, or "auto" by the hardware (``ops.neighbors.nearest``).

    """

    bank: Literal["coreset", "random", "kmeans", "all"] = "coreset"
    bank_fraction: float = field(0.1, above=0, at_most=1)
    bank_rows: int = field(0, at_least=0)
    bank_bytes: int = field(0, at_least=0)
    projection_dim: int = field(0, at_least=0)
    start: Literal["random", "published"] = "random"
    score: Literal["distance", "squared"] = "distance"
    reweighted: bool = False
    neighbours: int = field(9, at_least=2)
    precision: Precision = "auto"

    def check(self) -> None:
        if self.bank_rows and self.bank_bytes:
            raise Refused("bank_bytes", "0 with detector.bank_rows above 0", self.bank_bytes)


class PatchCore(FeatureDetector[Config]):
    """The detector; its state is {"bank": (M, d) float32, "rows": () int32}.

    The bank is padded to a bucket, so that categories share compiled programs; ``rows`` count.
    """

    _leaves_out = True

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Cell descriptors (b, gh, gw, d), on the grid of the first layer."""
        return patch_features(features, self.config)

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The bank, chosen from the normal images' rows in the order of their sample indices.

        So neither the order nor the batches of the source matter; all draws come from ``key``. One
        pass gathers the rows in one host array, without a second copy if the samples come in
        ascending order. ``mesh`` splits the work of choosing, and one of several processes the bank
        as well; every process holds all rows on its host meanwhile. Raises DataError without rows,
        with fewer than the image score needs, or with NaN or infinite features.
        """
        rows = OrderedRows()
        for part in self._cells(source):
            rows.add(part.values, part)
        return bank_state(self._bank(rows.found()[0], mesh, key, progress), mesh)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): distance, or its square, to the nearest row; image (b,).

        ``mesh`` splits the search over the devices.
        """
        embedded, bank = self.embed(features), state.get("prepared", state["bank"])
        shape = embedded.shape[:3]
        queries = embedded.reshape(-1, embedded.shape[-1])
        distances, indices = nearest(
            queries, bank, mesh=mesh, valid=state["rows"], precision=self.config.precision
        )
        distances = distances.reshape(shape[0], -1)
        values = jnp.square(distances) if self.config.score == "squared" else distances
        image = highest(values.reshape(shape), inside)
        if self.config.reweighted:
            counted = distances
            if inside is not None:
                cells = within(inside, (shape[1], shape[2])).reshape(shape[0], -1)
                counted = jnp.where(cells, distances, -jnp.inf)
            worst = jnp.argmax(counted, axis=1)[:, None]
            cell = jnp.take_along_axis(
                queries.reshape(shape[0], -1, queries.shape[1]), worst[..., None], axis=1
            )[:, 0]
            row = jnp.take_along_axis(indices.reshape(shape[0], -1), worst, axis=1)[:, 0]
            image = image * _weight(cell, state, row, self.config.neighbours, mesh)
        return Scores(map=values.reshape(shape), image=image)

    def prepared(self, state: Tree) -> Tree:
        """The state with a bank that is searched at once."""
        return prepared_state(state, 1, self.config.precision)

    def _bank(
        self, rows: np.ndarray, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> np.ndarray | jax.Array:
        bank = self._chosen(rows, mesh, key, progress) if len(rows) else rows
        least = self.config.neighbours if self.config.reweighted else 1
        if len(bank) < least:
            raise DataError(
                f"detector patchcore: expected a bank of at least {least} feature rows of normal "
                f"images, found {len(bank)} of {len(rows)}. Check the train split and the bank's "
                "size."
            )
        return bank

    def _chosen(
        self, rows: np.ndarray, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> np.ndarray | jax.Array:
        cfg, key = self.config, rng.named(key, "patchcore")
        if cfg.bank == "all":
            return rows
        budget: dict[str, int | float] = {"fraction": cfg.bank_fraction}
        if cfg.bank_rows or cfg.bank_bytes:
            budget = {"count": cfg.bank_rows} if cfg.bank_rows else {"bytes": cfg.bank_bytes}
        size = budget_rows(*rows.shape, **budget)  # type: ignore[arg-type]
        if cfg.bank == "kmeans":
            return kmeans_rows(key, rows, size, mesh=mesh, progress=progress)
        if cfg.bank == "random":
            return rows[np.asarray(random_rows(key, len(rows), size))]
        start = "published"
        if cfg.start == "random":
            start = int(jax.random.randint(rng.named(key, "start"), (), 0, len(rows)))
        picks = greedy_coreset(
            rows, size, start=start, projection_dim=cfg.projection_dim or None, key=key,
            mesh=mesh, progress=progress,
        )  # fmt: skip
        return rows[np.asarray(picks)]


def _weight(
    cell: jax.Array, state: Tree, row: jax.Array, neighbours: int, mesh: Mesh | None = None
) -> jax.Array:
    """Eq. 7's factor (b,) for worst cells (b, d) with nearest bank rows ``row`` (b,).

    1 - exp(‖m_t - m*‖) / Σ exp(‖m_t - m‖) over the ``neighbours`` rows m nearest to m*, with m*.
    """
    bank = state["bank"]
    split = mesh if hosts.spans(mesh) else None  # as the bank lies
    _, around = nearest(bank[row], bank, neighbours, mesh=split, valid=state["rows"])
    gaps = jnp.sqrt(jnp.sum(jnp.square(cell[:, None] - bank[around]), axis=2))
    own = jnp.sqrt(jnp.sum(jnp.square(cell - bank[row]), axis=1))
    return 1.0 - 1.0 / jnp.sum(jnp.exp(gaps - own[:, None]), axis=1)


build = PatchCore
