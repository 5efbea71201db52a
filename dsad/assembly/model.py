"""Fitted models: what an evaluation measured or ``dsad fit`` fitted, ready for other images.

DIR/model.json                   format, config, stamp, looks of the normal images; thresholds,
                                 scales and digests by category
DIR/backbone-0.safetensors       the network, or one for each category
DIR/fitted-CATEGORY.safetensors  banks of map wrappers and the detector's state
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from dsad import models
from dsad.assembly import pictures, runs
from dsad.assembly.pretrain import parse as parse_run
from dsad.assembly.saving import DIGEST, FORMAT, INDEX, Writer, digest
from dsad.core import config as core_config
from dsad.core import paths
from dsad.core.detection import Detector, MapWrapper, Prepares
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.tree import rebuilt
from dsad.core.types import Backbone, HasEncoder, RunInfo, Source
from dsad.evaluation.batches import Picture
from dsad.evaluation.compiled import Device, Fitted
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.predictions import Decision, Prediction, overlay
from dsad.evaluation.reader import Reader
from dsad.evaluation.results import Results
from dsad.evaluation.scored import ScoredImage, stream
from dsad.models import wrappers


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FittedModel:
    """A network, a detector and what was fitted to normal images, for one or more categories.

    ``title`` is a category or "all categories"; ``category`` is the one whose thresholds decide.
    ``thresholds`` (``thresholds.measure`` by seed) and ``scales`` are by category, as in
    ``Results``, and so is ``normals``, the looks of the normal images; without held-out images
    there are no thresholds. ``config`` is that of the fit.
    """

    title: str
    category: str
    backbone: Backbone
    detector: Detector
    map_wrappers: Mapping[str, MapWrapper]
    evaluation: EvalConfig
    fitted: Fitted
    categories: tuple[str, ...]
    thresholds: Mapping[str, Any]
    scales: Mapping[str, Any]
    normals: Mapping[str, Any]
    config: Mapping[str, Any]
    stamp: Mapping[str, Any]

    def __repr__(self) -> str:
        detector = type(self.detector).__name__
        return f"FittedModel({self.title!r}, {detector} on {self.config['backbone']})"

    @classmethod
    def load(cls, directory: str | epath.PathLike, category: str = "") -> "FittedModel":
        """One of the models in a directory.

        ``category`` may be left out where there is only one. Raises WorkdirError for what is not
        there or damaged, ConfigError for a category that is not in it.
        """
        return Saved.read(directory).model(category)

    def save(self, directory: str | epath.PathLike, *, overwrite: bool = False) -> None:
        """Write the model into a directory; one that is there needs ``overwrite``.

        Raises WorkdirError for a directory that holds anything else, or cannot be written.
        """
        writer = Writer(os.fspath(directory), overwrite=overwrite)
        results = Results(
            stamp=dict(self.stamp), thresholds=dict(self.thresholds), scales=dict(self.scales)
        )
        writer.keep(self.title, self.categories, self.backbone, self.fitted, results)
        writer.finish(self.config, results, self.normals)

    def decision(self, rate: float | None = None, threshold: float | None = None) -> Decision:
        """The thresholds at the model's false-alarm rate, or at another, without fitting again.

        Raises ConfigError as ``Decision.of`` does, and where no category of several is chosen.
        """
        if self.thresholds and self.category not in self.thresholds:
            raise ConfigError(
                "category: expected one, whose thresholds decide, of "
                f"{core_config.listed(self.categories)}. Load the model with it."
            )
        by_seed = self.thresholds.get(self.category, {})
        return Decision.of(next(iter(by_seed.values()), None), rate, threshold)

    def predict(
        self,
        image: str | os.PathLike[str] | np.ndarray,
        *,
        rate: float | None = None,
        threshold: float | None = None,
    ) -> Prediction:
        """Score one image, the path of a file or (h, w, 3) uint8, and decide as ``decision`` says.

        Raises DataError for what cannot be read.
        """
        decision = self.decision(rate, threshold)
        ((found,),) = (
            images for images, _ in self.stream(self._source([image]), batch=1) if images
        )
        return decision.predict(found.score, self.original(found))

    def overlay(
        self, image: str | os.PathLike[str] | np.ndarray, prediction: Prediction
    ) -> np.ndarray:
        """An image under its map, with the contour of its regions: (h, w, 3) uint8 RGB.

        Colours are those of ``dsad predict``, by the scores of normal images.
        """
        scale = self.scales.get(self.category, {})
        pixels = self._source([image])[0].image
        return overlay(pixels, prediction.map, scale, prediction.region_threshold)

    def score(
        self, images: Sequence[str | os.PathLike[str] | np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Scores (n,) f32 of images as ``predict`` takes them, and maps (h, w) f32 on their pixels.

        Batches are those of the fit: faster than one by one, and all maps are held.
        """
        scores, maps = [], []
        batch = self.evaluation.batch_size
        for found, _ in self.stream(self._source(images), batch=batch):
            scores += [x.score for x in found]
            maps += [self.original(x) for x in found]
        return np.asarray(scores, np.float32), maps

    def _source(self, images: Sequence[Any]) -> Source:
        return pictures.source(images, lossy=tuple(self.config["data"]["lossy"]))

    def stream(
        self, source: Source, *, batch: int, picture: Picture | None = None
    ) -> Iterator[tuple[list[ScoredImage], int]]:
        """Batches of a source as ``scored.stream`` gives them; nothing is kept."""
        if batch not in self._devices:
            self._devices[batch] = self._device(batch)
        device, fitted = self._devices[batch]
        reader = Reader(device, self.evaluation)
        yield from stream(reader, fitted, source, "images", picture=picture)

    def original(self, image: ScoredImage) -> np.ndarray:
        """The map of an image of ``stream`` on its pixels (h, w)."""
        return image.original(self.evaluation.preprocessing)

    @functools.cached_property
    def _devices(self) -> dict[int, tuple[Device, Fitted]]:
        return {}

    def _device(self, batch: int) -> tuple[Device, Fitted]:
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        config = dataclasses.replace(self.evaluation, batch_size=batch, feature_cache="", gallery=0)
        wrapped = tuple(self.map_wrappers.values())
        device = Device(self.backbone, self.detector, config, mesh, wrapped)
        return device, device.place(self._ready)

    @functools.cached_property
    def _ready(self) -> Fitted:
        """What was fitted, on the device; what its scores need again and again is computed once."""
        fitted = jax.tree.map(jnp.asarray, self.fitted)
        if isinstance(self.detector, Prepares):
            fitted = fitted._replace(state=self.detector.prepared(fitted.state))
        return fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The models in a directory, read when they are asked for."""

    directory: epath.Path
    index: Mapping[str, Any]

    @classmethod
    def read(cls, directory: str | epath.PathLike) -> "Saved":
        """Raises WorkdirError for a directory without models, or with those of another format."""
        folder = paths.directory(directory)
        try:
            index = json.loads((folder / INDEX).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise WorkdirError(
                f"{folder}: no fitted model there ({INDEX} is missing). Make one with "
                "dsad fit --out=DIR or dsad evaluate --save-model=DIR."
            ) from None
        except (OSError, ValueError) as error:
            raise WorkdirError(
                f"{folder / INDEX}: not readable as JSON: {error}. Copy it again, or fit again."
            ) from error
        form = index.get("format") if isinstance(index, dict) else None
        if form != FORMAT:
            raise WorkdirError(
                f"{folder}: a model of format {form}, expected {FORMAT}. Fit it again with dsad "
                "fit --out=DIR or dsad evaluate --save-model=DIR, or use the dsad that wrote it."
            )
        if index.pop(DIGEST, None) != digest(index):
            raise _damaged(folder / INDEX)
        return cls(directory=folder, index=index)

    def config(self) -> dict[str, Any]:
        """Nested keys and values of the evaluation that fitted them."""
        return core_config.tuples(self.index["config"])

    @property
    def stamp(self) -> Mapping[str, Any]:
        """Of the evaluation that fitted them."""
        return self.index["stamp"]

    @property
    def sha256(self) -> str:
        """Tells these models from all others, whatever they were fitted to, with thresholds."""
        return digest([self.index["sha256"], self.index["categories"]])

    @property
    def shares_backbone(self) -> bool:
        """Whether all models have one network."""
        return len(self.index["backbones"]) == 1

    def titles(self) -> tuple[str, ...]:
        """Of the models: a category, or all of them together."""
        return tuple(self.index["categories"])

    @property
    def category(self) -> str:
        """The only one, or "" of several."""
        names = [c for row in self.index["categories"].values() for c in row["categories"]]
        return names[0] if len(names) == 1 else ""

    @property
    def contents(self) -> frozenset[str]:
        """Of the images that they could be fitted on, see ``heldout.contents``."""
        return frozenset(c for row in self.index["normals"].values() for c in row["contents"])

    def backbone(self, title: str) -> Backbone:
        """The network of a model."""
        entry = self.index["backbones"][self.index["categories"][title]["backbone"]]
        params, extra = jax.tree.map(jnp.asarray, self._arrays(entry))
        about = core_config.tuples(entry["about"])
        if entry["kind"] == "network":
            network: Any = models.Backbone(params=params, extra=extra, **about)
        else:
            _, module, method = parse_run(entry["config"])
            info = core_config.build_dataclass(RunInfo, entry["info"], "info")
            objective = runs.frozen(module, method, info.classes)
            encoder = objective.encoder_weights if isinstance(objective, HasEncoder) else None
            network = runs.RunBackbone(
                params=params, extra=extra, function=objective.features, encoder=encoder,
                stored=json.dumps({n: entry[n] for n in ("directory", "config", "info")}), **about,
            )  # fmt: skip
        wrap = wrappers.unwrap(self.index["config"]["backbone"]).images
        return functools.reduce(lambda inner, outer: outer(inner), wrap, network)

    def fitted(self, title: str) -> Fitted:
        """What was fitted, as arrays of the host."""
        tree = self._arrays(self.index["categories"][title])
        return Fitted(tuple(tree["banks"]), tree["state"], tree["statistics"])

    def threshold(self, category: str) -> dict[str, Any]:
        """What set the thresholds of a category; of its fit's test images nothing."""
        rows = self.index["categories"].values()
        by_seed = next(row["thresholds"][category] for row in rows if category in row["categories"])
        return dict(next(iter(by_seed.values())))

    def model(self, category: str = "") -> FittedModel:
        """The model of a category."""
        from dsad.assembly.evaluate import parse

        rows = self.index["categories"]
        titles = [t for t, row in rows.items() if category in ("", t, *row["categories"])]
        if len(titles) != 1:
            raise ConfigError(
                f"{self.directory}: expected a category, found {category!r}. It has: "
                f"{core_config.listed(c for row in rows.values() for c in row['categories'])}. "
                "Name one with --category=NAME, in Python category=NAME."
            )
        config, detector = parse(self.index["config"])
        row, parts = rows[titles[0]], wrappers.unwrap(config.backbone)
        alone = dataclasses.replace(config.evaluation, feature_cache="", gallery=0)
        chosen = category if category in row["categories"] else ""
        if len(row["categories"]) == 1:
            chosen = row["categories"][0]
        return FittedModel(
            title=titles[0], category=chosen, config=self.config(),
            normals=self.index["normals"], backbone=self.backbone(titles[0]), detector=detector,
            map_wrappers=dict(zip(parts.names, parts.maps, strict=True)),
            evaluation=alone, fitted=self.fitted(titles[0]),
            categories=tuple(row["categories"]), thresholds=row["thresholds"],
            scales=row["scales"], stamp=self.index["stamp"],
        )  # fmt: skip

    def _arrays(self, entry: Mapping[str, Any]) -> Any:
        path = self.directory / entry["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WorkdirError(f"{path}: cannot be read ({paths.cause(error)}).") from error
        if hashlib.sha256(data).hexdigest() != self.index["sha256"][entry["file"]]:
            raise _damaged(path)
        return rebuilt(entry["tree"], safetensors.numpy.load(data))


def _damaged(path: epath.Path) -> WorkdirError:
    return WorkdirError(
        f"{path}: damaged (its SHA-256 is wrong). Copy it again, or fit the model again."
    )
