"""Positive pairs of cells and the dense losses on them, as DS2, PixPro and DenseCL define them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.core.config import Refused, Settings, field
from dsad.core.errors import ConfigError
from dsad.ops.contrast import info_nce
from dsad.ops.geometry import cell_distances, spatial_positives
from dsad.ops.similarity import unit

Similarity = Literal["dot", "cosine"]


class Negatives(Settings, place="negatives"):
    """InfoNCE of cells in place of DS2's loss: a query cell is told from others by its positive.

    Attributes:
      source: "off": none; "batch": the key cells of all other images of the global batch, and those
        of the own image that are far; "queue": earlier keys, of each image and view the mean of its
        cells (DenseCL).
      distance: own cells farther than this are negatives of "batch", in cell diagonals.
      temperature: of the similarities.
      queue: number of keys that are kept; a step adds two of every image.
      whole: weight of a loss that treats the mean of the last stage as one cell, with a projection
        and a queue of its own (DenseCL: 0.5); the cells have the rest.

    """

    source: Literal["off", "batch", "queue"] = "off"
    distance: float = field(1.5, at_least=0)
    temperature: float = field(0.2, above=0)
    queue: int = field(4096, at_least=1)
    whole: float = field(0.0, at_least=0, below=1)

    def check(self) -> None:
        if self.whole and self.source != "queue":
            raise Refused("whole", "0 unless source is 'queue'", self.whole)


def positive_pairs(
    query_backbone: jax.Array,
    key_backbone: jax.Array,
    query_box: jax.Array,
    key_box: jax.Array,
    *,
    threshold: float,
    top1: Literal["image", "cell", "off"],
    similarity: Similarity = "dot",
    nearest: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Union of the two criteria (b, S², S²) bool, and the spatial pairs alone.

    With ``nearest`` a query cell has at most one spatial positive, the first of the nearest cells.
    """
    b, cells, _, channels = query_backbone.shape
    shape = (b, cells**2, cells**2)
    spatial = jnp.zeros(shape, bool)
    if threshold > 0:
        spatial = spatial_positives(query_box, key_box, cells, threshold)
    if nearest:
        place = jnp.argmin(cell_distances(query_box, key_box, cells), axis=-1)
        spatial &= jnp.arange(shape[2])[None, None, :] == place[:, :, None]
    if top1 == "off":
        return spatial, spatial
    q = jax.lax.stop_gradient(query_backbone).reshape(b, -1, channels).astype(jnp.float32)
    k = jax.lax.stop_gradient(key_backbone).reshape(b, -1, channels).astype(jnp.float32)
    if similarity == "cosine":
        q, k = unit(q), unit(k)
    alike = jnp.einsum("bic,bjc->bij", q, k, precision="highest") / channels
    if top1 == "cell":
        best = jnp.argmax(alike, axis=-1)[:, :, None]
        return spatial | (jnp.arange(shape[2])[None, None, :] == best), spatial
    best = jnp.argmax(alike.reshape(b, -1), axis=-1)[:, None]
    chosen = jnp.arange(shape[1] * shape[2])[None, :] == best
    return spatial | chosen.reshape(shape), spatial


def dense_loss(
    query: jax.Array,
    key: jax.Array,
    query_backbone: jax.Array,
    key_backbone: jax.Array,
    query_box: jax.Array,
    key_box: jax.Array,
    *,
    threshold: float = 0.1,
    top1: bool | Literal["image", "cell", "off"] = True,
    similarity: Similarity = "dot",
) -> jax.Array:
    """Loss of one direction at one scale: −2 × mean similarity of the positive pairs.

    Args:
      query: unit vectors (b, S, S, c) of the online branch.
      key: unit vectors (b, S, S, c) of the teacher; no gradient flows into them.
      query_backbone: backbone maps (b, S, S, d) of the query view, for the similarity criterion.
      key_backbone: backbone maps (b, S, S, d) of the key view, from the teacher.
      query_box: crop corners (b, 4) as x0, y0, x1, y1 in [0, 1], x1 < x0 after a flip.
      key_box: likewise for the key view.
      threshold: of the spatial criterion, in cell diagonals; 0 switches it off.
      top1: True or "image" for the best pair of each image, "cell" for the best key of every
        query cell, False or "off" for the spatial criterion alone.
      similarity: of the backbone features, raw dot product or cosine.

    Returns:
      Scalar in [−2, 2], averaged over the batch; −2 is perfect agreement.

    """
    mode = {True: "image", False: "off"}.get(top1, top1)  # type: ignore[call-overload]
    _check_call(jnp.shape(query), jnp.shape(query_backbone), mode, similarity)
    boxes = (jnp.asarray(query_box), jnp.asarray(key_box))
    pairs, _ = positive_pairs(
        jnp.asarray(query_backbone), jnp.asarray(key_backbone), *boxes,
        threshold=threshold, top1=mode, similarity=similarity,
    )  # fmt: skip
    return pair_loss(jnp.asarray(query), jnp.asarray(key), pairs)


def _check_call(query: Any, maps: Any, top1: Any, similarity: Any) -> None:
    if top1 not in ("image", "cell", "off") or similarity not in ("dot", "cosine"):
        raise ConfigError(
            "dense_loss: expected top1 True, False, 'image', 'cell' or 'off' and similarity 'dot' "
            f"or 'cosine'; found {top1!r} and {similarity!r}."
        )
    if len(query) != 4 or query[1] != query[2] or query[:3] != maps[:3]:
        raise ConfigError(
            f"dense_loss: expected maps (b, S, S, c) of one S, found {query} and {maps}."
        )


def pair_loss(query: jax.Array, key: jax.Array, pairs: jax.Array) -> jax.Array:
    b, _, _, c = query.shape
    q = query.reshape(b, -1, c).astype(jnp.float32)
    k = jax.lax.stop_gradient(key).reshape(b, -1, c).astype(jnp.float32)
    # Normalised before the mean, so that images with many pairs weigh no more than others.
    alike = jnp.where(pairs, jnp.einsum("bic,bjc->bij", q, k, precision="highest"), 0.0)
    count = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    return -2.0 * jnp.mean(jnp.sum(alike, axis=(1, 2)) / (count + 1e-6))


def nce_loss(
    query: jax.Array,
    key: jax.Array,
    pairs: jax.Array,
    boxes: tuple[jax.Array, jax.Array],
    negatives: Negatives,
    queue: jax.Array | None,
) -> jax.Array:
    """Mean InfoNCE of the query cells of the global batch that have a positive; 0 without any.

    Args:
      query: unit vectors (b, S, S, c).
      key: likewise; no gradient flows into them.
      pairs: (b, S², S²) bool, at most one positive of every query cell.
      boxes: crop corners (b, 4) of the query view and of the key view.
      negatives: settings.
      queue: unit vectors (K, c), the negatives of source "queue".

    """
    b, cells, _, c = query.shape
    k = jax.lax.stop_gradient(key).reshape(b, -1, c)
    positive = jnp.take_along_axis(k, jnp.argmax(pairs, axis=-1)[:, :, None], axis=1)
    excluded, rows = None, b * cells**2
    if queue is None:
        near = ~(cell_distances(*boxes, cells) > negatives.distance) | pairs
        own = jnp.eye(b, dtype=bool)[:, None, :, None]
        excluded = (own & near[:, :, None, :]).reshape(rows, rows)
        queue = k.reshape(rows, c)
    return info_nce(
        query.reshape(rows, c), positive.reshape(rows, c), temperature=negatives.temperature,
        negatives=queue, excluded=excluded, counted=jnp.any(pairs, axis=-1).reshape(rows),
    )  # fmt: skip
