"""Networks whose layers have a weight and a bias and no norm: MobileNetV2 and SqueezeNet.

Layers are called as in the tree, with dots: ``block0.dw.weight``, ``fire2.squeeze1x1.bias``.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.models import mobilenet, squeezenet
from dsad.models.family import Family, Loaded, Preprocessing
from dsad.models.functional import Functional
from dsad.models.weights import names


class _Plain(Family):
    """One architecture without options, whose trees hold kernels and biases in ``params`` only."""

    #: What a file may hold besides, and the kernel whose input is BGR in it.
    ignored: Mapping[str, str] = {}
    turned = ""

    def load(self, arch: str, state: Mapping[str, Any]) -> Loaded:
        shapes, ignored = self.network(arch).shapes(), self.ignored
        trees = names.to_trees(self._entries(arch), state, shapes, ignored=ignored, what=arch)
        return Loaded(*trees, {}, names.left_out(state, ignored))

    def _entries(self, arch: str) -> list[names.Entry]:
        paths = flatten(self.network(arch).shapes()[0])
        return [_entry(path, turned=path == self.turned) for path in paths]

    @property
    def formats(self) -> tuple[str, ...]:
        return ("plain",)  # the names described above, in f32

    def save(
        self, arch: str, params: Any, extra: Any, form: str, **options: Any
    ) -> dict[str, np.ndarray]:
        return names.to_state(self._entries(arch), params, extra)


class MobileNet(_Plain):
    """``mobilenet_v2`` with its classifier; files are int8 with scales, or f32."""

    @property
    def archs(self) -> Collection[str]:
        return ("mobilenet_v2",)

    def network(self, arch: str, **options: Any) -> Functional:
        return mobilenet.mobilenet_v2()

    def strides(self, arch: str, **options: Any) -> dict[str, int]:
        return dict(mobilenet.STRIDES)

    def preprocessing(self, arch: str) -> Preprocessing:
        return Preprocessing(mean=mobilenet.MEAN, std=mobilenet.STD)

    def load(self, arch: str, state: Mapping[str, Any]) -> Loaded:
        return super().load(arch, dequantised(state, arch))


class SqueezeNet(_Plain):
    """``squeezenet1_1`` under Caffe's names, whose input is BGR.

    dsad's images are RGB: the same network, once the first kernel is turned.
    """

    ignored: Mapping[str, str] = {r"conv10\.": "classifier"}
    turned = "conv1/kernel"

    @property
    def archs(self) -> Collection[str]:
        return ("squeezenet1_1",)

    def network(self, arch: str, **options: Any) -> Functional:
        return squeezenet.squeezenet1_1()

    def strides(self, arch: str, **options: Any) -> dict[str, int]:
        return dict(squeezenet.STRIDES)

    def preprocessing(self, arch: str) -> Preprocessing:
        return Preprocessing(
            mean=squeezenet.MEAN, std=squeezenet.STD, image_size=227, crop=227 / 256
        )


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
