"""SuperADD: every cell of several blocks against a thinned bank of normal cells of its block.

"SuperADD" (winner of VAND 4.0, arXiv 2605.14808): the distance to the nearest row of a block's
bank, averaged over four blocks of a vision transformer whose features are not normalised. Later
blocks have longer features, and would decide alone: here each block's distances are in units of
what is usual between normal images.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import DetectorTraits, FeatureSource, Inside, Scores, highest
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.detectors._features import (
    DetectorConfig,
    FeatureDetector,
    OrderedRows,
    bank_state,
    check_rows,
    prepared_state,
    searched,
    select,
)
from dsad.ops.neighbors import Precision, nearest
from dsad.ops.resize import resize_maps
from dsad.ops.subsample import density_rows

#: Of every so many images one is held out to find what distances are usual.
EIGHTH = 8
#: Rows of them that are looked at.
SAMPLE = 4096


class Config(DetectorConfig):
    """Which blocks are compared, with how many rows each, and in which unit.

    Attributes:
      layers: feature maps, each compared with itself; their distances are averaged on the grid of
        the first. Empty takes the blocks at a quarter, a half, three quarters and the end of a
        network with ``depth`` blocks.
      depth: blocks of the network: 12 in ViT-S and ViT-B, 24 in ViT-L, 32 in ViT-H.
      bank_rows: rows that each bank keeps, at most, as of ``ops.subsample.density_rows``; 0 keeps
        all.
      unit: of the distances of a block: "usual", the median distance of rows of every eighth
        normal image to those of the others, so that blocks count alike, or "channels", the number
        of channels, as published.
      precision: of the search: "exact", "certified", which finds the same rows faster where the
        hardware multiplies bfloat16, or "auto" by the hardware (``ops.neighbors.nearest``).

    """

    layers: tuple[str, ...] = field((), distinct=True)
    depth: int = field(12, at_least=4)
    bank_rows: int = field(100_000, at_least=0)
    unit: Literal["usual", "channels"] = "usual"
    precision: Precision = "auto"
    sigma: float = field(0.0, at_least=0)


class SuperAdd(FeatureDetector[Config]):
    """The detector; its state is {layer: {"bank": (M, d), "rows": () int32, "unit": ()}}.

    Banks are padded to a bucket, so that categories share compiled programs; ``rows`` count. They
    take 4 · M · d bytes for each layer, 2.05 GB for four of 100,000 rows of a ViT-H+. Fitting holds
    every row of all layers on the host before.
    """

    _leaves_out = True

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the feature maps it reads."""
        cfg = self.config
        return cfg.layers or tuple(f"block{round(cfg.depth * i / 4) - 1}" for i in range(1, 5))

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up, and for how many blocks its layers are meant."""
        blocks = 0 if self.config.layers else self.config.depth
        return dataclasses.replace(super().traits, blocks=blocks)

    def embed(self, features: FeatureMaps) -> dict[str, jax.Array]:
        """{layer: (b, h, w, d)} of a batch, as they are."""
        return dict(zip(self.layers, select(features, self.layers), strict=True))

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """The banks, of the normal images' cells that count, in the order of their indices.

        So neither the order nor the batches of the source matter; all draws come from ``key``.
        Raises DataError without cells, or with NaN or infinite features.
        """
        cfg = self.config
        every = {name: OrderedRows() for name in self.layers}
        for part in self._cells(source):
            for name, values in part.values.items():
                every[name].add(values, part)
        state: dict[str, Any] = {}
        for name in self.layers:
            bank, images = every.pop(name).found()
            check_rows("superadd", bank, 1)
            if cfg.bank_rows and cfg.bank_rows < len(bank):
                own = rng.named(key, f"superadd {name}")
                chosen = density_rows(
                    own, bank, cfg.bank_rows, precision=cfg.precision, progress=progress
                )
                bank, images = bank[chosen], images[chosen]
            unit = float(bank.shape[1])
            if cfg.unit == "usual":
                unit = usual_distance(bank, images, cfg.precision)
            state[name] = {**bank_state(bank, mesh), "unit": jnp.asarray(unit, jnp.float32)}
        return state

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): mean over the layers of distance / unit; image (b,): its maximum.

        Maps of other grids are brought to the first bilinearly. ``mesh`` splits the search over the
        devices.
        """
        maps = []
        for name, cells in self.embed(features).items():
            found = searched(state[name], cells, 1, mesh, self.config.precision)[..., 0]
            maps.append(found / state[name]["unit"])
        grid = (maps[0].shape[1], maps[0].shape[2])
        maps = [m if m.shape[1:] == grid else resize_maps(m, grid) for m in maps]
        mean = sum(maps[1:], start=maps[0]) / len(maps)
        return Scores(map=mean, image=highest(mean, inside))

    def prepared(self, state: Tree) -> Tree:
        """The state with banks that are searched at once."""
        return {name: prepared_state(own, 1, self.config.precision) for name, own in state.items()}


def usual_distance(bank: np.ndarray, images: np.ndarray, precision: Precision = "auto") -> float:
    """Median distance of bank rows (M, d) of every eighth image to the rows of the others.

    ``images`` (M,) are those of the rows; windows and rotations of one are held out together. At
    most ``SAMPLE`` rows, evenly spaced, are looked at; equal ones have no part in it. With rows of
    a single image it is their distance to each other, and 1 where no two rows differ, as nothing is
    known then.
    """
    held = np.unique(images, return_inverse=True)[1] % EIGHTH == 0
    asked, known, k = bank[held], bank[~held], 1
    if not len(known):
        known, k = bank, min(2, len(bank))  # itself, then another
    asked = asked[np.linspace(0, len(asked) - 1, min(SAMPLE, len(asked))).round().astype(int)]
    gaps = np.asarray(nearest(asked, known, k, precision=precision)[0])[:, -1]
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if len(gaps) else 1.0


build = SuperAdd
