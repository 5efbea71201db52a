"""``dsad bench aupro``: AUPRO by counting and by sorting, with its error and its memory."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from scipy import ndimage

from dsad.bench import _measure
from dsad.evaluation.metrics import ranking, streaming
from dsad.terminal import console, flags

#: Increasing transforms of the scores: they change no value, but crowd the bins.
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "s": lambda s: s,
    "exp(3s)": lambda s: np.exp(3 * s),
    "100 + 0.1s": lambda s: 100 + np.float32(0.1) * s,
    "sigmoid(8+s)": lambda s: 1 / (1 + np.exp(-8 - s)),
}
#: Integer operations per pixel of a counting pass: to bits, shift, compare, add.
_OPERATIONS = 6


class Problem(NamedTuple):
    """Flat scores (h·w,) f32 and labelled truth per map."""

    maps: list[np.ndarray]
    truth: Sequence[Any]

    @property
    def pixels(self) -> int:
        """Over all maps."""
        return sum(m.size for m in self.maps)

    def part(self, maps: int) -> "Problem":
        """The last maps: these have defects."""
        return Problem(self.maps[-maps:], self.truth[-maps:])


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command("bench aupro", "AUPRO by counting and by sorting.")
    command.integer("maps", 110, "Number of maps; a quarter without defect.", at_least=2)
    command.integer("size", 1024, "Side of a map in pixels.", at_least=16)
    command.integer("rounds", 3, "Timed rounds of every route; medians are shown.", at_least=1)
    command.integer("peer_maps", 10, "Maps that the slower routes get, 0 for all of them.")
    command.integer("stream", 0, "Instead: count this many maps into one state, showing memory.")
    command.string("limit", "0.3", "False-positive rate to integrate up to.")
    _, values, _ = command.parse(argv)
    limit = flags.share("limit", values.limit, "rate")
    if values.stream:
        stream(values.stream, values.maps, values.size, limit)
    else:
        compare(values.maps, values.size, values.rounds, values.peer_maps or values.maps, limit)
    return 0


def problem(maps: int, size: int, seed: int = 0) -> Problem:
    """Heavy-tailed blobs with grain, and defects that overlap the tail of the normal pixels."""
    rng = np.random.default_rng(seed)
    coarse = max(4, size // 16)
    scores, masks = [], []
    for i in range(maps):
        grain = rng.standard_normal((size, size), np.float32)
        smooth, place = (
            _enlarged(rng.standard_normal((coarse, coarse), np.float32), size) for _ in "ab"
        )
        mask = place > np.quantile(place, 0.98) if i >= max(1, maps // 4) else place > np.inf
        x = smooth + np.float32(0.4) * grain + np.float32(1.5) * mask
        # A polynomial tail, bounded so that exp(3 s) stays finite.
        scores.append(np.clip(x * (1 + np.abs(x)) * np.float32(0.3), -8, 16))
        masks.append(mask)
    return Problem(*streaming.truths("regions", scores, masks))


def _enlarged(noise: np.ndarray, size: int) -> np.ndarray:
    smooth = ndimage.gaussian_filter(noise, 1.0, mode="wrap")
    wide = jax.image.resize(jnp.asarray(smooth / smooth.std()), (size, size), "bilinear")
    return np.asarray(wide)


def by_counting(given: Problem, limit: float) -> streaming.Measured:
    """All passes that the tolerance asks for."""
    counts = streaming.Counts("regions")
    return streaming.passes(counts, {"aupro": limit}, given.maps, given.truth)


def by_sorting(given: Problem, limit: float) -> float:
    """The exact route, from labelled regions."""
    steps = ranking.rank(*_split(given), sum(t.groups for t in given.truth))
    return ranking.overlap_area(steps, limit)


def by_sklearn(given: Problem, limit: float) -> float:
    """The same curve as a weighted ROC by scikit-learn: a defect pixel weighs 1 / region size."""
    from sklearn.metrics import roc_curve

    normal, defect, sizes = _split(given)
    truth = np.concatenate([np.zeros(normal.size, bool), np.ones(defect.size, bool)])
    weight = np.concatenate([np.ones(normal.size), 1.0 / sizes])
    scores = np.concatenate([normal, defect])
    x, y, _ = roc_curve(truth, scores, sample_weight=weight, drop_intermediate=False)
    x, y = ranking.cut(x, y, limit)
    return float(np.trapezoid(y, x) / limit)


def by_torch(given: Problem, limit: float) -> float:
    """One global sort by torch, then running sums; every pixel is a curve point, ties too."""
    import torch  # type: ignore[import-not-found]

    normal, defect, sizes = _split(given)
    scores = torch.from_numpy(np.concatenate([normal, defect]))
    order = torch.sort(scores, descending=True).indices
    weight = torch.from_numpy(np.concatenate([np.zeros(normal.size), 1.0 / sizes]))[order]
    y = torch.cumsum(weight, 0) / sum(t.groups for t in given.truth)
    x = torch.cumsum((order < normal.size).double(), 0) / normal.size
    x, y = ranking.cut(np.append(0.0, x.numpy()), np.append(0.0, y.numpy()), limit)
    return float(np.trapezoid(y, x) / limit)


#: Other routes to the same definition: label, module it needs, function.
PEERS: tuple[tuple[str, str, Callable[[Problem, float], float]], ...] = (
    ("scikit-learn, weighted ROC", "sklearn", by_sklearn),
    ("torch, global sort", "torch", by_torch),
)
_PACKAGES = {"sklearn": "scikit-learn", "torch": "torch"}


def _split(given: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = list(zip(given.maps, given.truth, strict=True))
    normal = np.concatenate([np.delete(scores, truth.union) for scores, truth in pairs])
    defect = np.concatenate([scores[truth.union] for scores, truth in pairs])
    return normal, defect, np.concatenate([truth.sizes for truth in given.truth])


def compare(maps: int, size: int, rounds: int, peer_maps: int, limit: float) -> dict[str, Any]:
    """Time all routes in interleaved rounds and print the table; medians and errors by label."""
    out = console.console()
    out.print(f"making {maps} maps of {size}² and labelling their regions (not timed) ...")
    given = problem(maps, size)
    problems: dict[str, Problem] = {}
    calls: dict[str, Callable[[], Any]] = {}

    def route(label: str, given: Problem, function: Callable[[Problem, float], Any]) -> None:
        problems[label], calls[label] = given, functools.partial(function, given, limit)

    for label, transform in TRANSFORMS.items():
        made = Problem([transform(m) for m in given.maps], given.truth) if label != "s" else given
        route(f"dsad counts: {label}", made, by_counting)
    counting = tuple(calls)  # the others compile nothing
    route("dsad sorts: s", given, by_sorting)
    for label, module, function in PEERS:
        if _measure.installed(module):
            route(label, given.part(peer_maps), function)
    timings = _measure.interleaved(calls, rounds, first=counting, keep=True)
    made = _print(out, problems, timings, limit)
    for label, module, _ in PEERS:
        if label not in calls:
            out.print(_measure.missing(label, _PACKAGES[module]))
    first = next(iter(timings.values()))
    _print_floors(out, given.pixels, first.result.passes, rounds)
    return made


def _print(
    out: Any, problems: dict[str, Problem], timings: dict[str, _measure.Timing], limit: float
) -> dict[str, Any]:
    table = console.table(
        "route: scores", "maps", "s", "CPU s", "ns/pixel", "passes", "AUPRO", "error", "bound",
        "MB extra", title=f"AUPRO up to {limit:g}, regions labelled beforehand", whole=True,
    )  # fmt: skip
    base = None
    made: dict[str, Any] = {}
    for label, timing in timings.items():
        given, seconds, result = problems[label], timing.median, timing.result
        counted = isinstance(result, streaming.Measured)
        value, bound = result.found["aupro"][:2] if counted else (result, None)
        error = abs(value - by_sorting(given, limit))
        each = seconds / given.pixels
        base = base or each
        table.add_row(
            label, str(len(given.maps)), f"{seconds:.2f}",
            f"{statistics.median(run.cpu for run in timing.rounds):.2f}",
            f"{each * 1e9:.1f} ({each / base:.1f}×)", str(result.passes) if counted else "",
            f"{value:.6f}", f"{error:.1e}", "" if bound is None else f"{bound:.1e}",
            f"{max(run.growth for run in timing.rounds) / 1e6:.0f}",
        )  # fmt: skip
        made[label] = {"seconds": seconds, "value": value, "error": error, "bound": bound}
    out.print(table)
    return made


def _print_floors(out: Any, pixels: int, passes: int, rounds: int) -> None:
    machine = _measure.machine()
    read = machine.bytes / 2  # nothing is written
    out.print(
        f"Floors of the first row, {passes} passes over {pixels / 1e6:.0f} M pixels: bytes "
        f"{4 * pixels * passes / read:.3f} s at {read / 1e9:.1f} GB/s read in a copy, operations "
        f"{_OPERATIONS * pixels * passes / machine.operations:.3f} s at "
        f"{machine.operations / 1e9:.0f} GFLOP/s of a plain matmul. Medians of {rounds} "
        f"interleaved rounds on {jax.devices()[0].device_kind}. "
        "Error: to the exact route on the same scores; MB extra: growth of the resident memory."
    )


def stream(total: int, maps: int, size: int, limit: float) -> dict[str, Any]:
    """Count ``total`` maps, ``maps`` different ones over and over, into one state."""
    out = console.console()
    given = problem(maps, size)
    counts = streaming.Counts("regions")
    state = counts.empty()
    wanted = {"aupro": limit}
    expected = counts.measure(counts.add(counts.empty(), *given), wanted)["aupro"]
    size_of_state = sum(a.nbytes for a in state.values())
    table = Table(title=f"{total} maps of {size}² counted into {size_of_state / 1e6:.1f} MB")
    for column in ("maps", "pixels", "s", "resident MB", "AUPRO", "bound"):
        table.add_column(column, justify="right")
    done, seen, start = 0, [], time.perf_counter()
    found = expected
    for part in _portions(given, total):
        state = counts.add(state, *part)
        done += len(part.maps)
        if done * 10 // total > len(seen) or done == total:
            found = counts.measure(state, wanted)["aupro"]
            seen.append(_measure.resident())
            table.add_row(
                str(done), f"{int(state['normal'].sum() + state['defect'].sum()):,}",
                f"{time.perf_counter() - start:.1f}", f"{seen[-1] / 1e6:.1f}",
                f"{found.value:.6f}", f"{found.bound:.1e}",
            )  # fmt: skip
    out.print(table)
    out.print(
        f"Resident memory from the first row to the last: {(seen[-1] - seen[0]) / 1e6:+.1f} MB. "
        f"AUPRO of the {maps} different maps by themselves: {expected.value:.6f}."
    )
    return {"resident": seen, "pixels": int(state["normal"].sum() + state["defect"].sum()),
            "value": found.value, "expected": expected.value}  # fmt: skip


def _portions(given: Problem, total: int) -> Iterator[Problem]:
    """All maps again and again, ``total`` of them."""
    whole, left = divmod(total, len(given.maps))
    yield from itertools.repeat(given, whole)
    if left:
        yield Problem(given.maps[:left], given.truth[:left])
