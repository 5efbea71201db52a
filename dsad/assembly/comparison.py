"""The config of a comparison, as values; ``comparison_cells`` has what it is made of."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from dsad.core import config as core_config
from dsad.core.config import Refused, field, listed
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig
from dsad.data import base as data_base
from dsad.evaluation.compared import Baseline
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.metrics import aupro_key
from dsad.evaluation.support import AS_DRAWN, SupportConfig
from dsad.terminal import flags

#: Below the working directory: the features of all backbones, unless the config names a folder.
FEATURES = "features"
#: In a backbone's spec and weights: the number of a seed, each of which has a network of its own.
SEED = "{seed}"


class NetworkConfig(core_config.Settings, place="config.backbones"):
    """One of the backbones; its spec alone may stand in the place of this group.

    With "{seed}" in ``spec`` or ``weights`` each of the seeds has a network of its own.

    Attributes:
      spec: as ``config.backbone`` of an evaluation: an architecture or run:DIR, in wrappers or not.
      weights: of an architecture, as ``config.weights`` of an evaluation; "random:{seed}" draws an
        untrained network for each seed.
      layers: maps that all detectors read of it, in the place of their own; empty: each its own.
      licence: of its weights, where dsad cannot know it, as of a file.

    """

    spec: str
    weights: str = ""
    layers: tuple[str, ...] = field((), distinct=True)
    licence: str = ""


class CompareConfig(core_config.Settings, place="config"):
    """Everything of a comparison but its backbones, its data sets and settings of detectors.

    The groups ``backbones`` and ``datasets`` hold one of each by the name that it has in tables,
    ``settings`` keys of a detector's config (``detector``, ``evaluation``, ``support`` and
    ``one_for_all``) by the detector's, or by BACKBONE/DETECTOR.

    Attributes:
      detectors: their config files, with variants after a colon ("patchcore:published"); of these
        files the keys of the method are taken, and how its maps are upsampled.
      baseline: what differences are taken against: a backbone, a detector, or BACKBONE/DETECTOR;
        empty: the first backbone, or the first detector of a single backbone.
      skip: evaluations that are left out, as DATASET/BACKBONE/DETECTOR for any number of shots, or
        DATASET/BACKBONE/4-shot/DETECTOR ("all" for shots = 0); * stands for anything.
      seed: of the detectors' random choices, as in an evaluation.
      shots: training images of each category that are used; 0: all. Several numbers are compared
        side by side; a detector that is fitted on the test images is measured once, without any.
      contamination: share of anomalous test images among them, as in an evaluation.
      seeds: draw the ``shots`` and the detectors' random choices, and are those of "{seed}".
      one_for_all: fit a single detector on the training images of all categories.

    """

    detectors: tuple[str, ...] = field(("patchcore",), distinct=True, filled=True)
    baseline: str = ""
    skip: tuple[str, ...] = ()
    seed: int = field(0, at_least=0)
    shots: int | tuple[int, ...] = field(0, at_least=0, distinct=True, filled=True)
    contamination: float = field(0.0, at_least=0, at_most=0.5)
    seeds: tuple[int, ...] = field((0,), at_least=0, distinct=True, filled=True)
    support: SupportConfig = AS_DRAWN
    one_for_all: bool = False
    evaluation: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def check(self) -> None:
        if self.evaluation.align_corners:
            advice = "Set config.settings.DETECTOR.evaluation.align_corners."
            raise Refused("evaluation.align_corners", "False, as detectors differ", True, advice)


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default, for config files to fill."""
    config = ml_collections.ConfigDict(core_config.as_dict(CompareConfig()))
    config.update(backbones={}, datasets={}, settings={})
    config.shots = config_dict.FieldReference(0, field_type=object)  # an integer or several
    return config


