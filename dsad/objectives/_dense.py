"""Positive pairs of cells and the dense loss on them, as DS2 and PixPro define them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.core.errors import ConfigError
from dsad.ops.geometry import spatial_positives
from dsad.ops.similarity import unit

Similarity = Literal["dot", "cosine"]


def positive_pairs(
    query_backbone: jax.Array,
    key_backbone: jax.Array,
    query_box: jax.Array,
    key_box: jax.Array,
    *,
    threshold: float,
    top1: Literal["image", "cell", "off"],
    similarity: Similarity = "dot",
) -> tuple[jax.Array, jax.Array]:
    """Union of the two criteria (b, S², S²) bool, and the spatial pairs alone."""
    b, cells, _, channels = query_backbone.shape
    shape = (b, cells**2, cells**2)
    spatial = jnp.zeros(shape, bool)
    if threshold > 0:
        spatial = spatial_positives(query_box, key_box, cells, threshold)
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
