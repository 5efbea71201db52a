"""NNX modules as pure functions on nested dicts: the only adapter to Flax.

Parameters and extra (batch statistics) leave this file as plain nested dicts of arrays, so
checkpoints and objectives owe nothing to Flax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsad.models.draws import Draws, size_of


class Functional:
    """Pure ``init`` and ``apply`` of the module that ``make(rngs)`` builds."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graphdef, self._params, self._extra = nnx.split(abstract, nnx.Param, ...)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh (params, extra) as nested dicts; traceable by ``eval_shape`` and ``jit``."""
        _, params, extra = nnx.split(self._make(nnx.Rngs(key)), nnx.Param, ...)
        return _strong(nnx.to_pure_dict(params)), _strong(nnx.to_pure_dict(extra))

    def shapes(self) -> tuple[Any, Any]:
        """(params, extra) as nested dicts of ``ShapeDtypeStruct``."""
        return nnx.to_pure_dict(self._params), nnx.to_pure_dict(self._extra)

    def apply(
        self, params: Any, extra: Any, *args: Any, method: str = "__call__", **kwargs: Any
    ) -> tuple[Any, Any]:
        """Call the module, or another ``method`` of it; returns (output, new extra)."""
        param_state, extra_state = _copy(self._params), _copy(self._extra)
        nnx.replace_by_pure_dict(param_state, params)
        nnx.replace_by_pure_dict(extra_state, extra)
        # Without a copy, batch norm writes into variables of an outer trace under grad.
        module = nnx.merge(self._graphdef, param_state, extra_state, copy=True)
        out = getattr(module, method)(*args, **kwargs)
        _, _, new_extra = nnx.split(module, nnx.Param, ...)
        return out, nnx.to_pure_dict(new_extra)


def drawn(make: Callable[[Draws, nnx.Rngs], nnx.Module]) -> Functional:
    """The module that ``make`` builds from one draw of as many normal numbers as it takes."""
    total = size_of(lambda draws: make(draws, nnx.Rngs(0)))
    return Functional(
        lambda rngs: make(Draws(jax.random.normal(rngs.params(), (total,), jnp.float32)), rngs)
    )


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x, tree)


def _strong(tree: Any) -> Any:
    """Weakly typed leaves retrace the step when they come back strongly typed."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.dtype(x.dtype)), tree)
