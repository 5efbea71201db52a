"""MuSc: the test images score each other, without a training image.

Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring
of the Unlabeled Images" (ICLR 2024). Most places of most images are normal, so that a place with
nothing like it in the nearest of the other images is not.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores
from dsad.core.errors import DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import DetectorConfig, FeatureDetector, select
from dsad.ops.mutual import mutual_scores
from dsad.ops.neighbors import nearest
from dsad.ops.resize import neighbourhood_mean, resize_maps
from dsad.ops.similarity import unit

#: Of the normalisation of a map.
EPSILON = 1e-5
#: Images that are normalised and averaged at once, at most.
CHUNK = 16
#: Share of an image's length in which it is known again, see ``_prints``.
SAME = 1e-3


class Config(DetectorConfig):
    """Which features score each other, and which images lend each other their scores.

    Attributes:
      layers: feature maps, each scored by itself; the scores are averaged on the grid of the first.
      neighbourhoods: sides of the squares of cells averaged around each cell; the scores of all are
        averaged.
      share: of the other images: a cell's score is its mean distance to so many nearest ones.
      similar: which images are alike, for the image scores: by the class token ("cls") of a vision
        transformer, or, for any network, by the mean of the last of ``layers`` ("mean"). "none"
        leaves an image the highest score of its cells.
      neighbours: k's. For each, an image's score becomes the mean of those of the k images most
        like it, itself one of them, weighted by their cosines; the scores of all k are averaged.
      scaled: the image scores of a set are brought to the range from 0 to 1 (all 0 where they are
        equal), as published. Their order stays.
      raw_vectors: as published for DINO: products of vectors of any length in place of cosines, and
        weights below 0.
      subsets: the images are split at random, as evenly as can be, into so many sets that score
        their own: 1/``subsets`` of the operations, and 1/``subsets``² of the table's memory.

    """

    layers: tuple[str, ...] = field(
        ("block2", "block5", "block8", "block11"), distinct=True, filled=True
    )
    neighbourhoods: tuple[int, ...] = field(
        (1, 3, 5), at_least=1, odd=True, distinct=True, filled=True
    )
    share: float = field(0.3, above=0, at_most=1)
    similar: Literal["cls", "mean", "none"] = "cls"
    neighbours: tuple[int, ...] = field((1, 2, 3), at_least=1, distinct=True, filled=True)
    scaled: bool = False
    raw_vectors: bool = False
    subsets: int = field(1, at_least=1)
    sigma: float = field(0.0, at_least=0)


class MuSc(FeatureDetector[Config]):
    """The detector; its state is {"maps": (n, gh, gw), "images": (n,), "prints": (n, d)}, float32.

    These are the scores of the images it was fitted on, and by what ``score`` knows them again;
    others get NaN. The published image score is the maximum of the map at the network's input size,
    here that of its cells, which no interpolation exceeds.
    """

    @property
    def traits(self) -> DetectorTraits:
        """Fitted on the test images; reads the class token if that says which are alike."""
        tokens = ("cls",) if self.config.similar == "cls" else ()
        return dataclasses.replace(
            super().traits, fits_on="test", tokens=tokens, seeded=self.config.subsets > 1,
            leaves_out=self.config.similar != "mean",  # which is that of all cells
            least_images=2 * self.config.subsets,
        )  # fmt: skip

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The scores of the images, in the order of their indices.

        After a first pass over the source there is one per layer, whose maps the host holds twice
        until their tokens are on the devices, then once: 8 and 4 · n · cells · d bytes (4.2 and 2.1
        GB for 1,000 images of 1,369 cells and 384 channels). ``mutual_scores`` says what devices
        hold beside it. Raises DataError for fewer than two images in a subset, and for NaN or
        infinite features.
        """
        prints, vectors, index = self._known(source)
        count, cfg = len(index), self.config
        if count < 2 * cfg.subsets:
            raise DataError(
                f"detector musc: expected at least {2 * cfg.subsets} test images, two for each of "
                f"config.detector.subsets = {cfg.subsets}, to score each other, found {count}."
            )
        order = np.argsort(rng.priorities(rng.named(key, "musc subsets"), index), kind="stable")
        sets = [np.sort(order[i :: cfg.subsets]) for i in range(cfg.subsets)]
        total = len(cfg.layers) * len(cfg.neighbourhoods) * cfg.subsets
        maps, grid, done = 0.0, (0, 0), 0
        for name in cfg.layers:
            cells, counted = self._normalised(source, name)
            size = (cells.shape[1], cells.shape[2])
            grid = grid if any(grid) else size
            for side in cfg.neighbourhoods:
                found = np.empty(cells.shape[:3], np.float32)
                for rows in sets:

                    def told(part: int, parts: int, what: str, done: int = done) -> None:
                        progress(int(100 * (done + part / parts)), 100 * total, what)

                    kept = max(1, math.floor(round(cfg.share * (len(rows) - 1), 6)))
                    scores = mutual_scores(
                        _tokens(cells, counted, rows, side), kept, mesh=mesh, progress=told
                    )
                    found[rows] = scores.reshape(-1, *size)
                    done += 1
                maps = maps + np.asarray(resize_maps(jnp.asarray(found), grid)) / total
            del cells
        maps = np.float32(maps * cfg.subsets)
        highest = maps.max(axis=(1, 2))
        images = scaled(highest) if cfg.scaled else highest
        if vectors is not None:
            images = smoothed(images, vectors, cfg.neighbours, raw=cfg.raw_vectors)
        state = {"maps": maps, "images": np.float32(images), "prints": prints}
        return jax.tree.map(jnp.asarray, state)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """The scores that the fit found: maps (b, gh, gw) and image scores (b,).

        NaN for images that were not there.
        """
        prints = _prints(features, self.layers)
        gaps, rows = nearest(prints, state["prints"], mesh=mesh)
        length = jnp.linalg.norm(prints, axis=1)
        unknown = jnp.where(gaps[:, 0] <= SAME * length, 0.0, jnp.nan)
        maps, images = state["maps"][rows[:, 0]], state["images"][rows[:, 0]]
        return Scores(map=maps + unknown[:, None, None], image=images + unknown)

    def _known(self, source: FeatureSource) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Prints, vectors of whole images (None: not needed) and indices, ascending."""
        embed = functools.partial(_vectors, self.layers, self.config.similar)
        parts = [(c.values, c.index) for c in self._cells(source, embed)]
        if not parts:
            raise DataError("detector musc: expected at least 2 test images, found 0.")
        index = np.concatenate([i for _, i in parts])
        order = np.argsort(index, kind="stable")
        values = [[v[n] for v, _ in parts] for n in range(len(parts[0][0]))]
        prints, *vectors = (np.concatenate(v)[order] for v in values)
        return prints, vectors[0] if vectors else None, index[order]

    def _normalised(self, source: FeatureSource, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Normalised maps (n, h, w, d) of one layer by ascending index; which cells count."""
        cells, counted, index = [], [], []
        for part in self._cells(source, functools.partial(_layer, layer)):
            there = part.counted(part.values.shape[1:3]).reshape(part.values.shape[:3])
            cells.append(np.asarray(_normal(part.values, there)))
            counted.append(there)
            index.append(part.index)
        order = np.argsort(np.concatenate(index), kind="stable")
        joined = np.concatenate(cells)
        del cells
        ordered = (order == np.arange(len(order))).all()
        return joined if ordered else joined[order], np.concatenate(counted)[order]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(layers: Sequence[str], similar: str, features: FeatureMaps) -> tuple[jax.Array, ...]:
    """Prints (b, d) of images, and the vectors (b, c) that tell which are alike, if any."""
    prints = _prints(features, layers)
    if similar == "none":
        return (prints,)
    last = features["cls"] if similar == "cls" else jnp.mean(features[layers[-1]], axis=(1, 2))
    return prints, last.astype(jnp.float32)


