"""The network of a run, compiled: feature maps of uint8 images, and what is made of them."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import dsad
from dsad.core.config import listed
from dsad.core.detection import PIXELS
from dsad.core.errors import ConfigError
from dsad.core.hosts import put, spans
from dsad.core.mesh import batch_sharding, replicated
from dsad.core.types import Backbone, FeatureMaps, HasFurther, HasTokens
from dsad.evaluation.hosts import Hosts
from dsad.models.wrappers import WithPixels


def fetched(mesh: Mesh) -> NamedSharding:
    """The sharding of results that every process reads as a whole.

    A single one fetches the shards as they lie.
    """
    return replicated(mesh) if spans(mesh) else batch_sharding(mesh)


class Extractor:
    """The feature maps ``layers`` of uint8 images of a ``size`` (h, w), as one program.

    The backbone is asked for one that computes nothing else. One that is a pytree of arrays is an
    argument of the program (``network``), so its weights are no constants of it. ``tokens`` are
    vectors of whole images beside the maps, see ``HasTokens``; ``blocks`` is as of
    ``DetectorTraits``. ``then`` turns the maps into something else within the program, for the host
    to read.
    """

    def __init__(
        self,
        layers: Sequence[str],
        size: tuple[int, int],
        mesh: Mesh,
        then: Callable[[FeatureMaps], Any] | None = None,
        tokens: Sequence[str] = (),
        blocks: int = 0,
    ) -> None:
        self.size, self.mesh, self.then = size, mesh, then
        self.tokens, self._blocks = tuple(tokens), blocks
        self.layers = (*layers, *self.tokens)
        self.network: Any = None
        self._like: Any = None  # of the network: one with equal structure has the same maps
        self._out = fetched(mesh) if then else batch_sharding(mesh)
        self._with_tree = jax.jit(self._forward, out_shardings=self._out)

    def use(self, backbone: Backbone) -> None:
        """Take another backbone; one of the same architecture needs no new program.

        Raises ConfigError, with all the maps that it has, for a layer that it does not have.
        """
        backbone = with_pixels(backbone, self.layers)
        like = jax.tree.structure(untitled(backbone)) if _is_arrays(backbone) else None
        if like is None or self._like is None or like != self._like:
            check_maps(backbone, self.size, self.layers, self.tokens, self._blocks)
        backbone = backbone.only(self.layers)
        self.network, self._like = None, like
        if like is not None:
            self.network = network = placed(untitled(backbone), self.mesh)
            self._run: Callable[[jax.Array], Any] = functools.partial(self._with_tree, network)
        else:
            forward = functools.partial(self._forward, backbone)
            self._run = jax.jit(forward, out_shardings=self._out)

    def __call__(self, images: np.ndarray) -> Any:
        """The maps {layer: (b, h, w, channels)}, or what ``then`` made of them, ready."""
        return jax.block_until_ready(self._run(put(images, batch_sharding(self.mesh))))

    def lower(self, batch: int) -> jax.stages.Lowered:
        """The program of so many images for the mesh, of a backbone that may be shapes alone."""
        return self._with_tree.lower(self.network, self.images(batch))

    def images(self, batch: int) -> jax.ShapeDtypeStruct:
        """The shape of so many, split over the mesh."""
        sharding = batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct((batch, *self.size, 3), jnp.uint8, sharding=sharding)

    def shapes(self, batch: int) -> Any:
        """Shapes and dtypes of what so many images give."""
        images = jax.ShapeDtypeStruct((batch, *self.size, 3), jnp.uint8)
        return jax.eval_shape(self._run, images)

    def fingerprint(self) -> str:
        """SHA-256 over whatever decides the results for an image, beside its own pixels.

        That is the lowered program, which holds the architecture and all its settings, pixel
        statistics, precision and image size; every weight; and the versions and kind of device
        that run it, as they round. Equal for any batch size, mesh and text about the weights.

        Raises ConfigError for a backbone that is no pytree of arrays: its weights are out of sight.
        """
        if self.network is None:
            raise ConfigError(
                "config.evaluation.feature_cache: expected a backbone that is a pytree of arrays, "
                "whose weights can be told from others. Register its class with "
                "jax.tree_util.register_dataclass, or leave the key empty."
            )
        leaves = jax.tree_util.tree_leaves_with_path(self.network)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.network)
        images = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.uint8)
        # Unused arguments are kept, so that it is clear which weights the others are.
        program = jax.jit(self._forward, keep_unused=True).lower(shapes, images).as_text()
        device = self.mesh.devices.flat[0]
        about = [dsad.__version__, jax.__version__, device.platform, device.device_kind]
        paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        digest = hashlib.sha256(json.dumps([about, self.layers, paths, program]).encode())
        for _, leaf in leaves:
            values = np.ascontiguousarray(leaf)
            digest.update(f"{leaf.shape} {leaf.dtype} ".encode())
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _forward(self, network: Any, images: jax.Array) -> Any:
        maps = network(normalised(network, images))
        found = {n: maps[n].astype(jnp.float32) for n in self.layers}
        return self.then(found) if self.then else found


def check_maps(
    backbone: Backbone, size: tuple[int, int], layers: Sequence[str], tokens: Sequence[str] = (),
    blocks: int = 0,
) -> FeatureMaps:  # fmt: skip
    """Shapes (1, h, w, channels) of all maps of a backbone for images of a ``size`` (h, w).

    Raises ConfigError, with all the maps that it has, for one of ``layers`` or ``tokens`` that it
    does not have, and for a transformer with another number of ``blocks`` (0: any).
    """
    backbone = with_pixels(backbone, layers)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    maps = _shapes(backbone, image)
    if isinstance(backbone, HasFurther) and backbone.further:
        maps |= _shapes(backbone.only(backbone.further), image)
    depth = sum(bool(re.fullmatch(r"block\d+", name)) for name in maps)
    if blocks and depth and backbone.layers is None and depth != blocks:
        raise ConfigError(
            f"config.detector.depth: expected {depth}, the blocks of {backbone.arch}, found "
            f"{blocks}: its layers would lie elsewhere than meant. Set "
            f"--config.detector.depth={depth}, or name layers."
        )
    have = backbone.tokens if isinstance(backbone, HasTokens) else ()
    if missing := [n for n in tokens if n not in have]:
        raise ConfigError(
            f"detector: it reads the class token {listed(missing)} beside the maps, and "
            f"{backbone.arch} has none. Name a vision transformer, such as "
            "--config.backbone=vit_base_patch16_224, or see whether the detector can do without."
        )
    if missing := [n for n in layers if n not in (*maps, *tokens)]:
        raise ConfigError(
            f"config.detector.layers: the backbone has no feature map {listed(missing)}; "
            f"it has: {listed(maps)}."
        )
    return maps


def _shapes(backbone: Backbone, image: jax.ShapeDtypeStruct) -> Any:
    if _is_arrays(backbone):  # or shapes, which only an argument can be
        return jax.eval_shape(lambda network, image: network(image), backbone, image)
    return jax.eval_shape(backbone, image)


def with_pixels(backbone: Backbone, layers: Sequence[str]) -> Backbone:
    """A backbone that has its input among its maps, where that is one of the ``layers``."""
    if PIXELS not in layers or isinstance(backbone, WithPixels):
        return backbone
    return WithPixels(encoder=backbone)


def normalised(network: Backbone, images: jax.Array) -> jax.Array:
    """What a network takes of uint8 images (b, H, W, 3)."""
    mean = jnp.asarray(network.mean, jnp.float32)[None, None, None, :]
    std = jnp.asarray(network.std, jnp.float32)[None, None, None, :]
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def placed(backbone: Backbone, mesh: Mesh) -> Backbone:
    """The backbone with its arrays on every device; one that is no pytree of arrays as it is.

    Arrays that lie on these devices already, whole or split, stay as they are; shapes get the
    sharding.

    Raises ConfigError if the processes of the mesh have unlike weights.
    """
    if not _is_arrays(backbone):
        return backbone
    leaves, structure = jax.tree.flatten(backbone)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        everywhere = replicated(mesh)
        return jax.tree.map(lambda x: x.update(sharding=everywhere), backbone)
    devices = set(mesh.devices.flat)
    if all(isinstance(x, jax.Array) and x.sharding.device_set == devices for x in leaves):
        return backbone
    if not spans(mesh):
        return jax.device_put(backbone, replicated(mesh))
    leaves = [np.asarray(x) for x in leaves]
    if not Hosts.of(mesh).same(leaves):
        raise ConfigError(
            "config.weights: the processes read different weights. Expected the same files on "
            "every machine; copy them again."
        )
    return jax.tree.unflatten(structure, [put(x, replicated(mesh)) for x in leaves])


def _is_arrays(backbone: Backbone) -> bool:
    leaves = jax.tree.leaves(backbone)
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    return bool(leaves) and all(isinstance(x, kinds) for x in leaves)


def untitled(backbone: Any) -> Any:
    """The backbone without the text about its weights, also inside wrappers.

    The text is part of the tree's structure, and would make another program of other weights.
    """
    if not dataclasses.is_dataclass(backbone) or isinstance(backbone, type):
        return backbone
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(backbone):
        value = getattr(backbone, field.name)
        if field.name in ("description", "directory"):
            changed[field.name] = ""
        elif isinstance(value, Backbone):
            changed[field.name] = untitled(value)
    return dataclasses.replace(backbone, **changed)
