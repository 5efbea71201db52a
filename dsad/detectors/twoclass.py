"""The 2-class protocols of VisA: a classifier and a U-Net, trained on labelled images.

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022. Two copies of a residual network go on training from the weights of a
backbone, independently of each other: one, with a linear unit behind the mean of its deepest map,
tells anomalous images from normal ones, the other is the encoder of a U-Net that marks defects.

Published are the two networks and the focal loss of the U-Net. Not published, and chosen here: the
size of the decoder, gamma and the weight of that loss, optimiser, length, input size and
augmentation. The batch norms of the encoder keep the statistics that its weights came with, since a
few images of one kind of product would replace them (and a network without norms of its own stays
what it was); their scales and biases are trained. The state is that of the last step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.augment.color import color_jitter, normalize
from dsad.core import rng
from dsad.core.config import field
from dsad.core.detection import PIXELS, FeatureSource, Inside, Scores
from dsad.core.errors import ConfigError
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import (
    Backbone,
    FeatureMaps,
    ObjectiveTraits,
    Progress,
    Scalars,
    Trainable,
    Tree,
)
from dsad.detectors._features import DetectorConfig, TrainedDetector, select
from dsad.models import resnet, unet
from dsad.models.family import Encoder, HasWeights

#: The two networks.
CLASSIFIER, SEGMENTER = "classifier", "segmenter"
#: Where ``extra`` has their encoders if these are no parameters.
FROZEN = "encoders"


class Config(DetectorConfig):
    """The two networks and their training.

    Attributes:
      layers: maps of the encoder that the decoder joins, from fine to coarse; "stem" is that of its
        first convolution. The classifier reads the last one.
      width: channels of the decoder at the image's own size; twice as many at each coarser step.
      frozen: the encoder keeps its weights, only unit and decoder are trained.
      gamma: of the U-Net's focal loss; 0 is cross entropy.
      image_gamma: likewise, of the classifier's.
      alpha: weight of defects in the focal loss, 1 - alpha that of the rest; 0: equal weights of 1.
      flips: images are mirrored, in either direction every other time.
      jitter: amounts of brightness, contrast, saturation and hue, four times of five.
      recipe: of the training.

    """

    layers: tuple[str, ...] = field(
        (resnet.STEM, "layer1", "layer2", "layer3", "layer4"), distinct=True, filled=True
    )
    width: int = field(16, at_least=1)
    frozen: bool = False
    gamma: float = field(2.0, at_least=0)
    image_gamma: float = field(0.0, at_least=0)
    alpha: float = field(0.0, within=(0, 1))
    flips: bool = True
    jitter: tuple[float, float, float, float] = field((0.1, 0.1, 0.1, 0.05), at_least=0)
    recipe: Recipe = Recipe(
        epochs=30.0, batch_size=8, optim=OptimConfig(lr=1e-4, weight_decay=1e-4, schedule="cosine")
    )
    sigma: float = field(0.0, at_least=0)


class TwoClass(TrainedDetector[Config]):
    """The detector; its state has for either network "encoder" and "head", and their statistics."""

    _learns_from = "labelled"

    @property
    def layers(self) -> tuple[str, ...]:
        """It reads the images themselves."""
        return (PIXELS,)

    def objective(self, specs: Tree, backbone: Backbone | None) -> Trainable:
        """The two losses; ConfigError for a backbone that is no residual network."""
        assert backbone is not None
        return Tuning(self.config, backbone)

    def fit(
        self,
        source: FeatureSource,
        *,
        mesh: Mesh | None,
        key: jax.Array,
        progress: Progress,
        trained: Tree | None = None,
    ) -> Tree:
        """What was trained, with the encoders in their places where they are frozen."""
        state = super().fit(source, mesh=mesh, key=key, progress=progress, trained=trained)
        params = {name: state[name] for name in (CLASSIFIER, SEGMENTER)}
        return {n: x for n, x in whole(params, state).items() if n != FROZEN}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Logits: map (b, H, W) of defects, image (b,) of an anomaly.

        Probabilities near 1 would be equal in float32.
        """
        (images,) = select(features, self.layers)
        image = classified(state, images, self.config)
        maps, _ = segmented(state, images, self.config, train=False)
        return Scores(map=maps, image=image)


def pyramid(state: Tree, name: str, images: jax.Array, layers: Sequence[str]) -> list[jax.Array]:
    """The encoder's maps (b, h, w, c) of normalised images, of one of the two networks."""
    params, statistics = state[name]["encoder"], state["encoder_statistics"]
    network = resnet.of_params(params)
    maps, _ = network.apply(params, statistics, images, train=False, method="pyramid")
    return select(maps, layers)


def classified(state: Tree, images: jax.Array, cfg: Config) -> jax.Array:
    """Logits (b,) of normalised images (b, H, W, 3)."""
    *_, deepest = pyramid(state, CLASSIFIER, images, cfg.layers)
    head = state[CLASSIFIER]["head"]
    return jnp.mean(deepest, axis=(1, 2)) @ head["kernel"] + head["bias"]


def segmented(
    state: Tree, images: jax.Array, cfg: Config, *, train: bool
) -> tuple[jax.Array, Tree]:
    """Logits (b, H, W) of normalised images (b, H, W, 3), and the decoder's new statistics."""
    maps = pyramid(state, SEGMENTER, images, cfg.layers)
    decoder = decoder_of([x.shape[-1] for x in maps], cfg)
    params, statistics = state[SEGMENTER]["head"], state["decoder_statistics"]
    size = (images.shape[1], images.shape[2])
    return decoder.apply(params, statistics, maps, size, train=train)


