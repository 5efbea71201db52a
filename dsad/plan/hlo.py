"""Collectives of a compiled program: kind, bytes, groups and how often each is executed.

What ``jax.stages.Compiled.as_text()`` prints is the program of one device after the partitioner.
The text of the CPU, GPU and TPU compilers is read: tuples with ``/*index=5*/`` comments, ``-start``
and ``-done`` halves, three notations of groups, loops inside loops, and the TPU's fusions that
carry a collective along or turn an all-reduce with a slice into a reduce-scatter.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

from dsad.plan._hlo_text import Computation, Module, Op, parse
from dsad.plan._hlo_trips import trip_count

#: The operations that move data between devices.
KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of ``KINDS``; asynchronous halves are one operation of the plain name.
      name: of the instruction.
      shapes: of the result on one device, such as ``("f32[128,512]",)``; several when combined.
      result_bytes, operand_bytes: per device and execution, of all its arrays together.
      group_size: devices that exchange data with each other; 2 for a permutation.
      groups: the ids of each group; pairs (source, target) for a permutation.
      count: executions per call of the program, the product of the trip counts around it.
      exact: False where data decide how often: in the branches of a conditional, each of which
        counts as taken, and in a loop of unknown length, which counts as one pass.
      op_name: the traced operation it comes from, if the compiler kept it.

    """

    kind: str
    name: str
    shapes: tuple[str, ...]
    result_bytes: int
    operand_bytes: int
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    count: int
    exact: bool
    op_name: str


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised HLO module text, in the order of the text.

    What no part of the program calls is left out. Raises ValueError if the text is no HLO module or
    a line cannot be read.
    """
    module = parse(text)
    times, exact = executions(module)
    running = [c for c in module.computations.values() if times[c.name]]
    starting = {c.name for c in running if _starts(c)}
    started = {_identity(op) for c in running if c.name in starting for op in _in(c)}
    found = []
    for c in running:
        for op in _in(c):
            # A fused start is carried through other fusions; its copies there move nothing.
            if c.fused and c.name not in starting and _identity(op) in started:
                continue
            found.append(_collective(module, c, op, times[c.name], c.name in exact))
    return found


def wire_bytes(collective: Collective) -> float:
    """Bytes that one device sends per execution, by the ring algorithm's formulas.

    With n devices in a group: all-reduce 2(n−1)/n of its operand, all-gather (n−1)/n of its result,
    reduce-scatter and all-to-all (n−1)/n of the operand; a permutation or broadcast sends its
    operand once. Multiply by ``count`` for one call of the program.
    """
    c, n = collective, collective.group_size
    if c.kind == "collective-permute":
        return float(c.operand_bytes) if any(a != b for a, b in c.groups) else 0.0
    if n < 2:
        return 0.0
    if c.kind == "collective-broadcast":
        return float(c.operand_bytes)
    share = (n - 1) / n
    if c.kind == "all-reduce":
        return 2 * share * c.operand_bytes
    return share * (c.result_bytes if c.kind == "all-gather" else c.operand_bytes)


def summary(found: list[Collective]) -> list[tuple[str, str, int, int, float]]:
    """Rows (kind, shapes, group size, executions, bytes sent per device), largest traffic first.

    Operations of the same kind, shapes and group size share a row.
    """
    rows: dict[tuple[str, str, int], tuple[int, float]] = {}
    for c in found:
        key = (c.kind, ", ".join(c.shapes), c.group_size)
        count, sent = rows.get(key, (0, 0.0))
        rows[key] = count + c.count, sent + c.count * wire_bytes(c)
    return sorted(((*k, *v) for k, v in rows.items()), key=lambda r: (-r[4], r[:3]))


def _in(computation: Computation) -> Iterator[Op]:
    """Operations of a computation that start or are a collective."""
    for op in computation.ops.values():
        if op.opcode.removesuffix("-start") in KINDS:
            yield op


def _starts(computation: Computation) -> bool:
    targets = (op.attribute("custom_call_target") for op in computation.ops.values())
    return "AsyncCollectiveStart" in targets


def _identity(op: Op) -> tuple[str, ...]:
    keys = ("channel_id", "replica_groups", "chain_id", "op_name")
    return (op.opcode, *map(str, op.type.arrays), *(op.attribute(k) for k in keys))


def executions(module: Module) -> tuple[Counter[str], set[str]]:
    """Executions of each computation per call, and which of these are known for certain."""
    times: Counter[str] = Counter()
    unsure: set[str] = set()

    def visit(name: str, count: int, known: bool) -> None:
        times[name] += count
        if not known:
            unsure.add(name)
        computation = module.computations[name]
        for op in computation.ops.values():
            trips = trip_count(module, computation, op) if op.opcode == "while" else 1
            sure = known and trips is not None and op.opcode != "conditional"
            for called in op.calls:
                visit(called, count * (1 if trips is None else trips), sure)

    visit(module.entry, 1, True)
    return times, set(times) - unsure


def _collective(
    module: Module, computation: Computation, op: Op, count: int, known: bool
) -> Collective:
    kind, arrays = op.opcode.removesuffix("-start"), op.type.arrays
    if op.opcode != kind and (kind != "all-reduce" or op.type.parts[0].nested):
        arrays = op.type.parts[1].arrays  # (operands, results, and what the runtime keeps)
    groups = op.groups(module)
    size = 2 if kind == "collective-permute" else max((len(g) for g in groups), default=1)
    result = operand = sum(a.bytes for a in arrays)
    if kind == "all-reduce" and _scattered(computation, op):
        kind, result = "reduce-scatter", operand // size
        arrays = computation.root.type.arrays
    elif kind == "all-gather":
        operand = result // size
    elif kind == "reduce-scatter":
        operand = result * size
    return Collective(
        kind=kind, name=op.name, shapes=tuple(str(a) for a in arrays), result_bytes=result,
        operand_bytes=operand, group_size=size, groups=groups, count=count, exact=known,
        op_name=op.attribute("op_name"),
    )  # fmt: skip


def _scattered(computation: Computation, op: Op) -> bool:
    """Whether a fusion keeps only its own part of an all-reduce, as the TPU's emitter does it."""
    root = computation.root
    if not computation.fused or root.opcode != "dynamic-slice" or root.arguments[0] != op.name:
        return False
    whole, part = (math.prod(o.type.arrays[0].shape) for o in (op, root))
    return whole > part
