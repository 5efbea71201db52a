"""FeatureNorm: how long the features are, and nothing else.

The score that ADPretrain (Yao et al., NeurIPS 2025, arXiv 2511.05245) trains its projected residual
features for: √(‖e‖ + 1) - 1 of every cell, averaged over the layers. It is meant for ``residual:``
and ``projected:`` features, whose length is a deviation from normal ones. That of a backbone's own
features says about as much of a defect as a coin.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.core.config import field
from dsad.core.detection import FeatureSource, Inside, Scores, highest
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import DetectorConfig, FeatureDetector, select
from dsad.ops.residual import Radius, radius
from dsad.ops.resize import resize_maps


class Config(DetectorConfig):
    """Which features are measured.

    Attributes:
      layers: feature maps to use, on the grid of the first.
      radius: see ``ops.residual.radius``; as the projectors were trained.
      image_score: as published, the "max" of the smoothed map.

    """

    layers: tuple[str, ...] = field(("layer1", "layer2", "layer3"), distinct=True, filled=True)
    radius: Radius = "released"
    image_score: Literal["method", "max", "top"] = "max"


class FeatureNorm(FeatureDetector[Config]):
    """The detector; its state is empty."""

    _leaves_out = True

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Nothing is learnt, no image is read: what is normal, a map wrapper has to know."""
        return {}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw) on the grid of the first layer; image (b,): its maximum.

        The other layers' maps are resampled with corners aligned.
        """
        maps = [radius(values, self.config.radius) for values in select(features, self.layers)]
        grid = (maps[0].shape[1], maps[0].shape[2])
        mean = jnp.mean(jnp.stack([resize_maps(m, grid, align_corners=True) for m in maps]), axis=0)
        return Scores(map=mean, image=highest(mean, inside))


build = FeatureNorm
