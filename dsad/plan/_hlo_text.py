"""The text of an HLO module as computations of operations; see ``hlo``."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_OP = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\]")
#: What runs whenever the operation runs; what a reduction applies to pairs holds no collective.
_CALLS = re.compile(r"\b(?:calls|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALL_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_APPLY = re.compile(r"\bto_apply=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bytes(self) -> int:
        """Without the padding of tiled layouts."""
        digits = re.search(r"\d+", self.dtype)  # bf16, f8e4m3fn, c64, s4
        bits = int(digits.group()) if digits else {"pred": 8}.get(self.dtype, 0)
        return math.ceil(bits * math.prod(self.shape) / 8)


@dataclasses.dataclass(frozen=True)
class Type:
    """A result type: an array, or a tuple of types."""

    text: str

    @property
    def nested(self) -> bool:
        """Whether it is a tuple."""
        return self.text.startswith("(")

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays in it, in order."""
        found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", self.text))  # without the layouts
        return tuple(Array(dtype, tuple(_numbers(shape))) for dtype, shape in found)

    @property
    def parts(self) -> "tuple[Type, ...]":
        """Entries of a tuple; the type itself otherwise."""
        return tuple(map(Type, _split(self.text[1:-1]))) if self.nested else (self,)


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction; ``arguments`` are names of others in the same computation."""

    name: str
    type: Type
    opcode: str
    arguments: tuple[str, ...]
    literal: str
    rest: str

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that run as part of it."""
        if self.opcode.endswith(("-update", "-done")):
            return ()  # they name what their start has run
        found = _CALLS.findall(self.rest)
        for names in _CALL_LISTS.findall(self.rest):
            found += [n.strip().lstrip("%") for n in names.split(",") if n.strip()]
        if self.opcode == "call":
            found += _APPLY.findall(self.rest)
        return tuple(found)

    def called(self, role: str) -> str:
        """The computation in the role ``condition``, ``body`` or ``calls``; "" if there is none."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""

    def attribute(self, key: str) -> str:
        """Value of an attribute as text, "" if absent."""
        found = re.search(rf'\b{key}="([^"]*)"|\b{key}=([^\s,]+)', self.rest)
        return (found.group(1) or found.group(2) or "") if found else ""

    def groups(self, module: "Module") -> tuple[tuple[int, ...], ...]:
        """Groups of ids that exchange data; pairs for a permutation."""
        if self.opcode.startswith("collective-permute"):
            return _listed(self._braces("source_target_pairs"))
        found = self._replica_groups()
        everyone = tuple(range(module.replicas * module.partitions))
        if not found:
            return (everyone,)
        global_ids = "use_global_device_ids=true" in self.rest
        reduces = self.opcode.startswith(("all-reduce", "all-gather", "reduce-scatter"))
        if "channel_id=" in self.rest and reduces and not global_ids:
            # Then the ids are replicas, and every group spans all partitions of its replicas.
            parts = range(module.partitions)
            return tuple(tuple(r * module.partitions + p for r in g for p in parts) for g in found)
        return found

    def _replica_groups(self) -> tuple[tuple[int, ...], ...]:
        start = self.rest.partition("replica_groups=")[2]
        if start.startswith("{"):
            return _listed(self._braces("replica_groups"))
        if start.startswith("["):
            found = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", start)
            if not found:
                raise ValueError(f"HLO: cannot read the replica groups of {self.name}: {start:.80}")
            count, size = _numbers(found.group(1))
            return _rows(_iota(found.group(2)).reshape(count, size))
        if start.startswith("mesh"):
            return _mesh_groups(start, self.name)
        return ()

    def _braces(self, key: str) -> str:
        start = self.rest.partition(f"{key}=")[2]
        return start[: _closing(start) + 1]


@dataclasses.dataclass
class Computation:
    """Operations by name, in order; ``fused`` if a fusion calls it."""

    name: str
    ops: dict[str, Op] = dataclasses.field(default_factory=dict)
    root: Op = dataclasses.field(init=False)
    fused: bool = False


@dataclasses.dataclass
class Module:
    """Computations by name, the name of the entry, and the devices of the program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    replicas: int


def parse(text: str) -> Module:
    """Read the text of a module; raises ValueError if it is none."""
    found = re.search(r"^HloModule .*$", text, re.M)
    computations, entry, current = {}, "", None
    for line in _COMMENT.sub("", text).splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                name = header.group(2) or header.group(4)
                current = computations[name] = Computation(name)
                entry = name if header.group(1) or header.group(3) else entry
        elif line.startswith("}"):
            current = None
        elif match := _OP.match(line):
            op = _op(match.group(2), line[match.end() :])
            current.ops[op.name] = op
            if match.group(1):
                current.root = op
    if not found or not entry:
        raise ValueError("HLO: expected the text of a module with an entry computation.")
    for computation in computations.values():
        for op in computation.ops.values():
            if op.opcode == "fusion":
                computations[op.called("calls")].fused = True
    header = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", found.group()))
    parts, copies = (int(header.get(key, 1)) for key in ("num_partitions", "replica_count"))
    return Module(computations, entry, parts, copies)


def _op(name: str, text: str) -> Op:
    """An instruction from what follows its ``=``."""
    end = _closing(text) + 1 if text.startswith("(") else text.find(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    inside = rest[:close]
    names = tuple(a.split()[-1].lstrip("%") for a in _split(inside) if a)
    return Op(name, Type(text[:end]), opcode, names, inside, rest[close + 1 :])


def _closing(text: str) -> int:
    """Index of the bracket that closes the one at the start of ``text``."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if depth == 0:
            return i
    raise ValueError(f"HLO: brackets that do not close: {text:.80}")


def _split(text: str) -> Iterator[str]:
    """Entries between the commas outside brackets."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    """{{0,1},{2,3}}, or nothing for {}."""
    return tuple(tuple(_numbers(g)) for g in re.findall(r"\{([\d,\s]+)\}", text))


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in array)


def _iota(text: str) -> np.ndarray:
    """Ids in the order of ``<=[4,2]T(1,0)``: counted, given a shape and transposed."""
    shape, _, order = text.partition("T")
    dims = _numbers(shape)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _mesh_groups(text: str, name: str) -> tuple[tuple[int, ...], ...]:
    """Groups along named axes: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}.

    An axis of a group may be a part of a mesh axis, written 'a':(4)2: of its factors 4, 2 and
    what is left, the 2.
    """
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    if not found:
        raise ValueError(f"HLO: cannot read the replica groups of {name}: {text:.80}")
    axes = [(a, int(n)) for a, n in re.findall(r"'([^']*)'=(\d+)", found.group(1))]
    used = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found.group(3))
    dims, chosen = [], []
    for axis, n in axes:
        inner = sorted((int(pre), int(size)) for a, pre, size in used if a == axis and pre)
        if any(a == axis and not pre for a, pre, _ in used):
            inner = [(1, n)]
        done = 1
        for pre, size in inner:
            dims += [pre // done, size]
            chosen.append(len(dims) - 1)
            done = pre * size
        dims.append(n // done)
    order = found.group(2)
    ids = _iota(order) if order and order.startswith("[") else np.arange(math.prod(dims))
    rest = [i for i in range(len(dims)) if i not in chosen]
    size = math.prod(dims[i] for i in chosen)
    return _rows(ids.reshape(dims).transpose(rest + chosen).reshape(-1, size))
