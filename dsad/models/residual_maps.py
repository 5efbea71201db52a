"""Map wrappers of ADPretrain: what a cell has that normal references have not, and projections.

See ``ops.residual`` and ``models.projector``. References are a few images of the support set; one
of them is no reference of itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import hosts, rng
from dsad.core.config import listed
from dsad.core.detection import FeatureSource
from dsad.core.errors import ConfigError, DataError
from dsad.core.types import FeatureMaps, Tree
from dsad.models.projector import project
from dsad.ops.images import per_image
from dsad.ops.residual import bank_residual, pooled

#: Reference images, as in the published tests.
REFERENCES = 8


class Projectors(NamedTuple):
    """``params`` of ``models.projector`` by layer; maps have at most ``tokens`` cells a side.

    ``description`` tells them from all others.
    """

    params: Mapping[str, Tree]
    tokens: int
    description: str


@dataclasses.dataclass(frozen=True)
class ResidualMaps:
    """Cells minus the most similar one of ``references`` normal images.

    A model of several categories has so many of each, and a cell its match in any of them.

    The bank is {"rows": {layer: (n, h, w, c)}, "owner": (n,) int32}, the number of each row's image
    in the support set; rotations of an image follow each other.
    """

    references: int

    def __post_init__(self) -> None:
        if self.references < 2:
            raise ConfigError(
                "config.backbone: residual and projected maps: expected 2 reference images or "
                f"more, found {self.references}; none is a reference of itself. Name more, or no "
                f"number for {REFERENCES}."
            )

    def adapt(self, source: FeatureSource, *, mesh: Mesh | None, key: jax.Array) -> Tree:
        """The bank; raises DataError for a support set of less than two images."""
        del mesh
        return self._bank(source, key, lambda maps: maps)

    def _bank(
        self, source: FeatureSource, key: jax.Array, made: Callable[[FeatureMaps], FeatureMaps]
    ) -> Tree:
        drawn: dict[str, dict[int, list[dict[str, np.ndarray]]]] = {}
        ranks: dict[int, int] = {}
        for batch in source:
            valid, index = np.asarray(batch.valid, bool), np.asarray(batch.index)
            maps = {n: x for n, x in batch.maps.items() if x.ndim == 4}
            maps = {n: np.asarray(hosts.whole(x), np.float32) for n, x in made(maps).items()}
            images = drawn.setdefault(batch.category, {})
            numbers = rng.priorities(key, index)
            for row in np.flatnonzero(valid):
                image = int(index[row])
                ranks[image] = int(numbers[row])
                images.setdefault(image, []).append({n: x[row] for n, x in maps.items()})
            kept = sorted(images, key=lambda i: (ranks[i], i))[: self.references]
            drawn[batch.category] = {i: images[i] for i in kept}
        rows = [(i, m) for images in drawn.values() for i in sorted(images) for m in images[i]]
        if few := [name for name, images in drawn.items() if len(images) < 2]:
            raise DataError(
                f"config.backbone: residual features of {listed(few)} need two images of the "
                "support set at least, since none is a reference of itself. Raise config.shots, or "
                "add images."
            )
        return {
            "rows": {n: jnp.asarray(np.stack([m[n] for _, m in rows])) for n in rows[0][1]},
            "owner": jnp.asarray([i for i, _ in rows], jnp.int32),
        }

    def transform(
        self, bank: Tree, maps: FeatureMaps, *, index: jax.Array, mesh: Mesh | None = None
    ) -> FeatureMaps:
        """Residual maps (b, h, w, c) f32."""
        return {name: self._residual(bank, name, x, index, mesh) for name, x in maps.items()}

    def _residual(
        self, bank: Tree, name: str, maps: jax.Array, index: jax.Array, mesh: Mesh | None
    ) -> jax.Array:
        rows, owner = bank["rows"][name], bank["owner"]

        def one(bank: Tree, image: Tree) -> jax.Array:
            rows, owner = bank
            values, number = image
            flat = rows.reshape(-1, rows.shape[-1])
            own = owner == number
            cells = flat.shape[0] // owner.shape[0]
            # Its own rows follow each other: turned to the end, where they do not count.
            behind = cells * (jnp.argmax(own) + jnp.sum(own))
            order = jnp.mod(jnp.arange(flat.shape[0]) + behind, flat.shape[0])
            valid = flat.shape[0] - cells * jnp.sum(own, dtype=jnp.int32)
            left = bank_residual(values.reshape(-1, values.shape[-1]), flat[order], valid)
            return left.reshape(values.shape)

        return per_image(one, (rows, owner), (maps.astype(jnp.float32), index), mesh)


@dataclasses.dataclass(frozen=True)
class ProjectedMaps(ResidualMaps):
    """Residual maps behind the projectors that ``read`` gives; the bank holds those as well."""

    run: str
    read: Callable[[], Projectors]

    def adapt(self, source: FeatureSource, *, mesh: Mesh | None, key: jax.Array) -> Tree:
        """The bank with "projectors"; ConfigError for maps that the run has no projector of."""
        del mesh
        projectors = self.read()
        bank = self._bank(source, key, lambda maps: self._pooled(projectors, maps))
        chosen = {name: projectors.params[name] for name in bank["rows"]}
        return {**bank, "projectors": jax.tree.map(jnp.asarray, chosen)}

    def _pooled(self, projectors: Projectors, maps: FeatureMaps) -> FeatureMaps:
        for name, x in maps.items():
            if name not in projectors.params:
                raise ConfigError(
                    f"config.detector.layers: {self.run} has no projector of {name}; it has some "
                    f"of: {listed(projectors.params)}."
                )
            width = projectors.params[name]["fc2"]["kernel"].shape[-1]
            if width != x.shape[-1]:
                raise ConfigError(
                    f"config.backbone: {self.run} has a projector for {width} channels of {name}, "
                    f"and the backbone gives {x.shape[-1]}. Name the encoder that it was trained "
                    "with."
                )
        return {name: pooled(x, projectors.tokens) for name, x in maps.items()}

    def transform(
        self, bank: Tree, maps: FeatureMaps, *, index: jax.Array, mesh: Mesh | None = None
    ) -> FeatureMaps:
        """Projected maps (b, h, w, c) f32, on the grid of the projectors."""
        projected = {}
        for name, x in maps.items():
            x = pooled(x, bank["rows"][name].shape[1:3])
            left = self._residual(bank, name, x, index, mesh)
            b, h, w, c = left.shape
            cells = project(bank["projectors"][name], left.reshape(b, h * w, c))
            projected[name] = cells.reshape(left.shape)
        return projected
