from dsad.objectives._adpretrain import LookConfig
from tests.contracts.objectives.common import SIDE, Case

CASE = Case(
    config={
        "arch": "resnet18", "layers": ("layer1", "layer2"), "side": SIDE, "tokens": 4, "slots": 24,
        "heads": 4, "references": (1, 2), "variants": 2, "defect_pixels": 8.0,
        "look": LookConfig(grey_probability=0.0, blur_probability=0.0),
    },
    # A key's bias moves all of a query's scores alike.
    no_gradient="keys/bias$",
    fixed_views=(
        "counted", "angle_label/layer1", "angle_label/layer2", "norm_label/layer1",
        "norm_label/layer2", "valid", "references/layer1", "references/layer2",
    ),
)  # fmt: skip
