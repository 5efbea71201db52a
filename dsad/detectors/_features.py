"""What detectors share: their fit, and how features are chosen, joined, checked and kept."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.core import hosts, rng
from dsad.core.config import Settings, by_number, field, listed
from dsad.core.detection import PIXELS, DetectorTraits, FeatureSource, Inside, within
from dsad.core.errors import ConfigError, DataError
from dsad.core.recipe import Recipe
from dsad.core.types import FeatureMaps, Progress, Tree
from dsad.ops.neighbors import Precision, nearest, pad_bank, prepare
from dsad.ops.resize import gaussian_smooth, match_grid, neighbourhood_mean, resize_maps

C = TypeVar("C", bound=Any)


class DetectorConfig(Settings, place="detector"):
    """What every detector can be told of its maps, once they are as large as the network's input.

    Attributes:
      sigma: of the Gaussian on the map, in pixels, cut at four of it; 0 leaves it out.
      image_score: "method" as the detector defines it, "max" of the smoothed map, or "top", the
        mean of the ``image_share`` of its pixels with the highest scores.
      image_share: share of the pixels that "top" averages.

    """

    sigma: float = field(4.0, at_least=0)
    image_score: Literal["method", "max", "top"] = "method"
    image_share: float = field(0.01, above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class FeatureDetector(Generic[C]):
    """A detector with a config that names its layers; its traits are what the config says.

    One that trains says so in them, and needs no ``_fit``.
    """

    config: C
    #: As of ``DetectorTraits``, where no config decides it.
    _positions: ClassVar[bool] = False
    _leaves_out: ClassVar[bool] = False
    _seeded: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the feature maps it reads."""
        return self.config.layers

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up."""
        cfg = self.config
        return DetectorTraits(
            sigma=cfg.sigma, image_score=cfg.image_score, image_share=cfg.image_share,
            positions=self._positions, leaves_out=self._leaves_out, seeded=self._seeded,
        )  # fmt: skip

    def fit(
        self,
        source: FeatureSource,
        *,
        mesh: Mesh | None,
        key: jax.Array,
        progress: Progress,
        trained: Tree | None = None,
    ) -> Tree:
        """State from the features of normal images; each class says what is in it.

        Of a detector that trains it is what its steps left: parameters and extra. Raises
        ConfigError for trained parameters where there is no use for them, and DataError for too
        few or broken features.
        """
        if trained is not None and self.traits.trains_on:
            return jax.tree.map(jnp.asarray, {**trained["params"], **trained["extra"]})
        if trained is not None:
            raise ConfigError(
                f"detector {self._name} has nothing to train, but trained parameters came."
            )
        return self._fit(source, mesh, key, progress)

    def _fit(
        self, source: FeatureSource, mesh: Mesh | None, key: jax.Array, progress: Progress
    ) -> Tree:
        """What ``fit`` gives where nothing was trained."""
        raise ConfigError(f"detector {self._name} trains: expected trained parameters, found None.")

    @property
    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def _cells(
        self, source: FeatureSource, embed: Callable[[FeatureMaps], Any] | None = None
    ) -> Iterator["Cells"]:
        """One pass over a source: ``embed``, compiled, of every batch without its padding.

        With several processes every one gets all values, batch by batch, so that what is fitted to
        them is the same everywhere. Raises DataError, naming the detector, the category and the
        samples, for NaN or infinite values.
        """
        embed = embed or functools.partial(_embedded, self)
        for batch in source:
            valid = np.asarray(batch.valid, bool)
            if not valid.any():
                continue
            leaves, structure = jax.tree.flatten(embed(dict(batch.maps)))
            leaves = [np.asarray(hosts.whole(x), np.float32)[valid] for x in leaves]
            index = np.asarray(batch.index)[valid]
            broken = np.zeros(len(index), bool)
            for leaf in leaves:
                broken |= ~np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
            if broken.any():
                raise DataError(
                    f"detector {self._name}: NaN or infinite features of {batch.category} samples "
                    f"{index[broken].tolist()}; expected finite ones. Check the weights."
                )
            inside = None if batch.inside is None else np.asarray(batch.inside)[valid]
            image = index if batch.image is None else np.asarray(batch.image)[valid]
            values = jax.tree.unflatten(structure, leaves)
            yield Cells(values, index, batch.category, image, inside)


@dataclasses.dataclass(frozen=True)
class TrainedDetector(FeatureDetector[C]):
    """A detector that trains before it is fitted, as the ``recipe`` of its config says."""

    _learns_from: ClassVar[Literal["features", "images", "labelled"]] = "features"

    @property
    def traits(self) -> DetectorTraits:
        """How its maps are smoothed and summed up, and what it learns from."""
        return dataclasses.replace(super().traits, trains_on=self._learns_from)

    @property
    def recipe(self) -> Recipe:
        """How it trains."""
        return self.config.recipe


@functools.partial(jax.jit, static_argnums=0)
def _embedded(detector: Any, features: FeatureMaps) -> Any:
    """Compiled once per configuration and shapes, not once per fit."""
    return detector.embed(features)


@runtime_checkable
class EmbedsCells(Protocol):
    """A detector of descriptors: ``embed`` gives those of a batch, pure and jittable."""

    def embed(self, features: FeatureMaps) -> Any: ...


class Cells(NamedTuple):
    """The valid inputs of one batch: ``values`` (n, ...) float32, ``index`` (n,), ``category``.

    ``values`` is one array, or a tree of arrays if that is what was computed. ``image`` (n,) and
    ``inside`` are those of the batch.
    """

    values: Any
    index: np.ndarray
    category: str
    image: np.ndarray
    inside: np.ndarray | None = None

    def counted(self, grid: tuple[int, int]) -> np.ndarray:
        """Which cells (n, cells) of a grid count: those of the image, each in one of its inputs."""
        if self.inside is None:
            return np.ones((len(self.index), grid[0] * grid[1]), bool)
        return np.asarray(within(self.inside, grid)).reshape(len(self.index), -1)


def select(features: FeatureMaps, layers: Sequence[str]) -> list[jax.Array]:
    """The maps of ``layers``, each (b, h, w, d); a missing one lists all, from fine to coarse."""
    missing = [name for name in layers if name not in features]
    if missing:
        grids = {name: x.shape[1:-1] for name, x in features.items() if name != PIXELS}
        have = [name for name in by_number(grids) if grids[name]]  # a token has no grid
        have.sort(key=lambda name: -math.prod(grids[name]))
        near = str(tuple(name for name in layers if name in have)).replace(" ", "")
        raise ConfigError(
            f"config.detector.layers: no feature map named {listed(missing)}; the backbone gives: "
            f"{', '.join(have) or '(none)'}. "
            + (f'Name some of these: --config.detector.layers="{near}"' if near != "()" else "")
        )
    return [features[name] for name in layers]


def joined(
    features: FeatureMaps, layers: Sequence[str], neighbourhood: int = 1, method: str = "bilinear"
) -> jax.Array:
    """Neighbourhood means of the layers, on the grid of the first, concatenated: (b, gh, gw, d)."""
    return on_one_grid(
        [neighbourhood_mean(m, neighbourhood) for m in select(features, layers)], method
    )


def on_one_grid(maps: Sequence[jax.Array], method: Any = "bilinear") -> jax.Array:
    """Maps (b, h, w, d) on the grid of the first, concatenated; ``method`` as of ``match_grid``."""
    grid = (maps[0].shape[1], maps[0].shape[2])
    return jnp.concatenate([match_grid(m, grid, method) for m in maps], axis=-1)


def pixel_maps(
    maps: jax.Array, side: int, sigma: float, radius: int, beyond: Literal["constant", "reflect"]
) -> jax.Array:
    """Maps (b, gh, gw) on ``side`` × ``side`` pixels, bilinear, under a Gaussian cut at ``radius``.

    What published code does to maps at a size of its own. Beyond their border are zeros
    ("constant"), or they are mirrored without their outermost pixels ("reflect").
    """
    pads = ((0, 0), (radius, radius), (radius, radius))
    wide = jnp.pad(resize_maps(maps, (side, side)), pads, mode=beyond)
    return gaussian_smooth(wide, sigma, radius / sigma)[:, radius:-radius, radius:-radius]


def tail_mean(maps: jax.Array, share: float, inside: Inside = None) -> jax.Array:
    """Mean (b,) of the ⌊share · n⌋ highest of the n cells inside, of at least one.

    ``maps`` are (b, gh, gw). A product that is whole but for rounding counts as whole.
    """
    grid = (maps.shape[1], maps.shape[2])
    values, most = maps.reshape(-1, grid[0] * grid[1]), _tail(share, grid[0] * grid[1])
    if inside is None:
        return jnp.mean(lax.top_k(values, most)[0], axis=1)
    counted = within(inside, grid).reshape(values.shape)
    highest, _ = lax.top_k(jnp.where(counted, values, -jnp.inf), most)
    counts = np.array([_tail(share, n) for n in range(grid[0] * grid[1] + 1)], np.int32)
    count = jnp.asarray(counts)[jnp.sum(counted, axis=1, dtype=jnp.int32)]
    chosen = jnp.arange(most)[None] < count[:, None]
    return jnp.sum(jnp.where(chosen, highest, 0.0), axis=1) / count.astype(jnp.float32)


def _tail(share: float, cells: int) -> int:
    return max(1, math.floor(round(share * cells, 6)))


def normal_rows(cells: Iterable["Cells"], key: jax.Array, most: int = 0) -> np.ndarray:
    """The cells (n, d) that count, in the order they come; with ``most`` at most that many.

    These draw a random priority each from (key, sample index, cell) and the lowest stay, in the
    order of images and cells: one pass, memory of twice the subset, and the same subset for any
    order or batching of the source.
    """
    rows, subset = [], Subset(most)
    for part in cells:
        values, index = part.values, part.index
        counted = part.counted(values.shape[1:3]).ravel()
        flat = values.reshape(-1, values.shape[-1])[counted]
        if not most:
            rows.append(flat)
            continue
        count = len(counted) // len(index)
        bits = rng.priorities(key, index, (count,)).ravel()
        cell = np.tile(np.arange(count), len(index))
        places = np.stack([bits, np.repeat(index, count), cell])
        subset.add(flat, places[:, counted])
    if len(subset):
        kept, (_, image, cell) = subset.found()
        rows = [kept[np.lexsort((cell, image))]]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)


class OrderedRows:
    """Every cell (N, d) that counts, ascending by sample and cell, grown in place in one array.

    So neither the order nor the batches of the source matter, and there is no second copy if the
    samples come in ascending order.
    """

    def __init__(self) -> None:
        self._rows = np.zeros((0, 0), np.float32)
        self._places = [np.zeros((2, 0), np.int64)]

    def add(self, values: np.ndarray, part: Cells) -> None:
        """Take maps (b, h, w, d) of the images of ``part``."""
        counted = part.counted(values.shape[1:3])
        values = values.reshape(-1, values.shape[-1])[counted.ravel()]
        at = len(self._rows)
        # In place: the allocator moves pages, so rows never exist twice.
        self._rows.resize((at + len(values), values.shape[1]), refcheck=False)
        self._rows[at:] = values
        of = np.stack([part.index, part.image])
        self._places.append(np.repeat(of, counted.sum(axis=1), axis=1))

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows, (0, 0) if there are none, and the image (N,) of each."""
        index, images = np.concatenate(self._places, axis=1)
        if (np.diff(index) >= 0).all():
            return self._rows, images
        order = np.argsort(index, kind="stable")
        return self._rows[order], images[order]


