"""FLOPs and memory traffic of a compiled program, with the passes of its loops.

XLA's own ``cost_analysis`` counts the body of a loop once, whatever its length, so that of a
transformer whose blocks are scanned it sees one block. Here everything counts as often as it runs.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from dsad.plan._hlo_text import Array, Computation, Module, Op, parse
from dsad.plan.hlo import executions

#: Operations that name or group values and move nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "optimization-barrier", "partition-id", "replica-id", "iota",
    "async-start", "async-update", "async-done", "copy-done", "all-gather-done",
    "all-reduce-done", "collective-permute-done", "send-done", "recv-done",
}  # fmt: skip
#: Operations that read no more of their first operand than they return.
_READS_A_PART = ("dynamic-slice", "slice", "gather")
#: Inside a fusion these cost nothing and change no value's size.
_RENAMES = ("bitcast", "copy", "reshape", "transpose")
#: Passes of the bfloat16 units of a TPU for one product of float32 operands.
_PASSES = {"highest": 6, "high": 3}
_PLACED = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one device and one call.

    Attributes:
      flops: of matrix products and convolutions; a multiply-add counts 2.
      bf16_flops: the same, a product of float32 operands at higher precision counted as many
        times as a TPU's bfloat16 units need passes for it (6 for "highest").
      bytes: read from and written to memory by every operation outside fusions; what the compiler
        placed in on-chip memory does not count, nor does the padding of tiled layouts.

    """

    flops: float
    bf16_flops: float
    bytes: float


def cost(text: str) -> Cost:
    """The cost of an optimised HLO module text; raises ValueError if it is none."""
    module = parse(text)
    times, _ = executions(module)
    flops = passes = moved = 0.0
    for computation in module.computations.values():
        count = times[computation.name]
        for op in computation.ops.values() if count else ():
            own = count * _flops(computation, op)
            flops += own
            if own:
                passes += own * _passes(computation, op)
            if not computation.fused:
                moved += count * _bytes(module, computation, op)
    return Cost(flops=flops, bf16_flops=passes, bytes=moved)


def _array(computation: Computation, name: str) -> Array:
    return computation.ops[name].type.arrays[0]


def _flops(computation: Computation, op: Op) -> float:
    if op.opcode == "convolution":
        return _convolution(computation, op)
    gemm = op.opcode == "custom-call" and "gemm" in op.attribute("custom_call_target")
    if op.opcode != "dot" and not gemm:
        return 0.0
    axes = re.search(r'\blhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)[\]}]', op.rest)
    if gemm and not axes:
        return 0.0
    left = _array(computation, op.arguments[0]).shape
    summed = [left[int(n)] for n in re.findall(r"\d+", axes.group(1))] if axes else []
    return 2.0 * math.prod(op.type.arrays[0].shape) * math.prod(summed)


def _convolution(computation: Computation, op: Op) -> float:
    """2 · outputs · taps that meet data · input channels of a group.

    A TPU's products are written as convolutions, whose batch axes are spatial axes in which most
    taps fall on padding or holes; these are not computed.
    """
    left, kernel = (_array(computation, a).shape for a in op.arguments[:2])
    out = op.type.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if not labels:
        return 0.0
    lhs, rhs, result = labels.groups()
    window = _window(op.rest)
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * kernel[rhs.index("i")]
    for axis in range(len(result) - 2):
        digit = str(axis)
        total *= _taps(
            left[lhs.index(digit)], kernel[rhs.index(digit)], out[result.index(digit)],
            *(window[key][axis] if key in window else default for key, default in _DEFAULTS),
        )  # fmt: skip
    return total


_DEFAULTS = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _window(rest: str) -> dict[str, list[int]]:
    """Per key a number for each axis; of the padding that in front."""
    found = re.search(r"\bwindow=\{([^}]*)\}", rest)
    made = {}
    for part in found.group(1).split() if found else ():
        key, _, value = part.partition("=")
        made[key] = [int(v.split("_")[0]) for v in value.split("x")]
    return made


