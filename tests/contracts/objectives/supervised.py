import dataclasses

from dsad.objectives._spd import SPDConfig
from tests.contracts.objectives.common import VIEW, Case
from tests.contracts.objectives.simsiam import ENCODER, TRIPLET

CASE = Case(
    config={**ENCODER, "view": VIEW},
    fixed_views=("label",),
    collectives=frozenset({"all-reduce"}),
    summed=0.05,
)
SPD = dataclasses.replace(
    CASE,
    config={
        **CASE.config, "spd": SPDConfig(weight=0.5, form="classifier", triplet=TRIPLET),
    },
    fixed_views=("label", "spd/anchor"),
    summed=1.05,
)  # fmt: skip
