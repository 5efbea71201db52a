"""Networks whose layers have a weight and a bias and no norm: MobileNetV2 and SqueezeNet.

Layers are called as in the tree, with dots: ``block0.dw.weight``, ``fire2.squeeze1x1.bias``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.models import names

#: What a complete SqueezeNet holds besides.
SQUEEZENET_IGNORED = {r"conv10\.": "classifier"}


def mobilenet(shapes: tuple[Any, Any]) -> list[names.Entry]:
    """The mapping of ``mobilenet.mobilenet_v2().shapes()``; for int8 files see ``dequantised``."""
    return [_entry(path) for path in flatten(shapes[0])]


def squeezenet(shapes: tuple[Any, Any]) -> list[names.Entry]:
    """The mapping of ``squeezenet.squeezenet1_1().shapes()``.

    Caffe's images are BGR and dsad's RGB: the same network, once the first kernel is turned.
    """
    return [_entry(p, turned=p == "conv1/kernel") for p in flatten(shapes[0])]


def _entry(path: str, *, turned: bool = False) -> names.Entry:
    module, _, leaf = path.replace("/", ".").rpartition(".")
    if leaf == "bias":
        return names.one(f"params/{path}", f"{module}.bias")
    layout = names.CONV
    if turned:
        layout = names.Layout(
            lambda x: names.CONV.read(x[:, ::-1]), lambda x: names.CONV.write(x)[:, ::-1]
        )
    return names.one(f"params/{path}", f"{module}.weight", layout)


def dequantised(state: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Kernels in f32: every ``X.weight_q`` (out, ..) int8 times ``X.scale`` (out,) is ``X.weight``.

    One rounding per weight. Tensors of other names pass unchanged, so a file that is f32 already
    does too. Raises ConfigError with a table of the layers whose int8 kernel and scale do not go
    together.
    """
    found, faults = {}, []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "scale" and f"{module}.weight_q" in state:
            continue
        if leaf != "weight_q":
            found[name] = tensor
            continue
        tensor, scale = np.asarray(tensor), np.asarray(state.get(f"{module}.scale"))
        if tensor.dtype != np.int8 or tensor.ndim < 1:
            faults.append((name, "int8 kernel", f"{tensor.shape} {tensor.dtype}"))
        elif scale.shape != tensor.shape[:1] or not names.is_float(scale.dtype):
            what_came = "missing" if scale.dtype == object else f"{scale.shape} {scale.dtype}"
            faults.append((f"{module}.scale", f"{tensor.shape[:1]}, one per output", what_came))
        elif f"{module}.weight" in state:
            faults.append((f"{module}.weight", "int8 or f32, not both", "both"))
        else:
            wide = scale.astype(np.float32).reshape(-1, *(1,) * (tensor.ndim - 1))
            found[f"{module}.weight"] = tensor.astype(np.float32) * wide
    if faults:
        raise ConfigError(f"weights do not fit {what}:\n{names.table(sorted(faults))}")
    return found
