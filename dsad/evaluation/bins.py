"""Bins of float32 scores by their leading bits, and counting into them on host or device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Scores counted per call on the device; shorter input is padded to a power of two.
CHUNK = 1 << 20
_SIGN_AND_EXPONENT = 9


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
        bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 = 0.0: the zeros tie
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


def count_host(scores: np.ndarray, layout: Layout) -> np.ndarray:
    """Float32 scores (n,) per slot, int64, by numpy."""
    return np.bincount(layout.slot(scores), minlength=layout.slots)


def count_device(scores: Any, layout: Layout) -> np.ndarray:
    """Float32 scores (n,) per slot, int64, on the device of a jax array or the default one."""
    total = np.zeros(layout.slots, np.int64)
    table: tuple[Any, ...] = ()
    slots = layout.slots
    if not layout.plain:
        slots = _padded(slots)
        shift = (32 - layout.leading - layout.extra).astype(np.uint32)
        table = (jnp.asarray(layout.start), jnp.asarray(shift))
    waiting: list[jax.Array] = []
    for at in range(0, scores.size, CHUNK):
        part = scores[at : at + CHUNK]
        missing = min(CHUNK, _padded(part.size)) - part.size
        valid = part.size
        if missing:
            pad = jnp.pad if isinstance(part, jax.Array) else np.pad
            part = pad(part, (0, missing))
        waiting.append(_count(part, np.int32(valid), table, leading=layout.leading, slots=slots))
        if len(waiting) > 2:  # as many at work as the host can add up behind
            total += np.asarray(waiting.pop(0))[: layout.slots]
    for counts in waiting:
        total += np.asarray(counts)[: layout.slots]
    return total


def _padded(size: int) -> int:
    return 1 << max(12, (size - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("leading", "slots"))
def _count(
    scores: jax.Array, valid: jax.Array, table: tuple[jax.Array, ...], *, leading: int, slots: int
) -> jax.Array:
    """Counts (slots,) int32 of the first ``valid`` scores."""
    # Not + 0.0, which a compiler may drop: the zeros must tie.
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, jnp.float32(0), scores), jnp.uint32)
    rest = 32 - leading
    slot = (bits >> rest).astype(jnp.int32)
    if table:
        start, shift = table
        within = (bits & jnp.uint32((1 << rest) - 1)) >> shift[slot]
        slot = start[slot] + within.astype(jnp.int32)
    slot = jnp.where(jnp.arange(scores.size, dtype=jnp.int32) < valid, slot, slots)
    return jnp.zeros(slots, jnp.int32).at[slot].add(1, mode="drop")
