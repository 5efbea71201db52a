"""MPDD: painted metal parts in the layout of MVTec AD."""

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.decode import MaskRule
from dsad.data.published import CATEGORY, Layout, Pattern

ABOUT = About(
    title="MPDD", licence="CC BY-NC-SA 4.0",
    citation="Jezek et al., Deep learning-based defect detection of metal parts, ICUMT 2021",
    masks="0 and 255", columns=("train", "good", "bad"),
    counts={
        "bracket_black": (289, 32, 47), "bracket_brown": (185, 26, 51),
        "bracket_white": (110, 30, 30), "connector": (128, 30, 14), "metal_plate": (54, 26, 71),
        "tubes": (122, 32, 69),
    },
    protocols={"": "official"},
    marks=("bracket_*/train/good", "metal_plate/train/good"),
)  # fmt: skip
_NAME = r"(?P<stem>[^/]+)"
LAYOUT = Layout(
    images=(
        Pattern(rf"{CATEGORY}/(?P<split>train)/(?P<kind>good)", rf"{_NAME}\.png"),
        Pattern(rf"{CATEGORY}/(?P<split>test)/(?P<kind>[^/]+)", rf"{_NAME}\.png"),
    ),
    masks=(Pattern(rf"{CATEGORY}/ground_truth/(?P<kind>[^/]+)", rf"{_NAME}_mask\.png"),),
    expected="<category>/train/good and <category>/test/<kind>",
    mask="{category}/ground_truth/{kind}/{stem}_mask.png",
    rule=MaskRule(),
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, LAYOUT, ABOUT)
