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
import jax.numpy as jnp
import numpy as np

from dsad.core.errors import ConfigError
from dsad.models import _names_resnet, names, resnet


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

    Raises ConfigError with a table of all tensors that are missing, unused or misshapen.
    """
    stages = resnet_stages(state)
    shapes = resnet.resnet(name, stages=stages).shapes()
    params, extra = names.to_trees(
        _names_resnet.entries(shapes, folded="bn1.weight" not in state), state, shapes,
        ignored=_names_resnet.IGNORED, what=name,
    )  # fmt: skip
    return *jax.tree.map(jnp.asarray, (params, extra)), stages
