"""Many evaluations as one: detectors × backbones × data sets × seeds, measured cell by cell."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath
from rich.console import Console

from dsad.assembly import datasets, evaluate, licences, runs, workdir
from dsad.assembly.comparison import FEATURES, Plan, parse
from dsad.assembly.comparison_cells import Cell, Faults, cells_of, notes, once
from dsad.core import distributed, paths
from dsad.core.errors import ConfigError, DsadError
from dsad.core.types import Backbone, Dataset
from dsad.data import base as data_base
from dsad.evaluation import compared, extract, stamp, support
from dsad.evaluation.compared import Measured
from dsad.evaluation.localize import Results, settings
from dsad.evaluation.report.page import metric_label
from dsad.evaluation.results import RESULTS
from dsad.models import wrappers
from dsad.models.weights.licences import Licence, named

T = TypeVar("T")

#: What a finished evaluation of a comparison may have had otherwise.
_FREE = (
    *workdir.SAME_NUMBERS, "config.evaluation.batch_size", "config.evaluation.workers",
    "config.evaluation.cache_mb",
)  # fmt: skip
#: Likewise in its stamp, beside who measured it and when.
_SEEN = (*(n for n in stamp.IGNORED if n not in ("backbone", "seed")), "backbone.per_category")


# --- loading


class _Loaded:
    """Data sets, and the last network, which neighbouring cells share."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._datasets: dict[data_base.DataConfig, Dataset | DsadError] = {}
        self._networks: dict[tuple[str, str], Backbone | DsadError] = {}

    def evaluation(self, cell: Cell) -> evaluate.Evaluation:
        """The parts of a cell; raises DsadError for what cannot be used."""
        config, _ = evaluate.parse(cell.config)
        found = self.dataset(config.data)
        network = None
        if not runs.per_category(config.backbone):
            network = self.network(cell, cell.config.backbone)
        return evaluate.prepare(cell.config, self._out, found, network=network)

    def dataset(self, config: data_base.DataConfig) -> Dataset:
        """The data set of a config."""
        return self._once(self._datasets, config, lambda: datasets.loaded(config, self._out))

    def network(self, cell: Cell, spec: str) -> Backbone:
        """What computes the features of a spec."""
        key = (wrappers.unwrap(spec).network, cell.config.weights)
        if key not in self._networks:
            self._networks.clear()
        return self._once(self._networks, key, lambda: runs.backbone(*key, cell.config.seed))

    def _once(self, known: dict[Any, T | DsadError], key: Any, load: Callable[[], T]) -> T:
        if key not in known:
            try:
                known[key] = load()
            except DsadError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, DsadError):
            raise found
        return found


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """A comparison whose cells were all checked.

    ``done`` are the numbers of finished ones, by place in ``cells``; ``again`` are those that are
    replaced. ``bytes`` are about those of the features that are still to be computed, ``notes``
    what people should know; ``licences`` are those of the backbones' weights, by name.
    """

    plan: Plan
    cells: list[Cell]
    done: dict[int, Measured]
    again: set[int]
    bytes: int
    features: str
    notes: list[str]
    licences: dict[str, Licence]
    loaded: _Loaded


