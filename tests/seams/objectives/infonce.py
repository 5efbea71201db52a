"""DS2 with negatives: a cell is told from those of all other images of the global batch."""

from dsad.objectives._dense import Negatives
from dsad.objectives.ds2 import Config, build
from tests.contracts.objectives import ds2
from tests.contracts.objectives.common import Case

__all__ = ["CASE", "Config", "build"]

CASE = Case(
    config={
        **ds2.CASE.config, "threshold": 0.5, "top1": "off", "propagation": False,
        "negatives": Negatives(source="batch"),
    },
    no_gradient=ds2.CASE.no_gradient,
    recorded=ds2.RecordedDS2,
)  # fmt: skip
