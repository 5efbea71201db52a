"""BTAD (beanTech): three products, with masks that have another suffix in each.

``<01|02|03>/train/ok``, ``<01|02|03>/test/{ok,ko}`` and ``<01|02|03>/ground_truth/ko``: images are
bmp or png, and masks png or bmp, whatever their images are.
"""

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import Layout, Pattern

ABOUT = About(
    title="BTAD", licence="CC BY-NC-SA 4.0",
    citation="Mishra et al., VT-ADL, ISIE 2021", masks="every value but 0 is a defect",
    columns=("train", "good", "bad"),
    counts={"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
    protocols={"": "official"},
    remarks=(
        "A converted copy has bmp and png of one stem side by side: an error, remove one.",
        "Which values the masks hold was not checked on the real files.",
    ),
    marks=("0[1-3]/train/ok", "0[1-3]/test/ko"),
)  # fmt: skip
_NAME = r"(?P<stem>[^/]+)\.(bmp|png)"
LAYOUT = Layout(
    images=(
        Pattern(r"(?P<category>\d\d)/(?P<split>train)/(?P<kind>ok)", _NAME),
        Pattern(r"(?P<category>\d\d)/(?P<split>test)/(?P<kind>ok|ko)", _NAME),
    ),
    masks=(Pattern(r"(?P<category>\d\d)/ground_truth/(?P<kind>ok|ko)", _NAME),),
    expected="<01|02|03>/train/ok and <01|02|03>/test/{ok,ko}",
    mask="{category}/ground_truth/{kind}/{stem}.png or .bmp",
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, LAYOUT, ABOUT)
