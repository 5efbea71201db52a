"""How an evaluation measures."""

from typing import Literal

from dsad.core.config import Refused, Settings, field
from dsad.core.paths import is_remote
from dsad.evaluation import metrics
from dsad.evaluation.morphology import Morphology
from dsad.evaluation.preprocessing import Method, Preprocessing

#: Further numbers by kind, with what the stamp says of them.
FURTHER = {
    "anomalous": {
        "pixel_auroc_anomalous": "pixels of anomalous images alone",
        "pixel_ap_anomalous": "pixels of anomalous images alone",
    },
    "partial": {
        "pixel_auroc_partial_05": "up to an FPR of 0.05, standardised by McClish: chance has 0.5",
    },
    "visa": {
        "image_aupr_visa": "trapezoids between all points of precision and recall",
        "pixel_auroc_visa": "202 thresholds, strictly above, 4 digits",
        "pixel_aupr_visa": "202 thresholds, strictly above, trapezoids, 4 digits",
    },
}  # fmt: skip
ABOUT_FURTHER = {name: text for kind in FURTHER.values() for name, text in kind.items()}

#: Rules of one threshold, see ``evaluation.rules``.
Rule = Literal["bound", "sigma", "superadd"]


class EvalConfig(Settings, place="evaluation"):
    """How numbers are measured; everything here that changes their meaning is in the stamp.

    Attributes:
      image_size: height in pixels of the network's input; `dsad evaluate` takes 0 for the side of
        the backbone's own.
      image_width: width of the input; 0: as its height.
      resize: how images become inputs: "stretched", "longer" fits them in with their aspect,
        "shorter" fills the input with their middle, "windows" cuts them into as many as it takes.
      crop: share of the sides of the resized image that the input shows, with "stretched" and
        "shorter".
      overlap: pixels that a window shows beyond those that it decides of, at least.
      scale: of images in windows: pixels of the resized image for one of the image.
      batch_size: images per device step over the whole mesh; rounded up to a multiple of its
        devices.
      align_corners: cell centres (False) or corner cells (True) are placed at the border when
        upsampling.
      fpr_limit: AUPRO integrates up to this false-positive rate; 0.05 is always measured as well.
      method: pixel numbers by sorting ("exact") or by counting ("streaming"), within 1e-5 of each
        other.
      further: numbers beside the usual ones: "anomalous", pixel AUROC and AP without the normal
        images, which flatters; "partial", pixel AUROC up to an FPR of 0.05
        (``metrics.partial_auroc``); "visa", numbers as VisA's code counts them (``metrics.visa``),
        and the trapezoidal area under precision and recall of images.
      gallery: anomalous images per category kept for the report: a third each best, median and
        worst.
      workers: threads that read, decode and resize.
      false_alarm_rate: share of normal images (and of their pixels) that the thresholds may flag;
        0: no thresholds.
      holdout: with a false-alarm rate, where the data set has no validation images to set the
        thresholds: 1/holdout of the training images, or as many as the rate needs, at most half,
        are scored by a second fit without them and set the thresholds.
      decisions: rules that set one threshold of maps each from the same normal images; F1 of
        pixels and of images at it is measured, see ``evaluation.rules``. "bound" keeps to the
        false-alarm rate, "sigma" is mean + ``sigmas`` standard deviations, "superadd" SuperADD's.
      sigmas: of the rule "sigma".
      morphology: what becomes of the pixels above such a threshold before they are counted.
      save_maps: save every anomaly map on original pixels: float32 TIFF, or 16-bit PNG with its
        scale.
      cache_mb: features of one category that stay on the devices for further passes and seeds, in
        MiB.
      recalibrate: the batch norms of the encoder get the mean and variance of the images that the
        detector is fitted on, for each category and seed; see ``evaluation.recalibration``.
      feature_cache: folder that keeps features for other detectors, scores and runs; empty: they
        are not kept.
      cache_layers: with a feature cache: maps and class tokens that it keeps beside those of the
        detector, so that detectors of other layers find theirs.

    """

    image_size: int = field(224, at_least=0)
    image_width: int = field(0, at_least=0)
    resize: Method = "stretched"
    crop: float = field(1.0, above=0, at_most=1)
    overlap: int = field(32, at_least=0)
    scale: float = field(1.0, above=0)
    batch_size: int = field(32, at_least=1)
    align_corners: bool = False
    fpr_limit: float = field(0.3, above=0, at_most=1)
    method: metrics.Method = "exact"
    further: tuple[Literal["anomalous", "partial", "visa"], ...] = field((), distinct=True)
    gallery: int = field(9, at_least=0)
    workers: int = field(4, at_least=1)
    false_alarm_rate: float = field(0.0, at_least=0, below=1)
    holdout: int = field(5, at_least=2)
    decisions: tuple[Rule, ...] = field((), distinct=True)
    sigmas: float = field(3.0, above=0)
    morphology: Morphology = Morphology()
    save_maps: Literal["none", "tiff", "png"] = "none"
    cache_mb: int = field(1024, at_least=0)
    recalibrate: bool = False
    feature_cache: str = ""
    cache_layers: tuple[str, ...] = field((), distinct=True)

    def check(self) -> None:
        if is_remote(self.feature_cache):
            raise Refused("feature_cache", "a folder of this machine", self.feature_cache)
        try:  # its keys have the same names here
            if self.image_size:
                _ = self.preprocessing
            else:
                Preprocessing(method=self.resize, crop=self.crop, scale=self.scale, overlap=0)
        except Refused as fault:
            raise Refused(*fault.args) from None
        for kind, why in (("visa", "Its thresholds are percentiles."), ("partial", "It sorts.")):
            if kind in self.further and self.method != "exact":
                expected = f'"exact" with config.evaluation.further="{kind}"'
                raise Refused("method", expected, self.method, why)
        if self.decisions and not self.false_alarm_rate:
            raise Refused(
                "false_alarm_rate", "a share above 0 with evaluation.decisions",
                self.false_alarm_rate,
                "Normal images are then scored, from which every rule takes its threshold.",
            )  # fmt: skip

    @property
    def preprocessing(self) -> Preprocessing:
        """From file pixels to the network's input and back."""
        return Preprocessing(
            height=self.image_size, width=self.image_width or self.image_size, method=self.resize,
            crop=self.crop, overlap=self.overlap, scale=self.scale,
        )  # fmt: skip

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of one row of numbers; the last follow the limits and the decisions."""
        kinds = ("auroc", "ap", "f1_max")
        names = [f"{unit}_{kind}" for unit in ("image", "pixel") for kind in kinds]
        names += [metrics.aupro_key(limit) for limit in self.fpr_limits]
        return (
            *names,
            *(f"{u}_f1_{r}" for r in self.decisions for u in ("pixel", "image")),
            *(name for kind in FURTHER if kind in self.further for name in FURTHER[kind]),
        )

    @property
    def about_further(self) -> dict[str, str]:
        """What the further numbers are, for the stamp."""
        return {name: text for kind in self.further for name, text in FURTHER[kind].items()}

    @property
    def fpr_limits(self) -> tuple[float, ...]:
        """The chosen limit, and the strict one of newer data sets."""
        return tuple(dict.fromkeys((self.fpr_limit, 0.05)))