def check_rows(detector: str, bank: np.ndarray, k: int) -> None:
    """Refuse a bank without k rows."""
    if len(bank) < k:
        raise DataError(
            f"detector {detector}: expected at least k = {k} feature rows of normal images, found "
            f"{len(bank)}. Check the train split."
        )


def searched(
    state: Tree, cells: jax.Array, k: int, mesh: Mesh | None, precision: Precision
) -> jax.Array:
    """Distances (b, gh, gw, k) of cells (b, gh, gw, d) to the nearest rows of ``bank_state``."""
    queries, bank = cells.reshape(-1, cells.shape[-1]), state.get("prepared", state["bank"])
    found, _ = nearest(queries, bank, k, mesh=mesh, valid=state["rows"], precision=precision)
    return found.reshape(*cells.shape[:3], k)


def bank_state(bank: Any, mesh: Mesh | None) -> Tree:
    """{"bank": (M, d) float32, "rows": () int32} of the rows (n, d), padded by ``pad_bank``.

    On a mesh of several processes every device gets its own rows only, as ``nearest`` splits them;
    elsewhere whoever places the state decides.
    """
    padded, count = pad_bank(bank)
    del bank  # nor does a caller hold it: one copy less
    if mesh is None or not hosts.spans(mesh):
        return {"bank": jnp.asarray(padded), "rows": jnp.asarray(count)}
    padded = np.pad(np.asarray(padded), ((0, -len(padded) % mesh.size), (0, 0)))
    return {"bank": hosts.split(padded, mesh), "rows": jnp.asarray(count)}


