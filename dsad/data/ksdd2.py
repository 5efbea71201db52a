"""KolektorSDD2: surfaces of one product, each image with a mask, of normal ones all zero.

``{train,test}/NNNNN.png`` with ``NNNNN_GT.png`` beside it. An image is defective where its mask has
any pixel that is not zero, at full size: after a resize, tiny defects would be lost. Names of other
forms, such as the published "10301 (copy).png", are ignored with a warning.
"""

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import Layout, Pattern

ABOUT = About(
    title="KolektorSDD2", licence="CC BY-NC-SA 4.0",
    citation="Bozic et al., Mixed supervision for surface-defect detection, Computers in Industry "
    "2021",
    address="https://www.vicos.si/resources/kolektorsdd2",
    masks="every value but 0 is a defect", columns=("train", "dropped", "good", "bad"),
    counts={"kolektor_sdd2": (2085, 246, 894, 110)},
    protocols={"": "official, one-class"},
    remarks=("Training uses normal images only; methods with labels have 246 defective ones.",),
    marks=("train/[0-9]*_GT.png", "test/[0-9]*_GT.png"),
)  # fmt: skip
LAYOUT = Layout(
    category="kolektor_sdd2",
    images=(Pattern(r"(?P<split>train|test)", r"(?P<stem>\d{5})\.png"),),
    masks=(Pattern(r"(?P<split>train|test)", r"(?P<stem>\d{5})_GT\.png"),),
    expected="{train,test}/NNNNN.png with NNNNN_GT.png beside it",
    mask="{split}/{stem}_GT.png",
    label="pixels",
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, LAYOUT, ABOUT)
