"""ISSTAD: a map of anomaly probabilities and a map of reconstruction errors, joined as published.

Jin et al., arXiv 2303.17354 (Engineering Applications of Artificial Intelligence 160, 2025) and its
two public codes, from 2023 and (extended) 2025. The network that makes both maps is trained as the
objective ``isstad``; give it as ``--config.backbone=run:DIR``. With p the probabilities, r the
squared errors, n the map r brought to [0, 1] by its own least and largest value, and G a Gaussian,
these are the scores under the names of the second code (the first has Pixel_Ham and Image_Ham):

    Pixel_Ham    G(p n); the first code multiplies by 255       pixel="product"
    Pixel_alpha  α G(p) + (1 - α) G(n) with α = 1/2             pixel="alpha"
    Pixel_MAX    the larger of G(p) and G(n), pixel by pixel    pixel="max"
    Image_Ham    mean of G(p) G(r); r is not brought to [0, 1]  image="product"
    Image_alpha  mean of the map Pixel_alpha                    image="alpha"
    Image_W      (1 + top(G(p)))^a (1 + top(G(r)))^b            image="weighted"

top is the mean of the ⌈q · pixels⌉ largest values. The first code smooths G(p) G(r) once more
before the mean, which a Gaussian with mirrored borders leaves as it is. As n is 1 somewhere in
every image, normal ones included, these pixel maps compare less well across images than scores do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.core.config import Refused, field, listed
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores
from dsad.core.errors import ConfigError
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import DetectorConfig, FeatureDetector, select
from dsad.ops.resize import gaussian_smooth, top_count

#: A further map of the network, shown in reports beside the two that are scored.
RECONSTRUCTION = "reconstruction"


class Config(DetectorConfig):
    """Which published scores, and their constants.

    Attributes:
      layers: the maps of probabilities and of errors, in this order.
      pixel, image: the published score of pixels and of images: a product, or "alpha", "max",
        "weighted"; see ``dsad.detectors.isstad``.
      alpha: weight of the probabilities in "alpha".
      q, a, b: share of pixels and the two exponents of "weighted".
      exponents: rows (category, q, a, b) for categories with their own.
      scale: factor on the map of "product".

    """

    layers: tuple[str, str] = field(("probability", "error"), distinct=True)
    pixel: Literal["product", "alpha", "max"] = "product"
    image: Literal["product", "alpha", "weighted"] = "product"
    alpha: float = field(0.5, within=(0, 1))
    q: float = field(0.1, above=0, at_most=1)
    a: float = field(1.0, at_least=0)
    b: float = field(1.0, at_least=0)
    exponents: tuple[tuple[str, float, float, float], ...] = ()
    scale: float = field(1.0, above=0)

    def check(self) -> None:
        names = [row[0] for row in self.exponents]
        if twice := {n for n in names if names.count(n) > 1}:
            raise Refused("exponents", "every category once", sorted(twice))
        for i, (_, q, a, b) in enumerate(self.exponents):
            if not (0 < q <= 1 and min(a, b) >= 0):
                raise Refused(f"exponents[{i}]", "q in (0, 1], a and b >= 0", self.exponents[i])

    @property
    def rows(self) -> tuple[tuple[float, float, float], ...]:
        """(q, a, b) for categories without a row of their own, then those of ``exponents``."""
        return ((self.q, self.a, self.b), *(row[1:] for row in self.exponents))


class Isstad(FeatureDetector[Config]):
    """The detector; its state is {"row": int32 ()}, which of ``config.rows`` its categories use."""

    @property
    def traits(self) -> DetectorTraits:
        """Its maps come smoothed: the Gaussian is a part of its scores."""
        return dataclasses.replace(super().traits, sigma=0.0)

    @property
    def panel_layers(self) -> tuple[str, ...]:
        """Names of the feature maps that ``panels`` reads."""
        return (*self.layers, RECONSTRUCTION)

    @property
    def panel_tops(self) -> Mapping[str, float]:
        """The values that end the colour scale of a panel; others follow what is shown."""
        return {"probability": 1.0}

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """Nothing is learnt: only the names of the categories are looked at, no image is read.

        Raises ConfigError if one detector is to serve categories with unlike exponents.
        """
        names = [row[0] for row in self.config.exponents]
        rows = [names.index(c) + 1 if c in names else 0 for c in source.categories]
        if len({self.config.rows[row] for row in rows}) > 1:
            raise ConfigError(
                "config.detector.exponents: one detector for all categories has one row of "
                f"exponents, found several for {listed(source.categories)}. Set "
                "--config.one_for_all=False, or leave exponents empty."
            )
        return {"row": jnp.asarray(rows[0] if rows else 0, jnp.int32)}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """The maps (b, h, w) and image scores (b,) that the config names.

        Raises ConfigError for a missing map and for maps that are not (b, h, w, 1) of one size.
        """
        p, r = self._read(features)
        n = to_unit_range(r)
        # Equal smoothings are computed once by the compiler.
        if self.config.pixel == "product":
            maps = self._smooth(self.config.scale * p * n)
        elif self.config.pixel == "alpha":
            maps = self._mixed(p, n)
        else:
            maps = jnp.maximum(self._smooth(p), self._smooth(n))
        if self.config.image == "product":
            image = jnp.mean(self._smooth(p) * self._smooth(r), axis=(1, 2))
        elif self.config.image == "alpha":
            image = jnp.mean(self._mixed(p, n), axis=(1, 2))
        else:
            image = self._weighted(state["row"], p, r)
        return Scores(map=maps, image=image)

    def panels(self, features: FeatureMaps) -> dict[str, jax.Array]:
        """Pictures for the report: (b, h, w, 3) pixels in [0, 1], and maps (b, h, w)."""
        p, r = self._read(features)
        pixels = select(features, (RECONSTRUCTION,))[0]
        return {"reconstruction": pixels, "error": r, "probability": p}

    def _read(self, features: FeatureMaps) -> tuple[jax.Array, jax.Array]:
        p, r = select(features, self.layers)
        if p.ndim != 4 or p.shape != r.shape or p.shape[3] != 1:
            raise ConfigError(
                "config.detector.layers: expected two maps (b, h, w, 1) of one size, found "
                f"{p.shape} and {r.shape} for {self.layers}. They come from a run of the objective "
                "isstad."
            )
        return p[..., 0], r[..., 0]

    def _smooth(self, maps: jax.Array) -> jax.Array:
        return gaussian_smooth(maps, self.config.sigma) if self.config.sigma > 0 else maps

    def _mixed(self, p: jax.Array, n: jax.Array) -> jax.Array:
        alpha = self.config.alpha
        return alpha * self._smooth(p) + (1 - alpha) * self._smooth(n)

    def _weighted(self, row: jax.Array, p: jax.Array, r: jax.Array) -> jax.Array:
        """Image_W (b,) with the exponents of a row."""
        pixels = p.shape[1] * p.shape[2]
        counts = jnp.asarray([top_count(q, pixels) for q, _, _ in self.config.rows], jnp.int32)
        powers = jnp.asarray([[a, b] for _, a, b in self.config.rows], jnp.float32)[row]
        tops = [top_mean(self._smooth(m), counts[row]) for m in (p, r)]
        return jnp.power(1 + tops[0], powers[0]) * jnp.power(1 + tops[1], powers[1])


def to_unit_range(maps: jax.Array) -> jax.Array:
    """Each map (b, h, w) shifted and scaled to [0, 1] by its own values; a constant one to 0."""
    low = jnp.min(maps, axis=(1, 2), keepdims=True)
    spread = jnp.max(maps, axis=(1, 2), keepdims=True) - low
    return jnp.where(spread > 0, (maps - low) / jnp.where(spread > 0, spread, 1), 0)


def top_mean(maps: jax.Array, count: jax.Array) -> jax.Array:
    """Mean (b,) of the ``count`` largest values of each map (b, h, w)."""
    pixels = maps.shape[1] * maps.shape[2]
    rising = jnp.sort(maps.reshape(maps.shape[0], pixels), axis=1)
    taken = jnp.arange(pixels)[None, :] >= pixels - count
    return jnp.sum(jnp.where(taken, rising, 0), axis=1) / count.astype(jnp.float32)


build = Isstad
