"""Results of the probes by labels, and their files."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dsad.core import paths
from dsad.core.types import Record, Source
from dsad.evaluation.label_probe import Probed, Split, tops
from dsad.evaluation.report import gallery
from dsad.evaluation.results import read_arrays, read_numbers, write_arrays, write_numbers

#: The probes by name, in the order of tables.
PROBES = {"linear": "linear probe", "knn": "k-NN probe"}
#: Classes up to which every confusion is kept, and how many of the largest beyond that.
ALL, MOST = 50, 200
#: Pictures of images that the linear probe takes for another class, those of one class, and their
#: longest side in pixels.
MISTAKES, OF_ONE, SIDE = 24, 3, 320
_FILE = "mistakes.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelResults:
    """What the probes measured.

    ``mean`` are the numbers, over seeds; ``std`` their sample standard deviation, empty for one
    seed; ``seeds[s]`` those of one, beside the counts of images, ``k``, and how the linear probe
    converged. Numbers are ``linear_top1``, ``knn_top1``, ``chance_top1`` and, from five classes on,
    ``..._top5``; chance names the most frequent training classes. ``classes[c]`` has over all
    seeds the test images, and the shares of them that either probe names rightly, None without
    any. ``confusions[p]`` lists (class, named class, images) over all seeds, the most frequent
    first; of many classes only the largest. ``mistakes`` are images of the first seed that the
    linear probe is most sure of, wrongly; ``pictures[i]`` is the JPEG of the i-th.
    """

    stamp: dict[str, Any]
    mean: dict[str, float]
    std: dict[str, float]
    seeds: dict[str, dict[str, Any]]
    classes: dict[str, dict[str, Any]]
    confusions: dict[str, list[list[Any]]]
    mistakes: list[dict[str, Any]]
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def tops(self) -> tuple[int, ...]:
        """So many best classes are counted."""
        return tops(len(self.classes))

    @property
    def counts(self) -> dict[str, Any]:
        """Images and neighbours (``train``, ``test``, ``k``); of several seeds all that occur."""
        rows = list(self.seeds.values())
        values = {name: sorted({row[name] for row in rows}) for name in ("train", "test", "k")}
        return {name: " or ".join(map(str, several)) for name, several in values.items()}

    @property
    def warnings(self) -> list[str]:
        """What the numbers do not say by themselves, as sentences."""
        lines = []
        for seed, row in self.seeds.items():
            fit = row["linear"]
            if not fit["converged"]:
                lines.append(
                    f"seed {seed}: the linear probe had not converged after {fit['iterations']} "
                    f"iterations (largest gradient {fit['gradient']:.1e}); raise "
                    "config.probe.iterations or lower config.probe.C."
                )
        if any(row["k"] < self.stamp["knn"]["k"] for row in self.seeds.values()):
            lines.append(
                f"k-NN: of {self.stamp['knn']['k']} neighbours asked for there are "
                f"{self.counts['k']}, all training images."
            )
        return lines


_JSON = tuple(f.name for f in dataclasses.fields(LabelResults) if f.name != "pictures")


class Tally:
    """Collects the probes of one seed after the other."""

    def __init__(self, names: Sequence[str], records: Sequence[Record]) -> None:
        self.names, self.records = names, records
        self.seeds: dict[str, dict[str, Any]] = {}
        self.mistakes: list[dict[str, Any]] = []
        shape = (len(names), len(names))
        self._counts = {probe: _Sparse(shape) for probe in PROBES}

    def add(self, seed: int, split: Split, labels: np.ndarray, probed: Probed) -> None:
        """Take the probes of a split of the records with these labels."""
        true = labels[split.test]
        told = {"linear": probed.linear, "knn": probed.neighbours}
        numbers: dict[str, Any] = {}
        for i, best in enumerate(tops(len(self.names))):
            numbers |= {f"{name}_top{best}": one.top(best) for name, one in told.items()}
            numbers[f"chance_top{best}"] = probed.chance[i]
        fitted = probed.fitted
        about = {
            "train": len(split.train), "test": len(split.test), "k": probed.k,
            "split_sha256": split.sha256(self.records),
            "linear": {"converged": fitted.converged, "iterations": fitted.iterations,
                       "loss": fitted.loss, "gradient": fitted.gradient},
        }  # fmt: skip
        if not self.seeds:
            self.mistakes = self._wrong(split, true, probed)
        self.seeds[str(seed)] = {**numbers, **about}
        for name, one in told.items():
            self._counts[name].add(true, one.named)

    def results(self, stamp: dict[str, Any]) -> LabelResults:
        """Of all seeds so far; without pictures."""
        every = list(self.seeds.values())
        keys = [key for key in every[0] if "_top" in key]
        columns = {key: [row[key] for row in every] for key in keys}
        several = len(every) > 1
        return LabelResults(
            stamp=stamp, mean={key: float(np.mean(v)) for key, v in columns.items()},
            std={key: float(np.std(v, ddof=1)) for key, v in columns.items()} if several else {},
            seeds=self.seeds, classes=self._by_class(),
            confusions={name: self._confused(counts) for name, counts in self._counts.items()},
            mistakes=self.mistakes,
        )  # fmt: skip

    def _by_class(self) -> dict[str, dict[str, Any]]:
        tested = self._counts["linear"].rows()
        rights = {name: counts.diagonal() for name, counts in self._counts.items()}
        rows = {}
        for i, name in enumerate(self.names):
            count = int(tested[i])
            shares = {p: int(right[i]) / count if count else None for p, right in rights.items()}
            rows[name] = {"test": count, **shares}
        return rows

    def _confused(self, counts: "_Sparse") -> list[list[Any]]:
        few = len(self.names) <= ALL
        pairs = [(t, n, c) for (t, n), c in counts.cells.items() if t != n]
        pairs.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
        return [[self.names[t], self.names[n], c] for t, n, c in pairs[: None if few else MOST]]

    def _wrong(self, split: Split, true: np.ndarray, probed: Probed) -> list[dict[str, Any]]:
        told, taken = probed.linear, [0] * len(self.names)
        wrong = np.flatnonzero(told.rank > 0)
        rows = []
        for i in sorted(wrong, key=lambda i: (-told.share[i], self.records[split.test[i]].path)):
            if len(rows) == MISTAKES:
                break
            if taken[true[i]] < OF_ONE:
                taken[true[i]] += 1
                rows.append(
                    {"path": self.records[split.test[i]].path, "class": self.names[true[i]],
                     "named": self.names[told.named[i]], "probability": float(told.share[i])}
                )  # fmt: skip
        return rows


class _Sparse:
    """Counts of (true, named) pairs: most of a million pairs of 1000 classes never occur."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.cells: dict[tuple[int, int], int] = {}

    def add(self, true: np.ndarray, named: np.ndarray) -> None:
        pairs, counts = np.unique(np.stack([true, named], axis=1), axis=0, return_counts=True)
        for (t, n), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.cells[t, n] = self.cells.get((t, n), 0) + count

    def rows(self) -> np.ndarray:
        """Images of each true class."""
        total = np.zeros(self.shape[0], np.int64)
        for (true, _), count in self.cells.items():
            total[true] += count
        return total

    def diagonal(self) -> np.ndarray:
        return np.array([self.cells.get((i, i), 0) for i in range(self.shape[0])])


def pictures(mistakes: Sequence[Mapping[str, Any]], source: Source) -> dict[str, np.ndarray]:
    """Small pictures of the mistakes among the samples of a source, by their number."""
    places = {record.path: i for i, record in enumerate(source.records)}
    small = {}
    for number, row in enumerate(mistakes):
        image = source[places[row["path"]]].image
        packed = gallery.jpeg(gallery.shrunk(image, SIDE), 84)
        small[str(number)] = np.frombuffer(packed, np.uint8)
    return small


def write(results: LabelResults, workdir: str | epath.PathLike) -> epath.Path:
    """Write the pictures and then ``results.json``; returns the latter's path."""
    folder = paths.directory(workdir)
    write_arrays(folder / _FILE, results.pictures, results.stamp)
    return write_numbers(folder, {name: getattr(results, name) for name in _JSON})


def read(workdir: str | epath.PathLike) -> LabelResults:
    """The results in a folder; raises WorkdirError if a file is missing or is not one of ours."""
    folder = paths.directory(workdir)
    fields = read_numbers(folder, _JSON)
    return LabelResults(**fields, pictures=read_arrays(folder / _FILE, fields["stamp"]))
