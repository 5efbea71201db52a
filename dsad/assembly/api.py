"""What ``import dsad`` offers: fit, load, pretrain, evaluate, and what they give and raise."""

import functools
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console

from dsad.assembly import evaluate as evaluation
from dsad.assembly import pictures, training, workdir
from dsad.assembly.fit import FALSE_ALARM_RATE, fitted_model
from dsad.assembly.model import FittedModel
from dsad.core.errors import ConfigError, DsadError, StoppedError
from dsad.core.types import Progress, silent
from dsad.evaluation.predictions import Prediction
from dsad.evaluation.results import Results
from dsad.terminal import console, flags

__all__ = ["DsadError", "FittedModel", "Prediction", "evaluate", "fit", "load", "pretrain"]

#: An image: the path of a file, or pixels (h, w, 3) uint8 RGB.
Image = str | os.PathLike[str] | np.ndarray
#: A file with variants, "configs/patchcore.py:published" or short "patchcore:published" for those
#: that come with dsad, or nested keys. Of the demo's, which is for both, each takes its part.
Config = str | os.PathLike[str] | Mapping[str, Any]


def fit(
    images_or_root: str | os.PathLike[str] | Sequence[Image],
    *,
    backbone: str,
    weights: str | os.PathLike[str] = "",
    detector: str = "patchcore",
    category: str = "images",
    false_alarm_rate: float = FALSE_ALARM_RATE,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> FittedModel:
    """Fit a detector to normal images, and set its thresholds by a second fit without some of them.

    Args:
      images_or_root: a folder of good pictures (those in folders below it, too), a pattern, or a
        sequence of paths and arrays (h, w, 3) uint8.
      backbone: an architecture such as "resnet18", or "run:DIR" of a pretraining run.
      weights: of an architecture: a file, a directory, "hf:OWNER/NAME", "imagenet", or "random"
        for an untrained one; a run has its own.
      detector: a module of ``dsad.detectors``.
      category: a name for what the pictures show.
      false_alarm_rate: the share of normal images that may be flagged; 0: no thresholds, which a
        single image cannot set.
      settings: further keys as on the command line, such as {"detector.bank_fraction": 0.01}.
      progress: called with images done, images in all, and what is going on.

    Raises ConfigError for a key, name or value that does not exist, DataError for images that
    cannot be read or are too few.

    """
    config = evaluation.default_config(detector)
    given = {
        "backbone": backbone, "weights": os.fspath(weights), "data.name": "folder",
        "evaluation.false_alarm_rate": false_alarm_rate,
    }  # fmt: skip
    if isinstance(images_or_root, (str, os.PathLike)):
        given["data.root"] = os.fspath(images_or_root)
        images: Sequence[Any] = pictures.matching([os.fspath(images_or_root)])
    else:
        images = list(images_or_root)
        if not images:
            raise ConfigError("images: expected good pictures, found none.")
    flags.update(config, {**given, **(settings or {})})
    cfg, _ = evaluation.parse(config)
    dataset = pictures.dataset(images, category, cfg.data)
    return fitted_model(evaluation.prepare(config, _quiet(), dataset), progress)


def load(directory: str | os.PathLike[str], category: str = "") -> FittedModel:
    """A model that ``FittedModel.save``, ``dsad fit`` or ``dsad evaluate --save-model`` wrote.

    ``category`` may be left out where there is only one. Raises WorkdirError for what is not there,
    damaged or of another format, ConfigError for a category that is not in it.
    """
    return FittedModel.load(directory, category)


def pretrain(
    config: Config,
    place: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """Train an encoder on normal images; returns its backbone, "run:DIR", for fit and evaluate.

    Args:
      config: such as "ds2:small"; see ``Config``.
      place: directory of the run: config, checkpoints, metrics.
      settings: keys to change, such as {"data.root": "pics/good", "steps": 400}.
      resume: continue the run in it.
      overwrite: replace the run in it.

    Raises ConfigError, DataError and WorkdirError as ``dsad pretrain`` ends with them, StoppedError
    where Ctrl-C ended it after saving.

    """
    chosen, out = _config(config, "pretrain", settings), console.console()
    place = os.fspath(place)
    claim = functools.partial(
        workdir.claim, place, "pretrain", chosen.to_dict(), resume=resume, overwrite=overwrite
    )
    claim(dry=True)
    prepared = training.prepare(chosen, out, continued=resume and workdir.has_checkpoint(place))
    path = claim(info=prepared.run.info)
    if not training.pretrain(prepared, path, out, resume=resume):
        raise StoppedError(f"{path}: stopped and saved. Go on with resume=True.")
    return f"run:{place}"


def evaluate(
    config: Config,
    place: str | os.PathLike[str] = "",
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Results:
    """Measure how well a backbone localizes defects; all numbers are in ``Results``.

    Args:
      config: such as "patchcore"; see ``Config``.
      place: directory for results and pictures, as ``dsad report`` takes it; empty: nothing is
        written.
      settings: keys to change, such as {"backbone": "run:runs/ds2"}.
      overwrite: replace the evaluation in it.
      progress: called with images done, images in all, and what is going on; without a directory.

    Raises ConfigError, DataError and WorkdirError as ``dsad evaluate`` ends with them.

    """
    chosen = _config(config, "evaluate", settings)
    claim = functools.partial(
        workdir.claim, os.fspath(place), "evaluate", chosen.to_dict(), overwrite=overwrite
    )
    if place:
        claim(dry=True)
    parts = evaluation.prepare(chosen, _quiet())
    if not place:
        return evaluation.localized(parts, progress)
    return evaluation.evaluate(parts, claim(), _quiet())


def _config(
    config: Config, part: str, settings: Mapping[str, Any] | None
) -> ml_collections.ConfigDict:
    chosen: Any
    if isinstance(config, (str, os.PathLike)):
        chosen = flags.Command("config", "", config=os.fspath(config)).parse([])[0]
    else:
        chosen = ml_collections.ConfigDict(config).lock()
    chosen = chosen.get(part, chosen)
    flags.update(chosen, settings or {})
    return chosen


def _quiet() -> Console:
    return Console(file=io.StringIO())