def decoder_of(channels: Sequence[int], cfg: Config) -> Any:
    """The decoder for maps of so many channels."""
    widths = [cfg.width * 2**i for i in reversed(range(len(channels)))]
    return unet.decoder(tuple(channels), tuple(widths))


def focal(logits: jax.Array, labels: jax.Array, gamma: float, alpha: float = 0.0) -> jax.Array:
    """Focal losses (...) of logits and bool labels (Lin et al., ICCV 2017, equation 5).

    -(1 - p)^gamma ln p with the probability p of the true class, times alpha of positive labels and
    1 - alpha of others, or times 1 with alpha 0.
    """
    true = jnp.where(labels, logits, -logits)
    weight = jnp.where(labels, alpha, 1 - alpha) if alpha else 1.0
    # (1 - p)^gamma by its logarithm: neither it nor its slope breaks where p is 1.
    return -weight * jnp.exp(gamma * jax.nn.log_sigmoid(-true)) * jax.nn.log_sigmoid(true)


class Tuning(Trainable):
    """What the steps do; the two losses have no parameter in common."""

    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: Config, backbone: Backbone) -> None:
        self.config, self.mean, self.std = cfg, backbone.mean, backbone.std
        encoder = encoder_of(backbone)
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        state = {SEGMENTER: {"encoder": encoder.params}, "encoder_statistics": encoder.extra}
        maps = jax.eval_shape(lambda s, x: pyramid(s, SEGMENTER, x, cfg.layers), state, image)
        self.channels = [x.shape[-1] for x in maps]

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """The linear unit, at 0, the decoder, and its batch statistics."""
        decoder, statistics = decoder_of(self.channels, self.config).init(rng.named(key, "decoder"))
        unit = {"kernel": jnp.zeros(self.channels[-1]), "bias": jnp.zeros(())}
        params = {CLASSIFIER: {"head": unit}, SEGMENTER: {"head": decoder}}
        return params, {"decoder_statistics": statistics}

    def adopt(self, params: Tree, extra: Tree, backbone: Backbone) -> tuple[Tree, Tree]:
        """The same with the encoder for both; a frozen one is no parameter."""
        encoder = encoder_of(backbone)
        both = {n: {"encoder": jax.tree.map(jnp.copy, encoder.params)} for n in params}
        extra = {**extra, "encoder_statistics": encoder.extra}
        if self.config.frozen:
            return params, {**extra, FROZEN: both}
        return {n: {**both[n], **params[n]} for n in params}, extra

    def views(self, batch: Any, key: jax.Array) -> Tree:
        """Normalised ``images`` (b, H, W, 3), flipped and jittered, and ``mask`` likewise."""
        keys = rng.sample_keys(key, batch["epoch"], batch["index"])
        cfg, images = self.config, batch["image"].astype(jnp.float32) / 255
        mask = batch["mask"] > 0

        def drawn(name: str) -> jax.Array:
            return jax.vmap(lambda k: rng.named(k, name))(keys)

        for axis, name in ((1, "rows"), (2, "columns")) if cfg.flips else ():
            turned = jax.vmap(jax.random.bernoulli)(drawn(name))
            images = jnp.where(turned[:, None, None, None], jnp.flip(images, axis), images)
            mask = jnp.where(turned[:, None, None], jnp.flip(mask, axis), mask)
        if any(cfg.jitter):
            brightness, contrast, saturation, hue = cfg.jitter
            images = color_jitter(
                images, drawn("jitter"), brightness=brightness, contrast=contrast,
                saturation=saturation, hue=hue, probability=0.8,
            )  # fmt: skip
        return {
            "images": normalize(images, self.mean, self.std), "mask": mask,
            "anomalous": batch["label"] > 0, "masked": batch["masked"] > 0,
        }  # fmt: skip

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Both losses added; pixels of images that are not masked are left out."""
        cfg, images = self.config, views["images"]
        state = whole(params, extra)
        image = classified(state, images, cfg)
        maps, statistics = segmented(state, images, cfg, train=True)
        pixels = jnp.mean(focal(maps, views["mask"], cfg.gamma, cfg.alpha), axis=(1, 2))
        masked = views["masked"].astype(jnp.float32)
        parts = {
            "classifier": jnp.mean(focal(image, views["anomalous"], cfg.image_gamma)),
            "segmenter": jnp.sum(masked * pixels) / jnp.maximum(jnp.sum(masked), 1),
        }
        extra = {**extra, "decoder_statistics": statistics}
        return parts["classifier"] + parts["segmenter"], (extra, parts)


def encoder_of(backbone: Backbone) -> Encoder:
    """The residual network that a backbone is; ConfigError for any other."""
    encoder = backbone.weights if isinstance(backbone, HasWeights) else None
    if encoder is None or encoder.arch not in resnet.ARCHS:
        raise ConfigError(
            f"config.backbone: this detector goes on training a residual network "
            f"({', '.join(resnet.ARCHS)}) or the run of one, found {backbone.arch}."
        )
    return encoder


def whole(params: Tree, extra: Tree) -> Tree:
    """The state that the networks read."""
    frozen = extra.get(FROZEN, {})
    return {**extra, **{name: {**frozen.get(name, {}), **params[name]} for name in params}}


build = TwoClass
