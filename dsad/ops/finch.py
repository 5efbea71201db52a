"""First-neighbour clustering: every row joins its nearest neighbour, repeated on cluster means.

FINCH, from Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor Relations".
Rows belong together if one is the other's nearest neighbour or both share one; as connected
components the shared neighbours follow from the links i to nn(i) alone. Every cluster has at least
two rows, so each level at least halves the count; four to five times fewer is usual.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import Mesh
from scipy.sparse import csgraph

from dsad.core import hosts
from dsad.core.errors import ConfigError
from dsad.ops.neighbors import bucket, nearest

#: Rows that fill up to a shared shape have this norm: unit vectors are at most 2 apart, these
#: rows at least 3 away.
FAR = 4.0


class Level(NamedTuple):
    """A partition: ``labels`` (n,) of the original rows, and the clusters' unit means (k, d)."""

    labels: np.ndarray
    means: np.ndarray


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) divided by their Euclidean norms, float32; rows of zeros stay zeros."""
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def first_neighbours(rows: np.ndarray, *, mesh: Mesh | None = None) -> np.ndarray:
    """Index (n,) of the closest other row by cosine, of n >= 2 unit rows (n, d)."""
    if len(rows) < 2:
        raise ConfigError(f"first_neighbours: expected at least 2 rows, found {len(rows)}.")
    filled = jnp.asarray(_filled(rows))
    # For unit vectors the order by Euclidean distance is the order by cosine.
    found = hosts.whole(nearest(filled, filled, 2, mesh=mesh)[1])[: len(rows)]
    own = np.arange(len(rows))
    # A row with duplicates may not be in its own list; the first is then as close as itself.
    return np.where(found[:, 0] == own, found[:, 1], found[:, 0])


def components(neighbours: np.ndarray) -> np.ndarray:
    """Cluster labels (n,) 0, 1, ... of the graph with the edges i to ``neighbours[i]``."""
    count = len(neighbours)
    edges = (np.ones(count, bool), (np.arange(count), neighbours))
    graph = scipy.sparse.coo_array(edges, shape=(count, count))
    return csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


def unit_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Normalised means (k, d) float32 of the rows (n, d) of each label; sums in float64."""
    count = int(labels.max()) + 1
    places = (np.ones(len(labels)), (labels, np.arange(len(labels))))
    sums = scipy.sparse.csr_array(places, shape=(count, len(labels))) @ rows.astype(np.float64)
    return normalised(sums)


def finch(rows: np.ndarray, *, mesh: Mesh | None = None) -> Iterator[Level]:
    """The levels of unit rows (n, d), from the finest to a single cluster.

    A mean is that of all original rows of its cluster. Deterministic, and the same partition for
    any order of rows without ties. ``mesh`` splits the search for neighbours over its devices;
    memory beyond the rows is that of ``nearest``. The first level costs 2 · n² · d operations.
    """
    means, labels = rows, np.arange(len(rows))
    while len(means) > 1:
        labels = components(first_neighbours(means, mesh=mesh))[labels]
        means = unit_means(rows, labels)
        yield Level(labels, means)


def _filled(rows: np.ndarray) -> np.ndarray:
    """Rows up to their bucket, so that few programs are compiled."""
    count, depth = rows.shape
    far = np.full((bucket(count, 64) - count, depth), FAR / np.sqrt(depth), np.float32)
    return np.concatenate([rows, far])


def prototypes(
    rows: np.ndarray, level: int, most: int = 0, *, mesh: Mesh | None = None
) -> np.ndarray:
    """Unit means (k, d) of a level: 0 is the rows themselves, 1 the finest partition.

    Unless 0, ``most`` caps k: coarser levels are taken until it holds. A level beyond the last one
    gives the last one, a single cluster.
    """
    found, at = rows, 0
    levels = finch(rows, mesh=mesh)
    while (at < level or 0 < most < len(found)) and len(found) > 1:
        found, at = next(levels).means, at + 1
    return found


def unit(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows (..., d) of unit norm, and where (...) there was a norm to divide by."""
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    some = norms != 0  # NaN is a norm: it must reach the scores
    return rows / jnp.where(some, norms, 1.0), some[..., 0]
