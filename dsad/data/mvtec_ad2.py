"""MVTec AD 2: eight objects under several lights, with validation images and two private tests.

``<object>/{train,validation}/good/NNN_regular.png``, ``<object>/test_public/{good,bad}/
NNN_<light>.png`` with ``test_public/ground_truth/bad/NNN_<light>_mask.png``. ``Record.camera`` is
the light, ``Record.group`` the scene, which stays together. ``test_private`` and
``test_private_mixed`` hold images without labels, which the owner's server scores: they are the
splits "private" and "private_mixed", where they are there. They take part in nothing that is
measured.
"""

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.decode import MaskRule
from dsad.data.published import CATEGORY, Layout, Pattern

#: Images of an object: train, validation, public good and bad ones, and those of a private set.
_COUNTS = {
    "can": (412, 46, 72, 90, 321), "fabric": (387, 43, 66, 90, 314),
    "fruit_jelly": (263, 37, 20, 60, 255), "rice": (313, 35, 42, 90, 277),
    "sheet_metal": (137, 19, 24, 90, 142), "vial": (291, 41, 35, 105, 276),
    "wallplugs": (293, 33, 60, 90, 232), "walnuts": (432, 48, 60, 90, 228),
}  # fmt: skip
ABOUT = About(
    title="MVTec AD 2", licence="CC BY-NC-SA 4.0",
    citation="Heckler-Kram et al., The MVTec AD 2 Dataset, arXiv 2503.21622, 2025",
    address="https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
    masks="0 and 255",
    columns=("train", "validation", "good", "bad", "private", "private_mixed"),
    counts={name: (*row, row[-1]) for name, row in _COUNTS.items()},
    also={name: (*row[:-1], 0, 0) for name, row in _COUNTS.items()},
    protocols={"": "official, public test"},
    remarks=(
        "Of an object, the scenes of defects appear under every light: cut by scene, not by file.",
        "Labels of the private sets are not published; the owner's server scores them.",
        "A damaged rice/train/good/265_regular.png was reported of one download.",
        "That masks hold 0 and 255 alone was not checked on the real files.",
    ),
    marks=("*/test_public",),
)  # fmt: skip
_SCENE = r"(?P<group>(?P<stem>\d+))_(?P<camera>[a-z]+(_\d+)?)"
LAYOUT = Layout(
    images=(
        Pattern(rf"{CATEGORY}/(?P<split>train|validation)/(?P<kind>good)", rf"{_SCENE}\.png"),
        Pattern(rf"{CATEGORY}/(?P<split>test_public)/(?P<kind>good|bad)", rf"{_SCENE}\.png"),
        Pattern(rf"{CATEGORY}/(?P<split>test_private(_mixed)?)", rf"{_SCENE}\.png"),
    ),
    masks=(
        Pattern(
            rf"{CATEGORY}/(?P<split>test_public)/ground_truth/(?P<kind>good|bad)",
            rf"{_SCENE}_mask\.png",
        ),
    ),
    expected="<object>/{train,validation}/good and <object>/test_public/{good,bad}",
    mask="{category}/test_public/ground_truth/{kind}/{stem}_{camera}_mask.png",
    splits=("train", "validation", "test"),
    rule=MaskRule(),
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, LAYOUT, ABOUT)
