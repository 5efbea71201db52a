"""What a fitted model says of one image: score, percentile, decision, regions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.evaluation import thresholds
from dsad.evaluation.regions import Region, regions
from dsad.evaluation.report import figures, gallery

#: Below every score, which is float32, and a number in JSON, too.
_LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one image.

    Attributes:
      score: higher is more anomalous; its unit is the detector's.
      map: (h, w) float32 scores on the pixels of the image.
      percentile: how many of 100 held-out normal images score lower; None for a model without
        thresholds.
      flagged: whether the score is above the threshold; None without one.
      regions: where the map is above ``region_threshold``, the highest peak first.
      region_threshold: at most the rate's share of normal images has a pixel above it; None for a
        model without thresholds, which has no regions.

    """

    score: float
    map: np.ndarray
    percentile: float | None
    flagged: bool | None
    regions: tuple[Region, ...]
    region_threshold: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Thresholds at a false-alarm rate, from the scores of held-out normals that a model keeps.

    ``image`` is that of scores. ``region`` is that of maps: at most the same share of normal images
    has a pixel above it. ``bound`` is the share of false alarms that both keep to; it exceeds
    ``rate`` where too few images were held out. All but a chosen ``image`` are None without
    held-out normals.
    """

    row: Mapping[str, Any] | None
    rate: float | None = None
    image: float | None = None
    region: float | None = None
    bound: float | None = None
    chosen: bool = False

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any] | None,
        rate: float | None = None,
        threshold: float | None = None,
    ) -> "Decision":
        """Thresholds at the rate of a row of ``thresholds.measure``, at another, or a chosen one.

        With a chosen ``threshold`` the share of held-out normals above it is the rate of regions;
        without held-out normals there are none. Raises ConfigError for both, for a rate outside
        (0, 1), and for one without held-out normals.
        """
        if rate is not None and threshold is not None:
            raise ConfigError("rate, threshold: expected one of them, found both.")
        if threshold is not None and not abs(threshold) <= -_LOWEST:  # nor nan
            raise Refused("threshold", "a finite score", threshold)
        if row is None:
            if rate is not None:
                raise ConfigError(
                    "rate: the model was fitted without held-out images. Give a threshold, or fit "
                    "it again with config.evaluation.false_alarm_rate above 0."
                )
            return cls(row=None, image=threshold, chosen=threshold is not None)
        if rate is not None and not 0 < rate < 1:
            raise Refused("rate", "a share of false alarms in (0, 1)", rate)
        scores, maxima, weights = row["scores"], row["maxima"], row["weights"]
        share: float = row["rate"] if rate is None else rate
        image, bound = thresholds.image_threshold(scores, share, weights)
        chosen = threshold is not None
        if threshold is not None:
            image, bound = threshold, thresholds.exceeding(scores, threshold, weights)
            share = bound
        region = thresholds.image_threshold(maxima, share, weights).value if share < 1 else _LOWEST
        return cls(
            row=row, rate=share, image=image, region=float(region), bound=bound, chosen=chosen
        )

    @property
    def normals(self) -> int:
        """How many were held out."""
        return len(self.row["scores"]) if self.row else 0

    @property
    def largest(self) -> float:
        """The highest score of a held-out normal."""
        assert self.row is not None
        return max(self.row["scores"])

    def __str__(self) -> str:
        if self.row is None:
            if self.chosen:
                return f"threshold {self.image:.4g} as chosen, nothing was held out"
            return "no threshold: nothing was held out"
        if self.chosen:
            above = sum(score > (self.image or 0) for score in self.row["scores"])
            return (
                f"threshold {self.image:.4g} as chosen, {above} of {self.normals} held-out above it"
            )
        about = {**self.row, "rate": self.rate, "image_bound": self.bound}
        return f"threshold {self.image:.4g}, false alarms at most {thresholds.at_rate(about)}"

    def predict(self, score: float, scores: np.ndarray) -> Prediction:
        """For an image of this score with the map ``scores`` (h, w)."""
        flagged = None if self.image is None else score > self.image
        if self.row is None or self.region is None:
            return Prediction(
                score=score, map=scores, percentile=None, flagged=flagged, regions=(),
                region_threshold=None,
            )  # fmt: skip
        return Prediction(
            score=score,
            map=scores,
            percentile=thresholds.percentile(self.row["scores"], score, self.row["weights"]),
            flagged=flagged,
            regions=regions(scores, self.region),
            region_threshold=self.region,
        )


def overlay(
    image: np.ndarray, scores: np.ndarray, scale: Mapping[str, float], region: float | None
) -> np.ndarray:
    """A picture (h, w, 3) uint8 under the colours of its map, with the contour at a threshold.

    ``scores`` may be of another size; ``scale`` is that of normal images, without one the map's.
    """
    if not scale:
        scale = {"median": float(np.median(scores)), "p99_9": float(scores.max())}
    drawn = figures.overlay(image, gallery.to_units(scores, scale))
    if region is None:
        return drawn
    mask = PIL.Image.fromarray((scores > region).astype(np.uint8) * 255)
    size = (image.shape[1], image.shape[0])
    # Shrunk by the mean, so that the smallest region keeps a contour.
    wide = np.asarray(mask.resize(size, PIL.Image.Resampling.BOX)) > 0
    return figures.outline(drawn, wide)
