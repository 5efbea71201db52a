import dataclasses

from dsad.objectives._spd import SPDConfig
from tests.contracts.objectives.common import VIEW, Case
from tests.contracts.objectives.simsiam import ENCODER, TRIPLET

CASE = Case(
    config={**ENCODER, "hidden": (32,), "out": 16, "view1": VIEW, "view2": VIEW},
    collectives=frozenset({"all-reduce", "all-gather"}),
    # Batch statistics.
    summed=0.05,
)
SPD = dataclasses.replace(
    CASE, config={**CASE.config, "spd": SPDConfig(weight=0.5, triplet=TRIPLET)},
    fixed_views=("spd/anchor",),
    # Two passes through the encoder, of which each sums its gradients.
    summed=1.05,
)  # fmt: skip
