"""``dsad bench gde``: a Gaussian per patch position, fitted and scored, beside scikit-learn."""

import contextlib
import dataclasses
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dsad.cli import console, flags
from dsad.core.errors import ConfigError
from dsad.core.types import FeatureBatch
from dsad.detectors import gde
from dsad.ops import gaussian

#: Images per batch of features; positions between two that are checked in float64.
BATCH, CHECK = 20, 61


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: ``images`` to fit and as many to score, on a grid of side × side."""

    images: int
    side: int
    channels: int
    components: int

    @property
    def positions(self) -> int:
        """Gaussians that are fitted."""
        return self.side**2


def main(argv: list[str]) -> int:
    """The command: ``dsad bench gde``."""
    command = flags.Command(
        "bench gde", "one PCA and Ledoit-Wolf Gaussian per position, beside scikit-learn."
    )
    command.integer("images", 60, "Images to fit, and as many others to score.")
    command.integer("side", 57, "Positions per axis; 57 are those of 256 pixels.")
    command.integer("channels", 512, "Features per patch.")
    command.integer("components", 50, "Of the PCA.")
    command.integer("rounds", 3, "Timed rounds; each runs every program once, medians are shown.")
    _, values, rest = command.parse(argv)
    if rest:
        raise ConfigError(f"dsad bench gde: unexpected argument {rest[0]!r}.")
    names = ("images", "side", "channels", "components", "rounds")
    for name in names:
        if getattr(values, name) < 1:
            raise ConfigError(f"--{name}: expected at least 1, found {getattr(values, name)}.")
    bench(Sizes(**{n: getattr(values, n) for n in names[:4]}), values.rounds)
    return 0


@dataclasses.dataclass
class Program:
    """One way to fit and score: its scores, seconds and growth of memory by round."""

    run: Callable[[], np.ndarray]
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    seconds: list[float] = dataclasses.field(default_factory=list)
    grown: list[int] = dataclasses.field(default_factory=list)


def bench(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Time all programs in interleaved rounds; prints a table, returns median seconds by name."""
    out = console.console()
    normal, test = _features(sizes, 0), _features(sizes, 1)
    programs = {"dsad": Program(_dsad(sizes, normal, test))}
    missing = importlib.util.find_spec("sklearn") is None
    if not missing:
        peer = _scikit_learn(sizes, normal, test)
        programs["scikit-learn"] = Program(peer)
        programs["scikit-learn, 1 thread"] = Program(lambda: _one_thread(peer))
    start = time.perf_counter()
    programs["dsad"].run()
    out.print(f"dsad, first run with compilation: {time.perf_counter() - start:.2f} s")
    for number in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            with _growth() as grown:
                program.scores = program.run()
            program.seconds.append(time.perf_counter() - start)
            program.grown.append(grown())
            out.print(f"round {number + 1}: {name} {program.seconds[-1]:.2f} s")
    median = {n: statistics.median(p.seconds) for n, p in programs.items()}
    _print(out, sizes, programs, median, _errors(sizes, programs, normal, test), rounds)
    if missing:
        out.print("scikit-learn: not installed: pip install scikit-learn")
    return median


def _features(sizes: Sizes, seed: int) -> np.ndarray:
    """Unit vectors (images, side, side, channels): a mean per position, correlated, as ReLU's."""
    world, own = np.random.default_rng(99), np.random.default_rng(seed)
    shape = (sizes.side, sizes.side, sizes.channels)
    mixing = world.standard_normal((sizes.channels, sizes.channels), dtype=np.float32)
    mixing /= (1 + np.arange(sizes.channels, dtype=np.float32))[:, None]
    mean = world.standard_normal(shape, dtype=np.float32)
    made = np.empty((sizes.images, *shape), np.float32)
    for image in made:
        draws = own.standard_normal(shape, dtype=np.float32)
        image[:] = np.maximum(mean + 0.1 * (draws @ mixing), 0)
        image /= np.linalg.norm(image, axis=-1, keepdims=True)
    return made


# --- programs -------------------------------------------------------------------------------


