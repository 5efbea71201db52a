"""Backbones around backbones: what changes the features before a detector sees them."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dsad.core.errors import ConfigError
from dsad.core.types import Backbone, FeatureMaps
from dsad.ops.similarity import unit

_PATCHES = re.compile(r"(\d+)/(\d+)")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["encoder"], meta_fields=["size", "stride"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """An encoder applied to every ``size`` × ``size`` patch of an image, ``stride`` pixels apart.

    Patches are not enlarged. Cell (i, j) of every feature map belongs to the patch of the rows
    stride · i to stride · i + size - 1 and the columns likewise: it is the spatial mean of the
    encoder's map of that patch, brought to unit length (DS2 and CutPaste, second stage). An image
    of 256 pixels gives 57 × 57 cells of 32 × 32 patches 4 pixels apart.
    """

    encoder: Backbone
    size: int
    stride: int

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the pixels, as the encoder was trained."""
        return self.encoder.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Of the pixels, as the encoder was trained."""
        return self.encoder.std

    @property
    def arch(self) -> str:
        """The encoder's architecture, with the patches' size and stride."""
        return f"patches:{self.size}/{self.stride}:{self.encoder.arch}"

    @property
    def description(self) -> str:
        """The encoder's weights."""
        return self.encoder.description

    @property
    def image_size(self) -> None:
        """Not told: its encoder was trained on images of about a patch's size."""
        return None

    @property
    def layers(self) -> tuple[str, ...] | None:
        """The maps it computes, None for all of the encoder's."""
        return self.encoder.layers

    def only(self, layers: Sequence[str]) -> "Patches":
        """The same patches by an encoder that computes just these maps."""
        return dataclasses.replace(self, encoder=self.encoder.only(layers))

    def __call__(self, images: jax.Array) -> FeatureMaps:
        """Maps (b, gh, gw, channels) of normalised images (b, H, W, 3).

        One row of patches at a time, so that memory is that of gw patches per image. Raises
        ConfigError if patches do not end at the image's border.
        """
        height, width = (self._cells(n) for n in images.shape[1:3])
        batch = images.shape[0]
        columns = self.stride * jnp.arange(width)[:, None] + jnp.arange(self.size)[None, :]

        def row(top: jax.Array) -> FeatureMaps:
            band = lax.dynamic_slice_in_dim(images, top, self.size, axis=1)
            patches = jnp.moveaxis(jnp.take(band, columns, axis=2), 2, 1)
            maps = self.encoder(patches.reshape(batch * width, self.size, self.size, 3))
            means = {n: jnp.mean(m.astype(jnp.float32), axis=(1, 2)) for n, m in maps.items()}
            return {n: unit(m).reshape(batch, width, -1) for n, m in means.items()}

        found = lax.map(row, self.stride * jnp.arange(height))
        return {n: jnp.moveaxis(m, 0, 1) for n, m in found.items()}

    def _cells(self, side: int) -> int:
        if side < self.size or (side - self.size) % self.stride:
            raise ConfigError(
                f"backbone patches:{self.size}/{self.stride}: expected an image side of "
                f"{self.size} + {self.stride} n pixels, so that patches end at the border; found "
                f"{side}. Set --config.evaluation.image_size."
            )
        return (side - self.size) // self.stride + 1


def is_wrapper(spec: str) -> bool:
    """Whether a backbone's name begins with a wrapper's."""
    return spec.startswith("patches:")


def split(spec: str) -> tuple[str, str]:
    """``patches:32/4:run:DIR`` as the wrapper's part ``patches:32/4`` and the inner ``run:DIR``."""
    kind, _, rest = spec.partition(":")
    options, _, inner = rest.partition(":")
    found = _PATCHES.fullmatch(options)
    if kind != "patches" or not inner or not found or min(int(n) for n in found.groups()) < 1:
        raise ConfigError(
            f"config.backbone={spec!r}: expected patches:SIZE/STRIDE:BACKBONE with pixels of at "
            "least 1, for example patches:32/4:resnet18 or patches:32/4:run:DIR."
        )
    return f"{kind}:{options}", inner


def wrap(wrapper: str, encoder: Backbone) -> Patches:
    """The wrapper named by the first part of ``split`` around an encoder."""
    size, stride = (int(n) for n in wrapper.removeprefix("patches:").split("/"))
    return Patches(encoder=encoder, size=size, stride=stride)
