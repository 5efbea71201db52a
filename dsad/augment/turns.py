"""Images turned by quarters before their views, whose turns are told apart: DistAug.

Sohn et al., "Learning and Evaluating Representations for Deep One-Class Classification", ICLR 2021.
There every image appears in its four turns; here one of them is drawn in every epoch, which has a
quarter of the images, and two turns of an image hardly ever meet in a batch.
"""

import jax
import jax.numpy as jnp

from dsad.augment._draws import integers, uniforms
from dsad.core.batch import Batch
from dsad.core.errors import DataError
from dsad.core.rng import named, sample_keys

#: Turns of an image, each a quarter further.
TURNS = 4


def turned(batch: Batch, turns: jax.Array) -> Batch:
    """The batch with image i turned to the left by ``turns[i]`` (b,) quarters, 0 to 3.

    Exact, a permutation of the canvas: the image stays in the top left corner, a quarter exchanges
    its height and width, what lies around it stays around it. Other fields in pixels, such as a
    mask, are not turned. Raises DataError for canvases that are not square.
    """
    canvases, size = batch["image"], batch["size"]
    if canvases.shape[1] != canvases.shape[2]:
        raise DataError(
            "turns: expected square canvases (b, S, S, 3), in which a quarter turn fits; found "
            f"{tuple(canvases.shape)}."
        )
    image, size = jax.vmap(_turned)(canvases, size, turns)
    return {**batch, "image": image, "size": size}


def _turned(canvas: jax.Array, size: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Canvas (S, S, 3) and size (2,) of one image."""
    odd = turn % 2 == 1
    size = jnp.where(odd, size[::-1], size)
    canvas = jnp.where(odd, jnp.swapaxes(canvas, 0, 1), canvas)
    place = jnp.arange(canvas.shape[0], dtype=jnp.int32)
    # The transposed image with its rows reversed is a quarter to the left, with its columns
    # reversed a quarter to the right; both of the image itself reversed are half a turn.
    reverse = {0: (turn == 1) | (turn == 2), 1: turn >= 2}
    for axis, reversed_ in reverse.items():
        there = reversed_ & (place < size[axis])
        order = jnp.where(there, size[axis] - 1 - place, place)
        canvas = jnp.take(canvas, order, axis=axis)
    return canvas, size


def draw_turns(batch: Batch, key: jax.Array) -> jax.Array:
    """Quarters (b,) int32, 0 to 3 equally likely, from (key, epoch[i], index[i]) alone."""
    keys = sample_keys(named(key, "turn"), batch["epoch"], batch["index"])
    return integers(uniforms(keys, "quarters", ()), 0, TURNS - 1)


def random_turns(batch: Batch, key: jax.Array) -> tuple[Batch, jax.Array]:
    """The batch turned, and by how many quarters (b,); see ``draw_turns``. Pure and jittable."""
    turns = draw_turns(batch, key)
    return turned(batch, turns), turns
