"""What is planned: the step of a training, or what an evaluation computes of a batch of images."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsad.assembly import evaluate, pretrain, runs
from dsad.assembly.pretrain import DataFacts, Run
from dsad.core.config import listed
from dsad.core.detection import PIXELS
from dsad.core.errors import ConfigError
from dsad.core.flops import model_flops
from dsad.core.mesh import make_mesh
from dsad.core.platform import planned_for
from dsad.evaluation import compiled
from dsad.models import wrappers
from dsad.plan import _samples, _warnings
from dsad.plan._compile import Program
from dsad.train.step import abstract_key

Kind = Literal["training", "features"]
#: Configs of other commands, by a group that they have, and what to plan in their place.
_OTHERS = {
    "backbones": "a comparison is made of evaluations, which are planned one by one",
    "pretrain": "the demo is made of two configs",
    "probe": "a probe takes the features of a batch as a detector of the same layer does",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A program that devices run again and again, known from shapes alone.

    Attributes:
      unit: what a batch consists of: an "image", or a "window" of one.
      batch_size: of them, over the whole mesh.
      lower: traces and lowers the program for the platform of the mesh.
      trees: shapes and shardings of what lies on the devices when it is called, by kind.
      model_flops: that one of the batch needs, see ``core.flops.model_flops``.
      warnings: lines about what a compiler made of it.
      samples, samples_from, epochs, steps: of a training.

    """

    kind: Kind
    unit: str
    mesh: Mesh
    batch_size: int
    lower: Callable[[], jax.stages.Lowered]
    trees: Mapping[str, Any]
    model_flops: float
    warnings: Callable[[Program], list[str]]
    samples: int | None = None
    samples_from: str = ""
    epochs: float | None = None
    steps: int | None = None

    @property
    def platform(self) -> str:
        """Of the mesh's devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def held(self) -> dict[str, int]:
        """Bytes of one device's part of the ``trees``, without empty ones."""

        def part(leaf: Any) -> int:
            return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

        sizes = {kind: sum(map(part, jax.tree.leaves(tree))) for kind, tree in self.trees.items()}
        return {kind: size for kind, size in sizes.items() if size}


def kind(config: Any) -> Kind:
    """What there is to plan of a config; raises ConfigError for one of another command."""
    if "objective" in config:
        return "training"
    if "detector" in config:
        return "features"
    why = next((f": {text}" for group, text in _OTHERS.items() if group in config), "")
    raise ConfigError(
        f"config has neither 'objective' nor 'detector' (it has: {listed(config.keys())}){why}. "
        "Plan a training, such as --config=configs/ds2.py, or the features of an evaluation: "
        "--config=configs/knn.py --config.backbone=ARCH --config.evaluation.image_size=SIDE."
    )


def resized(config: Any, batch: int) -> Any:
    """The config with another batch size."""
    changed = config.copy_and_resolve_references()
    (changed if kind(config) == "training" else changed.evaluation).batch_size = batch
    return changed


def training(config: Any, devices: list[Any], spec: str, samples: int) -> Job:
    """The step of a training; ``spec`` and ``samples`` as of ``_samples.count``."""
    cfg, _, _ = pretrain.parse(config)
    count, classes, source = _samples.count(cfg, spec, samples)
    run = pretrain.assemble(config, devices, DataFacts(samples=count, classes=classes))
    state = run.abstract
    trees = {
        "weights": state.params, "optimiser": state.opt_state,
        "statistics, teacher and other state": (state.extra, state.step),
        "batch": run.inputs, "data set on the device": run.store,
    }  # fmt: skip
    return Job(
        kind="training", unit="image", mesh=run.mesh, batch_size=cfg.batch_size,
        lower=functools.partial(lower, run), trees=trees, model_flops=run.model_flops_per_image(),
        warnings=functools.partial(_warnings.unintended, run), samples=count, samples_from=source,
        epochs=None if cfg.steps else cfg.epochs, steps=run.total_steps,
    )  # fmt: skip


def lower(run: Run) -> jax.stages.Lowered:
    """The step of a run traced and lowered for the platform of its mesh."""
    with run.tracing():
        return run.step.lower(run.abstract, run.inputs, run.store, abstract_key(run.mesh))


def features(config: Any, devices: list[Any]) -> Job:
    """The maps that a detector reads, of a batch of an evaluation; no weight file is needed.

    Raises ConfigError for detectors whose own network looks at the pixels, for one run per
    category, and for what an evaluation refuses of backbone, layers and size.
    """
    cfg, detector = evaluate.parse(config)
    evaluate.check_patches(cfg.backbone, detector)
    if tuple(detector.layers) == (PIXELS,):
        raise ConfigError(
            "config.detector: it reads the pixels, and its network is part of its own training: "
            "there are no features to plan. Name a detector of feature maps, such as knn."
        )
    if runs.per_category(cfg.backbone):
        raise ConfigError(
            f"config.backbone={cfg.backbone!r}: every category has a run of its own; name one."
        )
    mesh, network = make_mesh(cfg.mesh, devices), wrappers.unwrap(cfg.backbone).network
    platform = mesh.devices.flat[0].platform
    with planned_for(platform):
        backbone = runs.abstract(network, cfg.weights, cfg.seed)
        settings = evaluate.sized(cfg, backbone.image_size).evaluation
        into = settings.preprocessing
        extractor = compiled.extractor(detector, settings, mesh, backbone)
        extractor.use(backbone)
        image = jax.ShapeDtypeStruct((1, *into.size, 3), jnp.float32)
        needed = model_flops(lambda net, x: net(x), extractor.network, image, live=True)
    count = compiled.batch_rows(settings, mesh)

    def lowered() -> jax.stages.Lowered:
        with planned_for(platform):
            return extractor.lower(count)

    hosts = len({device.process_index for device in devices})
    lines = [] if into.single or hosts == 1 else [
        f'config.evaluation.resize: "windows" need one process, and this slice has {hosts} hosts'
    ]  # fmt: skip
    return Job(
        kind="features", unit="image" if into.single else "window", mesh=mesh, batch_size=count,
        lower=lowered, trees={"weights": extractor.network, "batch": extractor.images(count)},
        model_flops=needed, warnings=lambda program: lines + _warnings.copies(program),
    )  # fmt: skip
