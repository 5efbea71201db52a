"""The cases of the detector tests, feature sources, and float64 forms of what detectors share."""

import functools
import importlib
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from dsad.assembly.detectors import Trainer
from dsad.core import config as core_config
from dsad.core.detection import FeatureBatch
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import silent
from dsad.evaluation.fitting import TrainingData
from tests.seams import detectors as seams

KEY = jax.random.key(0)
#: How a detector is fitted on one device.
ALONE = {"mesh": None, "key": KEY, "progress": silent}


def maps_of(seed, count, shift=0.0):
    """Two layers of features on grids 6 × 5 and 3 × 3, far from the origin."""
    rng = np.random.default_rng(seed)
    make = lambda h, w, d: (8 + shift + rng.standard_normal((count, h, w, d))).astype(np.float32)  # noqa: E731
    return {"layer2": make(6, 5, 7), "layer3": make(3, 3, 4), "unused": make(2, 2, 3)}


def corrupted(maps):
    """``maps`` with a defect in the cells of rows 2 and 3, columns 1 and 2, of the first layer."""
    # Alternating, so that directions change as well as distances.
    maps["layer2"][:, 2:4, 1:3] += np.resize(np.float32([4, -4]), 7)
    return maps


class Batches:
    """A re-iterable feature source over ``maps``, in ``order``, the last batch padded."""

    categories = ("tiles",)

    def __init__(self, maps, order=None, size=4):
        self.maps, self.size = maps, size
        self.order = np.arange(len(next(iter(maps.values())))) if order is None else order

    def __iter__(self):
        for at in range(0, len(self.order), self.size):
            picked = self.order[at : at + self.size]
            padding = self.size - len(picked)
            maps = {
                n: jnp.asarray(np.concatenate([m[picked], np.full((padding, *m.shape[1:]), 1e6)]))
                for n, m in self.maps.items()
            }
            index = np.concatenate([picked, np.full(padding, -1)])
            yield FeatureBatch(maps, np.arange(self.size) < len(picked), "tiles", index)


def joined(maps, neighbourhood=3, order=1):
    """Neighbourhood means, resampled onto the grid of the first layer, by scipy, in float64."""
    window, grids = (1, neighbourhood, neighbourhood, 1), []
    for name in ("layer2", "layer3"):
        values = np.float64(maps[name])
        mean = ndimage.uniform_filter(values, window, mode="constant")
        grids.append(mean / ndimage.uniform_filter(np.ones_like(values), window, mode="constant"))
    up = [upsampled(m, grids[0].shape[1:3], order) for m in np.moveaxis(grids[1], 3, 0)]
    return np.concatenate([grids[0], np.stack(up, axis=3)], axis=3)


def upsampled(maps, grid=(6, 5), order=1):
    """Resampling of maps (b, h, w) at half-pixel centres: bilinear, or the nearest cell."""
    at = [
        np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        for n, m in zip(maps.shape[1:], grid, strict=True)
    ]
    points = np.meshgrid(*at, indexing="ij")
    return np.stack([ndimage.map_coordinates(m, points, order=order) for m in maps])


class Member(NamedTuple):
    """A detector under test: ``module`` has ``Config`` and ``build``, ``case`` its oracle."""

    module: Any
    case: Any


@functools.cache
def cases():
    """By name: the members of dsad.detectors, and the miniatures in tests/seams/detectors."""
    found = {
        n: Member(core_config.resolve("detectors", n), _module(f"contracts.detectors.{n}"))
        for n in core_config.members("detectors")
    }
    files = [m.name for m in pkgutil.iter_modules(seams.__path__)]
    return found | {n: Member(*(_module(f"seams.detectors.{n}"),) * 2) for n in files}


def _module(name):
    return importlib.import_module(f"tests.{name}")


def made(name, **config):
    module = cases()[name].module
    return module.build(module.Config(**config))


#: One for all tests, which share its programs.
TRAINER = Trainer()


def fitted(detector, source, mesh=None):
    """The state of a detector, trained before if it trains."""
    trained = {}
    if detector.traits.trains_on:
        images = backbone = labelled = network = None
        case = cases()[type(detector).__module__.rpartition(".")[2]].case
        if hasattr(case, "images_of"):
            images, backbone = functools.partial(case.images_of, source), case.network()
        if detector.traits.trains_on == "labelled":
            labelled, network = functools.partial(case.labelled_of, source), case.network()
        data = TrainingData(
            features=source, images=images, backbone=backbone, title="tiles", seed=0, key=KEY,
            mesh=mesh or make_mesh(MeshConfig(), jax.devices()[:1]), folder=None, progress=silent,
            labelled=labelled, network=network,
        )  # fmt: skip
        trained = {"trained": TRAINER(detector, data)}
    return detector.fit(source, **ALONE | {"mesh": mesh}, **trained)


def close(found, expected, rtol=1e-6):
    """Equal within ``rtol`` of each value; where scores may be negative, of the largest."""
    for a, b in zip(found, expected, strict=True):
        signed = np.min(b) < 0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max() if signed else 0)


def kept_rows(state):
    """The rows of a padded bank that count."""
    return np.asarray(state["bank"])[: int(state["rows"])]
