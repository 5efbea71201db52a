"""A network with its weights as one callable pytree: what detectors and users hold."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError
from dsad.core.pixels import IMAGENET_MEAN, IMAGENET_STD
from dsad.core.types import FeatureMaps, Tree
from dsad.models import registry, statistics
from dsad.models.family import Encoder, OtherArchitecture
from dsad.models.weights import imagenet, pretrained


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "extra"],
    meta_fields=[
        "arch", "options", "layers", "mean", "std", "image_size", "interpolation", "crop",
        "left_out", "description",
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """Frozen network in inference mode; a pytree, so it can be an argument of a jitted function.

    Call it with normalised RGB images (b, H, W, 3), that is ``(pixels / 255 - mean) / std``; it
    returns maps (b, h, w, channels): ``layer1`` to ``layer4`` of a residual network, ``block0`` and
    so on of a vision transformer, whose image sides must be multiples of its patch. Where ``only``
    names them, that gives ``norm0`` and so on too: the same behind its final norm.

    Attributes:
      options: what the weights decide about the network, such as (("stages", 3),).
      layers: the maps that are returned, None for all.
      image_size: side in pixels of the images the weights were trained on.
      interpolation: resampling filter of those images, such as "bilinear".
      crop: share of a resized image's side that its centre crop kept, None where the weights do
        not say: then it is the architecture's published one.
      left_out: tensors of the weights that are knowingly not used, by what they are.
      description: names the weights.

    """

    # Not shown: jax asks for the text of what it compiles, and hides an interrupt meanwhile.
    params: Any = dataclasses.field(repr=False)
    extra: Any = dataclasses.field(repr=False)
    arch: str
    options: tuple[tuple[str, Any], ...] = ()
    layers: tuple[str, ...] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size: int = 224
    interpolation: str = "bilinear"
    crop: float | None = None
    left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    description: str = ""

    @property
    def strides(self) -> dict[str, int]:
        """Input pixels per cell of each feature map."""
        family, options = registry.family_of(self.arch), dict(self.options)
        found = family.strides(self.arch, **options)
        if self.layers is None:
            return found
        found |= family.further(self.arch, **options)
        return {n: s for n, s in found.items() if n in self.layers}

    @property
    def further(self) -> tuple[str, ...]:
        """See ``core.types.HasFurther``."""
        if self.layers is not None:
            return ()
        return tuple(registry.family_of(self.arch).further(self.arch, **dict(self.options)))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Vectors of whole images that ``only`` can name as well: ("cls",) or ()."""
        return registry.family_of(self.arch).tokens(self.arch, **dict(self.options))

    def only(self, layers: Sequence[str]) -> "Backbone":
        """The backbone that computes just these maps and tokens, which saves memory."""
        have = (*self.strides, *self.further, *self.tokens)
        for name in layers:
            if name not in have:
                raise ConfigError(
                    f"{self.arch} ({self.description}): no feature map {name!r}."
                    f"{suggestion(name, have)} It has: {listed(have)}."
                )
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def statistics(self) -> Tree:
        """See ``models.statistics.HasStatistics``, as for the next two."""
        return statistics.present(self.extra)

    def with_statistics(self, statistics: Tree) -> "Backbone":
        return dataclasses.replace(self, extra=statistics)

    def measured(self, images: jax.Array) -> Tree:
        return statistics.measured(self.weights, images, applied=True)

    @property
    def weights(self) -> Encoder:
        """See ``models.family.HasWeights``."""
        known = registry.family_of(self.arch).preprocessing(self.arch)
        return Encoder(self.arch, dict(self.options), self.params, self.extra, known)

    def __call__(self, images: jax.Array) -> FeatureMaps:
        family = registry.family_of(self.arch)
        network = family.network(self.arch, **dict(self.options))
        return family.maps(network, self.params, self.extra, jnp.asarray(images), self.layers)


def backbone(arch: str, weights: pretrained.Spec | None = None, *, seed: int = 0) -> Backbone:
    """A backbone with random or published weights.

    Args:
      arch: a name of ``registry.archs()``: ``resnet18``, ``vit_base_patch16_224``, ...
      weights: None for random weights, anything that ``pretrained.read`` takes (a file, a
        directory, ``hf:owner/name``, a mapping of arrays under published names), or what it
        returned; "imagenet" is the repository of ``weights.imagenet``. What the weights lack does
        not exist in the result, so asking for the maps of a missing stage is refused. Pixel
        statistics, image size, interpolation and crop come from the weights' config, else they are
        the architecture's published ones.
      seed: of the random weights.

    Raises:
      ConfigError: unknown architecture, weights whose config names another one, or tensors that
        are missing, left over or misshapen.

    """
    family = registry.family_of(arch)
    known = family.preprocessing(arch)
    if weights is None:
        params, extra = jax.jit(family.network(arch).init)(jax.random.key(seed))
        return Backbone(
            params=params, extra=extra, arch=arch, mean=known.mean, std=known.std,
            image_size=known.image_size, interpolation=known.interpolation,
            description=f"random, seed {seed}",
        )  # fmt: skip
    state = pretrained.read(imagenet.repository(arch) if weights == "imagenet" else weights)
    _check_said(arch, state)
    try:
        loaded = family.load(arch, state)
    except OtherArchitecture:
        raise
    except ConfigError as error:
        others = [other for other in registry.archs() if _fits(other, state)]
        hint = f"\nThe tensors are those of {listed(others)}." if others else ""
        raise ConfigError(f"{state.source}: {error}{hint}") from error
    params, extra = jax.tree.map(jnp.asarray, (loaded.params, loaded.extra))
    return Backbone(
        params=params, extra=extra, arch=arch, options=tuple(sorted(loaded.options.items())),
        mean=state.mean or known.mean, std=state.std or known.std,
        image_size=state.input_size or loaded.options.get("image", known.image_size),
        interpolation=state.interpolation or known.interpolation, crop=state.crop,
        left_out=_hashable(loaded.left_out), description=state.source,
    )  # fmt: skip


def _fits(arch: str, state: pretrained.Weights) -> bool:
    try:
        registry.family_of(arch).load(arch, state)
    except ConfigError:
        return False
    return True


def _check_said(arch: str, state: pretrained.Weights) -> None:
    """Architectures of equal shapes may differ in statistics and in how positions are resampled."""
    said = state.architecture
    if said is None or said not in registry.archs():
        return
    suitable = registry.family_of(said).suitable(said, state.quick_gelu)
    if arch not in suitable:
        raise ConfigError(
            f"weights {state.source}: their config says {said}, but {arch} is asked for. Use "
            f"{' or '.join(suitable)}."
        )


def _hashable(groups: Mapping[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((word, tuple(found)) for word, found in groups.items())
