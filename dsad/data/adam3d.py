"""3D-ADAM, the subset of one camera in the layout of MVTec 3D-AD: colour images of printed parts.

See ``mvtec_3d`` for the layout. The depths are not read.
"""

from dsad.data import files, mvtec_3d, published
from dsad.data.about import About
from dsad.data.base import DataConfig

ABOUT = About(
    title="3D-ADAM", licence="CC BY-NC-SA 4.0",
    citation="3D-ADAM: A Dataset for 3D Anomaly Detection in Additive Manufacturing, arXiv "
    "2507.07838, 2025",
    masks="every value but 0 is a defect", columns=("train", "validation", "good", "bad"),
    protocols={"": "as published, colour images alone"},
    remarks=(
        "Its counts are not known to dsad: K12 does not apply.",
        "File names and mask values were not checked on the real files.",
    ),
    marks=("*/train/good/rgb",),
)  # fmt: skip


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return published.index(config, mvtec_3d.layout("[^/]+"), ABOUT)
