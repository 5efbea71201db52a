"""Runs and weights by name: one grammar, and what is made of what they hold.

    run:DIR            a pretraining run at its newest checkpoint; DIR may be gs://BUCKET/...
    run:DIR@STEP       at a step; 0 is its untouched initialisation
    run:DIR/{category} one run for each category
    WRAPPER:...        a wrapper around any of them, see ``models.wrappers``
    ARCH               an architecture, whose weights are named beside it

``run:`` may be left out where a run is there, unless an architecture has that name.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsad import models
from dsad.assembly import workdir
from dsad.assembly.pretrain import PretrainConfig, Run, parse
from dsad.core import config as core_config
from dsad.core import rng, tree
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.types import (
    EarlierWeights,
    FeatureMaps,
    HasEncoder,
    HasProjectors,
    Objective,
    ReadsTensors,
    RunInfo,
)
from dsad.models import registry, statistics, wrappers
from dsad.models.family import Encoder
from dsad.models.residual_maps import REFERENCES, ProjectedMaps, Projectors
from dsad.models.weights import export, pretrained
from dsad.train.checkpoint import CheckpointConfig, Checkpointer

#: As weights: a network that nobody trained; by the seed of the config, or "random:5" by another.
RANDOM = "random"
_SCHEME = "run:"
_CATEGORY = "{category}"


class Place(NamedTuple):
    """A run's directory, and a step or None for the newest one."""

    directory: str
    step: int | None


def innermost(spec: str) -> str:
    """The backbone inside all wrappers: ``run:DIR`` of ``patches:32/4:run:DIR``."""
    return wrappers.unwrap(spec).inner


def is_run(spec: str) -> bool:
    """Whether a spec names a run, also inside wrappers."""
    inner = innermost(spec)
    if inner.startswith(_SCHEME) or not inner or inner in registry.archs():
        return inner.startswith(_SCHEME)
    local = "://" not in inner or inner.startswith("gs://")
    return local and workdir.has_checkpoint(place(inner).directory)


def per_category(spec: str) -> bool:
    """Whether a spec names one run for each category."""
    return is_run(spec) and _CATEGORY in spec


def of_category(spec: str, category: str) -> str:
    """The spec of one category, wrappers and step included."""
    return spec.replace(_CATEGORY, category)


