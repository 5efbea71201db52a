"""The test images score each other, those with like class tokens alike: MuSc in small."""

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import Settings, field
from dsad.core.detection import DetectorTraits, Scores
from dsad.core.errors import DataError
from dsad.detectors._features import FeatureDetector, joined
from dsad.ops.similarity import unit
from tests.contracts.detectors import common


class Config(Settings, place="detector"):
    layers: tuple[str, ...] = field(("layer2", "layer3"), distinct=True, filled=True)
    temperature: float = field(0.1, above=0)


class Mutual(FeatureDetector[Config]):
    traits = property(lambda self: DetectorTraits(fits_on="test", tokens=("cls",), sigma=1.0))

    def embed(self, features):
        return joined(features, self.layers), unit(features["cls"])

    def _fit(self, source, mesh, key, progress):
        parts = [(p.index, *p.values) for p in self._cells(source)]
        if not parts:
            raise DataError("detector mutual: expected test images, found 0.")
        index, cells, tokens = (np.concatenate(x) for x in zip(*parts, strict=True))
        order = np.argsort(index)
        state = {"cells": jnp.asarray(cells[order]), "tokens": jnp.asarray(tokens[order])}
        return {**state, "scores": jnp.max(self._maps(state, state["cells"]), axis=(1, 2))}

    def _maps(self, state, cells):
        """The median over the images of the distance to their nearest cell."""
        bank = state["cells"].reshape(len(state["cells"]), -1, cells.shape[-1])

        def nearest(image):
            gaps = image[:, :, None, None] - bank[None, None]
            return jnp.min(jnp.sqrt(jnp.sum(jnp.square(gaps), axis=-1)), axis=-1)

        return jnp.median(jax.lax.map(nearest, cells), axis=-1)

    def score(self, state, features, *, mesh=None):
        cells, tokens = self.embed(features)
        maps = self._maps(state, cells)
        weights = jax.nn.softmax(tokens @ state["tokens"].T / self.config.temperature, axis=-1)
        image = jnp.max(maps, axis=(1, 2)) + weights @ state["scores"]
        return Scores(map=maps, image=image)


build = Mutual
CONFIGS = [{}, {"temperature": 1.0}]


def maps_of(seed, count):
    token = np.random.default_rng(seed + 50).standard_normal((count, 5)).astype(np.float32)
    return {**common.maps_of(seed, count), "cls": token}


def oracle(config, normal, test):
    def maps(images):
        bank = common.joined(normal, neighbourhood=1).reshape(6, -1, 11)
        gaps = np.linalg.norm(images[:, :, :, None, None] - bank, axis=-1)
        return np.median(gaps.min(-1), axis=-1)

    def directions(found):
        token = np.float64(found["cls"])
        return token / np.linalg.norm(token, axis=1, keepdims=True)

    known, found = (maps(common.joined(m, neighbourhood=1)) for m in (normal, test))
    weights = np.exp(directions(test) @ directions(normal).T / config.get("temperature", 0.1))
    weights /= weights.sum(1, keepdims=True)
    return found, found.max((1, 2)) + weights @ known.max((1, 2))
