"""Batch statistics of a frozen network: measured anew on other images, or put back where folded.

A network's statistics are its extra, which holds nothing else: ``mean`` and ``var`` of every norm.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.tree import flatten
from dsad.core.types import Backbone, Tree
from dsad.models import registry
from dsad.models.family import Encoder
from dsad.models.norm import EPSILON, measuring


@runtime_checkable
class HasStatistics(Backbone, Protocol):
    """A backbone whose batch statistics can be measured and replaced."""

    @property
    def statistics(self) -> Tree:
        """Those of its norms; {} without batch norms."""
        ...

    def with_statistics(self, statistics: Tree) -> Self:
        """The same with other statistics."""
        ...

    def measured(self, images: jax.Array) -> Tree:
        """``statistics`` (k, c) of normalised images, as ``measured`` gives for its encoder.

        Of k parts of equal size, each normalised by itself, that the batch goes through in.
        """
        ...


def present(extra: Tree) -> Tree:
    """The statistics in what a network has beside its parameters; {} without batch norms."""
    leaves = flatten(extra)
    return extra if leaves and all(path.endswith(("/mean", "/var")) for path in leaves) else {}


def is_folded(statistics: Tree) -> bool:
    """Whether all norms went into their convolutions, see ``weights._names_resnet``.

    An untrained network, whose variances are 1, is not.
    """
    marks = {"mean": np.float32(0), "var": np.float32(1.0 - EPSILON)}
    leaves = flatten(statistics).items()
    return bool(leaves) and all(np.all(x == marks[path.rsplit("/", 1)[1]]) for path, x in leaves)


def measured(encoder: Encoder, images: jax.Array, *, applied: bool) -> Tree:
    """Mean and biased variance (c,) f32 of what comes into every norm, of one batch.

    Every norm normalises by them if ``applied``, so that they are those of training; otherwise the
    network computes what it always does.
    """
    family = registry.family_of(encoder.arch)
    network = family.network(encoder.arch, **encoder.options)
    with measuring(applied=applied):
        return family.run(network, encoder.params, encoder.extra, images, train=False)[2]


class Moments:
    """Mean and variance of the union of batches, from those of each, in float64."""

    def __init__(self) -> None:
        self._weight: float = 0
        self._sums: Tree = None

    def add(self, statistics: Tree, weight: float) -> None:
        """Of k equal parts of a batch, (k, c), or of a whole one, (c,), and how much it counts."""

        def sums(norm: Mapping[str, Any]) -> dict[str, np.ndarray]:
            mean, var = (np.atleast_2d(np.asarray(norm[n], np.float64)) for n in ("mean", "var"))
            return {"mean": weight * mean.mean(0), "var": weight * (var + mean**2).mean(0)}

        added = jax.tree.map(sums, statistics, is_leaf=_is_norm)
        self._sums = added if self._sums is None else jax.tree.map(np.add, self._sums, added)
        self._weight += weight

    def statistics(self) -> Tree:
        """(c,) f32; the variance is biased, as that of one batch."""

        def moments(norm: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            mean = norm["mean"] / self._weight
            var = np.maximum(norm["var"] / self._weight - mean**2, 0)
            return {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}

        return jax.tree.map(moments, self._sums, is_leaf=_is_norm)


def unfolded(params: Tree, extra: Tree, statistics: Tree) -> tuple[Tree, Tree]:
    """The same function with other statistics: scales and biases make up for them.

    With the statistics of normal images, ``measured`` without applying them, a folded network can
    be trained: norms that are on batch statistics then begin near what they computed before.
    """
    params, extra, statistics = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (params, present(extra), statistics)
    )
    exact = _around(params, extra, statistics)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (exact, statistics))


def _around(params: Tree, old: Tree, new: Tree) -> Tree:
    if _is_norm(old):
        factor = params["scale"] / np.sqrt(old["var"] + EPSILON)
        return {
            "scale": factor * np.sqrt(new["var"] + EPSILON),
            "bias": params["bias"] + (new["mean"] - old["mean"]) * factor,
        }
    return {n: _around(x, old[n], new[n]) if n in old else x for n, x in params.items()}


def _is_norm(node: Any) -> bool:
    return isinstance(node, Mapping) and "var" in node
