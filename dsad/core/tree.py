"""Trees of arrays by path."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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


def count(tree: Any) -> int:
    """Total number of elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, f32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def diff(expected: Any, found: Any, describe: Callable[[Any], str] | None = None) -> list[str]:
    """Lines naming every path whose presence, shape or dtype differs between two trees."""
    describe = describe or (lambda x: f"{tuple(x.shape)} {x.dtype}")
    want, have = flatten(expected), flatten(found)
    lines = [f"{p}: missing, expected {describe(want[p])}" for p in want if p not in have]
    lines += [f"{p}: unexpected, found {describe(have[p])}" for p in have if p not in want]
    for p in want.keys() & have.keys():
        if describe(want[p]) != describe(have[p]):
            lines.append(f"{p}: expected {describe(want[p])}, found {describe(have[p])}")
    return sorted(lines)
