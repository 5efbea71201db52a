"""CutPaste, 3-way: normal images, those with a piece pasted, and those with a scar are told apart.

Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", CVPR 2021.
The head is thrown away; the detector ``gde`` takes the pooled features of the encoder.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsad.augment.color import normalize
from dsad.augment.cutpaste import CutPasteConfig, draw_cutpaste, draw_scar, paste
from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, field
from dsad.core.types import ObjectiveTraits, RunInfo, Scalars
from dsad.models import heads, registry
from dsad.models.family import Preprocessing
from dsad.objectives.encoder import EncoderObjective
from dsad.objectives.teacher import interleaved

#: The classes, in the order of the logits.
CLASSES = ("normal", "cutpaste", "scar")

#: A sixteenth of the image, undistorted: 64 of 256 pixels, which are no more than lightly coloured.
#: The published code colours the whole image first, whose mean its contrast then refers to.
CROP = ViewConfig(
    side=64, area=(1 / 16, 1 / 16), aspect=(1.0, 1.0), flip=0.0, jitter=(0.1, 0.1, 0.1, 0.1),
    jitter_probability=0.5, blur_probability=0.0,
)  # fmt: skip


class Config(Settings, place="objective"):
    """Settings of CutPaste.

    Attributes:
      arch: architecture of the encoder, see ``models.backbone``.
      hidden: widths of the head's hidden layers, each with a batch norm.
      view: of the normal image, which the two others are made from.
      patches: the pieces that are pasted.

    """

    arch: str = "resnet18"
    hidden: tuple[int, ...] = field((512, 128), at_least=1)
    view: ViewConfig = CROP
    patches: CutPasteConfig = CutPasteConfig()

    def check(self) -> None:
        if (box := self.patches.scar_box(self.view.side)) > self.view.side:
            raise Refused("view.side", f"at least the {box} pixels of a scar", self.view.side)


class CutPaste(EncoderObjective):
    """The objective; see ``core.types.Objective`` for the contract of each method."""

    #: Batch statistics tie the samples of a batch together.
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: Config, run: RunInfo):
        del run
        self.cfg, view = cfg, cfg.view
        family = registry.family_of(cfg.arch)
        known = Preprocessing(
            mean=view.mean, std=view.std, image_size=view.side, interpolation=view.filter, crop=1.0
        )
        super().__init__(cfg.arch, family.network(cfg.arch), options={}, preprocessing=known)
        widths = (family.channels(cfg.arch), *cfg.hidden, len(CLASSES))
        self.head = heads.mlp(widths, bias=True)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters and statistics of ``encoder`` and ``head``."""
        networks = {"encoder": self.encoder, "head": self.head}
        trees = {n: net.init(rng.named(key, n)) for n, net in networks.items()}
        return {n: t[0] for n, t in trees.items()}, {n: t[1] for n, t in trees.items()}

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """Normalised images (b, S, S, 3) f32 by class; the pieces come from the normal view."""
        view, patches = self.cfg.view, self.cfg.patches
        plain = dataclasses.replace(view, mean=(0.0,) * 3, std=(1.0,) * 3)
        images = {"normal": make_view(batch, rng.named(key, "view"), plain)["image"]}
        for name, draw in (("cutpaste", draw_cutpaste), ("scar", draw_scar)):
            keys = rng.sample_keys(rng.named(key, name), batch["epoch"], batch["index"])
            images[name], _ = paste(images["normal"], draw(keys, view.side, patches))
        return {name: normalize(image, view.mean, view.std) for name, image in images.items()}

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """Mean cross-entropy of all three classes, whose batch statistics are common."""
        del key, step  # everything random is in the views
        images = interleaved(*(views[name] for name in CLASSES))
        trees = params["encoder"], extra["encoder"]
        _, pooled, stats = self.family.run(self.encoder, *trees, images, train=True)
        logits, head = self.head.apply(params["head"], extra["head"], pooled, train=True)
        loss, right = cross_entropy(logits.reshape(-1, len(CLASSES), len(CLASSES)))
        scalars = {f"accuracy_{name}": right[i] for i, name in enumerate(CLASSES)}
        return loss, ({"encoder": stats, "head": head}, {"accuracy": jnp.mean(right), **scalars})

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The three classes of each image."""
        del params, extra
        return {name: self.pixels(image) for name, image in self.views(batch, key).items()}


def cross_entropy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss of logits (b, k, k), row i of which belong to class i, and accuracies (k,)."""
    each = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    classes = jnp.arange(logits.shape[-1])[None, :]
    right = jnp.argmax(each, axis=-1) == classes
    loss = -jnp.mean(jnp.diagonal(each, axis1=1, axis2=2))
    return loss, jnp.mean(right.astype(jnp.float32), axis=0)


def build(cfg: Config, run: RunInfo) -> CutPaste:
    """The objective for a run."""
    return CutPaste(cfg, run)