def _prints(features: FeatureMaps, layers: Sequence[str]) -> jax.Array:
    """Vectors (b, d) by which images are known again: sums of cells with fixed random weights."""
    parts = []
    for number, maps in enumerate(select(features, layers)):
        weights = np.random.default_rng(number).standard_normal(maps.shape[1:3])
        flat = maps.reshape(maps.shape[0], -1, maps.shape[-1]).astype(jnp.float32)
        scaled = jnp.asarray(weights.reshape(1, -1, 1) / np.sqrt(weights.size), jnp.float32)
        parts.append(jnp.sum(flat * scaled, axis=1))
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _layer(name: str, features: FeatureMaps) -> jax.Array:
    return select(features, (name,))[0]


@jax.jit
def _normal(maps: jax.Array, counted: jax.Array) -> jax.Array:
    """Maps (b, h, w, d) of mean 0 and variance 1 over an image's cells that count; 0 elsewhere."""
    there = counted[..., None]
    average = functools.partial(jnp.mean, axis=(1, 2, 3), keepdims=True, where=there)
    centred = maps - average(maps)
    centred = centred - average(centred)  # what rounding left of a large mean
    deviation = jnp.sqrt(average(jnp.square(centred)) + EPSILON)
    return jnp.where(there, centred / deviation, 0.0)