def prepared_state(state: Tree, k: int, precision: Precision) -> Tree:
    """The state with its bank as ``nearest`` takes it for many calls on one device."""
    ready = prepare(state["bank"], k, valid=state["rows"], precision=precision)
    return {**state, "prepared": ready}


class Subset:
    """At most ``most`` (0: all) of the rows that are added, those of lowest rank.

    Rows are ranked as in ``rng.lowest``; they stay in the order they came. Memory of twice the
    subset and one addition.
    """

    def __init__(self, most: int):
        self.most = most
        self._kept: list[tuple[Tree, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(places.shape[1] for _, places in self._kept)

    def add(self, values: Tree, places: np.ndarray) -> None:
        """Take a tree of numpy arrays (n, ...) and the rows' ranks (k, n)."""
        self._kept.append((values, places))
        if self.most and len(self) >= 2 * self.most:
            self._kept = [self.found()]

    def found(self) -> tuple[Tree, np.ndarray]:
        """The values and ranks that stay; there must have been an addition."""
        places = np.concatenate([p for _, p in self._kept], axis=1)
        values = [v for v, _ in self._kept]
        if not self.most or places.shape[1] <= self.most:
            return jax.tree.map(lambda *x: np.concatenate(x), *values), places
        chosen = rng.lowest(places, self.most)
        return jax.tree.map(lambda *x: np.concatenate(x)[chosen], *values), places[:, chosen]
