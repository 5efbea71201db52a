"""DenseCL: cells and whole images, each told from a queue of earlier keys."""

from dsad.objectives._dense import Negatives
from dsad.objectives.ds2 import Config, build
from tests.contracts.objectives import ds2
from tests.contracts.objectives.common import Case

__all__ = ["CASE", "Config", "build"]

CASE = Case(
    config={
        **ds2.CASE.config, "layers": ("layer2",), "hidden_norm": False, "threshold": 0.0,
        "top1": "cell", "top1_similarity": "cosine", "propagation": False,
        "negatives": Negatives(source="queue", queue=32, whole=0.5),
    },
    recorded=ds2.RecordedDS2,
    warm_up=4,
)  # fmt: skip
