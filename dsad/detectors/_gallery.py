"""Galleries: normal images by one vector each, with their maps, of which the nearest are used."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsad.core import rng
from dsad.core.errors import DataError
from dsad.detectors._features import Cells, Subset

#: Images are padded to a multiple of this, so that categories of similar size share one program.
BUCKET = 64


def gathered(
    parts: Iterable[Cells],
    key: jax.Array,
    most: int,
    kept: Callable[[Cells, np.ndarray], np.ndarray],
    name: str = "spade",
) -> Any:
    """{"pooled": (n, d), "gallery": {layer: (n, ...)}} of all images, in their order.

    ``parts`` hold the same of batches, with maps (b, h, w, d) of which ``kept`` gives what is kept.
    With ``most`` above 0 each image draws a random priority from (key, sample index) and so many of
    the lowest stay: memory of the subset only, and the same subset for any order or batching.
    Raises DataError without images.
    """
    subset = Subset(most)
    for cells in parts:
        gallery = {n: kept(cells, maps) for n, maps in cells.values["gallery"].items()}
        places = np.stack([rng.priorities(key, cells.index), cells.index])
        subset.add({**cells.values, "gallery": gallery}, places)
    if not len(subset):
        raise DataError(
            f"detector {name}: expected at least 1 normal image, found 0. Check the train split."
        )
    return subset.found()[0]


def padded(state: Any, neighbours: int, most: int) -> Any:
    """Images up to a multiple of BUCKET, at most ``most``, infinitely far; none with n < K."""
    count = len(state["pooled"])
    if count < neighbours:
        return state  # all images are used: a padded one would be, too
    wanted = count + -count % BUCKET
    missing = max(min(wanted, most or wanted), count) - count

    def pad(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([values, np.full((missing, *values.shape[1:]), fill, values.dtype)])

    gallery = {n: pad(v, 0.0) for n, v in state["gallery"].items()}
    return {"pooled": pad(state["pooled"], np.inf), "gallery": gallery}


def closest(pooled: jax.Array, vector: jax.Array, neighbours: int) -> tuple[jax.Array, jax.Array]:
    """Squared distances (K,), ascending, and places of the nearest rows (n, d) of a vector (d,)."""
    gaps = pooled - vector[None]
    squares = jnp.sum(gaps * gaps, axis=1)
    found, chosen = lax.top_k(-squares, min(neighbours, squares.shape[0]))
    return -found, chosen
