"""Further pictures of the gallery's cases, by a detector that ``HasPanels``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dsad.core.detection import Detector, HasPanels
from dsad.core.types import Source
from dsad.evaluation.batches import batches
from dsad.evaluation.compiled import Device
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.report import gallery
from dsad.evaluation.scored import Scored
from dsad.evaluation.support import subset

#: Longest side of the pictures in pixels.
SIDE = 320
#: Keys of the scales, before the name of a panel: a value of the detector's, or of the cases.
FIXED, SHOWN = "panel_top/", "panel_p99_9/"


def pictures(
    device: Device,
    detector: Detector,
    config: EvalConfig,
    category: str,
    source: Source,
    scored: Scored,
    cases: Mapping[str, Sequence[int]],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Panels of the cases, by another run of the network over just these, for ``gallery.npz``.

    They are decoded only where scoring decoded nothing, or another process did.

    Returns arrays ``panel/<name>/<category>/<number>`` in the aspect of the original image, at
    most 320 px: (h, w, 3) uint8 pixels, or (h, w) uint8 values where 255 is the top of the panel's
    scale and what lies above it; and these tops, under ``FIXED`` or ``SHOWN`` and the name.
    """
    numbers = sorted({n for section in cases.values() for n in section})
    if not isinstance(detector, HasPanels):
        return {}, {}
    found: dict[str, list[np.ndarray]] = {}
    shapes: dict[int, tuple[int, int]] = {}  # of this process's images
    shown = subset(source, [source.records[n].path for n in numbers])
    inputs = {source.records[n].path: seen for n, seen in scored.inputs.items()}
    passes = (shown, config, device.mesh, device.batch, device.panel_store)
    for host in batches(*passes, inputs=inputs):
        for name, values in device.panels(host).items():
            found.setdefault(name, []).extend(values[: int(host.valid.sum())])
        shapes.update(zip(host.index[host.own].tolist(), host.shapes, strict=True))
    sizes = [gallery.fit(shape, SIDE) for shape in device.hosts.listed(shapes)]
    arrays: dict[str, np.ndarray] = {}
    tops: dict[str, float] = {}
    # Pixels first, then by name: programs return their results in no order of the detector's.
    for name, values in sorted(found.items(), key=lambda item: (-item[1][0].ndim, item[0])):
        top = 1.0
        if values[0].ndim == 2:
            fixed = detector.panel_tops.get(name)
            top = float(np.quantile(np.stack(values), 0.999)) if fixed is None else fixed
            tops[f"{SHOWN if fixed is None else FIXED}{name}"] = top
        for number, size, value in zip(numbers, sizes, values, strict=True):
            arrays[f"panel/{name}/{category}/{number}"] = _picture(value / (top or 1.0), size)
    return arrays, tops


def _picture(value: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values or pixels in [0, 1] as uint8 of ``size`` (width, height)."""
    levels = PIL.Image.fromarray(np.round(np.clip(value, 0, 1) * 255).astype(np.uint8))
    return np.asarray(levels.resize(size, PIL.Image.Resampling.BILINEAR))


def names(arrays: Mapping[str, Any]) -> list[str]:
    """The panels that a gallery has, in its order."""
    return list(dict.fromkeys(n.split("/")[1] for n in arrays if n.startswith("panel/")))


def legend(tops: Mapping[str, float]) -> list[str]:
    """What the colours of each panel of values mean, from a mapping that has its top."""
    texts = []
    for key, top in tops.items():
        if key.startswith(FIXED):
            texts.append(f"{key.removeprefix(FIXED)} from 0 to {top:g}")
        if key.startswith(SHOWN):
            text = f"{key.removeprefix(SHOWN)} from 0 to {top:.4g}, the 99.9th percentile"
            texts.append(f"{text} over the pictured images")
    return texts
