"""What the tests of objectives share: the cases, and the batch, run and state they start from."""

import dataclasses
import functools
import importlib
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.augment.views import ViewConfig
from dsad.core import batch as batches
from dsad.core import config as core_config
from dsad.core.batch import BatchSpec
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.recipe import OptimConfig
from dsad.core.types import PerSample, Record, RunInfo
from dsad.data import facts as image_facts
from dsad.data.companions import CompanionDraws
from dsad.models.decoder import DecoderConfig
from dsad.objectives import mae
from dsad.train.optim import make_optimizer, make_schedule
from dsad.train.state import abstract_state, initial_state
from dsad.train.step import make_step, placed_key
from tests.seams import objectives as seams

BATCH, CANVAS, SIDE = 8, 40, 32
RUN = RunInfo(total_steps=30, batch_size=BATCH, samples=BATCH, classes=2)
VIEW = ViewConfig(side=SIDE, area=(0.3, 1.0))
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
      gradient: share of the largest gradient by which meshes may differ: more where a rectifier
        or a pool that is not ``recorded`` may choose otherwise. Views differ by 2e-6 between
        meshes; such noise on one device moves gradients of "steady" by 8e-4 of the largest.

    """

    config: Mapping[str, Any]
    no_gradient: str = "$^"
    fixed_views: tuple[str, ...] = ()
    warm_up: int = 0
    recorded: Callable[[Any, RunInfo], Any] | None = None
    collectives: frozenset[str] | None = None
    summed: float = 0.0
    own: tuple[str, ...] = ()
    gradient: float = 1e-4


class Member(NamedTuple):
    """An objective under test: ``module`` has ``Config`` and ``build``."""

    name: str
    module: types.ModuleType
    case: Case


@functools.cache
def cases() -> dict[str, Member]:
    """By name: the members of dsad.objectives, and the miniatures in tests/seams/objectives."""
    of_members = [
        Member(n, core_config.resolve("objectives", n), _module(f"contracts.objectives.{n}").CASE)
        for n in core_config.members("objectives")
    ]
    files = [m.name for m in pkgutil.iter_modules(seams.__path__)]
    miniatures = [Member(n, module := _module(f"seams.objectives.{n}"), module.CASE) for n in files]
    return {member.name: member for member in of_members + miniatures}


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
        return jax.tree.map(lambda a: a[index], {n: stored[n] for n in names})

    if wanted.features:
        objective, params, extra = perturbed(name)
        plain = dataclasses.replace(wanted, features={}).complete(drawn, rows)
        stored["features"] = jax.device_get(objective.per_sample(params, extra, plain))
    return wanted.complete(drawn, rows)


@functools.cache
def perturbed(name):
    """The objective with perturbed parameters: fresh ones hide gradients behind zero scales."""
    objective, state = build(name), _fresh(name)
    params, extra = jax.device_get((state.params, state.extra))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return objective, jax.tree.unflatten(tree, noisy), extra


@functools.cache
def _parts(name):
    """Objective, optimiser, abstract state, step and mesh of a training run on one device."""
    objective = build(name)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    optim = OptimConfig(name="adamw", lr=1e-3, lr_batch=0, schedule="constant", warmup_epochs=0)
    schedule = make_schedule(optim, batch_size=BATCH, steps_per_epoch=1, total_steps=30)
    tx: optax.GradientTransformation = make_optimizer(optim, schedule)
    abstract = abstract_state(objective, tx, mesh, 2**18)
    step = make_step(objective, tx, lambda state: schedule(state.step), abstract, mesh=mesh)
    return objective, tx, abstract, step, mesh


@functools.cache
def _fresh(name):
    objective, tx, abstract, _, _ = _parts(name)
    return initial_state(objective, tx, abstract, seed=0)


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def training(name):
    """A fresh state, which the step may consume, and the step, key and mesh that tests share."""
    *_, step, mesh = _parts(name)
    return _copied(_fresh(name)), step, placed_key(jax.random.key(0), mesh), mesh
