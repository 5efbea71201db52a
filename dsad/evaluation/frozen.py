"""The maps that a detector is given, as a function that its training steps can call."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsad.core.types import Backbone, FeatureMaps, Tree
from dsad.evaluation.extract import normalised


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["network", "banks"],
    meta_fields=["layers", "transform", "rotations"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenMaps:
    """A network with the map wrappers behind it, see ``core.detection.ImageMaps``.

    ``transform(banks, maps, index)`` gives the maps behind the wrappers that the ``banks`` are of,
    by the place of each image in the support set. It is compared by identity: one for all the
    categories that shall share programs. Of ``rotations`` samples each are one image.
    """

    network: Backbone
    banks: tuple[Tree, ...]
    layers: tuple[str, ...]
    transform: Callable[[tuple[Tree, ...], FeatureMaps, jax.Array], FeatureMaps]
    rotations: int = 1

    def __call__(self, images: jax.Array, index: jax.Array) -> FeatureMaps:
        """The ``layers`` (b, h, w, d) f32 of images (b, H, W, 3) from 0 to 255."""
        maps = self.network(normalised(self.network, images))
        maps = {name: maps[name].astype(jnp.float32) for name in self.layers}
        return self.transform(self.banks, maps, index // self.rotations)
