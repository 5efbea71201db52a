"""AutoVI (Renault): six stations of a car assembly line.

``<category>/train/good``, ``<category>/test/<kind>/<stem>.png`` and
``<category>/ground_truth/<kind>/<stem>/0000.png, ...``. All masks of an image are joined. Where
``<category>/defects_config.json`` is there, masks hold its values alone; see ``saturation``.
"""

from dsad.data import files, published, saturation
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import CATEGORY, Layout, Pattern

ABOUT = About(
    title="AutoVI", licence="CC BY-NC-SA 4.0",
    citation="Carvalho et al., The Automotive Visual Inspection Dataset (AutoVI), 2024",
    address="https://doi.org/10.5281/zenodo.10459003",
    masks="every value but 0 is a defect", columns=("train", "good", "bad", "kinds"),
    counts={
        "engine_wiring": (285, 285, 322, 4), "pipe_clip": (195, 195, 142, 2),
        "pipe_staple": (191, 188, 117, 1), "tank_screw": (318, 318, 95, 1),
        "underbody_pipes": (161, 161, 184, 3), "underbody_screw": (373, 374, 18, 1),
    },
    protocols={"": "official, first edition (1.0.0)"},
    remarks=(
        "Counts are those of a third party that evaluated the set, not of the owner; names of files"
        " and mask values were not checked on the real files.",
        "The paper measures sPRO, as of MVTec LOCO AD.",
    ),
    marks=("*/ground_truth/*/*/0000.png",),
)  # fmt: skip
LAYOUT = Layout(
    images=(
        Pattern(rf"{CATEGORY}/(?P<split>train)/(?P<kind>good)", r"(?P<stem>[^/]+)\.png"),
        Pattern(rf"{CATEGORY}/(?P<split>test)/(?P<kind>[^/]+)", r"(?P<stem>[^/]+)\.png"),
    ),
    masks=(
        Pattern(rf"{CATEGORY}/ground_truth/(?P<kind>[^/]+)/(?P<stem>[^/]+)", r"(?P<part>\d+)\.png"),
    ),
    aside=(rf"{CATEGORY}/{saturation.FILE}",),
    expected="<category>/train/good and <category>/test/<kind>",
    mask="{category}/ground_truth/{kind}/{stem}/0000.png",
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return saturation.listed(published.index(config, LAYOUT, ABOUT), needed=False)
