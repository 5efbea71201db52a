"""What the tests of objectives share: the cases, and the batch, run and state they start from."""

import dataclasses
import functools
import importlib
import math
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsad.augment.views import ViewConfig
from dsad.core import batch as batches
from dsad.core import config as core_config
from dsad.core.batch import BatchSpec
from dsad.core.tree import path_name
from dsad.core.types import PerSample, Record, RunInfo
from dsad.data import facts as image_facts
from dsad.data.companions import CompanionDraws
from dsad.models.decoder import DecoderConfig
from dsad.objectives import mae
from tests.seams import objectives as seams

BATCH, CANVAS, SIDE = 8, 40, 32
RUN = RunInfo(total_steps=30, batch_size=BATCH, samples=BATCH, classes=2)
VIEW = ViewConfig(side=SIDE, area=(0.3, 1.0))
#: Where views are not the matter: compiled in a fraction of the time.
CROP = dataclasses.replace(VIEW, jitter_probability=0.0, blur_probability=0.0)
ENCODER = mae.EncoderConfig(arch="mae_vit_tiny_patch16", width=48, depth=2, heads=4, patch=8)
DECODER = DecoderConfig(width=32, depth=2, heads=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """How the contract tests treat one objective.

    Attributes:
      config: keywords of its ``Config``: the small settings that are tested.
      no_gradient: regex of the parameter paths that have no gradient, mathematically.
      fixed_views: paths of views that depend neither on the key nor on the epoch.
      warm_up: steps before the loss is expected to fall, until a queue is full for instance.
      recorded: built instead of ``build`` where hard choices are compared; its scalars hold them
        under names that start with "chosen".
      collectives: kinds allowed in a step of whole parameters; none are asserted by default.
      summed: share of the gradients' bytes that such a step may sum in addition.
      own: public methods that are no part of a seam, for its own tests and benches.

    """

    config: Mapping[str, Any]
    no_gradient: str = "$^"
    fixed_views: tuple[str, ...] = ()
    warm_up: int = 0
    recorded: Callable[[Any, RunInfo], Any] | None = None
    collectives: frozenset[str] | None = None
    summed: float = 0.0
    own: tuple[str, ...] = ()


class Member(NamedTuple):
    """An objective under test: ``module`` has ``Config`` and ``build``."""

    name: str
    module: types.ModuleType
    case: Case


@functools.cache
def cases() -> dict[str, Member]:
    """By name: the members of dsad.objectives, and the miniatures in tests/seams/objectives."""
    of_members = [
        Member(n + suffix, core_config.resolve("objectives", n), case)
        for n in core_config.members("objectives")
        for suffix, case in _cases(_module(f"contracts.objectives.{n}"))
    ]
    files = [m.name for m in pkgutil.iter_modules(seams.__path__)]
    miniatures = [Member(n, module := _module(f"seams.objectives.{n}"), module.CASE) for n in files]
    return {member.name: member for member in of_members + miniatures}


def _cases(module):
    """The case of a member, and the one with SPD of a host, by what is added to the name."""
    return [("", module.CASE), *([("+spd", module.SPD)] if hasattr(module, "SPD") else [])]


def _module(name):
    return importlib.import_module(f"tests.{name}")


def build(name, recorded=False):
    """The objective of a case, with its ``recorded`` choices if asked."""
    _, module, case = cases()[name]
    return ((recorded and case.recorded) or module.build)(module.Config(**case.config), RUN)


#: Two categories, of each two normal and two anomalous images; the last has no annotation.
RECORDS = [
    Record(path=f"{i}.png", category="ab"[i % 2], label=i // 4, kind=("good", "bad")[i // 4])
    for i in range(BATCH)
]


@functools.cache
def spec(name):
    """What the batches of an objective hold."""
    objective = build(name)
    needs = objective.traits.needs
    plain = BatchSpec(canvas=CANVAS, needs=needs, facts=image_facts.fields(needs.facts))
    if not isinstance(objective, PerSample):
        return plain
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    features = jax.eval_shape(objective.per_sample, *shapes, batches.shapes(plain.whole, BATCH))
    return dataclasses.replace(plain, features=batches.fields_of(features))


@functools.cache
def samples():
    """Eight smooth images, each a canvas of which the left 32 columns are filled, by field."""
    g = np.random.default_rng(1)
    coarse = g.uniform(0, 255, (BATCH, 10, 10, 3))
    number = [np.arange(BATCH) % 2, np.arange(BATCH) // 4, np.arange(BATCH) % 2]
    mask = np.zeros((BATCH, CANVAS, CANVAS), np.uint8)
    mask[4:-1, 8:24, 8:16] = 1
    box = np.tile(np.array([[100, 50, 700, 900]], np.int32), (BATCH, 1))
    return {
        "image": coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8),
        "size": np.tile(np.array([[CANVAS, 32]], np.int32), (BATCH, 1)),
        **dict(zip(("category", "label", "group"), np.asarray(number, np.int32), strict=True)),
        "mask": mask,
        "masked": np.array([1] * (BATCH - 1) + [0], np.int32),
        "facts": {
            "original_size": np.tile(np.array([[1000, 800]], np.int32), (BATCH, 1)),
            "foreground_box": box,
            "foreground_box_published": box,
        },
    }


@functools.cache
def batch(name, epoch=0):
    """All samples as the batch of an objective, on the host."""
    wanted = spec(name)
    stored = dict(samples())
    if wanted.needs.mask:  # defects can be seen
        stored["image"] = np.where(stored["mask"][..., None], 255, stored["image"]).astype(np.uint8)
    stored["facts"] = {fact: stored["facts"][fact] for fact in wanted.facts}
    drawn = {"index": np.arange(BATCH, dtype=np.int32), "epoch": np.full(BATCH, epoch, np.int32)}
    if wanted.needs.companions:
        draws = CompanionDraws(RECORDS, wanted.needs.companions, seed=0)
        drawn["references"] = draws(drawn["index"], drawn["epoch"])

    def rows(index, names):
        return jax.tree.map(lambda a: a[index], batches.selected(stored, names))

    if wanted.features:
        objective, params, extra = perturbed(name)
        plain = dataclasses.replace(wanted, features={}).complete(drawn, rows)
        stored["features"] = jax.device_get(objective.per_sample(params, extra, plain))
    return wanted.complete(drawn, rows)


@functools.cache
def perturbed(name):
    """The objective, and parameters and extra on the host that no gradient vanishes at."""
    return build(name), *drawn(build(name))


def drawn(objective):
    """Random values of the sizes that initial ones have, which no compiler is needed for."""
    g = np.random.default_rng(7)

    def draw(keys, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # counters, places in a queue
            return np.zeros(leaf.shape, leaf.dtype)
        noise, path = np.asarray(g.standard_normal(leaf.shape), leaf.dtype), path_name(keys)
        if path.endswith(("scale", "var")):
            return 1 + np.abs(noise) / 10
        if not path.endswith("kernel"):
            return noise / 10
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[max(leaf.ndim - 2, 0)]
        return noise / math.sqrt(fan_in)

    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    return jax.tree.map_with_path(draw, shapes)
