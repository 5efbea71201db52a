"""Between dsad's trees and tensors under published names, both ways and strictly.

A network's mapping is a list of entries, one per leaf. Reading uses every tensor of the file or
finds it under a pattern that is knowingly left out; everything else is an error that lists all
faults at once. Writing gives the published tensors back, bit for bit.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten

#: Layouts inside dsad: dense kernels (in, out), convolutions (kh, kw, in, out).
_HWIO, _OIHW = (2, 3, 1, 0), (3, 2, 0, 1)


class Layout(NamedTuple):
    """How one published tensor becomes one array of a tree, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
#: torch's (out, in).
DENSE = Layout(lambda x: x.T, lambda x: x.T)
#: torch's (out, in, kh, kw); depthwise (channels, 1, kh, kw) becomes (kh, kw, 1, channels).
CONV = Layout(lambda x: x.transpose(_HWIO), lambda x: x.transpose(_OIHW))
#: A learnt token (1, 1, width) as (width,).
TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])
#: A batch of one, such as positions (1, T, width) as (T, width).
TABLE = Layout(lambda x: x[0], lambda x: x[None])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the trees and the published tensors that it is made of.

    ``path`` begins with ``params`` or ``extra``: ``params/blocks/qkv/kernel``. ``read`` gets the
    tensors in the order of ``names``, with the shapes that ``write`` gives them; ``write`` undoes
    it. An entry without names is a constant that the file does not hold; nothing is written of it.
    """

    path: str
    names: tuple[str, ...]
    read: Callable[[Sequence[np.ndarray]], np.ndarray]
    write: Callable[[np.ndarray], Sequence[np.ndarray]]


def one(path: str, name: str, layout: Layout = SAME) -> Entry:
    """A leaf that is one published tensor."""
    return Entry(path, (name,), lambda t: layout.read(t[0]), lambda x: [layout.write(x)])


def stacked(path: str, names: Iterable[str], layout: Layout = SAME) -> Entry:
    """A leaf with a leading axis of layers, each of which is a published tensor."""
    return Entry(
        path, tuple(names),
        lambda tensors: np.stack([layout.read(t) for t in tensors]),
        lambda x: [layout.write(layer) for layer in x],
    )  # fmt: skip


def split(path: str, parts: Sequence[str], depth: int, layout: Layout = SAME) -> Entry:
    """A leaf with a leading axis of ``depth`` layers, each of which is several published tensors.

    ``parts`` are their names with %d for the layer, one after the other along the tensors' first
    axis, all of one size; "" is a part that no file holds: it is zero, and is not written.
    """
    held = [k for k, part in enumerate(parts) if part]

    def read(tensors: Sequence[np.ndarray]) -> np.ndarray:
        layers = []
        for start in range(0, len(tensors), len(held)):
            pieces = [np.zeros_like(tensors[start])] * len(parts)
            for k, tensor in zip(held, tensors[start:], strict=False):
                pieces[k] = tensor
            layers.append(layout.read(np.concatenate(pieces)))
        return np.stack(layers)

    def write(x: np.ndarray) -> list[np.ndarray]:
        whole = (np.split(layout.write(layer), len(parts)) for layer in x)
        return [pieces[k] for pieces in whole for k in held]

    found = tuple(parts[k] % i for i in range(depth) for k in held)
    return Entry(path, found, read, write)


def constant(path: str, value: float, shape: Sequence[int]) -> Entry:
    """A leaf that the published file does not hold."""
    return Entry(path, (), lambda _: np.full(shape, value, np.float32), lambda _: ())


def under(entries: Iterable[Entry], name: str) -> list[Entry]:
    """The same entries for a network that is the part ``name`` of larger trees."""
    moved = []
    for entry in entries:
        kind, _, rest = entry.path.partition("/")
        moved.append(dataclasses.replace(entry, path=f"{kind}/{name}/{rest}"))
    return moved


def to_trees(
    entries: Sequence[Entry],
    state: Mapping[str, Any],
    shapes: tuple[Any, Any],
    *,
    ignored: Mapping[str, str],
    what: str,
) -> tuple[Any, Any]:
    """(params, extra) as nested dicts of f32 numpy arrays, from tensors by published name.

    f16 and bf16 tensors are widened, f64 rounded; integers have no meaning here and are refused.

    Args:
      entries: the mapping, one entry for every leaf of ``shapes``.
      state: arrays by name.
      shapes: (params, extra) of anything with a ``shape``, as ``Functional.shapes`` gives them.
      ignored: what is knowingly left out, regular expressions (match at the start) with a word for
        people: ``{"fc[.]": "classifier"}``. See ``left_out`` for a list of it.
      what: the network, for messages.

    Raises:
      ConfigError: a table of all tensors that are missing, left over, misshapen or no floats.

    """
    held, faults = {}, []
    wanted = _checked(entries, shapes)
    _check_any(entries, state, what)
    for entry in entries:
        held[entry], wrong = _tensors(entry, wanted[entry.path], state)
        faults += wrong
    used = {name for entry in entries for name in entry.names}
    left = [n for n in state if n not in used and reason(n, ignored) is None]
    faults += [(name, f"no tensor of {what}", _describe(state[name])) for name in left]
    if faults:
        raise ConfigError(f"weights do not fit {what}:\n{table(_joined(faults))}")
    # Only now: which architecture fits a file is found by trying them all.
    trees = nest({e.path: _leaf(e, tensors, wanted[e.path]) for e, tensors in held.items()})
    return trees.get("params", {}), trees.get("extra", {})


def to_state(entries: Sequence[Entry], params: Any, extra: Any) -> dict[str, np.ndarray]:
    """Tensors under published names and in the published layout: contiguous f32 arrays."""
    leaves = flatten({"params": params, "extra": extra})
    state: dict[str, np.ndarray] = {}
    for entry in entries:
        tensors = entry.write(np.asarray(leaves[entry.path], np.float32))
        for name, tensor in zip(entry.names, tensors, strict=True):
            # A copy: the tensors of a stack, or of another tree, must not share their memory.
            state[name] = np.array(tensor, np.float32, order="C")
    return state


def left_out(state: Mapping[str, Any], ignored: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Names that are knowingly not used, by what they are: ``{"classifier": ("fc.bias", ..)}``."""
    found: dict[str, list[str]] = {}
    for name in state:
        if (word := reason(name, ignored)) is not None:
            found.setdefault(word, []).append(name)
    return {word: tuple(names) for word, names in found.items()}


