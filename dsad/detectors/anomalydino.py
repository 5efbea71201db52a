"""AnomalyDINO: cosine distance of every token to the nearest token of a few normal images.

Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2" (WACV
2025): tokens behind the final norm, of unit length; d = 1 - cos to the nearest row, the image score
is the mean of the highest 1 % of its cells. On request what the first principal component of an
image's own tokens tells from its background alone counts. Without any normal image each test image
is compared with all others.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores, within
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    Cells,
    DetectorConfig,
    FeatureDetector,
    bank_state,
    check_rows,
    joined,
    normal_rows,
    prepared_state,
    searched,
    tail_mean,
)
from dsad.ops.images import per_image
from dsad.ops.neighbors import Precision, nearest, prepare, without
from dsad.ops.similarity import unit

#: As one of ``masked``: every category.
EVERY = "*"
#: Mean 1 - cos between tokens in one place below which two inputs are one image: with bfloat16
#: features 1e-5; other images of aligned objects differ by 0.05 and more.
SAME = 1e-4


class Config(DetectorConfig):
    """Which tokens enter the bank, what counts as the object, and how distances become scores.

    Attributes:
      layers: feature maps to concatenate, on the grid of the first; ``norm11`` is the last block of
        ViT-S and ViT-B behind the final norm, ``norm23`` that of ViT-L. Those of other networks
        serve as well.
      neighbourhood: side of the square of cells averaged around each cell.
      fits_on: "normals", or without them "test": each test image against all tokens of the others.
      k: with "normals" the score is the mean distance to the k nearest rows.
      nearest_share: with "test" it is the mean of the ⌈share · M⌉ smallest of the M distances.
      tail: the image score is the mean of this share of the cells, the highest, rounded down to at
        least one.
      masked: categories whose test images count on the object alone, "*" for all; of other cells
        the distance is 0.
      threshold: of the first principal component on the object, in units of the features; 10 is
        for DINOv2 behind the final norm.
      mask_rule: "grid": the sign of the component by centre against border, dilation and closing
        among neighbours, and an image without a cell above the threshold counts as a whole;
        "published": the other sign where 35 % of the centre or less are object, neighbours in
        raster order, so that rows leak into each other, and nothing of such an image counts.
      bank_rows: 0 keeps every row, else at most that many, a uniformly random subset.
      precision: of the search, see ``knn``.

    """

    layers: tuple[str, ...] = field(("norm11",), distinct=True, filled=True)
    neighbourhood: int = field(1, at_least=1, odd=True)
    fits_on: Literal["normals", "test"] = "normals"
    k: int = field(1, at_least=1)
    nearest_share: float = field(0.001, above=0, at_most=1)
    tail: float = field(0.01, above=0, at_most=1)
    masked: tuple[str, ...] = field((), distinct=True)
    threshold: float = 10.0
    mask_rule: Literal["grid", "published"] = "grid"
    bank_rows: int = field(0, at_least=0)
    precision: Precision = "auto"

    def check(self) -> None:
        if 0 < self.bank_rows < self.k:
            raise Refused("bank_rows", f"0 (all rows) or at least k = {self.k}", self.bank_rows)
        if self.bank_rows and self.fits_on == "test":
            raise Refused("bank_rows", "0 with fits_on = 'test'", self.bank_rows)


class AnomalyDino(FeatureDetector[Config]):
    """The detector; "masked" () bool of its state says whether its images are.

    Fitted on normal images the state is that of ``knn`` beside it: {"bank": (M, d), "rows": ()},
    rows of unit length. Fitted on test images: "tokens" (n · T, d), "counted" (n, T) bool, "image"
    (n,) int32, inputs of one image having one number, and "smallest" (images + 1,) int32, how many
    distances are averaged for each image and for others: 4 · n · T · d bytes, as much again while
    a batch is scored, whatever its size.
    """

    _leaves_out = True

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up, and what it is fitted on."""
        cfg = self.config
        return dataclasses.replace(
            super().traits, fits_on=cfg.fits_on, seeded=cfg.bank_rows > 0,
            least_images=2 if cfg.fits_on == "test" else 1,
        )  # fmt: skip

    def embed(self, features: FeatureMaps) -> jax.Array:
        """Tokens (b, gh, gw, d) of unit length."""
        return unit(self._raw(features))

    def _raw(self, features: FeatureMaps) -> jax.Array:
        return joined(features, self.layers, self.config.neighbourhood)

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The tokens of the images, in the order of the source; ``bank_rows`` as of ``knn``.

        Raises DataError without rows, with a single test image, or with NaN or infinite features;
        ConfigError if some of the categories of one fit are masked and others not.
        """
        cfg, names = self.config, source.categories
        masked = [name for name in names if EVERY in cfg.masked or name in cfg.masked]
        if masked and len(masked) < len(names):
            raise ConfigError(
                "config.detector.masked: one fit has masked categories and others; expected all of "
                f"them ('{EVERY}') or none, found {masked} of {list(names)}."
            )
        if cfg.fits_on == "test":
            state = _tokens(list(self._cells(source)), cfg.nearest_share)
        else:
            key = rng.named(key, "anomalydino bank")
            bank = normal_rows(self._cells(source), key, cfg.bank_rows)
            check_rows("anomalydino", bank, cfg.k)
            state = bank_state(bank, mesh)
        return {**state, "masked": jnp.asarray(bool(masked))}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): 1 - cos, 0 to 2; image (b,): mean of the highest cells inside.

        For a state of test images the one that an image itself is among them has no part in its
        scores. ``mesh`` splits the search over the devices.
        """
        cfg, raw = self.config, self._raw(features)
        tokens = unit(raw)
        if cfg.fits_on == "test":
            maps = per_image(self._mutual, self.prepared(state), tokens, mesh)
        else:
            found = searched(state, tokens, cfg.k, mesh, cfg.precision)
            maps = jnp.mean(jnp.square(found), axis=3) / 2  # of unit vectors: 1 - cos
        if cfg.masked:
            grid = (raw.shape[1], raw.shape[2])
            counted = jnp.ones_like(raw[..., 0], bool) if inside is None else within(inside, grid)
            of = functools.partial(foreground, threshold=cfg.threshold, rule=cfg.mask_rule)
            kept = per_image(lambda _, x: of(*x), (), (raw, counted), mesh)
            maps = jnp.where(state["masked"] & ~kept, 0.0, maps)
        return Scores(map=maps, image=tail_mean(maps, cfg.tail, inside))

    def prepared(self, state: Tree) -> Tree:
        """The state with a bank that is searched at once."""
        if "prepared" in state:
            return state
        if self.config.fits_on == "test":
            most = _smallest(self.config.nearest_share, len(state["tokens"]))
            ready = prepare(state["tokens"], most, precision=self.config.precision)
            return {**state, "prepared": ready}
        return prepared_state(state, self.config.k, self.config.precision)

    def _mutual(self, state: Tree, tokens: jax.Array) -> jax.Array:
        """The map (gh, gw) of one image, by the tokens of the others."""
        queries, bank = tokens.reshape(-1, tokens.shape[-1]), state["prepared"]
        # As vectors: a product over two axes would copy all tokens first.
        images = state["tokens"].reshape(len(state["image"]), queries.size)
        alike = jnp.dot(images, queries.ravel(), precision=lax.Precision.HIGHEST) / len(queries)
        itself = jnp.where(jnp.max(alike) > 1 - SAME, state["image"][jnp.argmax(alike)], -1)
        others = (state["counted"] & (state["image"] != itself)[:, None]).ravel()
        most, count = _smallest(self.config.nearest_share, len(others)), state["smallest"][itself]
        rest = without(bank, others)
        found, _ = nearest(queries, rest, most, precision=self.config.precision)
        chosen = jnp.arange(most)[None] < count
        total = jnp.sum(jnp.where(chosen, jnp.square(found) / 2, 0.0), axis=1)
        return (total / count.astype(jnp.float32)).reshape(tokens.shape[:2])