def place(spec: str) -> Place:
    """Directory and step that a spec names; an "@" before anything but a step is the path's.

    Raises ConfigError where both readings of ``DIR@5`` hold a run.
    """
    path = innermost(spec).removeprefix(_SCHEME)
    if not path:
        raise ConfigError(f"{spec!r}: expected the directory of a run, as in run:runs/ds2.")
    directory, _, step = path.rpartition("@")
    if not directory or not step.isdecimal():
        return Place(path, None)
    if not workdir.has_checkpoint(path):
        return Place(directory, int(step))
    if workdir.has_checkpoint(directory):
        raise ConfigError(
            f"{spec}: both {path} and {directory} hold a run; rename one, or add the step: "
            f"{path}@STEP."
        )
    return Place(path, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A pretraining run: its config and its objective, built as the run had built it.

    ``stored`` are the config and info that it wrote.
    """

    directory: str
    config: PretrainConfig
    objective: Objective
    frozen: Objective
    stored: Mapping[str, Any]

    def weights(self, step: int | None) -> tuple[Any, Any, int]:
        """(params, extra, step), on the host unless they are those of step 0."""
        if step == 0 and self.config.init_from not in ("", RANDOM):
            raise ConfigError(
                f"run:{self.directory}@0: that run began with the weights of "
                f"{self.config.init_from}; name those by themselves."
            )
        if step == 0:
            return *jax.jit(self.objective.init)(jax.random.key(self.config.seed)), 0
        checkpointer = Checkpointer(self.directory, CheckpointConfig(), read_only=True)
        try:
            return checkpointer.weights(step)
        finally:
            checkpointer.close()

    def described(self, step: int) -> str:
        """The weights of a step, for people."""
        origin = "untouched initialisation" if step == 0 else f"step {step}"
        split = self.config.data.split
        trained = "" if split == "train" else f", trained on split {split} with test images"
        return f"{self.directory} {origin}, seed {self.config.seed}{trained}"


def opened(directory: str) -> OpenedRun:
    """The run in a directory; raises ConfigError or WorkdirError for anything else there."""
    stored = workdir.read(directory)
    if stored["command"] != "pretrain":
        hint = f"; try run:{directory}/pretrain" if stored["command"] == "demo" else ""
        raise ConfigError(
            f"run:{directory}: expected a pretraining run, found one of "
            f"dsad {stored['command']}{hint}."
        )
    if "info" not in stored:
        raise WorkdirError(f"run:{directory}: {workdir.OLDER}")
    config, module, method = parse(stored["config"])
    info = core_config.build_dataclass(RunInfo, stored["info"], "info")
    return OpenedRun(
        directory=directory, config=config, objective=module.build(method, info),
        frozen=frozen(module, method, info.classes),
        stored={name: stored[name] for name in ("config", "info")},
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def frozen(module: Any, method: Any, classes: int) -> Objective:
    """One objective for the encoders of all runs of one config, which share compiled programs.

    Neither a run's length nor its number of images shapes its feature maps.
    """
    info = RunInfo(total_steps=1, batch_size=1, samples=1, classes=classes)
    return module.build(method, info)


# --- earlier weights


def checked_weights(run: Run) -> EarlierWeights | None:
    """The weights that ``init_from`` names, which the run's objective can adopt; None without any.

    Raises ConfigError for what does not fit or is missing, before anything is claimed.
    """
    if run.config.init_from == RANDOM:
        return None
    if not run.config.init_from:
        if needed := run.objective.traits.source:
            raise ConfigError(
                f"config.init_from: this objective starts from {needed}; name it with "
                "--config.init_from=DIR."
            )
        return None
    earlier = earlier_weights(run.config.init_from, run.objective)
    jax.eval_shape(
        lambda params, extra: run.objective.adopt(earlier, params, extra)[:2],
        run.abstract.params, run.abstract.extra,
    )  # fmt: skip
    return earlier


def earlier_weights(spec: str, objective: Objective) -> EarlierWeights:
    """Weights for an objective from a run, a file or a hub name."""
    if innermost(spec) != spec:
        raise ConfigError(
            f"config.init_from={spec}: a wrapper has no weights; name what is inside."
        )
    if is_run(spec):
        directory, step = place(spec)
        there = opened(directory)
        params, extra, step = there.weights(step)
        origin, method = f"{directory} step {step}", there.objective
        if not isinstance(method, HasEncoder):
            return EarlierWeights(None, params, extra, {}, origin)
        encoder = method.encoder_weights(params, extra)
        return EarlierWeights(encoder, params, extra, method.stage_facts, origin)
    try:
        weights = pretrained.read(spec)
    except ConfigError as error:
        raise ConfigError(
            f"config.init_from={spec!r}: neither a pretraining run (no checkpoints there) nor "
            f"weights: {error}"
        ) from error
    known = {"mean": weights.mean, "std": weights.std, "side": weights.input_size}
    facts = {name: value for name, value in known.items() if value is not None}
    encoder, params, extra = _read(weights, objective, spec)
    return EarlierWeights(encoder, params, extra, facts, weights.source)


def _read(weights: pretrained.Weights, objective: Objective, spec: str) -> tuple[Encoder, Any, Any]:
    if isinstance(objective, ReadsTensors):
        return objective.read_tensors(weights)
    if not isinstance(objective, HasEncoder):
        raise ConfigError(
            f"config.init_from={spec!r}: expected the directory of a pretraining run; this "
            "objective has no encoder that published weights would fit."
        )
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    own = objective.encoder_weights(*shapes)
    loaded = registry.family_of(own.arch).load(own.arch, weights)
    params, extra = jax.tree.map(jnp.asarray, (loaded.params, loaded.extra))
    return Encoder(own.arch, loaded.options, params, extra, own.preprocessing), {}, {}


# --- backbones


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "extra"],
    meta_fields=[
        "function",
        "mean",
        "std",
        "arch",
        "image_size",
        "description",
        "stored",
        "layers",
        "tokens",
        "further",
        "encoder",
    ],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBackbone:
    """The encoder of a run as its objective's ``features``; a pytree.

    ``stored`` is the JSON text of the run's directory, config and info, to build ``function`` again
    where the run is gone. ``layers``, unless None, are the only maps it computes. ``tokens`` are
    the vectors of whole images that ``only`` can name as well, ``further`` the maps. ``encoder`` is
    the objective's ``encoder_weights``.
    """

    # Not shown: jax asks for the text of what it compiles, and hides an interrupt meanwhile.
    params: Any = dataclasses.field(repr=False)
    extra: Any = dataclasses.field(repr=False)
    function: Callable[..., FeatureMaps]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    arch: str
    image_size: int | None
    description: str
    stored: str = ""
    layers: tuple[str, ...] | None = None
    tokens: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    encoder: Callable[[Any, Any], Encoder] | None = None

    @property
    def statistics(self) -> Any:
        """The encoder's; see ``models.statistics.HasStatistics``, as for the next two."""
        return statistics.present(self.weights.extra) if self.weights else {}

    def with_statistics(self, statistics: Any) -> "RunBackbone":
        assert self.encoder is not None
        leaves, structure = jax.tree.flatten(self.extra)
        numbers = jax.tree.unflatten(structure, range(len(leaves)))
        places = jax.tree.leaves(self.encoder(self.params, numbers).extra)
        for place, values in zip(places, jax.tree.leaves(statistics), strict=True):
            leaves[place] = values
        return dataclasses.replace(self, extra=jax.tree.unflatten(structure, leaves))

    def measured(self, images: jax.Array) -> Any:
        assert self.weights is not None
        return statistics.measured(self.weights, images, applied=True)

    @property
    def weights(self) -> Encoder | None:
        """See ``models.family.HasWeights``."""
        return self.encoder(self.params, self.extra) if self.encoder else None

    def only(self, layers: Sequence[str]) -> "RunBackbone":
        """One that computes just these maps and tokens."""
        return dataclasses.replace(self, layers=tuple(layers), further=())

    def __call__(self, images: jax.Array) -> FeatureMaps:
        return self.function(self.params, self.extra, images, self.layers)


def _projected(references: str | None, spec: str) -> ProjectedMaps:
    if spec + ":" == _SCHEME:
        raise ConfigError(
            "config.backbone: projected:run: expected the directory of a run by itself, and behind "
            "it a backbone, for example projected:runs/adpretrain:resnet18."
        )
    # Read once, not for each category and seed.
    read = functools.cache(functools.partial(projectors, _SCHEME + spec))
    return ProjectedMaps(int(references or REFERENCES), spec, read)


def projectors(spec: str) -> Projectors:
    """Those that a run trained on residual maps; raises ConfigError for any other run."""
    directory, step = place(spec)
    run = opened(directory)
    params, _, step = run.weights(step)
    if not isinstance(run.objective, HasProjectors):
        raise ConfigError(
            f"config.backbone: projected: expected a run that trains projectors (adpretrain), "
            f"found {run.described(step)}, of {type(run.objective).__name__}."
        )
    params, digest = jax.device_get(dict(run.objective.projectors(params))), hashlib.sha256()
    for path, values in sorted(tree.flatten(params).items()):
        digest.update(path.encode() + np.ascontiguousarray(values).tobytes())
    description = f"{run.described(step)}, sha256 {digest.hexdigest()[:12]}"
    return Projectors(params, run.objective.tokens, description)


wrappers.KINDS["projected"] = wrappers.Kind(
    "projected[:REFERENCES]:RUN", "projected:runs/adpretrain",
    r"(?:(\d+):)?((?:\w+://)?[^:]+):", _projected,
)  # fmt: skip


def random_seed(weights: str, seed: int) -> int | None:
    """The seed of an untrained network, None for weights of any other kind."""
    if not (named := re.fullmatch(rf"{RANDOM}(:(\d+))?", weights)):
        return None
    return int(named[2]) if named[2] else seed


def check_named(spec: str, weights: str) -> None:
    """Refuse an architecture whose weights are left to chance, and a run with other weights."""
    if is_run(spec):
        if weights:
            raise ConfigError("config.weights: a run brings its own weights; leave it empty.")
    elif not weights:
        registry.family_of(innermost(spec))  # an unknown name is the fault that it is
        raise ConfigError(
            f"config.weights: {innermost(spec)} needs some; expected a file, a directory, "
            f"hf:owner/name, imagenet, or {RANDOM} for an untrained network (by config.seed)."
        )


def backbone(spec: str, weights: str, seed: int) -> Any:
    """What a spec names, to compute feature maps; ``seed`` is that of ``RANDOM`` weights."""
    parts = wrappers.unwrap(spec)
    if parts.maps:
        raise ConfigError(
            f"backbone {spec}: {parts.names[-1]} needs the support set of an evaluation."
        )
    if parts.images:
        network = backbone(parts.inner, weights, seed)
        return functools.reduce(lambda inner, wrap: wrap(inner), parts.images, network)
    check_named(spec, weights)
    if not is_run(spec):
        drawn = random_seed(weights, seed)
        return models.backbone(spec, weights if drawn is None else None, seed=drawn or 0)
    run = opened(place(spec).directory)
    params, extra, step = run.weights(place(spec).step)
    params, extra = jax.tree.map(jnp.asarray, (params, extra))
    objective, arch, tokens = run.frozen, type(run.objective).__name__, ()
    encoder = None
    if isinstance(objective, HasEncoder):
        encoder = objective.encoder_weights
        network = objective.encoder_weights(params, extra)
        arch = network.arch
        tokens = registry.family_of(arch).tokens(arch, **network.options)
    return RunBackbone(
        params=params, extra=extra, function=objective.features, mean=objective.mean,
        std=objective.std, arch=arch, image_size=image_size(objective),
        description=run.described(step), tokens=tokens,
        further=further(objective, params, extra), encoder=encoder,
        stored=json.dumps({"directory": run.directory, **run.stored}),
    )  # fmt: skip


def abstract(spec: str, weights: str, seed: int) -> Any:
    """The same with shapes in the place of arrays, for which a run alone is read.

    Those of an architecture are its published ones, whatever ``weights`` names.
    """
    if not is_run(spec):
        return jax.eval_shape(lambda: backbone(spec, RANDOM, seed))
    network = backbone(spec, weights, seed)
    return jax.eval_shape(lambda: network)


def further(objective: Objective, params: Any, extra: Any) -> tuple[str, ...]:
    """Maps of the encoder beside those that ``features`` gives by itself; trees may be shapes."""
    if not isinstance(objective, HasEncoder):
        return ()
    network = objective.encoder_weights(params, extra)
    return tuple(registry.family_of(network.arch).further(network.arch, **network.options))


def image_size(objective: Objective) -> int | None:
    """Side in pixels of the images that an objective trains on, where it tells."""
    return objective.stage_facts.get("side") if isinstance(objective, HasEncoder) else None


def encoder(spec: str, weights: str) -> models.Backbone:
    """A backbone as a network of ``models``, to export it: ``ARCH`` with weights, or a run."""
    if innermost(spec) != spec:
        raise ConfigError(f"--backbone={spec}: a wrapper has no weights; name what is inside.")
    if is_run(spec):
        if weights:
            raise ConfigError("--weights: a run brings its own weights; leave it empty.")
        return _encoder_of_run(spec)
    if not weights:
        raise ConfigError(
            f"--backbone={spec}: name its weights with --weights=SPEC (a file, a directory or "
            "hf:owner/name), or export a run with --backbone=run:DIR."
        )
    return models.backbone(spec, weights)


def _encoder_of_run(spec: str) -> models.Backbone:
    """The network that a run trains, without its heads."""
    directory, step = place(spec)
    run = opened(directory)
    params, extra, step = run.weights(step)
    if not isinstance(run.objective, HasEncoder):
        raise ConfigError(
            f"{run.described(step)}: {type(run.objective).__name__} has no encoder that could be "
            "used elsewhere."
        )
    network = run.objective.encoder_weights(*jax.tree.map(jnp.asarray, (params, extra)))
    known = network.preprocessing
    return models.Backbone(
        params=network.params, extra=network.extra, arch=network.arch,
        options=tuple(sorted(network.options.items())), mean=known.mean, std=known.std,
        image_size=known.image_size, interpolation=known.interpolation, crop=known.crop,
        description=run.described(step),
    )  # fmt: skip


def read_run(spec: str) -> pretrained.Weights:
    """The encoder of ``run:DIR`` or ``run:DIR@STEP`` under published names.

    An entry point of the group ``dsad.weights``, so that ``models`` can read runs.
    """
    return export.as_weights(_encoder_of_run(spec))


def key_for(seed: int) -> jax.Array:
    """The key of a localization run."""
    return rng.named(jax.random.key(seed), "evaluate")
