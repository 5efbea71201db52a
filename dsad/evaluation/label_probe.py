"""What labels say of a representation: a k-NN probe and a linear probe of pooled vectors.

The nearest neighbours vote as in instance discrimination (Wu et al., CVPR 2018, section 3.4, there
with k = 200, in DINO with k = 20, both with a temperature of 0.07): each with
exp(cosine / temperature) for its class. The linear probe is that of ``evaluation.linear_probe``.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core.config import Refused, Settings, field, listed
from dsad.core.errors import DataError
from dsad.core.hosts import whole
from dsad.core.types import Progress, Record, silent
from dsad.data import heldout
from dsad.evaluation import linear_probe
from dsad.evaluation.config import EvalConfig
from dsad.ops.neighbors import nearest

#: Scores of samples × classes that exist at once, at most.
SCORES = 2**22
#: Classes from which on the five best are counted as well.
FIVE = 5


class ProbeConfig(Settings, place="config.probe"):
    """Two probes of pooled vectors by their classes, which are the categories of the data.

    Normal images alone take part.

    Attributes:
      layer: the feature map whose cells are averaged, or "cls" for the class token of a vision
        transformer; empty: the deepest map.
      split: "drawn" draws train and test from the training images of each class by every one of
        config.seeds, groups of images as a whole; "data" tests on the normal test images of the
        data set.
      train_share: with split "drawn": share of the images of each class that the probes learn from.
      k: neighbours that vote; all training images where there are fewer, as the results say.
      temperature: of the votes; small: the nearest one decides, large: all count alike.
      C: strength of the linear probe: 1 / (C n) weighs its squared weights against the mean loss.
      iterations: of L-BFGS, at most.

    """

    layer: str = ""
    split: Literal["drawn", "data"] = "drawn"
    train_share: float = field(0.8, above=0, below=1)
    k: int = field(20, at_least=1)
    temperature: float = field(0.07, above=0)
    C: float = field(1.0, above=0)
    iterations: int = field(1000, at_least=1)


class EncodeConfig(Settings, place="config.evaluation"):
    """How images are encoded.

    Attributes:
      image_size: side in pixels of the square network input; 0: the backbone's own.
      batch_size: images per device step over the whole mesh; rounded up to a multiple of its
        devices.
      workers: threads that read, decode and resize.

    """

    image_size: int = field(0, at_least=0)
    batch_size: int = field(32, at_least=1)
    workers: int = field(4, at_least=1)

    @property
    def reading(self) -> EvalConfig:
        """The same as an evaluation of localization has it."""
        return EvalConfig(
            image_size=self.image_size, batch_size=self.batch_size, workers=self.workers
        )


class Split(NamedTuple):
    """Numbers of the records that the probes learn from, and of those they are tested on."""

    train: np.ndarray
    test: np.ndarray

    def sha256(self, records: Sequence[Record]) -> str:
        """Tells splits of the same images apart, whatever the order of the records."""
        names = [sorted(records[i].path for i in part) for part in self]
        return hashlib.sha256("\n\n".join("\n".join(part) for part in names).encode()).hexdigest()


def classes_of(records: Sequence[Record]) -> tuple[str, ...]:
    """The classes of normal images; DataError unless there are two, with two images each."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record.category] = counts.get(record.category, 0) + 1
    if len(counts) < 2:
        raise DataError(
            f"a probe by labels needs at least 2 classes, found {len(counts)}: {listed(counts)}. "
            "A class is a category of the data: name more with config.data.categories, or a data "
            "set with a folder for each class."
        )
    if few := [name for name, count in counts.items() if count < 2]:
        raise DataError(
            f"a probe by labels needs at least 2 normal training images of each class, found 1 of "
            f"{listed(few)}. Add images, or leave the class out with config.data.categories."
        )
    return tuple(sorted(counts))


def drawn(records: Sequence[Record], share: float, seed: int) -> Split:
    """Train and test by class, drawn by hash, so that the order of the records does not matter.

    ``share`` of each class is for the train side; a group of images is on one side, so that a class
    with large groups may have less. Raises DataError for a class whose images are all one group.
    """
    by_class: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_class.setdefault(record.category, []).append(number)
    train: list[int] = []
    test: list[int] = []
    whole_groups = []
    for name, numbers in sorted(by_class.items()):
        places = {records[i].path: i for i in numbers}
        kept, held = heldout.divided([records[i] for i in numbers], 1 - share, seed)
        if not kept:
            whole_groups.append(name)
        train += [places[r.path] for r in kept]
        test += [places[r.path] for r in held]
    if whole_groups:
        raise DataError(
            "config.probe.train_share: nothing is left to learn from of "
            f"{listed(whole_groups)}; its test images and the rest of their groups are all that "
            "there is. Raise the share, add images of other groups, or leave the class out with "
            "config.data.categories."
        )
    return Split(np.asarray(train), np.asarray(test))


class Told(NamedTuple):
    """What a probe says of test samples: the class (n,) it names, and the rank (n,) of the true.

    Rank 0 is the class it names; equal scores rank by the number of the class. A class that no
    neighbour votes for has the last rank. ``share`` (n,) is that of the named class in the votes
    or its probability.
    """

    named: np.ndarray
    rank: np.ndarray
    share: np.ndarray

    def top(self, best: int) -> float:
        """Share of the samples whose class is among the ``best`` first."""
        return float(np.mean(self.rank < best))


