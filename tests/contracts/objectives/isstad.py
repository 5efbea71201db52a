from dsad.augment.isstad_corruption import CorruptionConfig
from tests.contracts.objectives.common import DECODER, ENCODER, SIDE, Case

CASE = Case(
    config={
        "encoder": ENCODER,
        "decoder": DECODER,
        "side": SIDE,
        "permute": "shuffle",
        "corruption": CorruptionConfig(most_draw=9),
    },
    fixed_views=("clean",),
    collectives=frozenset({"all-reduce"}),
    # The one classifier is summed for each of the two blocks that it stands behind.
    summed=0.12,
    own=("encode",),
)
