"""Fitted models on disk: what an evaluation measured, ready to score other images.

DIR/model.json             format, config, stamp; thresholds, scales and digests by category
DIR/backbone-0.safetensors the network, or one for each category
DIR/CATEGORY.safetensors   what was fitted: banks of map wrappers and the detector's state
"""

import dataclasses
import functools
import hashlib
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from dsad import models
from dsad.assembly import runs, workdir
from dsad.assembly.pretrain import parse as parse_run
from dsad.core import config as core_config
from dsad.core import distributed, hosts, paths
from dsad.core.detection import Detector, MapWrapper
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.tree import named_arrays, rebuilt
from dsad.core.types import Backbone, Record, RunInfo, Sample
from dsad.evaluation.compiled import Device, Fitted
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.reader import Reader
from dsad.evaluation.results import Results
from dsad.evaluation.scored import Scored, score
from dsad.evaluation.stamp import plain
from dsad.models import wrappers

#: Of the files; another one cannot be read.
FORMAT = 1
INDEX = "model.json"
_ADVICE = "Choose another --save-model, or mend this one."
#: What of a network's fields its arrays do not tell.
_NETWORK = (
    "arch", "options", "layers", "mean", "std", "image_size", "interpolation", "crop", "left_out",
    "description",
)  # fmt: skip
_RUN = ("mean", "std", "arch", "image_size", "description", "layers", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedModel:
    """A network, a detector and what was fitted to normal images, for one or more categories.

    ``thresholds`` and ``scales`` are by category, as in ``Results``; without held-out images there
    are no thresholds.
    """

    backbone: Backbone
    detector: Detector
    map_wrappers: Mapping[str, MapWrapper]
    evaluation: EvalConfig
    fitted: Fitted
    categories: tuple[str, ...]
    thresholds: Mapping[str, Any]
    scales: Mapping[str, Any]
    stamp: Mapping[str, Any]

    @classmethod
    def load(cls, directory: str | epath.PathLike, category: str = "") -> "FittedModel":
        """One of the models that ``dsad evaluate --save-model`` wrote.

        ``category`` may be left out where there is only one. Raises WorkdirError for what is not
        there or damaged, ConfigError for a category that is not in it.
        """
        return Saved.read(directory).model(category)

    @functools.cached_property
    def _device(self) -> Device:
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        wrapped = tuple(self.map_wrappers.values())
        return Device(self.backbone, self.detector, self.evaluation, mesh, wrapped)

    def score(self, images: Sequence[np.ndarray]) -> Scored:
        """Image scores (n,) and maps on the pixels of each image (h, w, 3) uint8."""
        device = self._device
        fitted = jax.tree.map(jnp.asarray, self.fitted)
        reader = Reader(device, self.evaluation)
        return score(reader, fitted, _Images(images), "images", lambda n: None, keep=False)


class _Images:
    """Arrays as a source."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = images
        self.records: Sequence[Record] = [
            Record(path=str(i), category="", label=0, kind="good") for i in range(len(images))
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Sample:
        return Sample(record=self.records[index], image=self._images[index], mask=None)


# --- writing


class Writer:
    """Writes the models of an evaluation one by one; the index comes last, so all or none is there.

    Raises WorkdirError if ``directory`` holds anything else, or a model that is not to be replaced;
    one that is stays until the first of the new ones is fitted.
    """

    def __init__(self, directory: str, *, overwrite: bool) -> None:
        self.directory = paths.directory(directory)
        self._index: dict[str, Any] = {"backbones": [], "categories": {}, "sha256": {}}
        self._last: Any = None
        self._overwrite = overwrite
        distributed.on_main(lambda: _clear(self.directory, overwrite, dry=True))

    def check(self, detector: Detector, backbone: Backbone | None, seeds: Sequence[int]) -> None:
        """Refuse what cannot be saved, or must not be; raises ConfigError."""
        if len(seeds) > 1:
            raise ConfigError(
                f"--save-model: expected a fit with a single seed, found config.seeds={seeds}."
            )
        if detector.traits.fits_on == "test":
            raise ConfigError("--save-model: what is fitted on the test images is of no other use.")
        if backbone is not None:
            _recipe(backbone)

    def keep(
        self, title: str, categories: Sequence[str], backbone: Any, fitted: Fitted, results: Results
    ) -> None:
        """Add the model of some categories; every process calls, the first one writes."""
        if not self._index["categories"]:
            distributed.on_main(lambda: _clear(self.directory, self._overwrite))
        if backbone is not self._last:
            self._last, number = backbone, len(self._index["backbones"])
            recipe, tree = _recipe(backbone)
            file = f"backbone-{number}.safetensors"
            entry = {"file": file, **recipe, "tree": self._write(file, tree)}
            self._index["backbones"].append(entry)
        file = f"{urllib.parse.quote(title, safe=' ')}.safetensors"
        self._index["categories"][title] = {
            "file": file,
            "categories": list(categories),
            "backbone": len(self._index["backbones"]) - 1,
            "tree": self._write(file, {"banks": fitted.banks, "state": fitted.state}),
            "thresholds": {c: t for c, t in results.thresholds.items() if c in categories},
            "scales": {c: s for c, s in results.scales.items() if c in categories},
        }

    def finish(self, config: Mapping[str, Any], results: Results) -> None:
        """Write the index: from now on there is a model."""
        about = {"format": FORMAT, "config": config, "stamp": results.stamp, **self._index}
        text = json.dumps(plain(about), indent=1, ensure_ascii=False)
        paths.write_whole(self.directory / INDEX, text, _ADVICE)

    def _write(self, file: str, tree: Any) -> Any:
        outline, arrays = named_arrays(jax.tree.map(lambda x: np.asarray(hosts.whole(x)), tree))
        data = safetensors.numpy.save(arrays)
        self._index["sha256"][file] = hashlib.sha256(data).hexdigest()
        if distributed.is_main():
            paths.write_whole(self.directory / file, data, _ADVICE)
        return outline


def _clear(directory: epath.Path, overwrite: bool, *, dry: bool = False) -> None:
    """Remove an older model that may be replaced, and what a stopped evaluation left.

    ``dry``: only refuse what may not be removed.
    """
    with paths.writing(directory, _ADVICE):
        there = list(directory.iterdir()) if directory.is_dir() else []
        names = {p.name for p in there}
        if INDEX in names and not overwrite:
            raise WorkdirError(
                f"--save-model={directory}: holds a model. Replace it with --overwrite, or choose "
                "another directory."
            )
        if foreign := sorted(n for n in names if not n.endswith(".safetensors") and n != INDEX):
            raise WorkdirError(
                f"--save-model={directory}: holds {foreign[0]}, which is no part of a model. "
                "Choose another directory."
            )
        for path in [] if dry else sorted(there, key=lambda p: p.name != INDEX):
            path.unlink()


def _recipe(network: Any) -> tuple[dict[str, Any], Any]:
    """How the network inside all wrappers is built again around its arrays, and those."""
    while isinstance(network, wrappers.Wrapped):
        network = network.encoder
    if isinstance(network, models.Backbone):
        about = {n: getattr(network, n) for n in _NETWORK}
        return {"kind": "network", "about": about}, (network.params, network.extra)
    if isinstance(network, runs.RunBackbone):
        stored = workdir.read(network.directory)
        about = {n: getattr(network, n) for n in _RUN}
        recipe = {"kind": "run", "about": about, "directory": network.directory}
        recipe |= {"config": stored["config"], "info": stored["info"]}
        return recipe, (network.params, network.extra)
    raise ConfigError(
        f"--save-model: a {type(network).__name__} cannot be saved; expected a network of "
        "dsad.models or the encoder of a run. Leave it out, or evaluate with one of these."
    )


# --- reading


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
        except FileNotFoundError:
            raise WorkdirError(
                f"{folder}: no fitted model there ({INDEX} is missing). Make one with "
                "dsad evaluate --save-model=DIR."
            ) from None
        except ValueError as error:
            raise WorkdirError(f"{folder / INDEX}: not readable as JSON: {error}.") from error
        if index.get("format") != FORMAT:
            raise WorkdirError(
                f"{folder}: a model of format {index.get('format')}, expected {FORMAT}. Fit it "
                "again with dsad evaluate --save-model=DIR, or use the dsad that wrote it."
            )
        return cls(directory=folder, index=index)

    def config(self) -> dict[str, Any]:
        """Nested keys and values of the evaluation that fitted them."""
        return _tuples(self.index["config"])

    @property
    def shares_backbone(self) -> bool:
        """Whether all models have one network."""
        return len(self.index["backbones"]) == 1

    def titles(self) -> tuple[str, ...]:
        """Of the models: a category, or all of them together."""
        return tuple(self.index["categories"])

    def backbone(self, title: str) -> Backbone:
        """The network of a model."""
        entry = self.index["backbones"][self.index["categories"][title]["backbone"]]
        params, extra = jax.tree.map(jnp.asarray, self._arrays(entry))
        about = _tuples(entry["about"])
        if entry["kind"] == "network":
            network: Any = models.Backbone(params=params, extra=extra, **about)
        else:
            _, module, method = parse_run(entry["config"])
            info = core_config.build_dataclass(RunInfo, entry["info"], "info")
            function = runs.features_of(module, method, info.classes)
            network = runs.RunBackbone(
                params=params, extra=extra, function=function, directory=entry["directory"], **about
            )
        wrap = wrappers.unwrap(self.index["config"]["backbone"]).images
        return functools.reduce(lambda inner, outer: outer(inner), wrap, network)

    def fitted(self, title: str) -> Fitted:
        """What was fitted, as arrays of the host."""
        tree = self._arrays(self.index["categories"][title])
        return Fitted(tuple(tree["banks"]), tree["state"])

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
                f"{core_config.listed(c for row in rows.values() for c in row['categories'])}."
            )
        config, detector = parse(self.index["config"])
        row, parts = rows[titles[0]], wrappers.unwrap(config.backbone)
        return FittedModel(
            backbone=self.backbone(titles[0]), detector=detector,
            map_wrappers=dict(zip(parts.names, parts.maps, strict=True)),
            evaluation=config.evaluation, fitted=self.fitted(titles[0]),
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
            raise WorkdirError(
                f"{path}: damaged (its SHA-256 is wrong). Copy it again, or fit the model again."
            )
        return rebuilt(entry["tree"], safetensors.numpy.load(data))


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were, also inside dicts."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
