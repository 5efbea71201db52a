"""What every method that trains, or uses, one encoder has in common."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsad.core import tree
from dsad.core.errors import ConfigError
from dsad.core.types import EarlierWeights, FeatureMaps, ObjectiveTraits, Passes, Trainable
from dsad.models import registry
from dsad.models.family import Encoder, Preprocessing


class EncoderObjective(Trainable):
    """An objective around ``encoder``, a network of the architecture ``arch``.

    Weights lie at ``params["encoder"]``, what has no gradient at ``extra["encoder"]``, unless
    ``encoder_trees`` and ``with_encoder`` say otherwise. ``options`` are the network's beside its
    architecture, see ``models.family.Encoder``; ``preprocessing`` is that of its training images.
    """

    traits = ObjectiveTraits()

    def __init__(
        self,
        arch: str,
        encoder: Any,
        *,
        options: Mapping[str, Any],
        preprocessing: Preprocessing,
    ) -> None:
        self.arch, self.encoder, self.options = arch, encoder, options
        self.preprocessing = preprocessing
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.family = registry.family_of(arch)

    def encoder_trees(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The encoder's parameters, and its part of extra."""
        return params["encoder"], extra["encoder"]

    def with_encoder(self, params: Any, extra: Any, trees: tuple[Any, Any]) -> tuple[Any, Any]:
        """(params, extra) with other ``encoder_trees``."""
        return {**params, "encoder": trees[0]}, {**extra, "encoder": trees[1]}

    def encoder_weights(self, params: Any, extra: Any) -> Encoder:
        """The encoder, for whole images."""
        trees = self.encoder_trees(params, extra)
        return Encoder(self.arch, self.options, *trees, self.preprocessing)

    def features(
        self, params: Any, extra: Any, images: jax.Array, layers: tuple[str, ...] | None = None
    ) -> FeatureMaps:
        """Maps of the encoder in inference mode."""
        trees = self.encoder_trees(params, extra)
        maps = self.family.maps(self.encoder, *trees, images, layers)
        return {name: m.astype(jnp.float32) for name, m in maps.items()}

    def embed(
        self, params: Any, extra: Any, images: jax.Array, *, train: bool, views: int = 1,
        layers: tuple[str, ...] = (),
    ) -> tuple[dict[str, jax.Array], Any]:  # fmt: skip
        """``pooled`` (b, d) f32, the encoder's vector of whole images, maps, and the new extra."""
        trees = self.encoder_trees(params, extra)
        maps, pooled, stats = self.family.run(
            self.encoder, *trees, images, train=train, views=views, layers=layers
        )
        _, extra = self.with_encoder({}, extra, (trees[0], stats))
        return {**maps, "pooled": pooled.astype(jnp.float32)}, extra

    def pixels(self, images: jax.Array) -> jax.Array:
        """Normalised images as RGB in [0, 1], to be looked at."""
        wide = (1,) * (images.ndim - 1) + (3,)
        mean, std = (jnp.asarray(x, jnp.float32).reshape(wide) for x in (self.mean, self.std))
        return images.astype(jnp.float32) * std + mean

    @property
    def stage_facts(self) -> dict[str, Any]:
        """What a later stage has to share with this one, and no tensor's shape tells."""
        return {"side": self.preprocessing.image_size, "mean": self.mean, "std": self.std}

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """Take the encoder of earlier weights, if it is the same network.

        Of a deeper residual network the further stages are left out. Fixed position tables stay
        one's own where they are made for another image size.
        """
        encoder = earlier.encoder
        if encoder is None or encoder.arch != self.arch:
            there = f"an encoder {encoder.arch}" if encoder else "weights without an encoder"
            raise ConfigError(
                f"config.init_from: expected an encoder {self.arch}, found {there} in "
                f"{earlier.origin}. Name other weights, or set the objective's architecture to "
                "theirs."
            )
        present, present_extra = self.encoder_trees(params, extra)
        taken = {name: part for name, part in encoder.params.items() if name in present}
        if lines := tree.diff(present, taken):
            raise ConfigError(
                f"config.init_from: the encoder in {earlier.origin} is not this {self.arch}:\n  "
                + "\n  ".join(lines)
            )
        held = {name: part for name, part in encoder.extra.items() if name in present_extra}
        if lines := tree.diff(present_extra, held):
            if present_extra.keys() != {"pos"}:
                raise ConfigError(
                    f"config.init_from: the statistics of the encoder in {earlier.origin} do not "
                    "fit:\n  " + "\n  ".join(lines)
                )
            held = present_extra
        params, extra = self.with_encoder(params, extra, (taken, held))
        report = f"encoder: {len(jax.tree.leaves(taken))} tensors"
        left = sorted({name.partition("_")[0] for name in encoder.params if name not in present})
        if left:
            report += f" without {', '.join(left)}"
        return params, extra, report

    def prepare(self, params: Any, extra: Any, passes: Passes) -> Any:
        """No look at the data is needed."""
        del params, passes
        return extra


def check_facts(earlier: EarlierWeights, own: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse an earlier stage whose tensors fit but mean something else.

    ``earlier.facts`` are the ``stage_facts`` of a run, or what published weights say.
    """
    there = earlier.facts
    lines = [
        f"{k}: {there[k]} there, {own[k]} here" for k in keys if k in there and there[k] != own[k]
    ]
    if lines:
        raise ConfigError(
            "config.init_from: the tensors fit, but the earlier stage differs from "
            "config.objective in what they mean; make them equal, or set "
            "--config.objective.adopt_check=shapes:\n  " + "\n  ".join(lines)
        )
