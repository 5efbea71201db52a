"""Fits models to normal images, without measuring them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsad.assembly import evaluate, saving
from dsad.assembly.model import FittedModel
from dsad.core import hosts
from dsad.core.detection import Detector
from dsad.core.errors import ConfigError, StoppedError
from dsad.core.types import Backbone, Progress
from dsad.evaluation.compiled import Fitted
from dsad.evaluation.results import Results
from dsad.models import wrappers

#: The share of normal images that a model may flag, where a config says nothing of it.
FALSE_ALARM_RATE = 0.05


def fit(parts: evaluate.Evaluation, writer: saving.Writer, progress: Progress) -> Results:
    """Fit and write the models of all categories; gives stamp, support sets and thresholds.

    Whatever stops it leaves no half of a model; Ctrl-C raises StoppedError.
    """
    writer.check(parts.detector, parts.backbone, parts.config.seeds)
    try:
        results = evaluate.localized(parts, progress, keep=writer, measured=False)
        evaluate.write_model(writer, parts, results)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; {writer.directory} holds no new model. The same command starts again."
        ) from None
    finally:
        writer.discard()
    return results


@dataclasses.dataclass
class _InMemory:
    """Keeps what is fitted for one title."""

    title: str = ""
    backbone: Any = None
    fitted: Fitted | None = None

    def check(self, detector: Detector, backbone: Backbone | None, seeds: Sequence[int]) -> None:
        saving.check(detector, backbone, seeds)

    def keep(
        self, title: str, categories: Sequence[str], backbone: Any, fitted: Fitted, results: Results
    ) -> None:
        del categories, results
        self.title, self.backbone = title, backbone
        self.fitted = jax.tree.map(lambda x: np.asarray(hosts.whole(x)), fitted)


def fitted_model(parts: evaluate.Evaluation, progress: Progress) -> FittedModel:
    """Fit a model of one category, or one of all of them; raises ConfigError for several models."""
    categories = tuple(parts.sets.by_category)
    if len(categories) > 1 and not parts.sets.sampling.pooled:
        raise ConfigError(
            f"expected images of one category for a model, found {len(categories)}. Fit them one "
            "by one, or with dsad fit."
        )
    kept = _InMemory()
    results = evaluate.localized(parts, progress, keep=kept, measured=False)
    assert kept.fitted is not None
    wrapped = wrappers.unwrap(parts.config.backbone)
    return FittedModel(
        title=kept.title, category=categories[0] if len(categories) == 1 else "",
        backbone=kept.backbone, detector=parts.detector,
        map_wrappers=dict(zip(wrapped.names, wrapped.maps, strict=True)),
        evaluation=parts.config.evaluation, fitted=kept.fitted, categories=categories,
        thresholds=results.thresholds, scales=results.scales, normals=parts.looks(),
        config=parts.stored(), stamp=results.stamp,
    )  # fmt: skip
