import dataclasses

import jax.numpy as jnp

from dsad.objectives import ds2
from dsad.objectives._dense import positive_pairs
from tests.contracts.objectives.common import VIEW, Case


class RecordedDS2(ds2.DS2):
    """DS2 whose scalars also hold the pairs it chose, (2, b, S², S²) bool at each stage."""

    def _scale(self, queries, maps, keys, key_maps, boxes):
        total, monitors = super()._scale(queries, maps, keys, key_maps, boxes)
        pairs = [
            positive_pairs(
                maps[q::2], key_maps[k::2], boxes[q], boxes[k], threshold=self.cfg.threshold,
                top1=self.cfg.top1, similarity=self.cfg.top1_similarity,
            )[0]
            for q, k in ((0, 1), (1, 0))
        ]  # fmt: skip
        return total, {**monitors, "chosen": jnp.stack(pairs)}


CASE = Case(
    config={
        "hidden": 16,
        "out": 8,
        "view1": VIEW,
        "view2": dataclasses.replace(VIEW, blur_probability=0.1),
    },
    # Biases in front of a batch norm.
    no_gradient=r"projector_\w+/conv1/bias",
    # Two stages compile in half the time, and have more cells to choose among.
    quick={"layers": ("layer1", "layer2")},
    recorded=RecordedDS2,
    collectives=frozenset({"all-reduce"}),
    # Batch statistics.
    summed=0.05,
)
