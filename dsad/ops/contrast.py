"""Contrastive losses over the global batch, and a queue of keys that may be split over devices.

Under one jit the arrays are those of the whole batch, so negatives come from all devices and
gradients reach them there. The constraints of this file only say what moves: the vectors of a
batch are brought to every device, a queue and its similarities stay where they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsad.core.errors import ConfigError
from dsad.core.mesh import BATCH_SPEC
from dsad.ops.similarity import unit

#: A queue: "keys" (K, d) f32, "labels" (K,) int32, "pointer" () int32, where the next key goes.
Queue = dict[str, Any]


def nt_xent(first: jax.Array, second: jax.Array, *, temperature: float = 0.1) -> jax.Array:
    """SimCLR's loss of two views of a batch (Chen et al. 2020).

    Each of the 2n vectors is told from the 2n − 2 others by its partner; the mean over all of them
    of −log(exp(s_partner / t) / Σ exp(s / t)), the sum over the 2n − 1 other vectors. Gradients
    flow into both sides of every similarity.

    Args:
      first: unit vectors (n, d) of one view of the global batch.
      second: of the other view, in the same order.
      temperature: t.

    """
    _check("nt_xent", first.ndim == 2 and first.shape == second.shape, first, second)
    n = first.shape[0]
    rows = placed(jnp.stack([first, second]).astype(jnp.float32), PartitionSpec(None, *BATCH_SPEC))
    columns = placed(rows, PartitionSpec())
    # Axes a, b: view; n, m: image. The views keep an axis of their own, so that rows need not move.
    alike = jnp.einsum("and,bmd->anbm", rows, columns, precision="highest") / temperature
    itself = jnp.eye(2, dtype=bool)[:, None, :, None] & jnp.eye(n, dtype=bool)[None, :, None, :]
    others = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, alike), axis=(2, 3))
    partner = jnp.sum(rows * rows[::-1], axis=-1) / temperature
    return jnp.mean(others - partner)


def info_nce(
    query: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 0.2,
    negatives: jax.Array | None = None,
    excluded: jax.Array | None = None,
    counted: jax.Array | None = None,
    split: bool = False,
) -> jax.Array:
    """Mean over the queries of −log(exp(q·k⁺ / t) / (exp(q·k⁺ / t) + Σ exp(q·k⁻ / t))).

    With ``negatives``, the rows of a queue, this is MoCo's loss (He et al. 2020) and, for the cells
    of maps, DenseCL's (Wang et al. 2021): no gradient flows into keys and negatives. Without, the
    keys of all other queries of the global batch are the negatives, and gradients flow into them.

    Args:
      query: unit vectors (n, d); the cells of maps (b, S², d) as (b · S², d).
      key: unit vectors (n, d), row i is the positive of query i.
      temperature: t.
      negatives: unit vectors (K, d), or None.
      excluded: (n, K) bool, pairs that are no negatives, such as those of one class; (n, n) without
        ``negatives``.
      counted: (n,) bool, the queries that the mean is over, such as those that have a positive;
        0 if there is none.
      split: the negatives are split over the mesh and stay so: queries are brought to every device,
        which compares all of them with its part. Otherwise every device compares its queries
        with a whole copy.

    Raises:
      ConfigError: for shapes that do not fit.

    """
    _check("info_nce", query.ndim == 2 and query.shape == key.shape, query, key)
    q, k = query.astype(jnp.float32), key.astype(jnp.float32)
    if negatives is None:
        q = placed(q, BATCH_SPEC)
        other, same = placed(k, PartitionSpec()), jnp.eye(k.shape[0], dtype=bool)
        excluded = same if excluded is None else excluded | same
    else:
        _check("info_nce", negatives.shape[1:] == q.shape[1:], query, negatives)
        k, other = jax.lax.stop_gradient((k, negatives.astype(jnp.float32)))
        q = placed(q, PartitionSpec() if split else BATCH_SPEC)
        other = placed(other, BATCH_SPEC if split else PartitionSpec())
    if excluded is not None:
        _check("info_nce", excluded.shape == (q.shape[0], other.shape[0]), excluded, other)
    positive = jnp.sum(q * k, axis=-1) / temperature
    alike = jnp.einsum("nd,kd->nk", q, other, precision="highest") / temperature
    if excluded is not None:
        alike = jnp.where(excluded, -jnp.inf, alike)
    # Not joined into rows of 1 + K first, which would break the split of the K.
    highest = jax.lax.stop_gradient(jnp.maximum(positive, jnp.max(alike, axis=1)))
    rest = jnp.sum(jnp.exp(alike - highest[:, None]), axis=1)
    losses = jnp.log(jnp.exp(positive - highest) + rest) + highest - positive
    if counted is None:
        return jnp.mean(losses)
    number = jnp.sum(counted, dtype=jnp.float32)
    return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.maximum(number, 1.0)


def make_queue(key: jax.Array, size: int, dim: int) -> Queue:
    """A queue of random unit vectors, as published; the label -1 is no class.

    For 65,536 keys and more, ``config.mesh.rules=(("keys$", "data+fsdp,-"),)`` splits it over all
    devices; whatever the split, it holds the same bits in the same order.
    """
    if size < 1 or dim < 1:
        raise ConfigError(f"queue: expected a positive size and width, found {size} and {dim}.")
    return {
        "keys": unit(jax.random.normal(key, (size, dim), jnp.float32)),
        "labels": jnp.full((size,), -1, jnp.int32),
        "pointer": jnp.zeros((), jnp.int32),
    }


def enqueue(queue: Queue, keys: jax.Array, labels: jax.Array | None = None) -> Queue:
    """The queue with the keys (n, d) of the global batch over its n oldest, in batch order.

    ``labels`` (n,): classes of the keys, for ``excluded`` of ``info_nce``. Every row of the queue
    looks up whether it is one of those that are replaced; an update of a slice that moves along a
    split axis would bring the whole queue to every device. Raises ConfigError for a batch that is
    larger than the queue.
    """
    size, n = queue["keys"].shape[0], keys.shape[0]
    if n > size:
        raise ConfigError(
            f"queue: expected at least the {n} keys of a batch, found a size of {size}; enlarge "
            "the queue or lower config.batch_size."
        )
    _check("enqueue", keys.shape[1:] == queue["keys"].shape[1:], keys, queue["keys"])
    new = placed(jax.lax.stop_gradient(keys).astype(jnp.float32), PartitionSpec())
    place = jnp.mod(jnp.arange(size, dtype=jnp.int32) - queue["pointer"], size)
    fresh, source = place < n, jnp.minimum(place, n - 1)
    marks = jnp.full((n,), -1, jnp.int32) if labels is None else labels.astype(jnp.int32)
    marks = placed(marks, PartitionSpec())
    return {
        "keys": jnp.where(fresh[:, None], new[source], queue["keys"]),
        "labels": jnp.where(fresh, marks[source], queue["labels"]),
        "pointer": jnp.mod(queue["pointer"] + n, size).astype(jnp.int32),
    }


def placed(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """X with a sharding, where the step has made its mesh known; see ``core.mesh``."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != {"data", "fsdp"}:
        return x
    split = [i for i, axes in enumerate(spec) if axes is not None]
    if any(x.shape[i] % mesh.size for i in split):
        return x  # sizes that cannot be split stay with the partitioner
    return jax.lax.with_sharding_constraint(x, spec)


def _check(name: str, fits: bool, first: jax.Array, second: jax.Array) -> None:
    if not fits:
        raise ConfigError(
            f"{name}: expected arrays (n, d) that fit each other, found {first.shape} and "
            f"{second.shape}."
        )