def prepare(
    config: Any, directory: str, out: Console, *, overwrite: bool = False,
    allow_different: bool = False,
) -> Comparison:  # fmt: skip
    """Check every cell before anything is computed or touched; all faults are told at once.

    Args:
      config: see ``CompareConfig``.
      directory: of the comparison, see ``compare``.
      out: is told what the data sets have to say.
      overwrite: measure finished cells again whose settings are others now.
      allow_different: compare numbers that do not mean the same, and say so.

    Raises:
      ConfigError: faults of cells, numbers of a data set that would not mean the same, or too
        little space for the features.

    """
    workdir.share(directory, "compare", {}, dry=True)
    plan, faults = parse(config), Faults()
    features = f"{directory.rstrip('/')}/{FEATURES}"
    if paths.is_remote(features) and not plan.config.evaluation.feature_cache:
        raise ConfigError(
            "config.evaluation.feature_cache: expected a folder of this machine for the features, "
            f"as --workdir={directory} is none."
        )
    cells, loaded = cells_of(plan, features, faults), _Loaded(out)
    path = paths.directory(directory)
    finished = distributed.on_main(lambda: [(path / c.folder / RESULTS).exists() for c in cells])
    made = Comparison(
        plan=plan, cells=cells, done={}, again=set(), bytes=0,
        notes=[] if faults else [*notes(plan), *once(plan, cells)], licences={},
        features=plan.config.evaluation.feature_cache or features, loaded=loaded,
    )  # fmt: skip
    sizes: dict[Any, int] = {}
    stamps: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, cell in enumerate(cells):
        with faults.of(cell.title, cell):
            parts = loaded.evaluation(cell)
            size, mark = _size(parts, cell, loaded), _stamp(parts, cell, loaded)
            if cell.backbone not in made.licences:
                made.licences[cell.backbone] = _licence(plan, parts, cell, loaded)
            title, first = stamps.setdefault(cell.dataset, (cell.title, mark))
            different = compared.differing(title, first, cell.title, mark)
            if different and not allow_different:
                faults.note(cell.title, "\n".join([_DIFFERENT, *different]))
            if finished[number]:
                measured = compared.read_measured(path, cell.folder, **cell.place)
                lines = workdir.changes(path / cell.folder, cell.config.to_dict(), _FREE)
                lines = lines or stamp.differences(measured.stamp, mark, _SEEN)
                if not lines:
                    made.done[number] = measured
                elif overwrite:
                    made.again.add(number)
                else:
                    faults.note(cell.title, "\n".join([_OTHERWISE, *lines]))
            else:
                if overwrite and _differs(path / cell.folder, cell):
                    made.again.add(number)
                workdir.claim(
                    str(path / cell.folder), "evaluate", cell.config.to_dict(), dry=True,
                    overwrite=number in made.again,
                )  # fmt: skip
            if number not in made.done:
                key = (cell.dataset, *cell.network, parts.config.evaluation.preprocessing)
                sizes[key] = max(size, sizes.get(key, 0))
    if faults:
        raise ConfigError(f"dsad compare: nothing was computed, because of\n  {faults}")
    made.bytes = sum(sizes.values())
    _check_space(made)
    return made


def _differs(folder: epath.Path, cell: Cell) -> bool:
    """Whether an evaluation that was begun in a folder has other settings."""
    begun = workdir.holds_run(str(folder))
    return begun and bool(workdir.changes(folder, cell.config.to_dict()))


_DIFFERENT = (
    "numbers that would not mean the same as those of the first row of the table; make these keys "
    "alike, or compare them all the same with --allow-different:"
)
_OTHERWISE = (
    "is measured with other settings (there → now); put these back, choose another --workdir, or "
    "measure such cells again with --overwrite:"
)


def _first_network(parts: evaluate.Evaluation, cell: Cell, loaded: _Loaded) -> Backbone:
    """The network of a cell, of one for each category the first."""
    if parts.backbone is not None:
        return parts.backbone
    spec = runs.of_category(cell.config.backbone, parts.dataset.categories[0])
    return loaded.network(cell, spec)


def _size(parts: evaluate.Evaluation, cell: Cell, loaded: _Loaded) -> int:
    """Bytes of the features of a cell's images; ConfigError for maps that there are not."""
    network = _first_network(parts, cell, loaded)
    detector, size = parts.detector, parts.config.evaluation.preprocessing.size
    traits = detector.traits
    maps = extract.check_maps(network, size, detector.layers, traits.tokens, traits.blocks)
    kept = [maps[n] for n in parts.config.evaluation.cache_layers if n in maps]
    images = 0
    for category, by_seed in parts.sets.by_category.items():
        bank = {path for own in by_seed.values() for path in own.bank}
        images += len(bank) * parts.config.support.rotations
        images += len(parts.dataset.source("test", category))
        if parts.sets.validated:
            images += len(support.validation(parts.dataset, category))
    return images * sum(4 * math.prod(x.shape) for x in kept)


def _stamp(parts: evaluate.Evaluation, cell: Cell, loaded: _Loaded) -> dict[str, Any]:
    """What the stamp of a cell is going to say."""
    cfg, names = parts.config, tuple(parts.map_wrappers())
    return stamp.make_stamp(
        parts.dataset, parts.dataset.categories, config=cfg.evaluation, detector=parts.detector,
        backbone=_first_network(parts, cell, loaded), key=runs.key_for(cfg.seed),
        details=settings(parts.detector, cfg.evaluation, parts.sets, names),
    )  # fmt: skip


