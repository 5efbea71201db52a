"""``dsad bench gde``: a Gaussian per position, fitted and scored, beside scikit-learn."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.bench import _measure
from dsad.core.detection import FeatureBatch
from dsad.core.types import silent
from dsad.detectors import gde
from dsad.ops import gaussian
from dsad.terminal import console, flags

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
    command.integer("images", 60, "Images to fit, and as many others to score.", at_least=1)
    command.integer("side", 57, "Positions per axis; 57 are those of 256 pixels.", at_least=1)
    command.integer("channels", 512, "Features per patch.", at_least=1)
    command.integer("components", 50, "Of the PCA.", at_least=1)
    command.integer("rounds", 3, "Timed rounds of every program; medians are shown.", at_least=1)
    _, values, _ = command.parse(argv)
    names = ("images", "side", "channels", "components")
    bench(Sizes(**{n: getattr(values, n) for n in names}), values.rounds)
    return 0


def bench(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Time all programs in interleaved rounds; prints a table, returns median seconds by name."""
    out = console.console()
    normal, test = _features(sizes, 0), _features(sizes, 1)
    programs = {"dsad": _dsad(sizes, normal, test)}
    missing = not _measure.installed("sklearn")
    if not missing:
        peer = _scikit_learn(sizes, normal, test)
        programs["scikit-learn"] = peer
        programs["scikit-learn, 1 thread"] = lambda: _one_thread(peer)

    def tell(number: int, name: str, run: _measure.Run) -> None:
        what = f"round {number}: {name}" if number else f"{name}, first run with compilation:"
        out.print(f"{what} {run.seconds:.2f} s")

    timings = _measure.interleaved(programs, rounds, first=("dsad",), keep=True, tell=tell)
    _print(out, sizes, timings, _errors(sizes, timings, normal, test), rounds)
    if missing:
        out.print(_measure.missing("scikit-learn", "scikit-learn"))
    return {name: timing.median for name, timing in timings.items()}


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
        image /= np.maximum(np.linalg.norm(image, axis=-1, keepdims=True), 1e-6)
    return made


class _Source:
    """Batches of given features."""

    categories: tuple[str, ...] = ("bench",)

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
    score = jax.jit(lambda state, maps: gde.patch_scores(state, detector.embed(maps)))

    def run() -> np.ndarray:
        state = detector.fit(_Source(normal), mesh=None, key=jax.random.key(0), progress=silent)
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


def _errors(
    sizes: Sizes, timings: dict[str, _measure.Timing], normal: np.ndarray, test: np.ndarray
) -> dict[str, float]:
    """Largest relative error against float64, over every 61st position."""
    fit, others = (v.reshape(sizes.images, sizes.positions, -1) for v in (normal, test))
    worst = dict.fromkeys(timings, 0.0)
    for at in range(0, sizes.positions, CHECK):
        exact = _exact(fit[:, at], others[:, at], sizes.components)
        for name, timing in timings.items():
            gap = np.max(np.abs(timing.result[:, at] / exact - 1))
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
    out: Any, sizes: Sizes, timings: dict[str, _measure.Timing], errors: dict[str, float],
    rounds: int,
) -> None:  # fmt: skip
    columns = ("program", "s", "times dsad", "max. relative error", "memory MB")
    table = console.table(*columns, whole=True)
    own = timings["dsad"]
    for name, timing in timings.items():
        grown = statistics.median(run.growth for run in timing.rounds)
        table.add_row(
            name, f"{timing.median:.2f}", f"{timing.median / own.median:.1f}",
            f"{errors[name]:.1e}", f"{grown / 1e6:.0f}",
        )  # fmt: skip
    out.print(table)
    operations, traffic = _floors(sizes)
    speed, bandwidth = _measure.machine()
    out.print(
        f"floors: {operations / 1e9:.1f} GFLOP at {speed / 1e9:.0f} GFLOP/s (float32 product) = "
        f"{operations / speed:.2f} s; {traffic / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s (copy) "
        f"= {traffic / bandwidth:.2f} s. dsad fits in float64, at about half that speed."
    )
    for name, timing in timings.items():
        if name != "dsad":
            gap = np.max(np.abs(own.result / timing.result - 1))
            out.print(f"largest relative difference of all scores, dsad and {name}: {gap:.1e}")
    out.print(
        f"{sizes.positions} Gaussians of {sizes.images} × {sizes.channels} features, "
        f"{sizes.components} components, {sizes.images} other images scored; medians of {rounds} "
        f"interleaved rounds on {jax.devices()[0].device_kind}; memory beyond the features is the "
        "growth of the resident set."
    )
