"""Writes fitted models, see ``assembly.model``."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from dsad import models
from dsad.assembly import runs
from dsad.core import distributed, hosts, paths
from dsad.core.detection import Detector
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.tree import named_arrays
from dsad.core.types import Backbone
from dsad.evaluation.compiled import Fitted
from dsad.evaluation.results import Results
from dsad.evaluation.stamp import plain
from dsad.models import wrappers

#: Of the files; another one cannot be read.
FORMAT = 5
INDEX = "model.json"
#: In the index: the SHA-256 of everything else there.
DIGEST = "index_sha256"
#: Names of what is written here, and of what a kill left of it.
_OURS = re.compile(
    rf"backbone-\d+\.safetensors|fitted-.*\.safetensors|{re.escape(INDEX)}"
    rf"|\..*{re.escape(paths.TEMPORARY)}",
    re.DOTALL,
)
_ADVICE = "Choose another directory for the model, or mend this one."
#: What of a network's fields its arrays do not tell.
_NETWORK = (
    "arch", "options", "layers", "mean", "std", "image_size", "interpolation", "crop", "left_out",
    "description",
)  # fmt: skip
_RUN = ("mean", "std", "arch", "image_size", "description", "layers", "tokens")


class Writer:
    """Writes the models of an evaluation one by one; the index comes last, so all or none is there.

    Raises WorkdirError if ``directory`` is a file, holds anything else, or a model that is not to
    be replaced (it stays until the first of the new ones is fitted); ConfigError if ``workdir``, of
    the evaluation, would lie in it.
    """

    def __init__(self, directory: str, *, overwrite: bool, workdir: str = "") -> None:
        self.directory = paths.directory(directory)
        if workdir and paths.directory(workdir).is_relative_to(self.directory):
            raise ConfigError(
                f"--save-model={directory}: expected a directory for models alone, found one that "
                f"takes --workdir={workdir} as well. Choose another, such as {workdir}/model."
            )
        self._index: dict[str, Any] = {"backbones": [], "categories": {}, "sha256": {}}
        self._last: Any = None
        self._overwrite = overwrite
        distributed.on_main(lambda: paths.check_place(directory, _ADVICE))
        distributed.on_main(lambda: _clear(self.directory, overwrite, dry=True))

    def check(self, detector: Detector, backbone: Backbone | None, seeds: Sequence[int]) -> None:
        """Refuse what cannot be saved, or must not be; raises ConfigError."""
        check(detector, backbone, seeds)

    def keep(
        self, title: str, categories: Sequence[str], backbone: Any, fitted: Fitted, results: Results
    ) -> None:
        """Add the model of some categories; every process calls, the first one writes."""
        recipe, tree = _recipe(backbone)  # what it refuses costs no older model
        if not self._index["categories"]:
            distributed.on_main(lambda: _clear(self.directory, self._overwrite))
        if backbone is not self._last:
            self._last, number = backbone, len(self._index["backbones"])
            file = f"backbone-{number}.safetensors"
            entry = {"file": file, **recipe, "tree": self._write(file, tree)}
            self._index["backbones"].append(entry)
        file = f"fitted-{paths.component(title)}.safetensors"
        self._index["categories"][title] = {
            "file": file,
            "categories": list(categories),
            "backbone": len(self._index["backbones"]) - 1,
            "tree": self._write(file, fitted._asdict()),
            "thresholds": {c: t for c, t in results.thresholds.items() if c in categories},
            "scales": {c: s for c, s in results.scales.items() if c in categories},
        }

    def finish(
        self, config: Mapping[str, Any], results: Results, normals: Mapping[str, Any]
    ) -> None:
        """Write the index: from now on there is a model.

        ``normals`` are the looks of the normal images by category, see ``pictures.looks``.
        """
        about = {"format": FORMAT, "config": config, "stamp": results.stamp, "normals": normals}
        about = plain(about | self._index)
        about[DIGEST] = digest(about)
        text = json.dumps(about, indent=1, ensure_ascii=False)
        paths.write_whole(self.directory / INDEX, text, _ADVICE)

    def discard(self) -> None:
        """Remove what there is without an index, as nothing follows; a whole model stays."""
        if distributed.is_main() and not (self.directory / INDEX).exists():
            for path in self.directory.iterdir() if self.directory.exists() else ():
                if _OURS.fullmatch(path.name):
                    path.unlink()

    def _write(self, file: str, tree: Any) -> Any:
        outline, arrays = named_arrays(jax.tree.map(lambda x: np.asarray(hosts.whole(x)), tree))
        data = safetensors.numpy.save(arrays)
        self._index["sha256"][file] = hashlib.sha256(data).hexdigest()
        if distributed.is_main():
            paths.write_whole(self.directory / file, data, _ADVICE)
        return outline


def digest(value: Any) -> str:
    """SHA-256 of JSON types, in whatever order they were written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _clear(directory: epath.Path, overwrite: bool, *, dry: bool = False) -> None:
    """Remove an older model that may be replaced, and what a stopped evaluation left.

    ``dry``: only refuse what may not be removed.
    """
    with paths.writing(directory, _ADVICE):
        there = list(directory.iterdir()) if directory.exists() else []
        names = {p.name for p in there}
        if INDEX in names and not overwrite:
            raise WorkdirError(
                f"{directory}: holds a model. Replace it with --overwrite, or choose "
                "another directory."
            )
        if foreign := sorted(n for n in names if not _OURS.fullmatch(n)):
            raise WorkdirError(
                f"{directory}: holds {foreign[0]}, which is no part of a model. "
                "Choose another directory."
            )
        for path in [] if dry else sorted(there, key=lambda p: p.name != INDEX):
            path.unlink()


def check(detector: Detector, backbone: Backbone | None, seeds: Sequence[int]) -> None:
    """Refuse what makes no model; raises ConfigError."""
    if len(seeds) > 1:
        raise ConfigError(f"a model is a fit with a single seed, found config.seeds={seeds}.")
    if detector.traits.fits_on == "test":
        name = type(detector).__module__.rpartition(".")[2]
        raise ConfigError(
            f"config.detector: {name} is fitted on the test images themselves, which score each "
            "other; it is of no use for other images, and no model of it is kept. Measure it with "
            "dsad evaluate, or choose a detector of normal images, such as patchcore."
        )
    if backbone is not None:
        _recipe(backbone)


def _recipe(network: Any) -> tuple[dict[str, Any], Any]:
    """How the network inside all wrappers is built again around its arrays, and those."""
    while isinstance(network, wrappers.Wrapped):
        network = network.encoder
    if isinstance(network, models.Backbone):
        about = {n: getattr(network, n) for n in _NETWORK}
        return {"kind": "network", "about": about}, (network.params, network.extra)
    if isinstance(network, runs.RunBackbone):
        about = {n: getattr(network, n) for n in _RUN}
        recipe = {"kind": "run", "about": about, **json.loads(network.stored)}
        return recipe, (network.params, network.extra)
    raise ConfigError(
        f"a {type(network).__name__} cannot be saved; expected a network of dsad.models or the "
        "encoder of a run."
    )