def in_order(entries: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A group whose keys stay in their order, which is that of the tables; others are sorted."""
    return ml_collections.ConfigDict(entries, sort_keys=False)


def backbone(
    spec: str, weights: str = "", layers: Sequence[str] = (), licence: str = ""
) -> dict[str, Any]:
    """A group of ``config.backbones``, with every key for the command line."""
    return {"spec": spec, "weights": weights, "layers": tuple(layers), "licence": licence}


def dataset(name: str, **keys: Any) -> dict[str, Any]:
    """A group of ``config.datasets`` likewise: the keys of ``config.data`` of an evaluation."""
    return core_config.as_dict(data_base.DataConfig(name=name, **keys))


def is_meant(config: Any) -> bool:
    """Whether a config is of a comparison."""
    return "backbones" in config and "datasets" in config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A parsed config: names in tables with what they stand for."""

    config: CompareConfig
    backbones: Mapping[str, NetworkConfig]
    datasets: Mapping[str, data_base.DataConfig]
    detectors: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    baseline: Baseline

    @property
    def main(self) -> tuple[str, ...]:
        """The numbers that lead the tables."""
        return ("pixel_ap", aupro_key(self.config.evaluation.fpr_limit), "image_auroc")

    @property
    def shots(self) -> tuple[int, ...]:
        """The numbers of training images; 0: all."""
        asked = self.config.shots
        return (asked,) if isinstance(asked, int) else asked


def _names(detectors: Sequence[str]) -> tuple[str, ...]:
    """``("knn,padim",)``, as a command line gives it, as two; commas part words of variants too."""
    made: list[str] = []
    for part in (p.strip() for text in detectors for p in text.split(",")):
        variant = made and ":" in made[-1] and part not in flags.shipped_configs()
        made[-1:] = [f"{made[-1]},{part}"] if variant and ":" not in part else [*made[-1:], part]
    return tuple(made)


def parse(config: Any) -> Plan:
    """A comparison from nested dicts; strict."""
    values = dict(core_config.require(config, "backbones", "configs/compare.py").items())
    groups = {
        name: _group(f"config.{name}", values.pop(name, None))
        for name in ("backbones", "datasets", "settings")
    }
    cfg = core_config.build_dataclass(CompareConfig, values)
    for group in ("backbones", "datasets"):
        if not groups[group]:
            raise ConfigError(f"config.{group}: expected at least one, found none.")
        for name in groups[group]:
            if not re.fullmatch(r"[\w+@=,. -]*\w", name) or name == FEATURES:
                raise ConfigError(
                    f"config.{group}: the name {name!r} cannot be that of a folder of numbers. "
                    "Use letters, digits and -."
                )
    networks, data = {}, {}
    for name, entry in groups["backbones"].items():
        where = f"config.backbones.{name}"
        given = {"spec": entry} if isinstance(entry, str) else _group(where, entry)
        networks[name] = core_config.build_dataclass(NetworkConfig, given, where)
    for name, entry in groups["datasets"].items():
        where = f"config.datasets.{name}"
        data[name] = core_config.build_dataclass(data_base.DataConfig, _group(where, entry), where)
    own = {
        name: dict(flat(_group(f"config.settings.{name}", entry)))
        for name, entry in groups["settings"].items()
    }
    detectors = _names(cfg.detectors)
    known = (*detectors, *flags.shipped_configs())

    def meant(name: str) -> bool:
        network, pair, detector = name.rpartition("/")
        alone = detector if pair and network in networks else name
        return alone in known or alone.partition(":")[0] in known

    if unknown := [n for n in own if not meant(n)]:
        pairs = [f"{b}/{d}" for b in networks for d in detectors]
        raise ConfigError(
            f"config.settings: no detector {listed(unknown)}."
            f"{core_config.suggestion(unknown[0], (*known, *pairs))} Known: {listed(detectors)}, "
            f"and BACKBONE/DETECTOR, with a backbone of {listed(networks)}."
        )
    return Plan(
        config=cfg, backbones=networks, datasets=data, detectors=detectors, settings=own,
        baseline=_baseline(cfg.baseline, tuple(networks), detectors),
    )  # fmt: skip


def _group(where: str, value: Any) -> dict[str, Any]:
    """The keys of a group."""
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{where}: expected a group of keys, found {value!r}.")
    return dict(value.items())


def _baseline(name: str, backbones: Sequence[str], detectors: Sequence[str]) -> Baseline:
    """What ``config.baseline`` names; raises ConfigError for a name that nothing has."""
    if not name:
        several = len(backbones) > 1, len(detectors) > 1
        return Baseline(backbones[0] if several[0] else "",
                        detectors[0] if several == (False, True) else "")  # fmt: skip
    pairs = [Baseline(b, d) for b in backbones for d in detectors]
    alone = [*(Baseline(backbone=b) for b in backbones), *(Baseline(detector=d) for d in detectors)]
    known = {str(found): found for found in reversed([*alone, *pairs])}
    if name not in known:
        raise ConfigError(
            f"config.baseline: no {name!r}.{core_config.suggestion(name, known)} Expected a "
            f"backbone ({listed(backbones)}), a detector ({listed(detectors)}) or "
            "BACKBONE/DETECTOR."
        )
    return known[name]


def flat(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys on one level."""
    for key, value in group.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
