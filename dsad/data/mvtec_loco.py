"""MVTec LOCO AD: structural and logical anomalies of five assemblies, with validation images.

``<category>/{train,validation}/good``, ``<category>/test/{good,logical_anomalies,
structural_anomalies}/NNN.png`` and ``<category>/ground_truth/<kind>/NNN/000.png, 001.png, ...``:
one mask per defect, whose pixels have the defect's value of ``<category>/defects_config.json``.
All masks of an image are joined; reading the first alone loses defects.
"""

import pathlib

from dsad.data import files, published, saturation
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import CATEGORY, Layout, Pattern
from dsad.data.saturation import Saturation

_KINDS = ("logical_anomalies", "structural_anomalies")
_KIND = "|".join(_KINDS)
ABOUT = About(
    title="MVTec LOCO AD", licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., Beyond Dents and Scratches, IJCV 2022",
    address="https://www.mvtec.com/company/research/datasets/mvtec-loco",
    masks="a defect's value of defects_config.json; every value but 0 is a defect",
    columns=("train", "validation", "good", *_KINDS),
    counts={
        "breakfast_box": (351, 62, 102, 83, 90), "juice_bottle": (335, 54, 94, 142, 94),
        "pushpins": (372, 69, 138, 91, 81), "screw_bag": (360, 60, 122, 137, 82),
        "splicing_connectors": (360, 60, 119, 108, 85),
    },
    also={"splicing_connectors": (354, 59, 119, 108, 85)},
    protocols={"": "official"},
    remarks=(
        "The paper prints 354 and 59 normal images of splicing_connectors, the archive has 360 and "
        "60.",
        "The names of the keys in defects_config.json were not checked on the real files.",
        "Published numbers are means of one run on logical and one on structural anomalies.",
    ),
    marks=("*/test/logical_anomalies", "*/ground_truth/logical_anomalies"),
)  # fmt: skip
LAYOUT = Layout(
    images=(
        Pattern(rf"{CATEGORY}/(?P<split>train|validation)/(?P<kind>good)", r"(?P<stem>\d+)\.png"),
        Pattern(rf"{CATEGORY}/(?P<split>test)/(?P<kind>good|{_KIND})", r"(?P<stem>\d+)\.png"),
    ),
    masks=(
        Pattern(
            rf"{CATEGORY}/ground_truth/(?P<kind>good|{_KIND})/(?P<stem>\d+)", r"(?P<part>\d+)\.png"
        ),
    ),
    aside=(rf"{CATEGORY}/{saturation.FILE}",),
    expected="<category>/{train,validation}/good and <category>/test/<kind>",
    mask="{category}/ground_truth/{kind}/{stem}/000.png",
    splits=("train", "validation", "test"),
)


def saturations(root: str | pathlib.Path, category: str) -> dict[int, Saturation]:
    """When the defects of a category are found completely, by the value of their pixels.

    Raises FaultError (K4) with all faults of the list.
    """
    return saturation.saturations(pathlib.Path(root), category)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return saturation.listed(published.index(config, LAYOUT, ABOUT), needed=True)
