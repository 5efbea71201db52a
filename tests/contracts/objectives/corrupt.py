from dsad.augment.corruptions import ShapesConfig
from dsad.objectives._segmentation import TermConfig
from tests.contracts.objectives.common import CROP, Case

SHAPES = ShapesConfig(
    probability=0.9, rectangle=(4.0, 12.0), scar_width=(2.0, 3.0), scar_length=(8.0, 20.0),
    blob=(3.0, 6.0), sources=("own", "other", "noise"), colour=0.1,
)  # fmt: skip
SETTINGS = {"layers": ("layer1", "layer2"), "width": 8, "view": CROP, "shapes": SHAPES}
#: The term of a residual host.
TERM = TermConfig(weight=0.5, **SETTINGS)

CASE = Case(
    config=SETTINGS,
    collectives=frozenset({"all-reduce", "collective-permute"}),
    summed=0.1,
)
