"""What every detector does with the features it is given: choose layers, join them, check them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import listed
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, FeatureSource
from dsad.ops.resize import match_grid, neighbourhood_mean


class Cells(NamedTuple):
    """The valid images of one batch: ``values`` (n, ...) float32, ``index`` (n,), ``category``.

    ``values`` is one array, or a tree of arrays if that is what was computed.
    """

    values: Any
    index: np.ndarray
    category: str


def check_layers(layers: Sequence[str]) -> None:
    """Refuse an empty list of layers, and a layer twice (a flag given twice adds up)."""
    if not layers:
        raise ConfigError("detector.layers: expected at least one layer name, found none.")
    if twice := sorted({n for n in layers if layers.count(n) > 1}):
        raise ConfigError(
            f"detector.layers: expected every layer once, found {listed(twice)} more than once in "
            f"{tuple(layers)}. Is --config.detector.layers given twice?"
        )


def select(features: FeatureMaps, layers: Sequence[str]) -> list[jax.Array]:
    """The maps of ``layers``, each (b, h, w, d); a missing one lists what exists."""
    missing = [name for name in layers if name not in features]
    if missing:
        raise ConfigError(
            f"detector.layers: no feature map named {listed(missing)}; the backbone gives: "
            f"{listed(features)}."
        )
    return [features[name] for name in layers]


def joined(
    features: FeatureMaps, layers: Sequence[str], neighbourhood: int = 1, method: str = "bilinear"
) -> jax.Array:
    """Neighbourhood means of the layers, on the grid of the first, concatenated: (b, gh, gw, d)."""
    means = [neighbourhood_mean(m, neighbourhood) for m in select(features, layers)]
    grid = (means[0].shape[1], means[0].shape[2])
    return jnp.concatenate([match_grid(m, grid, method) for m in means], axis=-1)  # type: ignore[arg-type]


def cells(source: FeatureSource, embed: Callable[[FeatureMaps], Any], name: str) -> Iterator[Cells]:
    """One pass over a source: ``embed``, made by ``jax.jit``, of every batch without its padding.

    Raises DataError, naming the detector ``name``, the category and the samples, for NaN or
    infinite values.
    """
    for batch in source:
        valid = np.asarray(batch.valid, bool)
        if not valid.any():
            continue
        made = embed(dict(batch.maps))
        leaves, structure = jax.tree.flatten(made)
        leaves = [np.asarray(x, np.float32)[valid] for x in leaves]
        index = np.asarray(batch.index)[valid]
        broken = np.zeros(len(index), bool)
        for leaf in leaves:
            broken |= ~np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
        if broken.any():
            raise DataError(
                f"detector {name}: NaN or infinite features of {batch.category} samples "
                f"{index[broken].tolist()}; expected finite ones. Check the weights."
            )
        yield Cells(jax.tree.unflatten(structure, leaves), index, batch.category)


def nothing_to_train(name: str, trained: object) -> None:
    """Refuse trained parameters that a detector has no use for."""
    if trained is not None:
        raise ConfigError(f"detector {name} has nothing to train, but trained parameters came.")
