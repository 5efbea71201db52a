"""From ``--config.backbone`` to something that gives feature maps."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsad import models
from dsad.assembly import pretrain, workdir
from dsad.core import rng
from dsad.core.errors import ConfigError
from dsad.core.types import Backbone, FeatureMaps, RunInfo, Specs
from dsad.models import wrappers
from dsad.models.weights import export
from dsad.models.weights.pretrained import Weights
from dsad.train.checkpoint import CheckpointConfig, Checkpointer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "extra"],
    meta_fields=["objective", "mean", "std", "arch", "description", "layers"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBackbone:
    """The encoder of a run as its objective's ``features``; a pytree."""

    params: Any
    extra: Any
    objective: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    arch: str
    description: str
    layers: tuple[str, ...] | None = None

    def only(self, layers: Sequence[str]) -> "RunBackbone":
        """The encoder that computes just these maps."""
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images it was trained on, where the objective tells."""
        return getattr(self.objective, "stage_facts", {}).get("side")

    def __call__(self, images: jax.Array) -> FeatureMaps:
        return self.objective.features(self.params, self.extra, images, self.layers)


def load(spec: str, weights: str, seed: int) -> Backbone:
    """A backbone from ``ARCH`` (with optional weights file) or ``run:DIR``, ``run:DIR@STEP``.

    Step 0 of a run is its untouched initialisation, drawn again from the run's seed. Either may
    stand in a wrapper, see ``models.wrappers``: ``patches:32/4:run:DIR``.
    """
    if wrappers.is_wrapper(spec):
        wrapper, inner = wrappers.split(spec)
        return wrappers.wrap(wrapper, load(inner, weights, seed))
    if not spec.startswith("run:"):
        return models.backbone(spec, weights or None, seed=seed)
    if weights:
        raise ConfigError("config.weights: a run brings its own weights; leave it empty.")
    return from_run(*_parsed(spec))


def per_category(spec: str) -> bool:
    """Whether a spec names one run per category, also in wrappers: ``run:DIR/{category}``."""
    return innermost(spec).startswith("run:") and "{category}" in spec


def of_category(spec: str, category: str) -> str:
    """The spec of one category, wrappers and ``@STEP`` included."""
    return spec.replace("{category}", category)


def run_directory(spec: str) -> str:
    """The directory in ``run:DIR@STEP``, also in wrappers."""
    return innermost(spec).removeprefix("run:").partition("@")[0]


def innermost(spec: str) -> str:
    """The backbone inside all wrappers: ``run:DIR`` of ``patches:32/4:run:DIR``."""
    while wrappers.is_wrapper(spec):
        spec = wrappers.split(spec)[1]
    return spec


def run_config(path: str) -> Mapping[str, Any]:
    """The config a pretraining run was started with."""
    found = workdir.read(path)
    if found["command"] != "pretrain":
        hint = f"; try run:{path}/pretrain" if found["command"] == "demo" else ""
        raise ConfigError(
            f"config.backbone=run:{path}: expected a pretraining run, found one of "
            f"dsad {found['command']}{hint}."
        )
    return found["config"]


def image_size(spec: str) -> int | None:
    """Side in pixels of the images that the run of a spec was trained on, where it tells."""
    config, module, method = pretrain.parse(run_config(run_directory(spec)))
    return getattr(_built(module, method, config.batch_size), "stage_facts", {}).get("side")


def from_run(path: str, step: int | None = None) -> RunBackbone:
    """The encoder of a run at a step, None for the newest checkpoint."""
    config, module, method = pretrain.parse(run_config(path))
    objective = _built(module, method, config.batch_size)
    if step == 0 and config.init_from:
        raise ConfigError(
            f"config.backbone=run:{path}@0: that run began with the weights of {config.init_from}; "
            "evaluate those by themselves."
        )
    if step == 0:
        specs = Specs(batch_size=config.batch_size, canvas=config.data.canvas)
        params, extra = jax.jit(lambda k: objective.init(k, specs))(jax.random.key(config.seed))
    else:
        checkpointer = Checkpointer(path, CheckpointConfig(), read_only=True)
        params, extra, step = checkpointer.weights(step)
        params, extra = jax.tree.map(jnp.asarray, (params, extra))
        checkpointer.close()
    origin = "untouched initialisation" if step == 0 else f"step {step}"
    return RunBackbone(
        params=params, extra=extra, objective=objective, mean=objective.mean, std=objective.std,
        arch=getattr(method, "arch", type(objective).__name__),
        description=f"{path} {origin}, seed {config.seed}",
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _built(module: Any, method: Any, batch_size: int) -> Any:
    """One objective for all runs of one config, so that they share compiled programs."""
    # The length of a run only shapes schedules, which feature maps do not depend on.
    return module.build(method, RunInfo(total_steps=1, batch_size=batch_size, samples=1, classes=1))


def encoder(spec: str, weights: str) -> models.Backbone:
    """A backbone as a network of ``models``, to export it: ``ARCH`` with weights, or a run."""
    if wrappers.is_wrapper(spec):
        raise ConfigError(f"--backbone={spec}: a wrapper has no weights; name what is inside.")
    if spec.startswith("run:"):
        if weights:
            raise ConfigError("--weights: a run brings its own weights; leave it empty.")
        return encoder_of_run(from_run(*_parsed(spec)))
    if not weights:
        raise ConfigError(
            f"--backbone={spec}: name its weights with --weights=SPEC (a file, a directory or "
            "hf:owner/name), or export a run with --backbone=run:DIR."
        )
    return models.backbone(spec, weights)


def encoder_of_run(run: RunBackbone) -> models.Backbone:
    """The network that a run trains, without its heads."""
    taken = getattr(run.objective, "encoder_weights", None)
    if taken is None:
        raise ConfigError(
            f"{run.description}: {type(run.objective).__name__} has no encoder that could be used "
            "elsewhere."
        )
    found = taken(run.params, run.extra)
    known = found.preprocessing
    return models.Backbone(
        params=found.params, extra=found.extra, arch=found.arch,
        options=tuple(sorted(found.options.items())), mean=known.mean, std=known.std,
        image_size=known.image_size, interpolation=known.interpolation, crop=known.crop,
        description=run.description,
    )  # fmt: skip


def read_run(spec: str) -> Weights:
    """The encoder of ``run:DIR`` or ``run:DIR@STEP`` under published names.

    An entry point of the group ``dsad.weights``, so that ``models`` can read runs.
    """
    return export.as_weights(encoder_of_run(from_run(*_parsed(spec))))


def _parsed(spec: str) -> tuple[str, int | None]:
    path, _, step = spec.removeprefix("run:").partition("@")
    if step and not step.isdigit():
        raise ConfigError(f"config.backbone={spec!r}: expected run:DIR or run:DIR@STEP.")
    return path, int(step) if step else None


def key_for(seed: int) -> jax.Array:
    """The key of a localization run."""
    return rng.named(jax.random.key(seed), "evaluate")
