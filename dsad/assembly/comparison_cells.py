"""The evaluations that a comparison is made of."""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsad.assembly import evaluate
from dsad.assembly.comparison import SEED, NetworkConfig, Plan, flat
from dsad.core import config as core_config
from dsad.core import paths
from dsad.core.config import listed
from dsad.core.detection import Detector
from dsad.core.errors import ConfigError, DsadError
from dsad.evaluation.compared import ALL, NONE, Shots
from dsad.models import wrappers
from dsad.terminal import flags

#: What a detector may have otherwise than the others.
_OWN = ("detector", "evaluation", "one_for_all", "support")


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
    usual = dict(flat(core_config.as_dict(evaluate.EvaluateConfig())))
    given = dict(flat(core_config.as_dict(plan.config)))
    for detector in plan.detectors:
        config, _, _ = flags.Command("compare", "", config=detector).parse([])
        asked, own = dict(flat(config)), dict(given)
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
