"""SPD's triplet of an image: itself, changed as a whole, and changed as a whole and in one place.

Positive and negative are drawn independently from the same distribution; without that the change as
a whole would tell them apart, and the local one would not be needed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsad.augment.color import normalize
from dsad.augment.crops import resized_crop
from dsad.augment.recipes import WEAK
from dsad.augment.smooth_blend import SmoothBlendConfig, draw_pieces, smooth_blend
from dsad.augment.views import ViewConfig, make_view
from dsad.core.batch import Batch
from dsad.core.config import Settings, field
from dsad.core.rng import named, sample_keys


class TripletConfig(Settings, place="triplet"):
    """How a triplet is made.

    Attributes:
      anchor: share of the image's shorter side in the anchor, a centred square (224 of 256).
      view: of positive and negative, as a whole.
      blend: the local change of the negative.

    """

    anchor: float = field(0.875, above=0, at_most=1)
    view: ViewConfig = WEAK
    blend: SmoothBlendConfig = SmoothBlendConfig()


def make_triplet(batch: Batch, key: jax.Array, config: TripletConfig) -> dict[str, jax.Array]:
    """``anchor``, ``positive``, ``negative`` (b, S, S, 3) f32, normalised; ``peak`` (b,).

    ``peak`` is the highest value of the negative's matte: far below 1 the piece is a mere smudge.
    Sample i's draws depend on (key, epoch[i], index[i]) alone. Pure and jittable.
    """
    view = config.view
    plain = dataclasses.replace(view, mean=(0.0,) * 3, std=(1.0,) * 3)
    size = batch["size"].astype(jnp.float32)
    side = jnp.maximum(jnp.round(config.anchor * jnp.min(size, axis=1, keepdims=True)), 1)
    corner = jnp.floor((size - side) / 2)
    box = jnp.concatenate([corner, side, side], axis=1)
    anchor = resized_crop(batch["image"], box, view.side, None, view.filter) / 255
    if view.filter == "bicubic":
        anchor = jnp.clip(anchor, 0.0, 1.0)  # the cubic overshoots at edges
    images = {"anchor": anchor}
    for name in ("positive", "negative"):
        images[name] = make_view(batch, named(key, name), plain)["image"]
    keys = sample_keys(named(key, "blend"), batch["epoch"], batch["index"])
    pieces = draw_pieces(keys, view.side, config.blend)
    images["negative"], alpha = smooth_blend(images["negative"], pieces, config.blend)
    normal = {name: normalize(image, view.mean, view.std) for name, image in images.items()}
    return {**normal, "peak": jnp.max(alpha, axis=(1, 2))}
