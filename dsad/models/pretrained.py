"""Published weights to dsad's trees, strictly: every tensor is used or the import fails.

ResNet weights come under torchvision's names, either complete (with batch-norm tensors) or
*folded*, where each batch norm has been multiplied into its convolution, which then has a bias. A
folded network is imported as norm mean 0, variance 1 − eps, scale 1 and shift = bias, so that the
same network computes it exactly.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.models import resnet
from dsad.models.norm import EPSILON

_IGNORED = re.compile(r"^(fc\.|classifier\.)|num_batches_tracked$")


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by name from an ``.npz`` file; nothing is ever unpickled."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file.")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"weights {path}: not a readable npz of plain arrays: {error}."
            ) from error
    raise ConfigError(f"weights {path}: expected a .npz file, found {path.suffix or 'no suffix'}.")


def resnet_stages(state: Mapping[str, Any]) -> int:
    """How many stages (1 to 4) the tensors cover, from their names."""
    stages = {int(m[1]) for name in state if (m := re.match(r"layer(\d)\.", name))}
    if not stages or stages != set(range(1, max(stages) + 1)) or "conv1.weight" not in state:
        raise ConfigError(
            "weights: expected torchvision ResNet names (conv1.weight, layer1.0.conv1.weight, ..); "
            f"found {', '.join(sorted(state)[:4])}, ... ({len(state)} tensors)."
        )
    return max(stages)


def resnet_trees(name: str, state: Mapping[str, Any]) -> tuple[Any, Any, int]:
    """(params, extra, stages) of the ResNet ``name`` from a state dict under torchvision's names.

    Raises ConfigError with one line per missing, unused or wrongly shaped tensor.
    """
    stages = resnet_stages(state)
    folded = "bn1.weight" not in state
    shapes = resnet.resnet(name, stages=stages).shapes()
    trees, faults, used = [], [], set()
    for shape_tree, kind in zip(shapes, ("params", "extra"), strict=True):
        leaves = {}
        for path, spec in flatten(shape_tree).items():
            source = _source_name(path)
            if folded and "norm" in path:
                value = _folded_norm(path, spec, state, used)
            else:
                value = state.get(source)
                used.add(source)
                if value is not None and path.endswith("kernel") and np.ndim(value) == 4:
                    value = np.transpose(np.asarray(value), (2, 3, 1, 0))
            found = None if value is None else tuple(np.shape(value))
            if found != tuple(spec.shape):
                faults.append(f"{source}: {kind} expects {tuple(spec.shape)}, found {found}")
                continue
            leaves[path] = np.asarray(value, np.float32)
        trees.append(_nest(leaves))
    unused = [n for n in state if n not in used and not _IGNORED.search(n)]
    faults += [f"{n}: {tuple(np.shape(state[n]))} is not a tensor of {name}" for n in unused]
    if faults:
        raise ConfigError(f"weights do not fit {name}:\n  " + "\n  ".join(sorted(faults)))
    return trees[0], trees[1], stages


def _source_name(path: str) -> str:
    """``layer1_block0/down_norm/scale`` as ``layer1.0.downsample.1.weight``."""
    *modules, leaf = path.split("/")
    module = re.sub(r"_block(\d+)", r".\1", ".".join(modules))
    module = module.replace("down_conv", "downsample.0").replace("down_norm", "downsample.1")
    module = module.replace("norm", "bn")
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return f"{module}.{names.get(leaf, leaf)}"


def _folded_norm(path: str, spec: Any, state: Mapping[str, Any], used: set[str]) -> Any:
    leaf = path.rsplit("/", 1)[1]
    if leaf == "bias":
        source = _source_name(path).replace("downsample.1", "downsample.0").replace("bn", "conv")
        used.add(source)
        return state.get(source)
    constant = {"scale": 1.0, "mean": 0.0, "var": 1.0 - EPSILON}[leaf]
    return np.full(spec.shape, constant, np.float32)


def _nest(leaves: Mapping[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.numpy.asarray(value)
    return tree
