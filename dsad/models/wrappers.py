"""What stands before a backbone in its spec and changes its features before a detector sees them.

Some wrap the network, others its maps; the latter may learn from a support set.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from dsad.core.detection import PIXELS, MapWrapper
from dsad.core.errors import ConfigError
from dsad.core.types import Backbone, FeatureMaps, HasFurther, Tree
from dsad.models.residual_maps import REFERENCES, ResidualMaps
from dsad.models.statistics import HasStatistics
from dsad.ops.similarity import unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapped:
    """What the backbones around an ``encoder`` have in common: it alone has weights."""

    encoder: Backbone

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the pixels, as the encoder was trained."""
        return self.encoder.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Of the pixels, as the encoder was trained."""
        return self.encoder.std

    @property
    def description(self) -> str:
        """The encoder's weights."""
        return self.encoder.description

    @property
    def layers(self) -> tuple[str, ...] | None:
        """The maps it computes, None for all of the encoder's."""
        return self.encoder.layers

    @property
    def further(self) -> tuple[str, ...]:
        """The encoder's; see ``core.types.HasFurther``."""
        return self.encoder.further if isinstance(self.encoder, HasFurther) else ()

    @property
    def statistics(self) -> Tree:
        """The encoder's; see ``models.statistics.HasStatistics``."""
        return self.encoder.statistics if isinstance(self.encoder, HasStatistics) else {}

    def with_statistics(self, statistics: Tree) -> Self:
        """The same around an encoder with other statistics."""
        assert isinstance(self.encoder, HasStatistics)
        return dataclasses.replace(self, encoder=self.encoder.with_statistics(statistics))

    def only(self, layers: Sequence[str]) -> Self:
        """The same around an encoder that computes just these maps."""
        return dataclasses.replace(self, encoder=self.encoder.only(layers))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["encoder"], meta_fields=["size", "stride"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches(Wrapped):
    """An encoder applied to every ``size`` × ``size`` patch of an image, ``stride`` pixels apart.

    Patches are not enlarged. Cell (i, j) of every feature map belongs to the patch of the rows
    stride · i to stride · i + size - 1 and the columns likewise: it is the spatial mean of the
    encoder's map of that patch, brought to unit length (DS2 and CutPaste, second stage). An image
    of 256 pixels gives 57 × 57 cells of 32 × 32 patches 4 pixels apart.
    """

    size: int
    stride: int

    @property
    def arch(self) -> str:
        """The encoder's architecture, with the patches' size and stride."""
        return f"patches:{self.size}/{self.stride}:{self.encoder.arch}"

    @property
    def image_size(self) -> None:
        """Not told: its encoder was trained on images of about a patch's size."""
        return None

    def __call__(self, images: jax.Array) -> FeatureMaps:
        """Maps (b, gh, gw, channels) of normalised images (b, H, W, 3).

        One row of patches at a time, so that memory is that of gw patches per image. Raises
        ConfigError if patches do not end at the image's border.
        """
        batch = images.shape[0]

        def row(patches: jax.Array) -> FeatureMaps:
            maps = self.encoder(patches)
            means = {n: jnp.mean(m.astype(jnp.float32), axis=(1, 2)) for n, m in maps.items()}
            return {n: unit(m).reshape(batch, len(patches) // batch, -1) for n, m in means.items()}

        return {n: jnp.moveaxis(m, 0, 1) for n, m in self._by_row(row, images).items()}

    def measured(self, images: jax.Array) -> Tree:
        """Statistics (gh, c) of every row of patches."""
        assert isinstance(self.encoder, HasStatistics)
        return self._by_row(self.encoder.measured, images)

    def _by_row(self, function: Callable[[jax.Array], Tree], images: jax.Array) -> Tree:
        """What a function makes of the patches (b · gw, size, size, 3) of each row."""
        height, width = (self._cells(n) for n in images.shape[1:3])
        columns = self.stride * jnp.arange(width)[:, None] + jnp.arange(self.size)[None, :]

        def row(top: jax.Array) -> Tree:
            band = lax.dynamic_slice_in_dim(images, top, self.size, axis=1)
            patches = jnp.moveaxis(jnp.take(band, columns, axis=2), 2, 1)
            return function(patches.reshape(-1, self.size, self.size, 3))

        return lax.map(row, self.stride * jnp.arange(height))

    def _cells(self, side: int) -> int:
        if side < self.size or (side - self.size) % self.stride:
            raise ConfigError(
                f"backbone patches:{self.size}/{self.stride}: expected an image side of "
                f"{self.size} + {self.stride} n pixels, so that patches end at the border; found "
                f"{side}. Set --config.evaluation.image_size."
            )
        return (side - self.size) // self.stride + 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=["encoder"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class WithPixels(Wrapped):
    """An encoder that gives its input as well, as the feature map ``PIXELS``."""

    @property
    def arch(self) -> str:
        """The encoder's."""
        return self.encoder.arch

    @property
    def image_size(self) -> int | None:
        """The encoder's."""
        return self.encoder.image_size

    def only(self, layers: Sequence[str]) -> Self:
        """The same with just these of the encoder's maps."""
        return super().only([name for name in layers if name != PIXELS])

    def __call__(self, images: jax.Array) -> FeatureMaps:
        """The encoder's maps of normalised images (b, H, W, 3), and those."""
        return {**self.encoder(images), PIXELS: images}


class Kind(NamedTuple):
    """A kind of wrapper: how it is written, the regex of its options, and what makes one of them.

    Options stand behind the colon of its name and end with one. ``build`` gives a function of the
    inner ``Backbone`` to another, or a ``MapWrapper``.
    """

    written: str
    example: str
    options: str
    build: Callable[..., Callable[[Backbone], Backbone] | MapWrapper]


def _patches(size: str, stride: str) -> Callable[[Backbone], Backbone]:
    return functools.partial(_cut, int(size), int(stride))


def _cut(size: int, stride: int, encoder: Backbone) -> Patches:
    return Patches(encoder=encoder, size=size, stride=stride)


def _residual(references: str | None) -> ResidualMaps:
    return ResidualMaps(int(references or REFERENCES))


#: By the first word of a spec. ``assembly.runs`` adds ``projected``, which reads a run.
KINDS = {
    "patches": Kind("patches:SIZE/STRIDE", "patches:32/4", r"([1-9]\d*)/([1-9]\d*):", _patches),
    "residual": Kind("residual[:REFERENCES]", "residual", r"(?:(\d+):)?", _residual),
}


class Unwrapped(NamedTuple):
    """A spec taken apart: ``maps`` and ``images`` from the inside out, and what is inside.

    ``names`` are those of the map wrappers, with their options; ``network`` is the spec without
    them.
    """

    maps: tuple[MapWrapper, ...]
    names: tuple[str, ...]
    network: str
    images: tuple[Callable[[Backbone], Backbone], ...]
    inner: str


def unwrap(spec: str) -> Unwrapped:
    """``residual:patches:32/4:run:DIR`` as its wrappers and ``run:DIR``.

    Raises ConfigError for options that a wrapper does not take, for nothing inside, and for a
    wrapper of maps inside one of images.
    """
    maps: list[tuple[str, MapWrapper]] = []
    images: list[Callable[[Backbone], Backbone]] = []
    network = inner = spec
    while kind := KINDS.get(name := inner.partition(":")[0]):
        if not (match := re.match(rf"{name}:{kind.options}(?=.)", inner)):
            raise ConfigError(
                f"config.backbone={spec!r}: expected {kind.written}:BACKBONE, for example "
                f"{kind.example}:resnet18 or {kind.example}:run:DIR."
            )
        wrapper, inner = kind.build(*match.groups()), inner[match.end() :]
        if not isinstance(wrapper, MapWrapper):
            images.append(wrapper)
        elif images:
            raise ConfigError(f"config.backbone={spec!r}: {name} has to stand in front.")
        else:
            maps.append((match[0].removesuffix(":"), wrapper))
            network = inner
    names, wrappers = zip(*reversed(maps), strict=True) if maps else ((), ())
    return Unwrapped(wrappers, names, network, tuple(reversed(images)), inner)
