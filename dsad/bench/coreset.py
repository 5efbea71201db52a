"""``dsad bench coreset``: seconds, memory and picks of the greedy coreset beside plain runs."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dsad import models
from dsad.assembly import datasets
from dsad.bench import _measure
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Progress
from dsad.data import base as data_base
from dsad.detectors import patchcore
from dsad.evaluation.compiled import Device
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.reader import Features, Reader
from dsad.ops.coreset import coreset_memory, greedy_coreset
from dsad.ops.neighbors import nearest
from dsad.terminal import console, flags

#: Long rows: rows, features, projection.
LONG = ((163_856, 384, 0), (300_000, 1_024, 128))


class Case(NamedTuple):
    """A bank and how many of its rows to pick, in which space."""

    name: str
    bank: np.ndarray
    size: int
    projection: int

    @property
    def width(self) -> int:
        """Features of the compared rows."""
        return self.projection or self.bank.shape[1]


class Measured(NamedTuple):
    """One run: picks, seconds, growth of resident bytes, predicted / real time at a tenth."""

    picks: np.ndarray
    seconds: float
    grown: int
    ratio: float


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "bench coreset", "seconds, memory and picks of the greedy coreset beside plain runs."
    )
    command.integer("rows", 20_000, "Rows of the bank (Gaussian).", at_least=20)
    command.integer("dim", 384, "Features of a row.", at_least=1)
    command.integer("percent", 5, "Rows to pick, in percent.", at_least=1)
    command.integer("projection", 0, "Compare rows after a random projection; 0 for none.")
    command.integer("rounds", 3, "Timed rounds of every route; medians are shown.", at_least=1)
    command.integer("peer_picks", 0, "Picks that the plain routes make, 0 for all of them.")
    command.switch(
        "long", "Also two large banks, 10 %, minutes: 163,856 × 384 and 300,000 × 1,024."
    )
    command.string(
        "bottle", "", "Folder of MVTec's bottle; its features replace the first large bank."
    )
    command.string("weights", "", "Weights of the ResNet-18 for --bottle.")
    _, values, _ = command.parse(argv)
    size = max(2, values.rows * min(values.percent, 100) // 100)
    bank = gaussian(values.rows, values.dim)
    case = Case("Gaussian", bank, size, values.projection)
    compare(case, values.rounds, values.peer_picks or size)
    if values.bottle:
        bank = bottle_features(values.bottle, values.weights)
        alone(Case("bottle, layers 2 + 3", bank, len(bank) // 10, 0))
    if values.long:
        for rows, dim, projection in LONG[1:] if values.bottle else LONG:
            alone(Case("clustered", clustered(rows, dim), rows // 10, projection))
    return 0


def gaussian(rows: int, dim: int) -> np.ndarray:
    """Standard normal rows."""
    return np.random.default_rng(0).standard_normal((rows, dim), np.float32)


def clustered(rows: int, dim: int) -> np.ndarray:
    """Non-negative rows around 200 centres of unequal size and spread, like patch features."""
    rng = np.random.default_rng(0)
    centres = np.abs(rng.standard_normal((200, dim), np.float32))
    share = rng.dirichlet(np.full(200, 0.5))
    which = np.sort(rng.choice(200, rows, p=share))
    spread = rng.uniform(0.1, 0.6, 200).astype(np.float32)
    bank = rng.standard_normal((rows, dim), np.float32)
    for c in range(200):
        mine = slice(*np.searchsorted(which, [c, c + 1]))
        bank[mine] *= spread[c]
        bank[mine] += centres[c]
    return bank[rng.permutation(rows)]


def bottle_features(root: str, weights: str) -> np.ndarray:
    """PatchCore's rows of the normal training images at 224 or their own side, if smaller."""
    detector: Any = patchcore.build(patchcore.Config())
    path, _, category = root.rstrip("/").rpartition("/")
    config = data_base.DataConfig(name="mvtec", root=path, categories=(category,))
    out = console.console()
    source = datasets.loaded(config, out).source("train", category)
    device = Device(
        models.backbone("resnet18", weights or None), detector, EvalConfig(),
        make_mesh(MeshConfig(), jax.devices()[:1]),
    )  # fmt: skip
    with console.progress("features", out) as tell:
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            tell(done, len(source), "images")

        reader = Reader(device, EvalConfig())
        return detector._gathered(Features(reader, [(category, source)], tick, keep=False))


def by_numpy(case: Case, picks: int) -> np.ndarray:
    """Farthest first one by one: a product with the bank per pick, norms kept."""
    bank, out = case.bank, [0]
    norms = np.einsum("nd,nd->n", bank, bank)
    far = np.full(len(bank), np.inf, np.float32)
    while len(out) < picks:
        last = out[-1]
        np.minimum(far, norms + norms[last] - 2 * (bank @ bank[last]), out=far)
        far[last] = -np.inf
        out.append(int(far.argmax()))
    return np.array(out)


def by_published(case: Case, picks: int) -> np.ndarray:
    """The public code's pass, in torch, or numpy without it: norms again, a root, a minimum."""
    if _measure.installed("torch"):
        return _published_torch(case, picks)
    bank, out = case.bank, [0]
    far = np.full((len(bank), 1), np.inf, np.float32)
    while len(out) < picks:
        row = bank[out[-1] : out[-1] + 1]
        norms = np.matmul(bank[:, None], bank[:, :, None])[:, 0]
        gaps = np.sqrt(np.maximum(norms + row @ row.T - 2 * (bank @ row.T), 0))
        far = np.min(np.concatenate([far, gaps], axis=1), axis=1, keepdims=True)
        out.append(int(far.argmax()))
    return np.array(out)


