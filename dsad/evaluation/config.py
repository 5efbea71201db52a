"""How an evaluation measures: its config, and what of it a detector rules out."""

import dataclasses
from typing import Literal

from dsad.core.config import check_options
from dsad.core.errors import ConfigError
from dsad.core.types import Detector
from dsad.evaluation import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How numbers are measured; everything here that changes their meaning is in the stamp."""

    #: Side in pixels of the square network input; `dsad evaluate` takes 0 for the backbone's own.
    image_size: int = 224
    #: Images per device step over the whole mesh; rounded up to a multiple of its devices.
    batch_size: int = 32
    #: Standard deviation of the Gaussian on the upsampled map, in pixels at ``image_size``.
    sigma: float = 4.0
    #: Cell centres (False) or corner cells (True) are placed at the border when upsampling.
    align_corners: bool = False
    #: AUPRO integrates up to this false-positive rate; 0.05 is always measured as well.
    fpr_limit: float = 0.3
    #: Pixel numbers by sorting ("exact") or by counting ("streaming"), within 1e-5 of each other.
    method: metrics.Method = "exact"
    #: Anomalous images per category kept for the report: a third each best, median and worst.
    gallery: int = 9
    #: Threads that read, decode and resize.
    workers: int = 4
    #: Share of normal images (and of their pixels) that the thresholds may flag; 0: no thresholds.
    false_alarm_rate: float = 0.0
    #: With a false-alarm rate, every so manieth training image is kept from the detector.
    holdout: int = 5
    #: Save every anomaly map on original pixels: float32 TIFF, or 16-bit PNG with its scale.
    save_maps: Literal["none", "tiff", "png"] = "none"
    #: Features of one category that stay on the devices for further passes and seeds, in MiB.
    cache_mb: int = 1024
    #: Folder that keeps features for other detectors, scores and runs; empty: they are not kept.
    feature_cache: str = ""

    def __post_init__(self) -> None:
        check_options(self, "evaluation")
        for field in ("batch_size", "workers"):
            if getattr(self, field) < 1:
                raise ConfigError(f"evaluation.{field}: expected ≥ 1, found {getattr(self, field)}")
        for field in ("image_size", "sigma", "gallery", "cache_mb"):
            if getattr(self, field) < 0:
                raise ConfigError(f"evaluation.{field}: expected ≥ 0, found {getattr(self, field)}")
        if not 0 <= self.false_alarm_rate < 1:
            raise ConfigError(
                f"evaluation.false_alarm_rate: expected in [0, 1), found {self.false_alarm_rate}"
            )
        if self.holdout < 2:
            raise ConfigError(
                f"evaluation.holdout: expected ≥ 2 (every second image), found {self.holdout}"
            )
        if not 0 < self.fpr_limit <= 1:
            raise ConfigError(f"evaluation.fpr_limit: expected in (0, 1], found {self.fpr_limit}")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of one row of numbers; the last follow the limits."""
        kinds = ("auroc", "ap", "f1_max")
        names = [f"{unit}_{kind}" for unit in ("image", "pixel") for kind in kinds]
        return (*names, *(metrics.aupro_key(limit) for limit in self.fpr_limits))

    @property
    def fpr_limits(self) -> tuple[float, ...]:
        """The chosen limit, and the strict one of newer data sets."""
        return tuple(dict.fromkeys((self.fpr_limit, 0.05)))


def check_smoothing(detector: Detector, config: EvalConfig) -> None:
    """Refuse a second Gaussian on the maps of a detector that has one of its own."""
    if config.sigma > 0 and detector.traits.smooths:
        raise ConfigError(
            "evaluation.sigma: this detector smooths its maps itself (detector.sigma); expected 0, "
            f"found {config.sigma:g}. Set --config.evaluation.sigma=0."
        )