def _smallest(share: float, rows: int) -> int:
    return max(1, int(np.ceil(round(share * rows, 6))))


def _tokens(parts: list[Cells], share: float) -> dict[str, Any]:
    """The state of test images, each with a number by category and sample."""
    names = [(part.category, int(i)) for part in parts for i in part.index]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(number) < 2:
        raise DataError(
            f"detector anomalydino: expected at least 2 test images, found {len(number)}; they "
            "score each other. Check the test split."
        )
    tokens = np.concatenate([part.values for part in parts])
    counted = np.concatenate([part.counted(part.values.shape[1:3]) for part in parts])
    image = np.array([number[name] for name in names], np.int32)
    own = np.bincount(image, weights=counted.sum(axis=1)).astype(int)
    smallest = [_smallest(share, own.sum() - n) for n in (*own, 0)]
    return {
        "tokens": jnp.asarray(tokens.reshape(-1, tokens.shape[3])),
        "counted": jnp.asarray(counted),
        "image": jnp.asarray(image),
        "smallest": jnp.asarray(smallest, jnp.int32),
    }


def foreground(
    tokens: jax.Array, counted: jax.Array, *, threshold: float, rule: Literal["grid", "published"]
) -> jax.Array:
    """Where (gh, gw) tokens (gh, gw, d) show the object, by their first principal component.

    Cells that are not ``counted`` (gh, gw) have no part in the component. The object is in the
    middle: rows and columns from a fifth to four fifths.
    """
    (height, width), depth = tokens.shape[:2], tokens.shape[2]
    weight = counted.reshape(-1, 1).astype(jnp.float32)
    rows = tokens.reshape(-1, depth)
    mean = jnp.sum(weight * rows, axis=0, keepdims=True) / jnp.maximum(jnp.sum(weight), 1.0)
    values = _component((rows - mean) * weight).reshape(height, width)
    centre = np.zeros((height, width), bool)
    centre[_middle(height), _middle(width)] = True
    inner, outer = counted & centre, counted & ~centre
    if rule == "grid":
        positive = _mean(values, inner) >= _mean(values, outer)
        mask = jnp.where(positive, values, -values) > threshold
        # Where nothing is told from the background, all may be the object; none would be no score.
        return closed(dilated(mask)) | ~jnp.any(mask)
    mask = values > threshold
    mask = jnp.where(_mean(mask, centre) <= 0.35, -values > threshold, mask)
    return closed(dilated(mask.reshape(-1, 1))).reshape(height, width)