def _published_torch(case: Case, picks: int) -> np.ndarray:
    import torch  # type: ignore[import-not-found]

    bank, out = torch.from_numpy(case.bank), [0]
    far = torch.full((len(bank), 1), float("inf"))
    with torch.no_grad():
        while len(out) < picks:
            row = bank[out[-1] : out[-1] + 1]
            norms = bank.unsqueeze(1).bmm(bank.unsqueeze(2)).reshape(-1, 1)
            gaps = (norms + (row @ row.T) - 2 * bank.mm(row.T)).clamp(min=0).sqrt()
            far = torch.cat([far, gaps], dim=-1).min(dim=1).values.reshape(-1, 1)
            out.append(int(torch.argmax(far)))
    return np.array(out)


def _picked(case: Case, bank: Any, progress: Progress | None = None) -> Any:
    projection = case.projection or None
    return greedy_coreset(
        bank, case.size, key=jax.random.key(0), projection_dim=projection, progress=progress
    )


def by_dsad(case: Case) -> Measured:
    """``greedy_coreset`` from row 0, with progress, as users run it."""
    calls: list[tuple[float, int, float]] = []

    def progress(done: int, total: int, note: str) -> None:
        left = re.search(r"about (\d+) s", note)
        calls.append((time.perf_counter(), done, float(left[1]) if left else np.nan))

    made = _measure.timed(lambda: _picked(case, case.bank, progress))
    end = time.perf_counter()
    now, _, left = next(c for c in calls if c[1] >= case.size / 10)
    ratio = left / max(end - now, 1e-9)
    return Measured(np.asarray(made.result), made.seconds, made.growth, ratio)


def compare(case: Case, rounds: int, peer_picks: int) -> dict[str, float]:
    """Interleaved rounds of all routes on one bank; prints a table, returns median seconds."""
    out = console.console()
    placed = jnp.asarray(case.bank)
    calls: dict[str, Callable[[], np.ndarray]] = {"dsad": lambda: np.asarray(_picked(case, placed))}
    torch = _measure.installed("torch")
    if not case.projection:
        public = "torch" if torch else "numpy"
        calls["plain numpy"] = functools.partial(by_numpy, case, peer_picks)
        calls[f"public code's pass, {public}"] = functools.partial(by_published, case, peer_picks)
    timings = _measure.interleaved(calls, rounds, first=("dsad",), keep=True)
    found = {name: timing.result for name, timing in timings.items()}
    median = {name: timing.median for name, timing in timings.items()}
    first = timings["dsad"].first
    assert first is not None
    picks = first.result
    pace = {n: v / (case.size if n == "dsad" else peer_picks) for n, v in median.items()}
    columns = ("route", "picks", "s", "ms a pick", "times dsad", "picks as dsad")
    table = console.table(*columns, title=_title(case), title_justify="left", whole=True)
    for name, value in median.items():
        same = np.mean(found[name] == picks[: len(found[name])])
        table.add_row(
            name, str(len(found[name])), f"{value:.3f}", f"{1e3 * pace[name]:.3f}",
            f"{pace[name] / pace['dsad']:.1f}", f"{same:.2%}",
        )  # fmt: skip
    out.print(table)
    if not torch:
        out.print(f"{_measure.missing('torch', 'torch')}; its pass was made in numpy.")
    out.print(f"first call, with compilation: {first.seconds:.2f} s. {_shortfall(case, picks)}")
    out.print(_floors(case))
    return median


def alone(case: Case) -> Measured:
    """One run with compilation, no peer: they would take minutes to hours."""
    out = console.console()
    made = by_dsad(case)
    table = Table(title=_title(case), title_justify="left")
    for column in ("s with compilation", "MiB beyond the bank", "stated MiB", "time left at 10 %"):
        table.add_column(column, justify="right")
    stated = coreset_memory(len(case.bank), case.bank.shape[1], case.size, case.projection or None)
    table.add_row(
        f"{made.seconds:.1f}", f"{made.grown / 2**20:.0f}", f"{stated / 2**20:.0f}",
        f"{made.ratio:.2f} of the real one",
    )  # fmt: skip
    out.print(table)
    if not case.projection:
        out.print(_shortfall(case, made.picks))
    out.print(_floors(case))
    return made


def _title(case: Case) -> str:
    space = f", projected to {case.projection}" if case.projection else ""
    rows, dim = case.bank.shape
    return f"{case.name}: {case.size:,} of {rows:,} × {dim:,}{space}"


def _shortfall(case: Case, picks: np.ndarray) -> str:
    """How much nearer to the earlier picks than the farthest row some picks are; 0 is exact."""
    if case.projection:
        return ""
    worst = 0.0
    for count in sorted({1, case.size // 20, case.size // 4} - {0}):
        kept = jnp.asarray(case.bank[picks[:count]])
        gaps = np.asarray(nearest(jnp.asarray(case.bank), kept)[0])[:, 0]
        worst = max(worst, 1 - float(gaps[picks[count]] / gaps.max()))
    return f"Picks 1, 5 % and 25 % are the farthest rows within {worst:.1e}, by dsad's search."


def _floors(case: Case) -> str:
    """Time that the arithmetic and the memory traffic alone would take on this machine."""
    rows, width = len(case.bank), case.width
    work, traffic = _measure.machine()
    operations = 2 * rows * width * case.size
    read = rows * width * 4 * -(-case.size // 256)
    return (
        f"floors: {operations / 1e9:,.0f} GFLOP at {work / 1e9:.0f} GFLOP/s {operations / work:.2f}"
        f" s; {read / 1e9:.1f} GB (the bank once per 256 picks) at {traffic / 1e9:.1f} GB/s "
        f"{read / traffic:.2f} s"
    )
