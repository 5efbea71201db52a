"""Reference images for every sample of a batch, drawn from (seed, epoch, sample index)."""

from collections.abc import Sequence

import numpy as np

from dsad.core.batch import Companions
from dsad.core.types import Record

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(*words: np.ndarray | int) -> np.ndarray:
    """A random 64-bit number for every combination of words, as SplitMix64 finishes its counter.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: a function
    of its arguments on any machine, for whole arrays at once.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for word in words:
            word = np.asarray(word).astype(np.int64).astype(np.uint64)
            state = (state ^ word) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


class CompanionDraws:
    """Draws what ``Companions`` asks for among the records of a source; see there."""

    def __init__(self, records: Sequence[Record], companions: Companions, seed: int):
        self.count, self.seed = companions.count, seed
        keys = [tuple(getattr(r, name) for name in _fields(companions)) for r in records]
        number = {key: i for i, key in enumerate(sorted(set(keys)))}
        self.key = np.asarray([number[key] for key in keys], np.int64)
        fits = np.asarray([companions.label in (None, r.label) for r in records], bool)
        able = np.flatnonzero(fits)
        #: The samples that can be references, those of one key together, and where a key begins.
        self.members = able[np.argsort(self.key[able], kind="stable")].astype(np.int64)
        self.start = np.searchsorted(self.key[self.members], np.arange(len(number) + 1))
        self.place = np.full(len(records), -1, np.int64)
        self.place[self.members] = np.arange(len(self.members)) - self.start[self.key[self.members]]

    def __call__(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """``index`` (b, r) int32 and ``valid`` (b, r) bool for samples and epochs (b,)."""
        index, key = np.asarray(index, np.int64), self.key[index]
        start, here = self.start[key], self.place[index]
        size = self._others(key, here)
        # Floyd's sampling without repetition (Bentley and Floyd 1987): draw t of 0 .. j, and take
        # j itself where t was taken before.
        drawn = np.full((len(index), self.count), -1, np.int64)
        for n in range(self.count):
            j = np.maximum(size - self.count, 0) + n
            t = (mixed(self.seed, epoch, index, n) % np.maximum(j + 1, 1).astype(np.uint64)).astype(
                np.int64
            )
            taken = (drawn == t[:, None]).any(axis=1)
            drawn[:, n] = np.where(n < size, np.where(taken, j, t), -1)
        valid = drawn >= 0
        drawn += valid & (here >= 0)[:, None] & (drawn >= here[:, None])  # never the sample itself
        chosen = (
            self.members[np.where(valid, start[:, None] + drawn, 0)] if len(self.members) else 0
        )
        return {"index": np.where(valid, chosen, index[:, None]).astype(np.int32), "valid": valid}

    def unaccompanied(self) -> int:
        """How many samples have no companion at all."""
        return int(np.sum(self._others(self.key, self.place) == 0))

    def _others(self, key: np.ndarray, place: np.ndarray) -> np.ndarray:
        return self.start[key + 1] - self.start[key] - (place >= 0)


def _fields(companions: Companions) -> tuple[str, ...]:
    """A group or a camera belongs to a category."""
    named = {"category", *companions.same} if companions.same else set()
    return tuple(name for name in ("category", "group", "camera") if name in named)
