"""Earlier weights whose batch norms went into the convolutions are made fit for training."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dsad.augment.color import normalize
from dsad.augment.crops import resized_crop
from dsad.core import hosts
from dsad.core.batch import Batch
from dsad.core.types import EarlierWeights, Objective, Tree
from dsad.models import statistics


def is_folded(earlier: EarlierWeights) -> bool:
    """Whether the encoder's batch norms are folded, see ``statistics.is_folded``."""
    encoder = earlier.encoder
    return encoder is not None and statistics.is_folded(statistics.present(encoder.extra))


def unfolded(
    earlier: EarlierWeights, objective: Objective, batches: Iterable[Batch], side: int
) -> EarlierWeights:
    """The same encoder with norms that have the statistics of whole images of ``side`` pixels.

    On batch statistics a folded network would lose what its norms had: each would bring its
    convolution's output to mean 0 and variance 1.
    """
    encoder = earlier.encoder

    @jax.jit
    def measure(trees: tuple[Tree, Tree], batch: Batch) -> Tree:
        corner = jnp.zeros_like(batch["size"])
        boxes = jnp.concatenate([corner, batch["size"]], axis=1).astype(jnp.float32)
        images = resized_crop(batch["image"], boxes, side) / 255
        images = normalize(images, objective.mean, objective.std)
        network = encoder._replace(params=trees[0], extra=trees[1])
        return statistics.measured(network, images, applied=False)

    moments, trees = statistics.Moments(), (encoder.params, encoder.extra)
    for batch in batches:
        measured = jax.tree.map(hosts.whole, measure(trees, batch))
        moments.add(measured, np.shape(batch["index"])[0])
    params, extra = statistics.unfolded(*trees, moments.statistics())
    return earlier._replace(encoder=encoder._replace(params=params, extra=extra))
