"""Where the arrays of a training state lie: rules by path, and an automatic rule for the rest."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.core.tree import check_pattern, check_used, first_match, flatten, path_name

#: A regular expression over paths, and one entry per axis of the arrays it matches.
Rule = tuple[str, str | tuple[str, ...]]

AXES = ("data", "fsdp")
WHOLE = "whole"


def parse_spec(spec: str | Sequence[str], key: str = "spec") -> PartitionSpec | None:
    """A spec as it is written in configs; None for "whole", which fits arrays of any rank.

    One entry per axis of the array, ``("-", "-", "fsdp")`` or in one text ``"-,-,fsdp"``: "-" keeps
    the axis in one piece, "data", "fsdp" or "data+fsdp" splits it over these axes of the mesh.
    Raises Refused, naming the ``key``, for anything else.
    """
    if spec == WHOLE or tuple(spec) == (WHOLE,):
        return None
    entries = [e.strip() for e in (spec.split(",") if isinstance(spec, str) else spec)]
    parts = [() if e == "-" else tuple(e.split("+")) for e in entries]
    used = [axis for part in parts for axis in part]
    if set(used) - set(AXES) or len(set(used)) < len(used) or not parts:
        raise Refused(
            key,
            f"one entry per axis of the array, '-' or each of {AXES} at most once (both on one "
            "axis as 'data+fsdp'), such as '-,-,fsdp', or 'whole'",
            spec,
        )
    return PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in parts))


def check_rules(rules: Sequence[Rule]) -> None:
    """Refuse rules whose pattern or spec cannot be read, naming the rule."""
    for i, (pattern, spec) in enumerate(rules):
        check_pattern(f"rules[{i}][0]", pattern)
        parse_spec(spec, f"rules[{i}][1]")


def automatic(shape: tuple[int, ...], mesh: Mesh, min_size: int) -> NamedSharding:
    """Split over "fsdp" along the largest axis that it divides, from ``min_size`` elements on."""
    parts = mesh.shape["fsdp"]
    fitting = [a for a in range(len(shape)) if shape[a] % parts == 0]
    if parts == 1 or math.prod(shape) < min_size or not fitting:
        return NamedSharding(mesh, PartitionSpec())
    axis = max(fitting, key=lambda a: shape[a])
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def state_shardings(
    params: Any, others: Any, mesh: Mesh, min_size: int, rules: Sequence[Rule] = ()
) -> tuple[Any, Any]:
    """Shardings of the parameters, and of the other arrays of a training state.

    The first rule whose pattern is found in a parameter's path wins over the automatic rule. An
    array among the others whose path ends in a parameter's path and that has its shape (moments
    of the optimiser, the teacher's copy) lies as the parameter does. What has no such parameter
    (a frozen encoder, a queue) follows the rules by its own path.

    Args:
      params: arrays or their shapes.
      others: likewise, a tree of groups such as ``{"extra": ..., "opt_state": ...}``.
      mesh: with the axes "data" and "fsdp".
      min_size: elements from which on the automatic rule splits.
      rules: pairs (pattern, spec), see ``parse_spec``.

    Raises:
      ConfigError: for a rule that matches nothing, or whose spec does not fit what it matches,
        naming the rule, the path, its shape and the axis.

    """
    check_rules(rules)
    patterns = [pattern for pattern, _ in rules]
    used: set[int] = set()

    def place(path: str, leaf: Any) -> NamedSharding:
        i = first_match(patterns, path)
        if i < 0:
            return automatic(np.shape(leaf), mesh, min_size)
        used.add(i)
        return _ruled(path, np.shape(leaf), parse_spec(rules[i][1]), mesh, f"[{i}] {patterns[i]!r}")

    made = jax.tree.map_with_path(lambda p, x: place(path_name(p), x), params)
    shapes = {path: np.shape(x) for path, x in flatten(params).items()}
    homes = flatten(made)

    def follow(keys: Any, leaf: Any) -> NamedSharding:
        path = path_name(keys)
        own = _parameter_of(path, shapes)
        return homes[own] if own and shapes[own] == np.shape(leaf) else place(path, leaf)

    rest = jax.tree.map_with_path(follow, others)
    check_used("config.mesh.rules", patterns, used, params)
    return made, rest


def _parameter_of(path: str, known: Mapping[str, Any]) -> str:
    """The longest parameter path that ``path`` ends in, "" if there is none."""
    parts = path.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((t for t in tails if t in known), "")


def _ruled(
    path: str, shape: tuple[int, ...], spec: PartitionSpec | None, mesh: Mesh, rule: str
) -> NamedSharding:
    if spec is None:
        return NamedSharding(mesh, PartitionSpec())
    if len(spec) != len(shape):
        raise ConfigError(
            f"config.mesh.rules{rule}: {path} has the shape {shape}, so the spec needs "
            f"{len(shape)} entries (or 'whole'); found {len(spec)}."
        )
    for axis, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[n] for n in names)
        if shape[axis] % parts:
            raise ConfigError(
                f"config.mesh.rules{rule}: {path} has the shape {shape}; its axis {axis} of "
                f"{shape[axis]} cannot be split over {'+'.join(names)} of {parts} devices."
            )
    return NamedSharding(mesh, spec)