@functools.cache
def _taps(
    size: int, taps: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of an output and a tap that meet an element along one axis."""
    starts, total = np.arange(out) * stride - pad, 0
    last = (size - 1) * lhs_dilate
    for tap in range(taps):
        read = starts + tap * rhs_dilate
        total += int(np.sum((read >= 0) & (read <= last) & (read % lhs_dilate == 0)))
    return total


def _passes(computation: Computation, op: Op) -> int:
    kinds = {_array(computation, a).dtype for a in op.arguments[:2]}
    found = re.search(r"operand_precision=\{(\w+),(\w+)\}", op.rest)
    if "f32" not in kinds or not found:
        return 1
    return max(_PASSES.get(precision, 1) for precision in found.groups())


def _bytes(module: Module, computation: Computation, op: Op) -> float:
    if op.opcode in _FREE:
        return 0.0
    if op.opcode == "fusion":
        return _fusion_bytes(module, computation, op)
    written = _placed(op)
    sizes = [_placed(computation.ops[a]) for a in op.arguments]
    if op.opcode in _READS_A_PART:
        return 2.0 * written + sum(sizes[1:])
    if op.opcode == "dynamic-update-slice":
        return 2.0 * sizes[1]
    if op.opcode == "scatter":
        return 3.0 * sizes[-1] + sum(sizes[1:-1])  # updates, and what they change twice
    if op.opcode == "copy-start":
        # From one memory to another, (target, source, context): what lies in this one.
        return float(sum(_placed_text(p.text) for p in op.type.parts[:2]))
    if op.opcode.endswith("-start") and op.type.nested:
        return float(written)  # the operands are part of what it returns
    return float(written + sum(sizes))


def _fusion_bytes(module: Module, computation: Computation, op: Op) -> float:
    """What a fusion reads, only the slices where it reads slices, and what it writes.

    A fusion that ends in ``dynamic-update-slice`` changes its operand in place.
    """
    inner = module.computations[op.called("calls")]
    roots, parts = [inner.root], [_placed(op)]
    if inner.root.opcode == "tuple":
        roots = [inner.ops[a] for a in inner.root.arguments]
        parts = [_placed_text(p.text) for p in op.type.parts]
    total, updated = 0.0, set()
    for root, size in zip(roots, parts, strict=True):
        change = _update(module, inner, root)
        if change:
            size = min(size, change[0])
            updated.add(change[1])
        total += size
    users = _users(inner)
    for parameter in inner.ops.values():
        if parameter.opcode != "parameter" or parameter.name in updated:
            continue
        size = _placed(computation.ops[op.arguments[int(parameter.literal)]])
        total += min(size, _read_of(module, inner, parameter, users))
    return total


def _users(computation: Computation) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = {}
    for op in computation.ops.values():
        for argument in set(op.arguments):
            found.setdefault(argument, []).append(op)
    return found


def _read_of(module: Module, inner: Computation, value: Op, users: dict[str, list[Op]]) -> float:
    """Bytes of a fused value that are read: its slices, if nothing reads it whole."""
    total = 0.0
    for user in users.get(value.name, ()):
        if user.opcode in _READS_A_PART and user.arguments[0] == value.name:
            total += sum(a.bytes for a in user.type.arrays)
        elif user.opcode in _RENAMES:
            total += _read_of(module, inner, user, users)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")]
            below = _users(nested)
            for parameter in _parameters(nested, user, value.name):
                total += _read_of(module, nested, parameter, below)
        else:
            return math.inf
    return total


def _parameters(nested: Computation, call: Op, argument: str) -> list[Op]:
    """Parameters of a fused computation that stand for an argument of its call."""
    places = {str(i) for i, a in enumerate(call.arguments) if a == argument}
    return [p for p in nested.ops.values() if p.opcode == "parameter" and p.literal in places]


def _update(module: Module, computation: Computation, op: Op) -> tuple[int, str] | None:
    """Bytes that a result changes of a parameter in place, and which; None if it is made anew."""
    op = _through(computation, op)
    if op.opcode == "dynamic-update-slice":
        target = _through(computation, computation.ops[op.arguments[0]]).name
        change = computation.ops[op.arguments[1]].type.arrays
        return sum(a.bytes for a in change), target
    if op.opcode == "fusion":
        nested = module.computations[op.called("calls")]
        found = _update(module, nested, nested.root)
        if found and nested.ops[found[1]].opcode == "parameter":
            argument = op.arguments[int(nested.ops[found[1]].literal)]
            return found[0], _through(computation, computation.ops[argument]).name
    return None


def _through(computation: Computation, op: Op) -> Op:
    """The operation behind those that only rename a value."""
    while op.opcode in _RENAMES and op.arguments:
        op = computation.ops[op.arguments[0]]
    return op


def _placed(op: Op) -> int:
    return _placed_text(op.type.text)


def _placed_text(text: str) -> int:
    """Bytes of the arrays of a type that lie in main memory, which layouts call space 0."""
    total = 0
    for dtype, shape, layout in _PLACED.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        if not space or space.group(1) == "0":
            total += Array(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n)).bytes
    return total
