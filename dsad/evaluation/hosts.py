"""What the processes of a run have to tell each other in an evaluation.

Each has the images whose rows of a batch lie on its devices: it decodes them, brings their maps
to original pixels and counts. Numbers add up; what only process 0 needs is sent there.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from dsad.core import distributed
from dsad.core import hosts as arrays_of_hosts
from dsad.core.errors import DsadError

T = TypeVar("T")

#: Bytes that all processes together hand around at once.
BYTES = 2**26
#: Sizes handed around are powers of two from here on, so that few programs are compiled.
LEAST = 2**10


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of one evaluation; ``several`` is False for one, where nothing is sent.

    All of them must make the same calls in the same order.
    """

    several: bool = False

    @classmethod
    def of(cls, mesh: Mesh) -> "Hosts":
        """Those whose devices a mesh has."""
        return cls(arrays_of_hosts.spans(mesh))

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return not self.several or distributed.is_main()

    def together(self, function: Callable[[], T]) -> T:
        """Call what needs no other process; a DsadError on one is raised on all."""
        return distributed.together(function) if self.several else function()

    def from_main(self, value: T) -> T:
        """What process 0 passed, which JSON must be able to hold, on every process."""
        return (
            distributed.gather_objects(value if self.main else None)[0] if self.several else value
        )

    def total(self, values: Any) -> np.ndarray:
        """Sums over the processes, element by element, of arrays of one shape and dtype.

        Exact for integers that fit the dtype; memory beyond the arrays as in ``to_main``.
        """
        values = np.asarray(values)
        if not self.several:
            return values
        flat = values.reshape(-1)
        step = max(1, BYTES // distributed.count() // values.itemsize)
        sums = np.empty_like(flat)
        for at in range(0, flat.size, step):
            part = flat[at : at + step]
            padded = np.zeros(_padded(part.size), flat.dtype)
            padded[: part.size] = part
            sums[at : at + part.size] = distributed.gather(padded).sum(axis=0)[: part.size]
        return sums.reshape(values.shape)

    def listed(self, rows: Mapping[int, Any]) -> list[Any]:
        """All processes' rows, which JSON must be able to hold, by ascending number."""
        found = dict(rows)
        if self.several:
            shared = distributed.gather_objects(list(rows.items()))
            found = {number: row for own in shared for number, row in own}
        return [found[number] for number in sorted(found)]

    def to_main(self, arrays: Mapping[T, np.ndarray]) -> dict[T, np.ndarray]:
        """All processes' arrays on process 0, and none elsewhere; keys are numbers or strings.

        Memory beyond the arrays: ``BYTES``, divided among the processes.
        """
        if not self.several:
            return dict(arrays)
        mine = dict(arrays)
        heads = distributed.gather_objects([[k, a.shape, a.dtype.str] for k, a in mine.items()])
        sizes = [sum(_bytes(shape, dtype) for _, shape, dtype in head) for head in heads]
        # Those of process 0 are there already.
        own = [] if self.main else [_raw(a) for a in mine.values()]
        data = np.concatenate(own) if own else np.zeros(0, np.uint8)
        step = max(LEAST, BYTES // distributed.count())
        pieces: list[list[np.ndarray]] = [[] for _ in heads]
        for at in range(0, max(sizes[1:], default=0), step):
            longest = min(step, max(sizes[1:]) - at)
            padded = np.zeros(min(step, _padded(longest)), np.uint8)
            part = data[at : at + step]
            padded[: part.size] = part
            for process, row in enumerate(distributed.gather(padded)):
                if self.main and process:
                    pieces[process].append(row[: max(0, min(step, sizes[process] - at))])
        if not self.main:
            return {}
        for head, parts in zip(heads[1:], pieces[1:], strict=True):
            mine.update(_unpacked(head, parts))
        return mine

    def agreed(self, tree: Any) -> Any:
        """The tree of host arrays as process 0 has it, sent around only where they differ.

        Raises DsadError where shapes differ.
        """
        if not self.several:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        leaves = [np.asarray(x) for x in leaves]
        if self.same(leaves):
            return tree
        shapes = [[list(x.shape), x.dtype.str] for x in leaves]
        if any(other != shapes for other in distributed.gather_objects(shapes)):
            raise DsadError(
                "the processes fitted detectors of different shapes to the same features. Are "
                "their machines and versions of one kind?"
            )
        sent = [self.total(_raw(x) if self.main else np.zeros_like(_raw(x))) for x in leaves]
        whole = [s.view(x.dtype).reshape(x.shape) for s, x in zip(sent, leaves, strict=True)]
        return jax.tree.unflatten(structure, whole)

    def same(self, leaves: Sequence[np.ndarray]) -> bool:
        """Whether all processes have the same arrays, bit by bit."""
        if not self.several:
            return True
        digest = hashlib.sha256()
        for leaf in leaves:
            digest.update(f"{leaf.shape} {leaf.dtype} ".encode())
            digest.update(_raw(leaf).data)
        return len(set(distributed.gather_objects(digest.hexdigest()))) == 1


#: A single process.
ALONE = Hosts()


def _padded(size: int) -> int:
    return max(LEAST, 1 << max(0, size - 1).bit_length())


def _raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _bytes(shape: Sequence[int], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _unpacked(head: Sequence[Any], parts: Sequence[np.ndarray]) -> dict[Any, np.ndarray]:
    data = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    found, at = {}, 0
    for key, shape, dtype in head:
        size = _bytes(shape, dtype)
        found[key] = np.empty(shape, np.dtype(dtype))
        found[key].reshape(-1).view(np.uint8)[:] = data[at : at + size]
        at += size
    return found
