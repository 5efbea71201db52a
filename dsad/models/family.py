"""What the architectures of one kind have in common: their network, weights and preprocessing."""

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.pixels import IMAGENET_MEAN, IMAGENET_STD
from dsad.core.types import FeatureMaps


class OtherArchitecture(ConfigError):
    """Weights that say which architecture they want, whatever their shapes fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How the images of published weights were prepared.

    ``mean`` and ``std`` are those of RGB pixels in [0, 1]; ``image_size`` is the side in pixels the
    network saw; ``interpolation`` the name of the resampling filter; ``crop`` the share of a
    resized image's side that its centre crop keeps.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size: int = 224
    interpolation: str = "bilinear"
    crop: float = 0.875


class Network(Protocol):
    """A network as pure functions, such as ``Functional`` or ``ViT``."""

    def init(self, key: Any, /) -> tuple[Any, Any]:
        """Fresh (params, extra)."""
        ...

    def shapes(self) -> tuple[Any, Any]:
        """(params, extra) as nested dicts of ``ShapeDtypeStruct``."""
        ...


class Encoder(NamedTuple):
    """The encoder that an objective trains, as ``models.backbone`` would hold it."""

    arch: str
    options: Mapping[str, Any]
    params: Any
    extra: Any
    preprocessing: Preprocessing


@runtime_checkable
class HasWeights(Protocol):
    """A backbone that is one encoder, or nothing but that, which can be trained further."""

    @property
    def weights(self) -> Encoder | None:
        """Its encoder; None if it has none that could be told apart."""
        ...


class Loaded(NamedTuple):
    """Weights as trees of f32 numpy arrays.

    ``options`` go to ``Family.network``: what the tensors decide, such as the number of stages.
    ``left_out`` names the tensors that are knowingly not used, by what they are.
    """

    params: Any
    extra: Any
    options: Mapping[str, Any]
    left_out: Mapping[str, Sequence[str]]


class Family(abc.ABC):
    """Architectures that share their network's code and their mapping to published names."""

    @property
    @abc.abstractmethod
    def archs(self) -> Collection[str]:
        """Names of the architectures."""

    @abc.abstractmethod
    def network(self, arch: str, **options: Any) -> Network:
        """The network; equal arguments give the same object, so that its programs are reused."""

    def fresh(
        self, arch: str, layers: Sequence[str], *, dtype: str, zero_init_last: bool
    ) -> tuple[Any, dict[str, Any]]:
        """A network to train that ends, where it can, behind the deepest of ``layers``.

        And its options. ``dtype`` is the compute type; ``zero_init_last`` starts residual branches
        at zero where there is a norm that can.
        """
        del layers, zero_init_last
        if dtype != "float32":
            raise ConfigError(f"{arch}: computes in float32 only, found dtype {dtype!r}.")
        return self.network(arch), {}

    def maps(
        self, network: Any, params: Any, extra: Any, images: Any, layers: tuple[str, ...] | None
    ) -> FeatureMaps:
        """Feature maps in inference mode, only ``layers`` where these are given."""
        maps, _ = network.apply(params, extra, images, train=False)
        return _only(maps, layers)

    def run(
        self, network: Any, params: Any, extra: Any, images: Any, *, train: bool, views: int = 1,
        layers: tuple[str, ...] | None = None,
    ) -> tuple[FeatureMaps, jax.Array, Any]:  # fmt: skip
        """Maps as ``maps`` gives, pooled vectors (b, c) f32 and the new extra.

        In training the ``views`` of an image follow each other along the batch axis, and each has
        batch statistics of its own, see ``norm.BatchNorm``. Vectors are what a head for whole
        images takes: here the mean over the cells of the deepest map.
        """
        maps, extra = network.apply(params, extra, images, train=train, views=views)
        *_, deepest = maps.values()
        pooled = jnp.mean(deepest.astype(jnp.float32), axis=(1, 2))
        return _only(maps, layers), pooled, extra

    @abc.abstractmethod
    def strides(self, arch: str, **options: Any) -> dict[str, int]:
        """Input pixels per cell of every feature map of ``maps`` without ``layers``."""

    def further(self, arch: str, **options: Any) -> dict[str, int]:
        """The same of the maps that ``maps`` gives only where ``layers`` names them."""
        del arch, options
        return {}

    def tokens(self, arch: str, **options: Any) -> tuple[str, ...]:
        """Vectors (b, d) that ``maps`` gives beside the maps, where ``layers`` names them."""
        del arch, options
        return ()

    @abc.abstractmethod
    def preprocessing(self, arch: str) -> Preprocessing:
        """That of the architecture's first published weights, for files that do not say."""

    def terms(self, arch: str) -> str:
        """What the licence of the published weights asks of whoever uses them, if that is much."""
        del arch
        return ""

    @abc.abstractmethod
    def load(self, arch: str, state: Mapping[str, Any]) -> Loaded:
        """Trees from tensors under published names; ConfigError with a table of all faults."""

    def channels(self, arch: str, **options: Any) -> int:
        """Channels of the deepest feature map."""
        network = self.network(arch, **options)
        *_, last = self.strides(arch, **options)
        side = self.preprocessing(arch).image_size
        image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        maps = jax.eval_shape(
            lambda p, e, x: self.maps(network, p, e, x, (last,)), *network.shapes(), image
        )
        return maps[last].shape[-1]

    def published(self, arch: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """Name of a network in timm, and the arguments in which it differs from that name's."""
        del options
        return arch, {}

    def suitable(self, name: str, quick_gelu: bool | None = None) -> tuple[str, ...]:
        """Architectures for weights whose config says timm's ``name``, the best one first.

        ``quick_gelu``: see ``pretrained.Weights``.
        """
        del quick_gelu
        return (name,)

    def check_complete(self, arch: str, **options: Any) -> None:
        """Refuse weights that end early, which no other library's network can load."""
        del arch, options

    @property
    def formats(self) -> tuple[str, ...]:
        """Layouts of names that ``save`` knows; none: the family cannot be exported."""
        return ()

    def save(
        self, arch: str, params: Any, extra: Any, form: str, **options: Any
    ) -> dict[str, np.ndarray]:
        """Tensors under published names; loading them gives the same network."""
        del params, extra, options
        raise ConfigError(f"{arch}: cannot be written under published names ({form}).")


def _only(maps: FeatureMaps, layers: tuple[str, ...] | None) -> FeatureMaps:
    return maps if layers is None else {name: maps[name] for name in layers}
