"""MVTec 3D-AD, its colour images: ten objects, with validation images.

``<category>/{train,validation}/good/rgb/NNN.png``, ``<category>/test/<kind>/rgb/NNN.png`` and
``<category>/test/<kind>/gt/NNN.png``, which normal images have as well, all zero. The depths in
``xyz`` are not read.
"""

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import CATEGORY, Layout, Pattern

ABOUT = About(
    title="MVTec 3D-AD", licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., The MVTec 3D-AD Dataset, VISAPP 2022",
    address="https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    masks="every value but 0 is a defect", columns=("train", "validation", "good", "bad"),
    counts={
        "bagel": (244, 22, 22, 88), "cable_gland": (223, 23, 21, 87), "carrot": (286, 29, 27, 132),
        "cookie": (210, 22, 28, 103), "dowel": (288, 34, 26, 104), "foam": (236, 27, 20, 80),
        "peach": (361, 42, 26, 106), "potato": (300, 33, 22, 92), "rope": (298, 33, 32, 69),
        "tire": (210, 29, 25, 87),
    },
    protocols={"": "official, colour images alone"},
    remarks=("Numbers of methods that see the depths are not comparable.",),
    marks=("*/train/good/rgb",),
)  # fmt: skip


def layout(stem: str) -> Layout:
    """The layout with names of images by a regular expression."""
    image, split = rf"(?P<stem>{stem})\.png", "(?P<split>train|validation|test)"
    return Layout(
        images=(
            Pattern(rf"{CATEGORY}/(?P<split>train|validation)/(?P<kind>good)/rgb", image),
            Pattern(rf"{CATEGORY}/(?P<split>test)/(?P<kind>[^/]+)/rgb", image),
        ),
        masks=(Pattern(rf"{CATEGORY}/{split}/(?P<kind>[^/]+)/gt", image),),
        aside=(rf"{CATEGORY}/{split}/[^/]+/xyz/[^/]+\.tiff?", rf"{CATEGORY}/calibration/.*"),
        expected="<category>/{train,validation}/good/rgb and <category>/test/<kind>/rgb",
        mask="{category}/test/{kind}/gt/{stem}.png",
        splits=("train", "validation", "test"),
    )


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, layout(r"\d+"), ABOUT)
