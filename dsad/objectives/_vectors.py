"""What methods that contrast whole images share: an encoder with heads that make vectors."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.recipes import MOCO
from dsad.augment.views import ViewConfig, make_view
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, listed
from dsad.core.types import EarlierWeights, ObjectiveTraits
from dsad.models import registry
from dsad.models.family import Preprocessing
from dsad.objectives.encoder import EncoderObjective


class VectorsConfig(Settings, place="objective"):
    """Settings of the encoder.

    Attributes:
      arch: its architecture, see ``models.backbone``.
      last: the map that the encoder ends with, such as "layer3"; its mean is the vector. Empty: the
        whole network.
      zero_init_last: residual branches of a ResNet start at zero.
      dtype: compute type of the networks; parameters, statistics and losses stay f32.

    """

    arch: str = "resnet50"
    last: str = ""
    zero_init_last: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        known = registry.family_of(self.arch).strides(self.arch)
        if self.last and self.last not in known:
            raise Refused("last", f"one of {listed(known)}, or ''", self.last)


class VectorsObjective(EncoderObjective):
    """An encoder whose vectors of whole images go through ``heads``.

    Each of ``heads`` takes what the one before it gives, the first the encoder's vector; ``embed``
    gives their outputs by name ("z", "p").
    """

    #: Batch statistics, and mostly the loss, tie the samples of a batch together.
    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, cfg: VectorsConfig, view: ViewConfig) -> None:
        family = registry.family_of(cfg.arch)
        network, options = family.fresh(
            cfg.arch, (cfg.last or [*family.strides(cfg.arch)][-1],), dtype=cfg.dtype,
            zero_init_last=cfg.zero_init_last,
        )  # fmt: skip
        known = Preprocessing(
            mean=view.mean, std=view.std, image_size=view.side, interpolation=view.filter, crop=1.0
        )
        super().__init__(cfg.arch, network, options=options, preprocessing=known)
        #: Width of the encoder's vectors.
        self.width = family.channels(cfg.arch, **options)
        self.heads: Mapping[str, Any] = {}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters and statistics of ``encoder`` and of every head."""
        networks = {"encoder": self.encoder, **self.heads}
        trees = {n: net.init(rng.named(key, n)) for n, net in networks.items()}
        return {n: t[0] for n, t in trees.items()}, {n: t[1] for n, t in trees.items()}

    def embed(
        self, params: Any, extra: Any, images: jax.Array, *, train: bool, views: int = 1,
        layers: tuple[str, ...] = (),
    ) -> tuple[dict[str, jax.Array], Any]:  # fmt: skip
        """``pooled``, maps, what the heads give (b, d) f32 by name, and the new extra."""
        vectors, extra = super().embed(
            params, extra, images, train=train, views=views, layers=layers
        )
        x = vectors["pooled"]
        for name, head in self.heads.items():
            x, stats = head.apply(params[name], extra[name], x, train=train, views=views)
            extra = {**extra, name: stats}
            vectors[name] = x.astype(jnp.float32)
        return vectors, extra

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """Take an encoder with its statistics, and nothing else."""
        params, extra, report = super().adopt(earlier, params, extra)
        return params, extra, f"{report}; heads start anew"


class TwoViewsConfig(VectorsConfig, place="objective"):
    """Settings of the encoder and of two views of each image.

    Attributes:
      view1, view2: of each image, of one side and of the same pixels.

    """

    view1: ViewConfig = MOCO
    view2: ViewConfig = MOCO

    def check(self) -> None:
        super().check()
        for name in ("side", "mean", "std"):
            value, expected = getattr(self.view2, name), getattr(self.view1, name)
            if value != expected:
                raise Refused(f"view2.{name}", f"view1's {expected}", value)


class TwoViewsObjective(VectorsObjective):
    """A method that compares the vectors of two views of an image."""

    def __init__(self, cfg: TwoViewsConfig) -> None:
        super().__init__(cfg, cfg.view1)
        self._views = {"view1": cfg.view1, "view2": cfg.view2}

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``view1`` and ``view2`` (b, S, S, 3) f32, normalised, with draws of their own."""
        return {
            name: make_view(batch, rng.named(key, name), view)["image"]
            for name, view in self._views.items()
        }

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Both views."""
        del params, extra
        views = self.views(batch, key)
        return {"view 1": self.pixels(views["view1"]), "view 2": self.pixels(views["view2"])}
