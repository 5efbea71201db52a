import dataclasses

from dsad.augment.smooth_blend import SmoothBlendConfig
from dsad.augment.triplets import TripletConfig
from dsad.objectives._spd import SPDConfig
from tests.contracts.objectives.common import VIEW, Case

#: A piece that can be seen in views of 32 pixels.
BLEND = SmoothBlendConfig(area=(0.05, 0.1), sigma_side=0, sigma=1.0)
TRIPLET = TripletConfig(view=dataclasses.replace(VIEW, area=(0.9, 1.0)), blend=BLEND)
ENCODER = {"arch": "resnet18", "last": "layer1"}

CASE = Case(
    config={
        **ENCODER, "hidden": (32,), "out": 16, "predictor": 8, "view1": VIEW, "view2": VIEW,
    },
    collectives=frozenset({"all-reduce"}),
    # Batch statistics.
    summed=0.05,
)  # fmt: skip
SPD = dataclasses.replace(
    CASE, config={**CASE.config, "spd": SPDConfig(weight=0.5, triplet=TRIPLET)},
    fixed_views=("spd/anchor",),
    # The gradients of host and term are summed by themselves.
    summed=1.05,
)  # fmt: skip
