"""FLOPs that a model needs, counted in its traced program: matrix products and convolutions.

These are *model* FLOPs, the numerator of model FLOPs utilisation: what the mathematics asks for,
the same on every device count and in every compute type. A compiled program does more where
activations are computed twice to save memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from dsad.core.types import KnowsFlops, Objective

#: Names that ``jax.checkpoint`` has had as a primitive.
_REMAT = ("checkpoint", "remat", "remat2")


def model_flops(function: Callable[..., Any], *abstract: Any, live: bool = False) -> float:
    """FLOPs of the matrix products and convolutions of ``function(*abstract)``.

    A multiply-add counts 2. The arguments may be arrays or ``jax.ShapeDtypeStruct``; nothing is
    computed. A ``scan`` counts its body times its length, a ``while`` loop its body once because
    its length is not known, a ``cond`` its most expensive branch. Convolutions count the taps on
    their padding, as is usual, but not the holes of a dilated input, so that the gradient of a
    strided one costs twice the forward pass. Of a gradient of something under ``jax.checkpoint``
    the repeated forward pass counts as well; see ``without_remat``. With ``live`` only those count
    that a result needs, as compilers drop the others.
    """
    jaxpr = jax.make_jaxpr(function)(*abstract).jaxpr
    return float(sum(map(_of_equation, _live(jaxpr)))) if live else _count(jaxpr)


def training_flops_per_image(objective: Objective, params: Any, extra: Any, batch: Any) -> float:
    """Model FLOPs of a training step per image of the batch, forward and backward.

    The objective's own ``flops_per_image`` where it states one, else the count of the gradient of
    its loss, without the making of the views and without any recomputation. All arguments may be
    ``jax.ShapeDtypeStruct``.
    """
    if isinstance(objective, KnowsFlops):
        return float(objective.flops_per_image)
    views = jax.eval_shape(lambda b: objective.views(b, jax.random.key(0)), batch)

    def loss(params: Any, extra: Any, views: Any) -> jax.Array:
        key = jax.random.key(0)
        return objective.loss(params, extra, views, key=key, step=jnp.int32(0))[0]

    gradient = jax.value_and_grad(without_remat(loss, params, extra, views))
    return model_flops(gradient, params, extra, views) / batch["index"].shape[0]


def without_remat(function: Callable[..., Any], *abstract: Any) -> Callable[..., Any]:
    """``function`` with every ``jax.checkpoint`` taken away, for these argument shapes.

    Looks into ``jit`` and ``scan``; the bodies of custom derivatives stay as they are.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*abstract)
    tree = jax.tree.structure(out)

    def plain(*args: Any) -> Any:
        found = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(tree, found)

    return plain


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, args, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, jex.Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        if equation.primitive.name in _REMAT:
            results = _evaluate(equation.params["jaxpr"], (), *inputs)
        else:
            params = equation.primitive.get_bind_params(_stripped(equation.params))
            results = equation.primitive.bind(*inputs, **params)
        results = results if equation.primitive.multiple_results else [results]
        known |= zip(equation.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _stripped(params: dict[str, Any]) -> dict[str, Any]:
    body = params.get("jaxpr")
    if not isinstance(body, jex.ClosedJaxpr) or not _has_remat(body.jaxpr):
        return params
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=v.weak_type) for v in body.in_avals]
    plain = jax.make_jaxpr(lambda *args: _evaluate(body.jaxpr, body.consts, *args))(*shapes)
    return {**params, "jaxpr": plain}


def _has_remat(jaxpr: Any) -> bool:
    return any(
        e.primitive.name in _REMAT or any(map(_has_remat, _bodies(e.params))) for e in jaxpr.eqns
    )


def _live(jaxpr: Any) -> list[Any]:
    """The equations that its results need, last first; inside of them nothing is looked for."""
    used, found = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(v) in used for v in equation.outvars):
            used |= set(map(id, equation.invars))
            found.append(equation)
    return found


def _count(jaxpr: Any) -> float:
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "conv_general_dilated":
        return _convolution(equation)
    bodies = [_count(body) for body in _bodies(params)]
    if name == "cond":
        return max(bodies)
    times = params["length"] if name == "scan" else 1
    # Inside a shard_map the shapes are those of one device.
    if name == "shard_map":
        times = math.prod(params["mesh"].shape.values())
    return times * sum(bodies)


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def _convolution(equation: Any) -> float:
    """2 · outputs · taps · input channels of a group, without taps on the holes of the input."""
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    out = equation.outvars[0].aval.shape
    total = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis in range(len(numbers.out_spec) - 2):
        places = np.arange(out[numbers.out_spec[axis + 2]]) * params["window_strides"][axis]
        taps = np.arange(kernel[numbers.rhs_spec[axis + 2]]) * params["rhs_dilation"][axis]
        read = places[:, None] + taps[None, :] - params["padding"][axis][0]
        total *= np.count_nonzero(read % params["lhs_dilation"][axis] == 0)
    return total
