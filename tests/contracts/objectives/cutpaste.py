import dataclasses

from dsad.objectives import cutpaste
from tests.contracts.objectives.common import SIDE, Case

CASE = Case(
    config={
        "hidden": (64, 32),
        "view": dataclasses.replace(cutpaste.CROP, side=SIDE, area=(0.5, 0.5)),
    },
    # Biases in front of a batch norm.
    no_gradient=r"head/conv[12]/bias",
    collectives=frozenset({"all-reduce"}),
    # Batch statistics.
    summed=0.05,
)