def reason(name: str, ignored: Mapping[str, str]) -> str | None:
    """Why a tensor is left out, None if it must be used."""
    return next((word for pattern, word in ignored.items() if re.match(pattern, name)), None)


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows of (tensor, expected, found) under a heading, aligned."""
    lines = [("tensor", "expected", "found"), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)


def _joined(faults: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The rows in order; those of four blocks or more that tell the same are one."""
    alike: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for name, want, have in sorted(faults):
        block = re.sub(r"\.\d+\.", ".*.", name, count=1)
        alike.setdefault((block, want, have), []).append((name, want, have))
    rows = []
    for (block, want, have), own in alike.items():
        rows += [(f"{block} ({len(own)} tensors)", want, have)] if len(own) >= 4 else own
    return sorted(rows)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path name as nested dicts; undoes ``core.tree.flatten`` of nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _checked(entries: Sequence[Entry], shapes: tuple[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by path; a mapping that does not cover them is a fault of dsad, not of a file."""
    wanted = flatten({"params": shapes[0], "extra": shapes[1]})
    paths = [entry.path for entry in entries]
    if sorted(paths) != sorted(wanted):
        raise ValueError(f"entries {set(paths) ^ set(wanted)} do not cover the leaves, once each")
    return {path: tuple(leaf.shape) for path, leaf in wanted.items()}


def _check_any(entries: Sequence[Entry], state: Mapping[str, Any], what: str) -> None:
    """A file of another kind would fill a table with all its tensors and all that are missing."""
    known = [name for entry in entries for name in entry.names]
    if known and not any(name in state for name in known):
        some = dict.fromkeys(known[i * (len(known) - 1) // 2] for i in range(3))
        raise ConfigError(
            f"weights do not fit {what}: expected names such as {', '.join(some)} "
            f"({len(known)} tensors); found {', '.join(list(state)[:3]) or 'nothing'} "
            f"({len(state)} tensors). These are weights of another network, or in names that dsad "
            "does not read."
        )


def _tensors(
    entry: Entry, shape: tuple[int, ...], state: Mapping[str, Any]
) -> tuple[list[np.ndarray], list[tuple[str, str, str]]]:
    tensors, faults = [], []
    published = entry.write(np.broadcast_to(np.float32(0), shape))
    for name, like in zip(entry.names, published, strict=True):
        if name not in state:
            faults.append((name, str(like.shape), "missing"))
            continue
        tensor = np.asarray(state[name])
        if tensor.shape != like.shape or not is_float(tensor.dtype):
            faults.append((name, str(like.shape), _describe(tensor)))
        tensors.append(tensor)
    return tensors, faults


def is_float(dtype: np.dtype) -> bool:
    """Whether a type holds real numbers; numpy knows bfloat16 only by name."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _leaf(entry: Entry, tensors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    wide = [t.astype(np.float32, copy=False) for t in tensors]
    leaf = np.asarray(entry.read(wide), np.float32, order="C")
    if any(np.may_share_memory(leaf, t) for t in tensors):
        leaf = leaf.copy()  # the file's memory is not kept, nor can it be written into
    if leaf.shape != shape:
        raise ValueError(f"{entry.path}: read gives {leaf.shape}, the tree holds {shape}")
    return leaf


def _describe(tensor: Any) -> str:
    tensor = np.asarray(tensor)
    return str(tensor.shape) if is_float(tensor.dtype) else f"{tensor.shape} {tensor.dtype}"
