"""The compiled part of an evaluation: features, map wrappers, scores, maps at input size."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from jax import lax
from jax.sharding import Mesh

from dsad.core.detection import (
    Detector,
    DetectorTraits,
    HasPanels,
    MapWrapper,
    Scores,
    within,
)
from dsad.core.errors import ConfigError
from dsad.core.hosts import own_part, own_rows, put
from dsad.core.mesh import batch_sharding, replicated
from dsad.core.types import Backbone, FeatureMaps, HasTokens, Tree
from dsad.evaluation import recalibration, stamp, stored
from dsad.evaluation.batches import HostBatch
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.extract import Extractor, placed
from dsad.evaluation.frozen import FrozenMaps
from dsad.evaluation.hosts import Hosts
from dsad.models.statistics import HasStatistics
from dsad.ops import resize
from dsad.ops.resize import top_count


def finished(
    traits: DetectorTraits, size: tuple[int, int], align_corners: bool, scores: Scores,
    inside: jax.Array | None = None,
) -> Scores:  # fmt: skip
    """Scores with maps (b, *size): upsampled, smoothed, and summed up as the traits say.

    ``inside`` (b, 2, 2, 2) is as of ``Preprocessing.inside``: cells beyond the image are taken for
    those at its border, and pixels that do not count have no part in the image score.
    """
    maps = scores.map if inside is None else _bordered(scores.map, inside[:, 1])
    maps = resize.resize_maps(maps, size, align_corners=align_corners)
    maps = resize.gaussian_smooth(maps, traits.sigma) if traits.sigma > 0 else maps
    if traits.image_score == "method":
        return Scores(map=maps, image=scores.image)
    pixels = size[0] * size[1]
    values = maps.reshape(-1, pixels)
    if inside is None:
        count = top_count(traits.image_share, pixels) if traits.image_score == "top" else 1
        highest, _ = lax.top_k(values, count)
        return Scores(map=maps, image=jnp.mean(highest, axis=1))
    counted = within(inside[:, 0], size).reshape(-1, pixels)
    share = traits.image_share if traits.image_score == "top" else 0.0
    return Scores(map=maps, image=_top(values, counted, share))


def _bordered(maps: jax.Array, content: jax.Array) -> jax.Array:
    """Maps (b, gh, gw) whose cells beyond the image are those at its border."""
    cells = within(content, (maps.shape[1], maps.shape[2]))
    for axis in (1, 2):
        there = jnp.any(cells, axis=3 - axis)
        count = there.shape[1]
        first, last = jnp.argmax(there, axis=1), count - 1 - jnp.argmax(there[:, ::-1], axis=1)
        place = jnp.clip(jnp.arange(count)[None], first[:, None], last[:, None])
        maps = jnp.take_along_axis(maps, jnp.expand_dims(place, 3 - axis), axis=axis)
    return maps


def _top(values: jax.Array, counted: jax.Array, share: float) -> jax.Array:
    """Mean (b,) of the highest ``share`` of the counted values (b, n), of at least one."""
    order = jnp.sort(jnp.where(counted, values, -jnp.inf), axis=1)[:, ::-1]
    most = jnp.sum(counted, axis=1, keepdims=True, dtype=jnp.float32)
    count = jnp.maximum(jnp.ceil(jnp.round(share * most, 3)), 1)
    chosen = jnp.arange(order.shape[1])[None] < count
    total = jnp.sum(jnp.where(chosen, order, 0.0), axis=1)
    return total / jnp.sum(chosen, axis=1, dtype=jnp.float32)


def transformed(
    wrappers: tuple[MapWrapper, ...],
    mesh: Mesh | None,
    banks: tuple[Tree, ...],
    maps: FeatureMaps,
    index: jax.Array,
) -> FeatureMaps:
    """The maps behind the first wrappers, one for each bank; class tokens pass by."""
    tokens = {name: x for name, x in maps.items() if x.ndim == 2}
    maps = {name: x for name, x in maps.items() if name not in tokens}
    for wrapper, bank in zip(wrappers, banks, strict=False):
        maps = wrapper.transform(bank, maps, index=index, mesh=mesh)
    return {**maps, **tokens}


class Fitted(NamedTuple):
    """What one support set gave: the banks of the map wrappers, and the detector's state.

    ``statistics`` are the encoder's that were measured on the support set, {} if none were.
    """

    banks: tuple[Tree, ...]
    state: Tree
    statistics: Tree


def batch_rows(config: EvalConfig, mesh: Mesh) -> int:
    """Inputs of the network in a batch: as configured, but a multiple of the devices."""
    return -(-config.batch_size // mesh.size) * mesh.size


def extractor(detector: Detector, config: EvalConfig, mesh: Mesh, backbone: Backbone) -> Extractor:
    """Of what a detector reads and the feature cache keeps beside; it has no backbone yet."""
    own_tokens = tuple(detector.traits.tokens)
    # In the order of the config first, so that all detectors ask for one program.
    further = config.cache_layers if config.feature_cache else ()
    every = dict.fromkeys((*further, *detector.layers, *own_tokens))
    stored_tokens = backbone.tokens if isinstance(backbone, HasTokens) else ()
    vectors = {*own_tokens, *stored_tokens} - {*detector.layers}
    maps = tuple(name for name in every if name not in vectors)
    tokens = tuple(name for name in every if name in vectors)
    return Extractor(
        maps, config.preprocessing.size, mesh, tokens=tokens, blocks=detector.traits.blocks
    )


class Device:
    """The compiled parts of a run: features, scores, maps at network input size.

    Every part is compiled once per combination of shapes, so categories whose detector states have
    equal shapes share one program. The detector's ``score`` gets the mesh where there are several
    devices.
    """

    def __init__(
        self,
        backbone: Backbone,
        detector: Detector,
        config: EvalConfig,
        mesh: Mesh,
        map_wrappers: Sequence[MapWrapper] = (),
    ) -> None:
        self.mesh = mesh
        self.batch = batch_rows(config, mesh)
        self.layers, self._traits = tuple(detector.layers), detector.traits
        self.preprocessing = config.preprocessing
        if map_wrappers and not config.preprocessing.single and self._traits.trains_on == "images":
            # Its steps know windows by number, the banks whole images: an image served itself.
            raise ConfigError(
                "config.backbone: a detector that trains on windows of images takes no wrapper of "
                'maps; name the network alone, or set config.evaluation.resize to "longer".'
            )
        several = mesh if mesh.size > 1 else None
        self._wrapped = functools.partial(transformed, tuple(map_wrappers), several)
        self._transform = jax.jit(self._wrapped, out_shardings=batch_sharding(mesh))
        self._score = jax.jit(functools.partial(detector.score, mesh=several))
        finish = functools.partial(
            finished, detector.traits, self.preprocessing.size, config.align_corners
        )
        self._finish = jax.jit(finish, out_shardings=batch_sharding(mesh))
        self.hosts = Hosts.of(mesh)
        self.folder = config.feature_cache
        self.store: stored.FeatureStore | None = None
        self.panel_store: stored.FeatureStore | None = None
        #: By name of a source: whether the features of an image, by path, were stored before.
        self.from_store: dict[str, dict[str, bool]] = {}
        #: Whether those of the latest batch all were.
        self.all_stored = False
        self._own = (*self.layers, *detector.traits.tokens)
        self._features = extractor(detector, config, mesh, backbone)
        self._panels: Extractor | None = None
        stretched = self.preprocessing.whole and self.preprocessing.everything
        if config.gallery > 0 and isinstance(detector, HasPanels) and stretched:
            self._panels = Extractor(
                detector.panel_layers, self.preprocessing.size, mesh, detector.panels
            )
        self.use(backbone)

    def use(self, backbone: Backbone) -> None:
        """Take another backbone; one of the same architecture needs no new program."""
        self.backbone, self._statistics = backbone, None
        self._use(backbone, stamp.describe_backbone(backbone))

    def recalibrate(self, statistics: Tree) -> bool:
        """Take the backbone with these statistics; False if it has the very same already."""
        if not statistics or statistics is self._statistics:
            return False
        assert isinstance(self.backbone, HasStatistics)
        about = {**stamp.describe_backbone(self.backbone), "batch_norm": recalibration.RULE}
        self._use(self.backbone.with_statistics(statistics), about)
        self._statistics = statistics
        return True

    def _use(self, backbone: Backbone, about: dict[str, Any]) -> None:
        backbone = placed(backbone, self.mesh)  # once for both
        self._features.use(backbone)
        self.store = self.hosts.together(lambda: self._opened(self._features, about))
        if self._panels:
            self._panels.use(backbone)
            if not self.hosts.several:  # every process draws all panels, but has few of the images
                self.panel_store = self._opened(self._panels, {**about, "panels": True})

    def _opened(self, extractor: Extractor, about: dict[str, Any]) -> stored.FeatureStore | None:
        if not self.folder:
            return None
        preprocessing = self.preprocessing.describe()
        about = {**about, "layers": extractor.layers, "preprocessing": preprocessing}
        text = f"{stored.FORMAT} {preprocessing} {PIL.__version__} {extractor.fingerprint()}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return stored.FeatureStore(self.folder, name, about)

    @property
    def draws_panels(self) -> bool:
        """Whether the detector shows more of an image than its map."""
        return self._panels is not None

    def frozen(self, banks: tuple[Tree, ...], rotations: int) -> FrozenMaps | None:
        """The network, on the mesh, and a wrapper for each bank; None if it is not arrays."""
        features = self._features
        if features.network is None:
            return None
        return FrozenMaps(
            network=features.network.only(self._own), banks=banks, layers=self._own,
            transform=self._wrapped, rotations=rotations,
        )  # fmt: skip

    def identity(self, about: Any) -> str:
        """Tells apart what gives features (``about``: where its weights are out of sight)."""
        return str(about) if self._features.network is None else self._features.fingerprint()

    def stored_features(self, host: HostBatch) -> FeatureMaps:
        """The detector's maps of a batch, read if all are stored, else computed where not."""
        maps = self._complete(host)
        return {name: maps[name] for name in self._own}

    def _complete(self, host: HostBatch) -> FeatureMaps:
        if self.store is None:
            return self._features(host.images)
        if self.hosts.several:
            return self._stored_by_all(self.store, host)
        maps = self.store.complete(host.found, lambda: self._features(host.images))
        # Padding repeats a row, so that it is as finite as the others.
        rows = np.minimum(np.arange(self.batch), len(host.found) - 1)

        sharding = batch_sharding(self.mesh)
        arrays = {
            n: x if isinstance(x, jax.Array) else put(x[rows], sharding) for n, x in maps.items()
        }
        return jax.block_until_ready(arrays)

    def _stored_by_all(self, store: stored.FeatureStore, host: HostBatch) -> FeatureMaps:
        """The same where every process reads and stores its own images."""
        missing = [row.maps is None for row in host.found]
        total, images = int(self.hosts.total(np.int64(sum(missing)))), int(host.valid.sum())
        computed = self._features(host.images) if total else {}
        here = own_rows(self.mesh, self.batch)
        fresh = {n: own_part(x)[host.own[here]] for n, x in computed.items()}

        def complete() -> Mapping[str, Any]:
            return store.complete(host.found, lambda: fresh) if host.found else {}

        rows = self.hosts.together(complete)
        if total == images:
            return computed
        made = {}
        for name, spec in self._features.shapes(self.batch).items():
            values = np.zeros(spec.shape, spec.dtype)  # padding is finite
            if host.found:
                values[host.own] = rows[name]
            made[name] = put(values, batch_sharding(self.mesh))
        return jax.block_until_ready(made)

    def note(self, name: str, paths: Sequence[str], host: HostBatch) -> None:
        """Remember which images of a source had their features in the store at first sight."""
        were = [found.maps is not None for found in host.found]
        self.all_stored = bool(were) and all(were)
        known = self.from_store.setdefault(name, {})
        for path, was in zip(paths, were, strict=bool(were)):
            known.setdefault(path, was)

    def panels(self, host: HostBatch) -> dict[str, np.ndarray]:
        """What the detector shows of a batch beside its map; nothing for most detectors."""
        if self._panels is None:
            return {}
        extractor = self._panels

        def compute() -> dict[str, np.ndarray]:
            return {n: np.asarray(x, np.float32) for n, x in extractor(host.images).items()}

        if self.panel_store is None:
            return compute()
        return dict(self.panel_store.complete(host.found, compute))

    def place(self, state: Tree) -> Tree:
        """The detector's state on the mesh: what is not there yet is replicated.

        Processes that fitted it to slightly different values, by rounding, take process 0's.
        """
        leaves, structure = jax.tree.flatten(state)
        devices = set(self.mesh.devices.flat)
        missing = {
            i: x
            for i, x in enumerate(leaves)
            if not (isinstance(x, jax.Array) and x.sharding.device_set == devices)
        }
        everywhere = replicated(self.mesh)
        place = put if self.hosts.several else jax.device_put
        for i, x in self.hosts.agreed(missing).items():
            leaves[i] = place(x, everywhere)
        return jax.tree.unflatten(structure, leaves)

    def transform(
        self, banks: tuple[Tree, ...], maps: FeatureMaps, index: np.ndarray
    ) -> FeatureMaps:
        """The maps behind a wrapper for each bank; ``index`` as of ``MapWrapper``."""
        if not banks:
            return maps
        places = put(index.astype(np.int32), batch_sharding(self.mesh))
        return jax.block_until_ready(self._transform(banks, maps, places))

    def image_score(self, scores: Sequence[float], pixels: np.ndarray) -> float:
        """That of an image by the scores of its views, the highest, or by its map (h, w)."""
        if self._traits.image_score != "top":
            return max(scores)
        count = top_count(self._traits.image_share, pixels.size)
        return float(np.partition(pixels, -count, axis=None)[-count:].mean())

    def score(
        self, fitted: Fitted, maps: FeatureMaps, host: HostBatch
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maps (n, s, s) and image scores (n,) f32 of the own rows of a batch."""
        maps = self.transform(fitted.banks, maps, np.full(self.batch, -1))
        if host.inside is None:
            scores = self._finish(self._score(fitted.state, maps))
        else:
            inside = put(host.inside, batch_sharding(self.mesh))
            scores = self._finish(
                self._score(fitted.state, maps, inside=inside[:, 0]), inside=inside
            )
        own = host.own[own_rows(self.mesh, self.batch)]
        found = (np.asarray(own_part(x), np.float32)[own] for x in (scores.map, scores.image))
        return next(found), next(found)
