"""PaDiM: a Gaussian of normal features at every position (Defard et al., ICPR 2020).

Maps of several layers are brought to the first one's grid by repeating cells and concatenated; the
score of a cell is the Mahalanobis distance to the Gaussian of its position. Published settings
keep a random subset of 100 of ResNet-18's 448 channels, because a covariance per position is
large. With few images the same distance needs no d × d matrix: see ``form``.

The published image score is the maximum of the *smoothed* map; here it is the maximum of the map
before smoothing, which belongs to the evaluation and not to the detector.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core.config import Refused, field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores, highest
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import DetectorConfig, FeatureDetector, joined
from dsad.ops import gaussian
from dsad.ops.resize import resize_maps

#: Stored images are padded to a multiple of this, so that few shapes are compiled.
MULTIPLE = 32


class Config(DetectorConfig):
    """Which features are modelled, and how.

    Attributes:
      layers: maps to read, on the grid of the first.
      channels: size of the random subset of the concatenated channels, the same for all categories;
        0 keeps all.
      channel_seed: draws the ``channels``.
      ridge: added to the diagonal of the covariance.
      form: "full" keeps a d × d matrix per position, memory independent of the number of images n;
        "low_rank" keeps the n centred features, exact as well and smaller for n < d (209 images, 56
        × 56 × 448: 1.7 GB against 2.5 GB; with 100 channels 125 MB in full form); "auto" takes the
        smaller one.
      joint: one Gaussian over all layers, or False for one per layer on its own grid, whose
        distances are averaged (ADPretrain's variant, always with all channels).

    """

    layers: tuple[str, ...] = field(("layer1", "layer2", "layer3"), distinct=True, filled=True)
    channels: int = field(100, at_least=0)
    channel_seed: int = 1024
    ridge: float = field(0.01, above=0)
    form: Literal["auto", "full", "low_rank"] = "auto"
    joint: bool = True

    def check(self) -> None:
        if not self.joint and self.channels:
            all_layers = "A subset is drawn from the concatenated layers."
            raise Refused("channels", "0 (all) with joint = False", self.channels, all_layers)


class Padim(FeatureDetector[Config]):
    """The detector; its state holds one part per Gaussian grid: the joint one, or per layer.

    A part is {"mean": (gh, gw, d), "factor": (gh, gw, d, d)} in full form and {"mean", "factor":
    (gh, gw, n, d), "inner": (gh, gw, n, n)} in low-rank form.
    """

    _positions = True

    @property
    def traits(self) -> DetectorTraits:
        """A single image has no variance."""
        return dataclasses.replace(super().traits, least_images=2, seeded=False)

    def embed(self, features: FeatureMaps) -> list[jax.Array]:
        """What each Gaussian models, (b, gh, gw, d): one array if joint, else one per layer."""
        if not self.config.joint:
            return [joined(features, (name,)) for name in self.layers]
        values = joined(features, self.layers, method="nearest")
        if not self.config.channels:
            return [values]
        subset = channel_subset(values.shape[-1], self.config.channels, self.config.channel_seed)
        return [jnp.take(values, jnp.asarray(subset), axis=-1)]

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Mean and covariance (divisor n - 1) + ridge I per position, on the host in float64.

        One pass for a joint model, one per layer otherwise. Features are held until there are as
        many images as channels, then folded into the covariance; nothing depends on the order of
        the source. Raises DataError for fewer than 2 images or broken features.
        """
        # No ``key``: the channel subset is one for all categories, and nothing else is random.
        groups = 1 if self.config.joint else len(self.layers)
        made = []
        for group in range(groups):
            fold = _Fold(self.config.form)
            for values, index, *_ in self._cells(source, functools.partial(_embed, self, group)):
                fold.add(values, index)
            made.append(jax.tree.map(jnp.asarray, self._part(fold)))
        return tuple(made)

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw) of Mahalanobis distances; image (b,): its maximum."""
        maps = [
            gaussian.per_position(values, part, self._distance)
            for values, part in zip(self.embed(features), state, strict=True)
        ]
        grid = (maps[0].shape[1], maps[0].shape[2])
        same = [m if m.shape[1:] == grid else resize_maps(m, grid, True) for m in maps]
        mean = sum(same[1:], start=same[0]) / len(same)
        return Scores(map=mean, image=highest(mean, inside))

    def _distance(self, rows: jax.Array, part: Tree) -> jax.Array:
        if "inner" not in part:
            return gaussian.mahalanobis(rows, part["mean"], part["factor"])
        parts = (part["mean"], part["factor"], part["inner"])
        return gaussian.low_rank_mahalanobis(rows, *parts, self.config.ridge)

    def _part(self, fold: "_Fold") -> dict[str, np.ndarray]:
        if fold.count < 2:
            raise DataError(
                f"detector padim: expected at least 2 normal images, found {fold.count}."
            )
        height, width = fold.grid
        if self.config.form != "full" and fold.moments is None:
            parts = gaussian.low_rank(fold.rows(), self.config.ridge, MULTIPLE)
            found = dict(zip(("mean", "factor", "inner"), parts, strict=True))
        else:
            found = fold.gaussians(self.config.ridge)
        return {n: v.reshape(height, width, *v.shape[1:]) for n, v in found.items()}


class _Fold:
    """Features of images, held as they are or folded into moments once those are smaller."""

    def __init__(self, form: str):
        self.form = form
        self.count = 0
        self.grid = (0, 0)
        self.moments: gaussian.Moments | None = None
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray, index: np.ndarray) -> None:
        """Take the features (n, gh, gw, d) of the images ``index`` (n,)."""
        self.grid = (values.shape[1], values.shape[2])
        depth = values.shape[3]
        self._blocks.append((values.reshape(len(values), -1, depth), index))
        self.count += len(values)
        held = sum(len(v) for v, _ in self._blocks)
        # Sizes of the two forms; the same rule again at the end would choose the same one.
        smaller = self.form == "auto" and held * (held + depth) >= depth * depth
        if smaller or (self.form == "full" and held >= depth):
            self._fold()

    def rows(self) -> list[np.ndarray]:
        """The held features of every image, (positions, d), by ascending sample index."""
        pairs = [
            (int(i), v) for block, index in self._blocks for i, v in zip(index, block, strict=True)
        ]
        return [v for _, v in sorted(pairs, key=lambda pair: pair[0])]

    def gaussians(self, ridge: float) -> dict[str, np.ndarray]:
        """{"mean": (positions, d), "factor": (positions, d, d)} float32."""
        if self._blocks:
            self._fold()
        found = self.moments
        assert found is not None
        factor = np.empty(found.scatter.shape, np.float32)
        depth = found.mean.shape[1]
        for part, mean in gaussian.position_chunks([found.mean], 8 * depth * depth):
            chunk = gaussian.Moments(found.count, mean[0], found.scatter[part])
            factor[part] = gaussian.whitening(gaussian.covariance(chunk), ridge)
        return {"mean": found.mean.astype(np.float32), "factor": factor}

    def _fold(self) -> None:
        rows = self.rows()
        self._blocks = []
        positions, depth = rows[0].shape
        old = self.moments or gaussian.Moments(
            0, np.zeros((positions, depth)), np.zeros((positions, depth, depth))
        )
        for part, values in gaussian.position_chunks(rows, 8 * depth * depth):
            before = gaussian.Moments(old.count, old.mean[part], old.scatter[part])
            _, old.mean[part], old.scatter[part] = gaussian.merge(before, gaussian.moments(values))
        self.moments = gaussian.Moments(old.count + len(rows), old.mean, old.scatter)


@functools.cache
def channel_subset(channels: int, size: int, seed: int) -> np.ndarray:
    """Sorted random subset (size,) int32 of ``channels``, a function of its arguments alone."""
    if size > channels:
        raise ConfigError(
            f"config.detector.channels: expected at most {channels}, the channels of the layers "
            f"together, or 0 for all of them; found {size}."
        )
    with jax.ensure_compile_time_eval():
        drawn = np.asarray(jax.random.permutation(jax.random.key(seed), channels))
    return np.sort(drawn[:size]).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(detector: Padim, group: int, features: FeatureMaps) -> jax.Array:
    """Compiled once per configuration and shapes, not once per fit."""
    return detector.embed(features)[group]


build = Padim