def _component(rows: jax.Array) -> jax.Array:
    """Coordinates (n,) of centred rows (n, d) on the axis of most variance.

    Of both signs it takes the one with the axis' largest entry above zero.
    """
    high = lax.Precision.HIGHEST
    count, depth = rows.shape
    smaller = "nd,ne->de" if depth <= count else "nd,md->nm"
    _, vectors = jnp.linalg.eigh(jnp.einsum(smaller, rows, rows, precision=high))
    axis = vectors[:, -1]
    if depth > count:
        axis = unit(jnp.einsum("n,nd->d", axis, rows, precision=high))
    axis = axis * jnp.where(axis[jnp.argmax(jnp.abs(axis))] < 0, -1.0, 1.0)
    return jnp.einsum("nd,d->n", rows, axis, precision=high)


def _middle(length: int) -> slice:
    start = int(0.2 * length)
    return slice(start, max(int(0.8 * length), start + 1))


def _mean(values: jax.Array, where: Any) -> jax.Array:
    total = jnp.sum(jnp.where(where, values, 0).astype(jnp.float32))
    return total / jnp.maximum(jnp.sum(jnp.asarray(where, jnp.float32)), 1.0)


def dilated(mask: jax.Array) -> jax.Array:
    """A mask (h, w) and the cells around it, 3 × 3."""
    return lax.reduce_window(mask, False, lax.bitwise_or, (3, 3), (1, 1), "SAME")


def closed(mask: jax.Array) -> jax.Array:
    """A mask (h, w) dilated and eroded by 3 × 3; what lies beyond the border erodes nothing."""
    return ~dilated(~dilated(mask))


build = AnomalyDino
