"""Trees of arrays by path."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import Refused
from dsad.core.errors import ConfigError


def path_name(path: tuple[Any, ...]) -> str:
    """``("encoder", "conv", "kernel")`` as ``"encoder/conv/kernel"``."""
    return "/".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path name, in tree order."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def mask_by_path(tree: Any, pattern: str) -> Any:
    """Tree of bools: True where the path name matches the regular expression (search)."""
    matcher = re.compile(pattern)
    return jax.tree.map_with_path(lambda p, _: bool(matcher.search(path_name(p))), tree)


def check_pattern(key: str, pattern: str) -> None:
    """Raise ``Refused`` for the key unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise Refused(key, f"a regular expression ({error})", pattern) from error


def first_match(patterns: Sequence[str], path: str) -> int:
    """Index of the first pattern that is found (search) in the path name, -1 for none."""
    return next((i for i, p in enumerate(patterns) if re.search(p, path)), -1)


def match_paths(key: str, patterns: Sequence[str], params: Any) -> Any:
    """Tree of ``first_match`` of every path; raises as ``check_used``."""
    matches = jax.tree.map_with_path(lambda p, _: first_match(patterns, path_name(p)), params)
    check_used(key, patterns, set(jax.tree.leaves(matches)), params)
    return matches


def check_used(key: str, patterns: Sequence[str], used: Collection[int], params: Any) -> None:
    """Raise ConfigError for patterns whose index is not used, with the largest parameters."""
    if unused := [i for i in range(len(patterns)) if i not in used]:
        sizes = {path: math.prod(np.shape(x)) for path, x in flatten(params).items()}
        raise ConfigError(
            "; ".join(f"{key}[{i}] {patterns[i]!r} matches no array" for i in unused)
            + " or an earlier one takes them all. The largest parameters: "
            + ", ".join(sorted(sizes, key=lambda p: -sizes[p])[:5])
            + "."
        )


def count(tree: Any) -> int:
    """Total number of elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, f32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def diff(expected: Any, found: Any) -> list[str]:
    """Lines naming every path whose presence, shape or dtype differs between two trees."""
    want, have = (
        {p: f"{tuple(x.shape)} {x.dtype}" for p, x in flatten(tree).items()}
        for tree in (expected, found)
    )
    lines = [f"{p}: missing, expected {want[p]}" for p in want if p not in have]
    lines += [f"{p}: unexpected, found {have[p]}" for p in have if p not in want]
    both = [p for p in want if want[p] != have.get(p, want[p])]
    return sorted([*lines, *(f"{p}: expected {want[p]}, found {have[p]}" for p in both)])


def named_arrays(tree: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A tree of dicts, tuples and lists as JSON can hold it, and its arrays by path.

    The outline has a name where the tree has an array; tuples become lists. Raises TypeError for
    any other container.
    """
    arrays: dict[str, np.ndarray] = {}

    def outlined(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {k: outlined(v, (*path, str(k))) for k, v in node.items()}
        if type(node) in (tuple, list):
            return [outlined(v, (*path, str(i))) for i, v in enumerate(node)]
        if not isinstance(node, np.ndarray):
            raise TypeError(f"{'/'.join(path)}: expected an array, found {type(node).__name__}.")
        name = "/".join(path)
        arrays[name] = np.ascontiguousarray(node).reshape(node.shape)
        return name

    return outlined(tree, ()), arrays


def rebuilt(outline: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The tree of an outline, with tuples for lists."""
    if isinstance(outline, dict):
        return {k: rebuilt(v, arrays) for k, v in outline.items()}
    if isinstance(outline, list):
        return tuple(rebuilt(v, arrays) for v in outline)
    return arrays[outline]
