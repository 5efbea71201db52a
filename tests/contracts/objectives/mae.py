import dataclasses

from dsad.objectives import mae
from tests.contracts.objectives.common import DECODER, ENCODER, SIDE, Case

CASE = Case(
    config={
        "encoder": ENCODER,
        "decoder": DECODER,
        "view": dataclasses.replace(mae.CROP, side=SIDE),
    },
    collectives=frozenset({"all-reduce"}),
    summed=0.01,
    own=("encode", "decode"),
)
