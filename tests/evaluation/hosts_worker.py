"""One of the processes of ``test_hosts``: evaluations by name, their results below a folder.

Images differ in size, some defects have no mask, and the last batches leave processes unequal
parts: 5 training images in batches of 4 leave a single one, of which the second has nothing.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dsad.assembly.detectors import Trainer
from dsad.core import distributed
from dsad.core.config import resolve
from dsad.core.errors import DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Record, Sample
from dsad.evaluation.localize import EvalConfig, localize, write_results
from dsad.evaluation.support import Sampling
from tests.backbones import Plain, static


class Images:
    """Noise with a gradient; defects are brighter squares."""

    name = "images"
    categories = ("a", "b")
    protocol = {"name": "images"}  # noqa: RUF012

    def __init__(self, broken=""):
        self.broken = broken

    def source(self, split, category=None):
        kinds = {"train": {"good": 5}, "test": {"good": 4, "dark": 2, "light": 3}}[split]
        return Source(
            [
                Record(
                    path=f"{c}/{split}/{kind}/{i}.png", category=c, label=int(kind != "good"),
                    kind=kind, masks=() if kind == "good" else (f"{c}/masks/{kind}/{i}.png",),
                )
                for c in ([category] if category else self.categories)
                for kind, count in kinds.items()
                for i in range(count)
            ],
            self.broken,
        )  # fmt: skip


class Source:
    def __init__(self, records, broken):
        self.records, self.broken = records, broken

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        if record.path == self.broken:
            raise DataError(f"{record.path}: cannot be decoded")
        rng = np.random.default_rng(list(record.path.encode()))
        height, width = 30 + index, 40 - index
        image = 110 + rng.integers(-9, 10, (height, width, 3)) + np.arange(width)[None, :, None]
        mask = np.zeros((height, width), bool)
        if record.label:
            mask[8:16, 9:19] = True
            image[mask] += 25 if record.kind == "light" else -25
        lost = record.path == "a/test/dark/1.png"
        return Sample(record=record, image=image.astype(np.uint8), mask=None if lost else mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backbone(Plain):
    """A random projection of patches of 4, 8 and 16 pixels, and the maps that isstad reads."""

    weights: jax.Array
    std: tuple = static(default=(0.5, 0.5, 0.5))

    def maps(self, images):
        size = images.shape[0], images.shape[1]

        def layer(side, depth):
            patches = images.reshape(size[0], size[1] // side, side, -1, side, 3)
            cells = patches.mean((2, 4)) + patches.std((2, 4))
            return jnp.sin(jnp.einsum("bhwc,cd->bhwd", cells, self.weights[:, :depth]))

        grey = images.mean(-1, keepdims=True)
        return {
            "layer1": layer(4, 8), "layer2": layer(4, 12), "layer3": layer(8, 16),
            "layer4": layer(8, 16), "probability": jax.nn.sigmoid(grey), "error": grey**2,
            "reconstruction": jax.nn.sigmoid(images),
        }  # fmt: skip


#: One process and two round sums over a batch differently, and a pair of pixels that changes places
#: is more than the tolerance: a step that moves no weight that is not 0.
STEP = Recipe(steps=1, batch_size=4, optim=OptimConfig(lr=1e-12))
#: Settings of the detector by its name, where the defaults do not fit such small maps.
DETECTORS = {
    "knn": {"k": 2},
    "knn-sampled": {"bank_rows": 100},
    "patchcore": {"reweighted": True, "neighbours": 3},
    "patchcore-kmeans": {"bank": "kmeans", "bank_rows": 20, "score": "squared"},
    "patchcore-published": {"start": "published", "projection_dim": 8, "bank_rows": 30},
    "padim": {"channels": 10},
    "gde": {"layers": ("layer3",), "components": 2, "patch": 8, "stride": 8},
    "gde-global": {"layers": ("layer3",), "components": 5, "per_position": False, "patch": 8,
                   "stride": 8},
    "anomalydino": {"layers": ("layer2", "layer3")},
    "fre": {"pool": 1},
    "subspace": {"layers": ("layer3",)},
    "superadd": {"layers": ("layer2", "layer3"), "bank_rows": 100},
    "rad": {"layers": ("layer2", "layer3"), "retrieval": "layer3", "neighbours": 3},
    "spade": {"neighbours": 3},
    "protoad": {"image_levels": 1},
    "isstad": {"sigma": 1.0},
    "cflow": {"layers": ("layer2", "layer3"), "blocks": 2, "recipe": STEP},
    "uniad": {"grid": 0, "neighbourhood": 3, "width": 8, "heads": 2, "mlp": 16, "depth": 1,
              "scaled": False, "recipe": STEP},
    "dinomaly": {"layers": ("layer3", "layer4"), "recipe": STEP},
    "musc": {"layers": ("layer2", "layer3"), "similar": "mean"},
    "featurenorm": {},
    "simplenet": {"layers": ("layer2", "layer3"), "hidden": 16, "recipe": STEP},
    "glass": {"layers": ("layer2", "layer3"), "hidden": 16, "steps": 5, "recipe": STEP},
}  # fmt: skip
EXTRA = {
    "knn:streaming": {"false_alarm_rate": 0.3, "save_maps": "png", "holdout": 3},
    "knn:pooled": {"seeds": (0, 1), "pooled": True, "shots": 4, "save_maps": "tiff"},
    "patchcore:streaming": {"seeds": (0, 1)},
    "knn:exact": {"false_alarm_rate": 0.3, "holdout": 3},
    "knn:cached": {"feature_cache": "CACHE"},
    "knn:recomputed": {"seeds": (0, 1), "cache_mb": 0},
}
CASES = (*DETECTORS, *EXTRA)


def evaluated(case, folder, broken="", devices=None):
    """Run one case; process 0 writes its results."""
    name, _, way = case.partition(":")
    options = dict(EXTRA.get(case, {}))
    if "feature_cache" in options:
        options["feature_cache"] = str(folder.parent / "features")
    sampling = Sampling(**{k: options.pop(k) for k in ("seeds", "pooled", "shots") if k in options})
    module = resolve("detectors", name.partition("-")[0])
    detector = module.build(module.Config(**{"sigma": 1.0, **DETECTORS[name]}))
    config = EvalConfig(
        image_size=32, batch_size=4, workers=2, gallery=3,
        method="streaming" if way == "streaming" else "exact", **options,
    )  # fmt: skip
    weights = np.random.default_rng(0).normal(size=(3, 16))
    found = localize(
        Backbone(jnp.asarray(weights, jnp.float32)), detector, Images(broken), config,
        mesh=make_mesh(MeshConfig(), devices), key=jax.random.key(1),
        folder=folder, sampling=sampling, train=Trainer(),
    )  # fmt: skip
    if distributed.is_main():
        write_results(found, folder)
    return found


def main():
    """``hosts_worker FOLDER BROKEN PROCESS PROCESSES PORT CASE ...``."""
    folder, broken, index, count, port, *cases = sys.argv[1:]
    jax.config.update("jax_default_matmul_precision", "highest")  # as in the tests' process
    jax.config.update("jax_numpy_rank_promotion", "raise")
    distributed.start(
        coordinator=f"localhost:{port}", num_processes=int(count), process_id=int(index)
    )
    for case in cases:
        try:
            found = evaluated(case, pathlib.Path(folder, case), broken)
            print(f"{case}: {found.mean['pixel_auroc']!r}", flush=True)
        except Exception as error:
            print(f"{case}: {type(error).__name__}: {error}", flush=True)
            if not broken:
                raise


if __name__ == "__main__":
    main()