class _Source:
    """Batches of given features."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __iter__(self) -> Iterator[FeatureBatch]:
        for at in range(0, len(self.values), BATCH):
            part = self.values[at : at + BATCH]
            index = np.arange(at, at + len(part))
            yield FeatureBatch({"patch": jnp.asarray(part)}, index >= 0, "bench", index)


def _dsad(sizes: Sizes, normal: np.ndarray, test: np.ndarray) -> Callable[[], np.ndarray]:
    detector = gde.build(
        gde.Config(layers=("patch",), components=sizes.components, images=0, per_position=True)
    )
    score = jax.jit(detector.patch_scores)

    def run() -> np.ndarray:
        state = detector.fit(_Source(normal), mesh=None, key=jax.random.key(0))
        parts = [np.asarray(score(state, b.maps)) for b in _Source(test)]
        return np.concatenate(parts).reshape(len(test), -1)

    return run


def _scikit_learn(sizes: Sizes, normal: np.ndarray, test: np.ndarray) -> Callable[[], np.ndarray]:
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    fit, others = (v.reshape(sizes.images, sizes.positions, -1) for v in (normal, test))

    def run() -> np.ndarray:
        scores = np.empty((sizes.images, sizes.positions))
        for at in range(sizes.positions):
            pca = PCA(sizes.components, svd_solver="full")
            density = LedoitWolf().fit(pca.fit_transform(fit[:, at]))
            scores[:, at] = np.sqrt(density.mahalanobis(pca.transform(others[:, at])))
        return scores

    return run


def _one_thread(run: Callable[[], np.ndarray]) -> np.ndarray:
    """Small matrices gain nothing from more BLAS threads, and lose where cores are shared."""
    with gaussian.one_blas_thread():
        return run()


# --- checks and floors ----------------------------------------------------------------------


def _errors(
    sizes: Sizes, programs: dict[str, Program], normal: np.ndarray, test: np.ndarray
) -> dict[str, float]:
    """Largest relative error against float64, over every 61st position."""
    fit, others = (v.reshape(sizes.images, sizes.positions, -1) for v in (normal, test))
    worst = dict.fromkeys(programs, 0.0)
    for at in range(0, sizes.positions, CHECK):
        exact = _exact(fit[:, at], others[:, at], sizes.components)
        for name, program in programs.items():
            gap = np.max(np.abs(program.scores[:, at] / exact - 1))
            worst[name] = max(worst[name], float(gap))
    return worst


def _exact(fit: np.ndarray, test: np.ndarray, components: int) -> np.ndarray:
    """Distances by a singular value decomposition and the whole inverse of the covariance."""
    fit, test = np.asarray(fit, np.float64), np.asarray(test, np.float64)
    mean = fit.mean(axis=0)
    axes = np.linalg.svd(fit - mean, full_matrices=False)[2][:components].T
    rows, others = (fit - mean) @ axes, (test - mean) @ axes
    n, p = rows.shape
    cov = rows.T @ rows / n
    mu, norm = np.trace(cov) / p, np.sum(cov**2)
    spread = (norm - p * mu**2) / p
    error = (np.mean(np.sum(rows**2, axis=1) ** 2) - norm) / (p * n)
    shrink = min(error, spread) / spread
    inverse = np.linalg.inv((1 - shrink) * cov + shrink * mu * np.eye(p))
    return np.sqrt(np.einsum("nc,cd,nd->n", others, inverse, others))


@contextlib.contextmanager
def _growth() -> Iterator[Callable[[], int]]:
    """Peak growth of the resident set in bytes, sampled while the block runs; 0 off Linux."""
    start = peak = _resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak - start
    finally:
        stop.set()
        thread.join()


def _resident() -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            line = next(x for x in file if x.startswith("VmRSS"))
    except OSError:
        return 0
    return 1024 * int(line.split()[1])


def _machine() -> tuple[float, float]:
    """(float32 operations per second of a matrix product, bytes per second of a copy)."""
    a = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    best = [0.0, 0.0]
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        middle = time.perf_counter()
        np.copyto(target, source)
        end = time.perf_counter()
        best[0] = max(best[0], 2 * 2048**3 / (middle - start))
        best[1] = max(best[1], 2 * source.nbytes / (end - middle))
    return best[0], best[1]


def _floors(sizes: Sizes) -> tuple[float, float]:
    """(operations, bytes) that any such program needs.

    Operations: Gram matrices, eigenvectors (4/3 n³ to tridiagonal form and 2 n² k back), axes and
    scores. Bytes: both sets of features read once, the Gaussians written and read once.
    """
    n, d, k = sizes.images, sizes.channels, sizes.components
    small = min(n, d)
    products = 2 * n * d * small + 4 / 3 * small**3 + 2 * small**2 * k + 4 * n * d * k
    return sizes.positions * products, 4.0 * sizes.positions * (2 * n * d + 2 * d * (k + 1))


def _print(
    out: Any, sizes: Sizes, programs: dict[str, Program], median: dict[str, float],
    errors: dict[str, float], rounds: int,
) -> None:  # fmt: skip
    table = Table(title=None)
    for column in ("program", "s", "times dsad", "max. relative error", "memory MB"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, program in programs.items():
        table.add_row(
            name, f"{median[name]:.2f}", f"{median[name] / median['dsad']:.1f}",
            f"{errors[name]:.1e}", f"{statistics.median(program.grown) / 1e6:.0f}",
        )  # fmt: skip
    out.print(table)
    operations, traffic = _floors(sizes)
    speed, bandwidth = _machine()
    out.print(
        f"floors: {operations / 1e9:.1f} GFLOP at {speed / 1e9:.0f} GFLOP/s (float32 product) = "
        f"{operations / speed:.2f} s; {traffic / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s (copy) "
        f"= {traffic / bandwidth:.2f} s. dsad fits in float64, at about half that speed."
    )
    for name, program in programs.items():
        if name != "dsad":
            gap = np.max(np.abs(programs["dsad"].scores / program.scores - 1))
            out.print(f"largest relative difference of all scores, dsad and {name}: {gap:.1e}")
    out.print(
        f"{sizes.positions} Gaussians of {sizes.images} × {sizes.channels} features, "
        f"{sizes.components} components, {sizes.images} other images scored; medians of {rounds} "
        f"interleaved rounds on {jax.devices()[0].device_kind}; memory beyond the features is the "
        "growth of the resident set."
    )
