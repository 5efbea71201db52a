"""Settings of ADPretrain; see ``objectives.adpretrain``."""

from typing import Literal

from dsad.augment.corruptions import ShapesConfig
from dsad.core.config import Refused, Settings, field, listed
from dsad.models import registry
from dsad.models.transformer import Remat
from dsad.ops.residual import Radius


class LookConfig(Settings, place="objective.look"):
    """How the look of a view is changed; nothing moves, so that views share one mask.

    Attributes:
      jitter: brightness, contrast, saturation (relative) and hue (turns, at most 0.5).
      jitter_probability: of the change of colours.
      grey_probability: of a view without colours.
      blur: sigma of the Gaussian in pixels, from and to.
      blur_probability: of the blur.

    """

    jitter: tuple[float, float, float, float] = field((0.4, 0.4, 0.4, 0.1), at_least=0)
    jitter_probability: float = field(0.8, within=(0, 1))
    grey_probability: float = field(0.2, within=(0, 1))
    blur: tuple[float, float] = field((0.1, 2.0), above=0, rising=True)
    blur_probability: float = field(0.5, within=(0, 1))


class Config(Settings, place="objective"):
    """Settings of the method.

    Attributes:
      arch: architecture of the frozen encoder, see ``models.backbone``; its weights come from
        ``init_from``.
      layers: maps with a projector each.
      side: pixels of the square images that the encoder sees, whole images stretched.
      tokens: most cells of a map a side; finer maps are averaged.
      references: numbers of reference images, of which every step draws one.
      centre_references: reference images in the pass that measures the centres.
      centre_momentum: 0 keeps the centres of raw residual features, as released; else they follow
        projected normal cells by an exponential average that keeps so much.
      encode: "once" computes the encoder's maps before the first step and keeps them; "every_step"
        draws new views all the time, as released.
      variants: pairs of views of every image that are kept.
      plain: one of the two views is the image as it is, as the paper says; else both are changed,
        as released.
      anomalies: "real" ones with masks, or "synthetic" ones, drawn into images that are all normal.
      labels: which cells are defects: by "area", or "released": by area for the angle loss, but
        by 32 pixels whatever the patch, and by one corner pixel for the norm loss.
      defect_pixels: of a patch of 14 × 14 pixels, above which a cell is a defect.
      temperature: of the angle loss.
      shell, margin: radii of the norm loss: of the shell, and from there to defects.
      radius: see ``ops.residual.radius``.
      angle, norm: weights of the two losses.
      slots: learned reference vectors of a projector.
      heads: of its attention.
      remat: what the projectors keep for the backward pass, see ``models.transformer.POLICIES``.
      dtype: compute type of encoder and projectors; parameters, matching and losses stay f32.
      stored: type of maps that are kept.

    """

    arch: str = "vit_base_patch14_dinov2"
    layers: tuple[str, ...] = field(
        ("block2", "block5", "block8", "block11"), distinct=True, filled=True
    )
    side: int = field(224, at_least=16)
    tokens: int = field(16, at_least=1)
    references: tuple[int, ...] = field((1, 4, 8), at_least=1, distinct=True, filled=True)
    centre_references: int = field(4, at_least=1)
    centre_momentum: float = field(0.0, at_least=0, below=1)
    encode: Literal["once", "every_step"] = "once"
    variants: int = field(1, at_least=1)
    plain: bool = True
    anomalies: Literal["real", "synthetic"] = "real"
    labels: Literal["area", "released"] = "area"
    defect_pixels: float = field(32.0, at_least=0)
    temperature: float = field(0.15, at_least=0.03)
    shell: float = field(0.4, above=0)
    margin: float = field(0.75, at_least=0)
    radius: Radius = "released"
    angle: float = field(1.0, at_least=0)
    norm: float = field(1.0, at_least=0)
    slots: int = field(2048, at_least=1)
    heads: int = field(16, at_least=1)
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    look: LookConfig = LookConfig()
    shapes: ShapesConfig = ShapesConfig(sources=("own", "noise"))

    def check(self) -> None:
        known = registry.family_of(self.arch).strides(self.arch)
        if not set(self.layers) <= set(known):
            raise Refused("layers", f"some of {listed(known)}", self.layers)
        if self.anomalies == "synthetic":
            self.shapes.fits(self.side)
            if "other" in self.shapes.sources:
                advice = "What is kept of an image must not depend on the others of its batch."
                raise Refused("shapes.sources", "own and noise alone", self.shapes.sources, advice)