def _licence(plan: Plan, parts: evaluate.Evaluation, cell: Cell, loaded: _Loaded) -> Licence:
    """Of a cell's weights, of one run for each category or seed that of the first."""
    if given := plan.backbones[cell.backbone].licence:
        return named(given)
    spec = runs.of_category(cell.config.backbone, parts.dataset.categories[0])
    return licences.of_backbone(spec, cell.config.weights, loaded.dataset)


def _check_space(made: Comparison) -> None:
    """Refuse features that do not fit beside what their folder holds, which may be the same."""
    folder = paths.directory(made.features)
    free, held = paths.free(folder), 0
    if folder.is_dir():
        held = sum(p.stat().length for p in folder.glob("*/*.features"))
    if free is not None and made.bytes > free + held:
        raise ConfigError(
            f"{made.features}: the features need about {paths.size(made.bytes)}, and "
            f"{paths.size(free)} are free there. Name a folder on a larger disk with "
            "--config.evaluation.feature_cache=DIR, or compare fewer backbones or data sets."
        )


# --- running


def compare(
    made: Comparison, directory: str, out: Console, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure what is not finished; returns what ``comparison.json`` holds, see there.

    After every cell both files of the comparison are written, so that the report shows what there
    is. Raises DsadError, naming the cell, for one that fails; the finished ones stay.
    """
    path = workdir.share(directory, "compare", config)
    total, content = len(made.cells), _written(made, path)
    for number, cell in enumerate(made.cells):
        if number in made.done:
            continue
        left = _left(made)
        about = f", {left} for all that is left" if left else ""
        out.print(f"{number + 1}/{total}  {cell.title}{about}")
        try:
            results = _measured(made, path, number, out)
        except DsadError as error:
            on = "The others stay as they are; the same command goes on."
            told = DsadError(f"{cell.title}: {cell.told(str(error))}\n{on}")
            told.code, told.shared = error.code, error.shared
            raise told from error
        made.done[number] = compared.read_measured(path, cell.folder, **cell.place)
        out.print(f"  {_line(results, made.plan.main)}")
        content = _written(made, path)
    return content


def _measured(made: Comparison, path: epath.Path, number: int, out: Console) -> Results:
    """Evaluate a cell in its own directory."""
    cell = made.cells[number]
    parts = distributed.together(lambda: made.loaded.evaluation(cell))
    folder = workdir.claim(
        str(path / cell.folder), "evaluate", cell.config.to_dict(), overwrite=number in made.again
    )
    with data_base.read_as(parts.config.data):
        return evaluate.evaluate(parts, folder, out, name=cell.title)


def _written(made: Comparison, path: epath.Path) -> dict[str, Any]:
    """The numbers of the finished cells, in the order of all; also written, once there are some."""
    done = [made.done[number] for number in sorted(made.done)]
    left = [cell.title for number, cell in enumerate(made.cells) if number not in made.done]
    content = compared.summary(done, made.plan.baseline, made.plan.main, left, made.licences)
    if done and distributed.is_main():
        compared.write(path, content)
    return content


def _line(results: Results, metrics: Sequence[str]) -> str:
    seconds = sum(sum(row["seconds"].values()) for row in results.categories.values())
    numbers = [
        f"{metric_label(m)}: {results.mean[m]:.3f}"
        for m in metrics if results.mean.get(m) is not None
    ]  # fmt: skip
    return f"{', '.join(numbers)} ({seconds:.0f} s)"


def _left(made: Comparison) -> str:
    """How long the rest takes at the pace of finished cells, of the same detector where there are.

    Empty where nothing is known.
    """
    taken: dict[str, list[float]] = {}
    for measured in made.done.values():
        for key in (measured.detector, ""):
            taken.setdefault(key, []).append(sum(measured.seconds.values()))
    if not taken:
        return ""
    rest = [cell for number, cell in enumerate(made.cells) if number not in made.done]
    paces = [taken.get(cell.detector, taken[""]) for cell in rest]
    minutes = sum(sum(pace) / len(pace) for pace in paces) / 60
    return f"about {minutes:.0f} min" if minutes >= 1.5 else f"about {60 * minutes:.0f} s"