def _tokens(cells: np.ndarray, counted: np.ndarray, rows: np.ndarray, side: int) -> np.ndarray:
    """Unit tokens (n, cells, d) of the images ``rows``."""
    made = np.empty((len(rows), math.prod(cells.shape[1:3]), cells.shape[3]), np.float32)
    for at in range(0, len(rows), CHUNK):
        some = rows[at : at + CHUNK]
        made[at : at + CHUNK] = _averaged(cells[some], counted[some], side)
    return made


@functools.partial(jax.jit, static_argnums=2)
def _averaged(cells: jax.Array, counted: jax.Array, side: int) -> jax.Array:
    """Unit tokens (b, cells, d) of the means of squares; beyond the border, and the image, 0s.

    In the place of a cell that does not count, another of the image: no token is nearer for it.
    """
    means = unit(neighbourhood_mean(cells, side, count_normalised=False))
    flat, there = means.reshape(len(cells), -1, cells.shape[-1]), counted.reshape(len(cells), -1)
    taken = jnp.where(there, jnp.arange(there.shape[1]), jnp.argmax(there, axis=1)[:, None])
    return jnp.take_along_axis(flat, taken[..., None], axis=1)


def scaled(scores: np.ndarray) -> np.ndarray:
    """Scores (n,) from 0 to 1, all 0 where they are equal."""
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low if high > low else 1.0)


def smoothed(
    scores: np.ndarray, vectors: np.ndarray, neighbours: Sequence[int], *, raw: bool = False
) -> np.ndarray:
    """Image scores (n,), each a mean of those of the images most like it.

    ``vectors`` (n, c) are of whole images, ``neighbours`` the k's. ``raw`` takes products of
    vectors for weights as they are, also below 0.
    """
    vectors = vectors.astype(np.float64)
    if not raw:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    weights = vectors @ vectors.T
    if not raw:
        np.fill_diagonal(weights, np.inf)  # an image is the most like itself, whatever the rounding
    order = np.argsort(-weights, axis=1, kind="stable")
    if not raw:
        weights = np.clip(weights, 0.0, 1.0)
    return np.mean(list(_means(scores, weights, order, neighbours)), axis=0)


def _means(
    scores: np.ndarray, weights: np.ndarray, order: np.ndarray, neighbours: Sequence[int]
) -> Iterator[np.ndarray]:
    for count in neighbours:
        chosen = order[:, :count]
        found = np.take_along_axis(weights, chosen, axis=1)
        yield np.sum(found * scores[chosen], axis=1) / np.sum(found, axis=1)


build = MuSc
