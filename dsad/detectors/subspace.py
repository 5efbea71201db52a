"""SubspaceAD: what a linear subspace of normal tokens leaves of every token, squared.

"SubspaceAD: Training-Free Few-Shot Anomaly Detection via Subspace Modeling" (CVPR 2026): the mean
over the blocks in the upper middle of a vision transformer, one subspace of 99 % of the variance;
the image score is the mean of the highest 1 % of the tokens. The mathematics are those of ``fre``
in mode "patch", but for several blocks, one for all.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core.config import Refused, field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    DetectorConfig,
    FeatureDetector,
    pixel_maps,
    select,
    tail_mean,
)
from dsad.detectors._subspace import Moments, bucketed, leading, patch_errors

#: Side of a published map.
SIDE = 672


class Config(DetectorConfig):
    """Which blocks are averaged, and how many axes are normal.

    Attributes:
      layers: feature maps of equal shape that are averaged; empty takes the blocks in the ``span``
        of a network with ``depth`` blocks.
      depth: blocks of the network: 12 in ViT-S and ViT-B, 24 in ViT-L, 40 in ViT-g.
      span: shares of the depth, each rounded to a block: 7 and 8 of 12, 13 to 17 of 24, 22 to 28 of
        40. The same share serves networks of all sizes; the same number of blocks does not.
      variance: share of the normal tokens' variance that the axes explain, at least.
      components: unless 0, the number of axes instead.
      tail: the image score is the mean of this share of the cells, the highest, rounded down to at
        least one.
      map_rule: "cells": a score for every cell; "published": the map has 672 × 672 pixels, the size
        of the network's input, blurred by 3 × 3 of them, whose weights are almost equal (those of
        sigma 4); its cells are its pixels, 4,515 of them for a ``tail`` of 0.01.

    """

    layers: tuple[str, ...] = field((), distinct=True)
    depth: int = field(12, at_least=1)
    span: tuple[float, float] = field((0.55, 0.7), within=(0, 1), rising=True)
    variance: float = field(0.99, above=0, at_most=1)
    components: int = field(0, at_least=0)
    tail: float = field(0.01, above=0, at_most=1)
    map_rule: Literal["cells", "published"] = "cells"

    def check(self) -> None:
        if round(self.span[0] * self.depth) >= self.depth:
            raise Refused("span", f"shares of which the first ends below {self.depth}", self.span)
        if self.sigma and self.map_rule == "published":
            raise Refused("sigma", '0 with map_rule = "published", which blurs', self.sigma)


class Subspace(FeatureDetector[Config]):
    """The detector; its state is {"mean": (d,), "axes": (r, d)}, float32.

    The axes are filled up with zero rows, which change nothing, to a bucket of at least 32.
    """

    _seeded = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the feature maps it reads."""
        cfg = self.config
        first, last = (round(share * cfg.depth) for share in cfg.span)
        return cfg.layers or tuple(f"block{i}" for i in range(first, min(last, cfg.depth - 1) + 1))

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up, and for how many blocks its layers are meant."""
        blocks = 0 if self.config.layers else self.config.depth
        cells = self.config.map_rule == "cells"  # pixels lie between cells, also those outside
        return dataclasses.replace(super().traits, blocks=blocks, leaves_out=cells)

    def embed(self, features: FeatureMaps) -> jax.Array:
        """The mean (b, gh, gw, d) of the layers."""
        maps = select(features, self.layers)
        shapes = {name: m.shape[1:] for name, m in zip(self.layers, maps, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ConfigError(
                "config.detector.layers: expected maps of equal shape, whose mean is taken, found "
                f"{shapes}. Name one of them."
            )
        return sum(maps[1:], start=maps[0]) / len(maps)

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Mean and principal axes of the cells that count, in one pass in float64 on the host.

        Raises DataError without images or with NaN or infinite features.
        """
        moments = None
        for part in self._cells(source):
            rows = part.values[part.counted(part.values.shape[1:3]).reshape(part.values.shape[:3])]
            if moments is None:
                moments = Moments(rows)
            moments.add(rows)
        if moments is None:
            raise DataError(
                "detector subspace: expected at least 1 normal image, found 0. Check the train "
                "split."
            )
        space = moments.subspace(self._count)
        return {"mean": jnp.asarray(space.mean), "axes": jnp.asarray(bucketed(space.axes))}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Squared residuals: map (b, gh, gw); image (b,): mean of the highest cells inside.

        As published, the map is (b, 672, 672).
        """
        maps = patch_errors(state["mean"], state["axes"], self.embed(features))
        if self.config.map_rule == "published":
            maps = pixel_maps(maps, SIDE, 4.0, 1, "reflect")
        return Scores(map=maps, image=tail_mean(maps, self.config.tail, inside))

    def _count(self, variances: np.ndarray) -> int:
        return leading(variances, self.config.variance, self.config.components, reached=True)


build = Subspace
