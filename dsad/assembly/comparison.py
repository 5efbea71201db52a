"""The config of a comparison, and the evaluations that it is made of."""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from dsad.assembly import evaluate
from dsad.core import config as core_config
from dsad.core import paths
from dsad.core.config import Refused, field, listed
from dsad.core.detection import Detector
from dsad.core.errors import ConfigError, DsadError
from dsad.core.mesh import MeshConfig
from dsad.data import base as data_base
from dsad.evaluation.compared import ALL, NONE, Baseline, Shots
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.metrics import aupro_key
from dsad.evaluation.support import AS_DRAWN, SupportConfig
from dsad.models import wrappers
from dsad.terminal import flags

#: Below the working directory: the features of all backbones, unless the config names a folder.
FEATURES = "features"
#: In a backbone's spec and weights: the number of a seed, each of which has a network of its own.
SEED = "{seed}"

#: What a detector may have otherwise than the others.
_OWN = ("detector", "evaluation", "one_for_all", "support")


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
        name: dict(_flat(_group(f"config.settings.{name}", entry)))
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


def _flat(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys on one level."""
    for key, value in group.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """An evaluation of a comparison; ``seed`` is None for one of all seeds."""

    dataset: str
    backbone: str
    detector: str
    shots: Shots
    seed: int | None
    config: Any

    @property
    def place(self) -> dict[str, Any]:
        """What tells its row from the others."""
        return {n: getattr(self, n) for n in ("dataset", "backbone", "detector", "shots")}

    @property
    def title(self) -> str:
        few = f"{self.shots}-shot/" if isinstance(self.shots, int) else ""
        seed = "" if self.seed is None else f"/seed{self.seed}"
        return f"{self.dataset}/{self.backbone}/{few}{self.detector}{seed}"

    @property
    def folder(self) -> str:
        """Below the comparison's."""
        return "/".join(map(paths.component, self.title.split("/")))

    def told(self, text: str) -> str:
        """A message about an evaluation, with the keys that the comparison has in their places."""
        own = {
            "data": f"datasets.{self.dataset}",
            "backbone": f"backbones.{self.backbone}.spec",
            "weights": f"backbones.{self.backbone}.weights",
            "detector": f"settings.{self.detector}.detector",
        }
        names = "|".join(own)
        return re.sub(rf"\bconfig\.({names})\b", lambda key: f"config.{own[key[1]]}", text)

    @property
    def network(self) -> tuple[str, str]:
        """Spec without wrappers of maps, and weights: what computes the features."""
        return wrappers.unwrap(self.config.backbone).network, self.config.weights


class Faults:
    """Faults of many cells, each told once."""

    def __init__(self) -> None:
        self._cells: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, title: str, cell: "Cell | None" = None) -> Iterator[None]:
        """Note what is raised in this block, of a cell with the keys of the comparison."""
        try:
            yield
        except DsadError as error:
            self.note(title, cell.told(str(error)) if cell else str(error))

    def note(self, title: str, text: str) -> None:
        """Note a fault."""
        self._cells.setdefault(text, []).append(title)

    def __bool__(self) -> bool:
        return bool(self._cells)

    def __str__(self) -> str:
        lines = []
        for text, cells in self._cells.items():
            shown = cells if len(cells) < 4 else [*cells[:2], f"{len(cells) - 2} more"]
            lines += [f"{', '.join(shown)}:", *(f"    {line}" for line in text.splitlines())]
        return "\n  ".join(lines)


def cells_of(plan: Plan, features: str, faults: Faults) -> list[Cell]:
    """One after the other, so that those of a data set and a network are neighbours.

    ``features`` is the folder of all features, unless the config names one.
    """
    files = {}
    for detector in plan.detectors:
        with faults.of(f"config.detectors {detector}"):
            config, _, _ = flags.Command("compare", "", config=detector).parse([])
            files[detector] = core_config.require(config, "detector", "configs/patchcore.py")
    measured = core_config.as_dict(plan.config.evaluation)
    measured["feature_cache"] = measured["feature_cache"] or features
    del measured["align_corners"]
    parsed: list[tuple[Cell, evaluate.EvaluateConfig, Detector]] = []
    for place, network, seed, shots in _places(plan):
        if place["detector"] not in files or _skipped(plan, *place.values()):
            continue
        config = files[place["detector"]].copy_and_resolve_references()
        cell = Cell(**place, shots=shots or ALL, seed=seed, config=config)
        with faults.of(cell.title, cell):
            config.evaluation.update(measured)
            _fill(config, plan, place, network, seed, shots)
            cfg, detector = evaluate.parse(config)
            if detector.traits.fits_on == "test":
                if shots != plan.shots[0]:
                    continue
                config.shots = 0
                cell = dataclasses.replace(cell, shots=NONE)
            elif _skipped(plan, *place.values(), shots=f"{shots}-shot" if shots else ALL):
                continue
            parsed.append((cell, cfg, detector))
    if not parsed and not faults:
        raise ConfigError(f"config.skip: {plan.config.skip} leaves nothing to compare.")
    _share_layers(parsed, plan.config.evaluation.cache_layers)
    return [cell for cell, _, _ in parsed]


