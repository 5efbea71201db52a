"""How often a loop of an HLO module runs; see ``hlo``."""

import math
import re

from dsad.plan._hlo_text import Computation, Module, Op

#: A value of a computation as (entry of its parameter or None, constant that is added to it).
Linear = tuple[int | None, int]

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
    """Passes of a while loop, or None if they depend on data.

    The compiler may have written them down; else the condition must compare a counter with a
    constant, both of them constants before the loop or in the condition, and the counter must
    change by a constant in the body.
    """
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(known.group(1))
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    left, right, direction = compared

    def before(value: Linear) -> int | None:
        """A value of the condition on the first test."""
        if value[0] is None:
            return value[1]
        start = _entry(module, computation, loop.arguments[0], value[0])
        return None if start is None or start[0] is not None else start[1] + value[1]

    def change(value: Linear) -> int | None:
        """What one pass adds to it."""
        if value[0] is None:
            return 0
        after = _entry(module, body, body.root.name, value[0])
        return None if after is None or after[0] != value[0] else after[1]

    first, bound, step, drift = before(left), before(right), change(left), change(right)
    if drift and step == 0:
        first, bound, step, drift = bound, first, drift, 0
        direction = _SWAPPED[direction]
    if first is None or bound is None or not step or drift != 0:
        return None
    return _passes(first, bound, step, direction)


def _passes(first: int, bound: int, step: int, direction: str) -> int | None:
    """Values first, first + step, ... for which the comparison with the bound holds."""
    distance = (bound - first) / step
    if direction == "NE":
        return int(distance) if distance >= 0 and distance == int(distance) else None
    if (step > 0) != direction.startswith("L"):
        return None  # away from the bound: none or for ever
    passes = math.floor(distance) + 1 if direction.endswith("E") else math.ceil(distance)
    return max(passes, 0)


def _comparison(module: Module, condition: Computation) -> tuple[Linear, Linear, str] | None:
    """Both sides of the comparison that ends the loop, maybe inside a fusion."""
    root, where, env = condition.root, condition, None
    if root.opcode == "fusion":
        env = [_linear(module, condition, a, None) for a in root.arguments]
        where = module.computations[root.called("calls")]
        root = where.root
    if root.opcode != "compare" or root.attribute("direction") not in _SWAPPED:
        return None
    left, right = (_linear(module, where, a, env) for a in root.arguments)
    if left is None or right is None:
        return None
    return left, right, root.attribute("direction")


def _entry(module: Module, where: Computation, name: str, index: int) -> Linear | None:
    """An entry of a tuple."""
    op = where.ops[name]
    if op.opcode == "tuple":
        return _linear(module, where, op.arguments[index], None)
    if op.opcode == "parameter":
        return index, 0
    if op.opcode in _SAME:
        return _entry(module, where, op.arguments[0], index)
    return None


def _linear(
    module: Module, where: Computation, name: str, env: list[Linear | None] | None
) -> Linear | None:
    """A scalar as an entry of the computation's parameter plus a constant, if it is one.

    Inside a fusion ``env`` holds the values of its parameters.
    """
    op = where.ops[name]
    if op.opcode == "constant":
        return (None, int(op.literal)) if re.fullmatch(r"-?\d+", op.literal) else None
    if op.opcode == "parameter":
        return env[int(op.literal)] if env is not None else None
    if op.opcode == "get-tuple-element":
        source = where.ops[op.arguments[0]]
        if source.opcode in ("parameter", "tuple"):
            return _entry(module, where, source.name, int(op.attribute("index")))
        return None
    if op.opcode in _SAME:
        return _linear(module, where, op.arguments[0], env)
    if op.opcode == "fusion":
        inner = module.computations[op.called("calls")]
        values = [_linear(module, where, a, env) for a in op.arguments]
        return _linear(module, inner, inner.root.name, values)
    if op.opcode in ("add", "subtract"):
        sides = [_linear(module, where, a, env) for a in op.arguments]
        return _sum(sides[0], sides[1], -1 if op.opcode == "subtract" else 1)
    return None


def _sum(left: Linear | None, right: Linear | None, sign: int) -> Linear | None:
    if left is None or right is None:
        return None
    if right[0] is not None and (left[0] is not None or sign < 0):
        return None
    return (left[0] if left[0] is not None else right[0]), left[1] + sign * right[1]
