"""Fewer rows of a bank, crowded places thinned first: SuperADD's rule (arXiv 2605.14808).

A greedy coreset (``ops.coreset``) keeps the farthest rows, and with them every outlier of the
training images; here a row stays with a probability that falls with its company: 1/2 for one that
is alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core import rng
from dsad.core.errors import ConfigError
from dsad.core.types import Progress
from dsad.ops.neighbors import Precision, nearest

#: At most so many rounds, and so many neighbours that are counted, a row itself among them.
ROUNDS, NEIGHBOURS = 100, 100
#: The radius of a round starts at this share of the mean distance, and grows by this factor.
SHARE, GROWTH = 0.1, 1.1


def density_rows(
    key: jax.Array,
    bank: np.ndarray,
    size: int,
    *,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> np.ndarray:
    """Which ``size`` distinct rows of ``bank`` (N, d) to keep, ascending: (size,) int64.

    Every one of 100 rounds draws an N/100th of the rows that are not kept yet, and keeps at most a
    100th of ``size`` of them (``sparse``); what is missing in the end is drawn uniformly. There are
    fewer rounds where a part would have fewer than 100 rows, which have too few neighbours, and not
    more than ``size``. All draws come from ``key``.

    A round compares its rows with each other: 2 (N/100)² d operations, 100 times. Raises
    ConfigError for a size that is none.
    """
    count = len(bank)
    if not 1 <= size <= count:
        raise ConfigError(f"density_rows: expected 1 <= size <= {count} rows, found {size}.")
    rounds = max(1, min(ROUNDS, size, count // NEIGHBOURS))
    kept = np.zeros(count, bool)
    for i in range(rounds) if size < count else ():
        own = jax.random.fold_in(rng.named(key, "density rows"), i)
        part = _drawn(rng.named(own, "part"), np.flatnonzero(~kept), count, count // rounds)
        rows = jnp.asarray(bank[part], jnp.float32)
        gaps, _ = nearest(rows, rows, min(NEIGHBOURS, len(part)), precision=precision)
        chances = jax.random.uniform(rng.named(own, "chances"), (len(part),))
        kept[part[sparse(np.asarray(gaps), np.asarray(chances), size // rounds)]] = True
        if progress:
            progress(i + 1, rounds, "rounds of subsampling")
    rest = _drawn(
        rng.named(key, "density fill"), np.flatnonzero(~kept), count, size - int(kept.sum())
    )
    kept[rest] = True
    return np.flatnonzero(kept)


def sparse(gaps: np.ndarray, chances: np.ndarray, most: int) -> np.ndarray:
    """Places, at most ``most``, of the rows that a round keeps.

    A row stays if its chance u, uniform in [0, 1), is below 1 / (1 + c), where c counts its
    neighbours, itself among them, that are closer than a radius. The radius starts at a tenth of
    the mean distance and grows by a tenth until no more than ``most`` stay. Where c has reached all
    of the neighbours and more stay nevertheless, which no radius changes, those of least u do.

    Args:
      gaps: distances (n, k), ascending, of every row to its nearest rows, itself first.
      chances: u (n,).
      most: rows to keep.

    """
    # u < 1 / (1 + c) holds for c < 1 / u - 1: up to a radius of the distance of that rank.
    with np.errstate(divide="ignore"):
        rank = np.ceil(1 / np.float64(chances) - 1)
    always = rank > gaps.shape[1]
    if always.sum() > most:
        return np.argsort(chances, kind="stable")[:most]
    place = np.where(always, 1, rank).astype(np.int64)[:, None] - 1
    reach = np.where(always, np.inf, np.take_along_axis(np.float64(gaps), place, axis=1)[:, 0])
    # Rows that are all the same have no distance, and a radius of 0 would not grow.
    radius = max(SHARE * float(gaps.mean(dtype=np.float64)), float(np.finfo(np.float32).tiny))
    while (reach >= radius).sum() > most:
        radius *= GROWTH
    return np.flatnonzero(reach >= radius)


def _drawn(key: jax.Array, rows: np.ndarray, count: int, size: int) -> np.ndarray:
    """``size`` (or all, if fewer) of ``rows``, which are below ``count``, uniformly, ascending."""
    bits = np.asarray(jax.random.bits(key, (count,), jnp.uint32))[rows]
    ranked = (bits.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    if 0 < size < len(rows):
        ranked = np.partition(ranked, size - 1)
    return np.sort((ranked[:size] & np.uint64(0xFFFFFFFF)).astype(np.int64))
