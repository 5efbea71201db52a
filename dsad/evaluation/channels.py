"""sPRO of a data set whose defects are known one by one: channels, names and kinds.

Every mask file of an image is a channel, one defect, of which as many pixels count as its
saturation says. As MVTec LOCO AD's numbers are, those of a kind of defect are against all normal
images, and the mean over the kinds stands beside the number of all images together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsad.core.channels import HasChannels
from dsad.core.types import Dataset, Source
from dsad.evaluation import metrics
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.metrics.spro import Units, units

#: Ends the name of a mean over kinds of defect.
KINDS = "_kinds"
#: For the stamp.
PROTOCOL = {
    "channels": "one for each mask file, which is one defect",
    "saturation": "defects_config.json by the value of the file's pixels, at least one pixel; "
    "areas are of inspected pixels",
    "false_positives": "share of the pixels of all images that are free of any channel",
    KINDS.removeprefix("_"): "mean over the kinds of defect, each against all normal images",
}


def of(source: Source) -> HasChannels | None:
    """The source, if it knows every defect by itself."""
    return source if isinstance(source, HasChannels) and source.saturated else None


def known(dataset: Dataset, categories: Iterable[str]) -> bool:
    """Whether sPRO is measured of any category."""
    return any(of(dataset.source("test", category)) for category in categories)


def read(
    source: HasChannels, number: int, mask: np.ndarray | None, window: tuple[slice, slice],
    shape: tuple[int, int],
) -> Units:  # fmt: skip
    """The channels of an image of ``shape`` (h, w) in the ``window`` that is inspected.

    None where its ``mask`` is not known or empty. Raises DataError as the source does.
    """
    found = source.channels(number, shape) if mask is not None and mask.any() else []
    inside = np.broadcast_to(False, shape)[window]
    masks, rules = [c.mask[window] for c in found], [c.saturation for c in found]
    return units([inside], [masks], [rules])[0]


def names(config: EvalConfig) -> tuple[str, ...]:
    """The keys of the numbers that come with channels."""
    keys = [metrics.spro_key(limit) for limit in config.fpr_limits]
    return (*keys, *(f"{name}{KINDS}" for name in ("image_auroc", *keys)))


def completed(
    config: EvalConfig, row: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The numbers of a category and of its kinds with all ``names``, means over kinds included."""
    blank = dict.fromkeys(names(config))
    full = {kind: {**blank, **numbers} for kind, numbers in kinds.items()}
    means = {m: _mean([x[m.removesuffix(KINDS)] for x in full.values()])
             for m in blank if m.endswith(KINDS)}  # fmt: skip
    return {**blank, **row, **means}, full


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if values and len(defined) == len(values) else None