@functools.partial(jax.jit, static_argnames="classes")
def _voted(
    near: jax.Array, labels: jax.Array, true: jax.Array, temperature: jax.Array, classes: int
) -> tuple[jax.Array, ...]:
    """Of distances (b, k) between unit vectors and the neighbours' labels (b, k)."""
    # cosine = 1 - distance² / 2. The nearest weighs 1: no temperature overflows.
    cosine = 1.0 - 0.5 * jnp.square(near)
    weights = jnp.exp((cosine - jnp.max(cosine, axis=1, keepdims=True)) / temperature)
    rows = jnp.arange(len(near))[:, None]
    scores = jnp.zeros((len(near), classes)).at[rows, labels].add(weights)
    named, rank, best = _ranked(scores, true)
    voted = jnp.take_along_axis(scores, true[:, None], axis=1)[:, 0] > 0
    return named, jnp.where(voted, rank, classes), best / jnp.sum(scores, axis=1)


@jax.jit
def _likely(logits: jax.Array, true: jax.Array) -> tuple[jax.Array, ...]:
    return _ranked(jax.nn.softmax(logits), true)


def _ranked(scores: jax.Array, true: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best class, the rank of the true one, and the best score, of scores (b, c)."""
    right = jnp.take_along_axis(scores, true[:, None], axis=1)
    before = jnp.arange(scores.shape[1])[None, :] < true[:, None]
    rank = jnp.sum((scores > right) | ((scores == right) & before), axis=1)
    return jnp.argmax(scores, axis=1), rank, jnp.max(scores, axis=1)


def by_neighbours(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    true: np.ndarray,
    classes: int,
    *,
    k: int,
    temperature: float,
    mesh: Mesh | None = None,
) -> Told:
    """The k-NN probe of vectors (n, d) with ``labels`` (n,), tested on others with ``true`` (m,).

    Memory beyond the vectors is bounded, see ``ops.neighbors.nearest``. A vector of zeros, which
    has no direction, counts as half as alike to every other as an equal one is.
    """
    distances, indices = nearest(_unit(test), _unit(train), k, mesh=mesh)
    near, votes = whole(distances), labels[whole(indices)]
    scale = np.float32(temperature)

    def vote(rows: np.ndarray) -> tuple[jax.Array, ...]:
        return _voted(near[rows], votes[rows], true[rows], scale, classes)

    return _in_blocks(vote, len(test), classes)


def by_linear(
    fitted: linear_probe.Linear, test: np.ndarray, true: np.ndarray, classes: int
) -> Told:
    """What a linear probe says of standardised vectors (m, d) with classes ``true`` (m,)."""
    return _in_blocks(
        lambda rows: _likely(fitted.scores(test[rows]), true[rows]), len(test), classes
    )


def _in_blocks(tell: Any, count: int, classes: int) -> Told:
    """``tell`` of row numbers, block by block of one size; the last one repeats its last row."""
    size = min(max(SCORES // classes, 1), count)
    parts = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        parts.append([np.asarray(x)[: count - start] for x in tell(rows)])
    return Told(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; zeros stay zeros."""
    length = np.sqrt(np.sum(np.square(rows, dtype=np.float64), axis=1, keepdims=True))
    return (rows / np.maximum(length, np.finfo(np.float64).tiny)).astype(np.float32)


class Probed(NamedTuple):
    """Both probes of one split, and how the linear one was fitted."""

    neighbours: Told
    linear: Told
    fitted: linear_probe.Linear
    k: int
    chance: tuple[float, ...]


def probe(
    vectors: np.ndarray,
    labels: np.ndarray,
    split: Split,
    classes: int,
    config: ProbeConfig,
    *,
    mesh: Mesh,
    progress: Progress = silent,
) -> Probed:
    """Both probes of vectors (n, d) with labels (n,); ``chance`` is of ``tops(classes)``.

    That is the share which the most frequent training classes have of the test images.
    """
    train, test = vectors[split.train], vectors[split.test]
    known, true = labels[split.train].astype(np.int32), labels[split.test].astype(np.int32)
    k = min(config.k, len(train))
    told = by_neighbours(
        train, known, test, true, classes, k=k, temperature=config.temperature,
        mesh=mesh if mesh.size > 1 else None,
    )  # fmt: skip
    standard = linear_probe.Standard.of(train)
    fitted = linear_probe.fit(
        standard(train), known, classes, strength=config.C, iterations=config.iterations,
        mesh=mesh, progress=progress,
    )  # fmt: skip
    frequent = np.argsort(-np.bincount(known, minlength=classes), kind="stable")
    return Probed(
        neighbours=told, linear=by_linear(fitted, standard(test), true, classes), fitted=fitted,
        k=k, chance=tuple(float(np.mean(np.isin(true, frequent[:n]))) for n in tops(classes)),
    )  # fmt: skip


def tops(classes: int) -> tuple[int, ...]:
    """So many best classes are counted: 1, and 5 where there are as many."""
    return (1, FIVE) if classes >= FIVE else (1,)


def check_finite(vectors: np.ndarray, layer: str) -> None:
    """Raises Refused where the network gave no finite vectors (n, d)."""
    if bad := int(np.sum(~np.all(np.isfinite(vectors), axis=1))):
        raise Refused(
            "config.backbone", f"finite vectors of {layer}",
            f"{bad} of {len(vectors)} with NaN or infinity",
            "Its weights are damaged, or their training failed.",
        )  # fmt: skip
