import dataclasses

from dsad.objectives import rotpred
from tests.contracts.objectives.common import SIDE, Case

CASE = Case(
    config={
        "last": "layer1", "cells": (24, 8), "hidden": (64, 32, 16),
        "view": dataclasses.replace(rotpred.TURNED, side=SIDE, area=(0.3, 1.0)),
    },
    # The batch norm behind the next linear map takes a constant away.
    no_gradient=r"cells/conv2/bias",
    collectives=frozenset({"all-reduce"}),
    # Batch statistics.
    summed=0.05,
    own=("logits",),
)  # fmt: skip
