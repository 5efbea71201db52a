"""Functions of one image over batches of images, on one device or split over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsad.core.types import Tree


def per_image(
    function: Callable[[Tree, Any], Any], state: Tree, images: Any, mesh: Mesh | None = None
) -> Any:
    """``function(state, image)`` of every image, one after the other; results stacked (b, ...).

    ``images`` is a tree of arrays (b, ...). ``mesh`` splits the images over all its devices, with
    the whole state on each; without it the batch size may be symbolic (``jax.export``).
    """

    def each(state: Tree, images: Any) -> Any:
        return lax.map(lambda image: function(state, image), images)

    if mesh is None:
        return each(state, images)
    count = jax.tree.leaves(images)[0].shape[0]
    missing = -count % mesh.size
    images = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))), images)
    split = PartitionSpec(mesh.axis_names)
    stacked = jax.shard_map(each, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)(
        state, images
    )
    return jax.tree.map(lambda x: x[:count], stacked)
