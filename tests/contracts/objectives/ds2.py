import dataclasses

import jax.numpy as jnp

from dsad.objectives import ds2
from tests.contracts.objectives.common import VIEW, Case


class RecordedDS2(ds2.DS2):
    """DS2 whose scalars also hold the pairs it chose, (2, b, S², S²) bool at each stage."""

    def _scale(self, queries, maps, keys, key_maps, boxes, queue):
        total, monitors = super()._scale(queries, maps, keys, key_maps, boxes, queue)
        pairs = [
            self._pairs(maps[q::2], key_maps[k::2], boxes[q], boxes[k])[0]
            for q, k in ((0, 1), (1, 0))
        ]
        return total, {**monitors, "chosen": jnp.stack(pairs)}


CASE = Case(
    config={
        # Compiled in half the time of the published stages, with more cells to choose among.
        "layers": ("layer1", "layer2"),
        "hidden": 16,
        "out": 8,
        "view1": VIEW,
        "view2": dataclasses.replace(VIEW, blur_probability=0.1),
    },
    # Biases in front of a batch norm.
    no_gradient=r"projector_\w+/conv1/bias",
    recorded=RecordedDS2,
    collectives=frozenset({"all-reduce"}),
    # Batch statistics.
    summed=0.05,
)