def _skipped(plan: Plan, data: str, backbone: str, detector: str, shots: str = "") -> bool:
    """Whether a cell, or with ``shots`` "" all of its detector, is left out."""
    title = _title(data, backbone, detector, shots)
    return any(fnmatch.fnmatchcase(title, pattern) for pattern in plan.config.skip)


def _title(data: str, backbone: str, detector: str, shots: str) -> str:
    """What patterns of ``config.skip`` are held against."""
    return "/".join(filter(None, (data, backbone, shots, detector)))


def _places(plan: Plan) -> Iterator[tuple[dict[str, str], NetworkConfig, int | None, int]]:
    """Names of a cell, its network, its seed where each has a network of its own, and its shots."""
    for data in plan.datasets:
        for name, network in plan.backbones.items():
            per_seed = SEED in network.spec or SEED in network.weights
            for seed in plan.config.seeds if per_seed else (None,):
                for detector in plan.detectors:
                    place = {"dataset": data, "backbone": name, "detector": detector}
                    for shots in plan.shots:
                        yield place, network, seed, shots


def notes(plan: Plan) -> list[str]:
    """What is in vain: patterns of ``config.skip``, and what detectors' files ask for.

    The latter do not get what is the same for all.
    """
    titles = {
        _title(*place.values(), shots=few) for place, _, _, n in _places(plan)
        for few in ("", f"{n}-shot" if n else ALL)
    }  # fmt: skip
    made = [
        f"config.skip: {pattern!r} is of no evaluation"
        for pattern in plan.config.skip if not fnmatch.filter(titles, pattern)
    ]  # fmt: skip
    usual = dict(_flat(core_config.as_dict(evaluate.EvaluateConfig())))
    given = dict(_flat(core_config.as_dict(plan.config)))
    for detector in plan.detectors:
        config, _, _ = flags.Command("compare", "", config=detector).parse([])
        asked, own = dict(_flat(config)), dict(given)
        for settings in _settings(plan, detector).values():
            own |= settings
        for key in ("evaluation.image_size", "one_for_all", "shots", "support.rotations"):
            here = plan.shots if key == "shots" else (own[key],)
            if asked[key] not in (usual[key], *here):
                made.append(
                    f"{detector}: its file has config.{key} = {asked[key]}, here "
                    f"{', '.join(map(str, here))}"
                )
    return made


def once(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """Which detectors are measured without training images, whatever numbers were asked for."""
    if plan.shots == (0,):
        return []
    shots = ", ".join(map(str, plan.shots))
    return [
        f"{name}: is fitted on the test images and takes no training image; measured once, as "
        f"0-shot, not with config.shots = {shots}"
        for name in dict.fromkeys(cell.detector for cell in cells if cell.shots == NONE)
    ]


def _settings(plan: Plan, detector: str, backbone: str = "") -> dict[str, Mapping[str, Any]]:
    """By name in ``config.settings``, later ones over earlier.

    Those of a detector, also of its config file where it is a variant, and on a backbone.
    """
    names = (detector.partition(":")[0], detector, f"{backbone}/{detector}")
    return {name: plan.settings[name] for name in names if name in plan.settings}


def _fill(
    config: Any, plan: Plan, place: Mapping[str, str], network: NetworkConfig, seed: int | None,
    shots: int,
) -> None:  # fmt: skip
    """Make the config of a detector's file that of a cell, as ``dsad evaluate`` takes it."""
    cfg, detector = plan.config, place["detector"]
    spec, weights = (
        text if seed is None else text.replace(SEED, str(seed))
        for text in (network.spec, network.weights)
    )
    config.update(
        backbone=spec, weights=weights, seed=cfg.seed, shots=shots,
        contamination=cfg.contamination, one_for_all=cfg.one_for_all,
        seeds=cfg.seeds if seed is None else (seed,), support=core_config.as_dict(cfg.support),
        mesh=core_config.as_dict(cfg.mesh),
        data=core_config.as_dict(evaluate.data_config(plan.datasets[place["dataset"]], spec)),
    )  # fmt: skip
    if network.layers:
        flags.update(config, {"detector.layers": network.layers})
    for name, own in _settings(plan, detector, place["backbone"]).items():
        if wrong := [key for key in own if key.partition(".")[0] not in _OWN]:
            raise ConfigError(
                f"config.settings.{name}: expected keys of {listed(_OWN)}, found {listed(wrong)}; "
                "the others are the same for all."
            )
        try:
            flags.update(config, own)
        except ConfigError as error:
            raise ConfigError(f"config.settings.{name}: {error}") from error


def _share_layers(
    cells: Sequence[tuple[Cell, evaluate.EvaluateConfig, Detector]], first: Sequence[str]
) -> None:
    """Let the cells of a network keep the maps of all, so that an image passes it once."""
    layers: dict[Any, dict[str, None]] = {}
    groups = []
    for cell, cfg, detector in cells:
        # Not the preprocessing itself: a size of 0 is the backbone's own.
        seen = (cfg.evaluation.image_size, cfg.evaluation.image_width, cfg.evaluation.resize)
        wanted = layers.setdefault((*cell.network, *seen), dict.fromkeys(first))
        wanted |= dict.fromkeys((*detector.layers, *detector.traits.tokens))
        groups.append((cell, wanted))
    for cell, wanted in groups:
        cell.config.evaluation.cache_layers = tuple(wanted)
