"""Bins of float32 scores by their leading bits, and counting into them on host or device."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Scores counted per call on the device; shorter input is padded to a power of two.
CHUNK = 1 << 20
#: Scores counted before the sums leave the device: far from wrapping int32.
_FETCH = 1 << 30
_SIGN_AND_EXPONENT = 9
_NEGATIVE_ZERO = np.uint32(1 << 31)


class Layout(NamedTuple):
    """Where a score is counted, in the order of the raw bits: positive scores up, then negative.

    ``extra`` (2^leading,) uint8: bits by which each leading bin is split; ``start`` its first slot.
    """

    leading: int
    extra: np.ndarray
    start: np.ndarray
    slots: int

    @classmethod
    def of(cls, extra: np.ndarray) -> "Layout":
        """From the bits by which each leading bin is split."""
        if not extra.any():
            return _uniform(extra.size)
        size = np.left_shift(np.int64(1), extra.astype(np.int64))
        start = np.cumsum(size) - size
        return cls(extra.size.bit_length() - 1, extra, start.astype(np.int32), int(size.sum()))

    @property
    def plain(self) -> bool:
        """Whether no bin is split."""
        return self.slots == self.extra.size

    @property
    def bin_of_slot(self) -> np.ndarray:
        """Leading bin of every slot."""
        return np.repeat(np.arange(self.extra.size), np.left_shift(1, self.extra.astype(np.int64)))

    def infinite(self, counts: np.ndarray) -> int:
        """How many of the counted scores were NaN or infinite: their exponent is all ones."""
        half = self.extra.size // 2
        reserved = self.extra.size >> _SIGN_AND_EXPONENT
        top, negative = int(self.start[half - reserved]), int(self.start[half])
        last = int(self.start[-reserved])
        return int(counts[top:negative].sum() + counts[last:].sum())

    def ascending(self, counts: np.ndarray) -> np.ndarray:
        """Counts (slots,) from the lowest score to the highest."""
        negative = int(self.start[self.extra.size // 2])
        return np.concatenate([counts[negative:][::-1], counts[:negative]])

    def slot(self, scores: np.ndarray) -> np.ndarray:
        """Slot of every float32 score (n,), intp."""
        bits = scores.view(np.uint32)
        bits = np.where(bits == _NEGATIVE_ZERO, np.uint32(0), bits)  # the zeros tie
        rest = 32 - self.leading
        found = (bits >> np.uint32(rest)).astype(np.intp)
        if self.plain:
            return found
        within = bits & np.uint32((1 << rest) - 1)
        within >>= (rest - self.extra[found]).astype(np.uint32)
        return self.start[found] + within.astype(np.intp)


@functools.lru_cache(maxsize=4)
def _uniform(size: int) -> Layout:
    whole = np.zeros(size, np.uint8), np.arange(size, dtype=np.int32)
    return Layout(size.bit_length() - 1, *whole, size)


def count_host(parts: Iterable[np.ndarray], layout: Layout) -> np.ndarray:
    """Float32 scores (n,) of every part per slot, int64, by numpy."""
    total = np.zeros(layout.slots, np.int64)
    for part in parts:
        total += np.bincount(layout.slot(part), minlength=layout.slots)
    return total


def count_device(parts: Iterable[Any], layout: Layout) -> np.ndarray:
    """The same on the device of jax arrays, or on the default one; parts may be of both kinds.

    Two sums take turns, so that two cores count at once; each is fetched and added in int64 before
    its int32 could wrap.
    """
    table: tuple[Any, ...] = ()
    slots = layout.slots
    if not layout.plain:
        slots = _padded(slots)
        shift = (32 - layout.leading - layout.extra).astype(np.uint32)
        table = (jnp.asarray(layout.start), jnp.asarray(shift))
    total = np.zeros(layout.slots, np.int64)
    sums = [jnp.zeros(slots, jnp.int32) for _ in range(2)]
    inside = 0
    for turn, (chunk, valid) in enumerate(_chunks(parts)):
        sums[turn % 2] = _count(
            sums[turn % 2], chunk, np.int32(valid), table, leading=layout.leading
        )
        inside += valid
        if inside + CHUNK > _FETCH:
            total += sum(np.asarray(s, np.int64)[: layout.slots] for s in sums)
            sums, inside = [jnp.zeros(slots, jnp.int32) for _ in range(2)], 0
    return total + sum(np.asarray(s, np.int64)[: layout.slots] for s in sums)


def _chunks(parts: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Arrays of few sizes with the number of scores in each."""
    for part in parts:
        for at in range(0, part.size, CHUNK):
            chunk = part[at : at + CHUNK]
            valid = chunk.size
            if missing := min(CHUNK, _padded(valid)) - valid:
                pad = jnp.pad if isinstance(chunk, jax.Array) else np.pad
                chunk = pad(chunk, (0, missing))
            yield chunk, valid


def _padded(size: int) -> int:
    return 1 << max(12, (size - 1).bit_length())


@functools.partial(jax.jit, static_argnames="leading", donate_argnums=0)
def _count(
    counts: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    table: tuple[jax.Array, ...],
    *,
    leading: int,
) -> jax.Array:
    """``counts`` (slots,) int32 plus those of the first ``valid`` scores."""
    # By integers alone: in float arithmetic devices flush the smallest scores to zero.
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    bits = jnp.where(bits == _NEGATIVE_ZERO, jnp.uint32(0), bits)  # the zeros tie
    rest = 32 - leading
    slot = (bits >> rest).astype(jnp.int32)
    if table:
        start, shift = table
        within = (bits & jnp.uint32((1 << rest) - 1)) >> shift[slot]
        slot = start[slot] + within.astype(jnp.int32)
    slot = jnp.where(jnp.arange(scores.size, dtype=jnp.int32) < valid, slot, counts.size)
    return counts.at[slot].add(1, mode="drop")
