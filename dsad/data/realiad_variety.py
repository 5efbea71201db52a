"""Real-IAD Variety (Zhu et al., 2025): 160 kinds of objects in the layout of Real-IAD.

``realiadvariety_<raw|...>/<category>/{OK,NG/<defect>}/S####/`` holds PNG images of five cameras,
whose names have ``_C<1..5>_``, and the masks that the lists name; the lists are
``realiadvariety_jsons/Real-IAD_Variety_jsons/<category>.json``, as those of ``dsad.data.realiad``.
``config.data.root`` is the folder of the images, or the one that holds it and the lists.

Differences from Real-IAD: the classes of defects are words, whose spelling varies; and a view that
does not show the defect of its object has the object's class without a mask. Such views count as
normal, as in the evaluations that are published.

What is said here was gathered from public programs that read this set; its files were not seen. The
counts of training and test images are of one of them, and the masks' names are those of the lists.
"""

import re

from dsad.data import files, realiad
from dsad.data.about import About
from dsad.data.base import DataConfig

_LISTS = realiad.Lists(
    places=(
        "realiadvariety_jsons/Real-IAD_Variety_jsons", "Real-IAD_Variety_jsons",
        "realiadvariety_jsons",
    ),
    train=19_955, test=178_995, bad=None,
    split="published, multi-view (every view of five cameras an image)",
)  # fmt: skip
ABOUT = About(
    title="Real-IAD Variety", licence="not verified; see the owner's page",
    citation="Zhu et al., Real-IAD Variety, 2025",
    address="https://huggingface.co/datasets/Real-IAD/Real-IAD_Variety",
    masks="every value but 0 is a defect", columns=("train", "test"), categories=160,
    counts={f"all 160 categories, {_LISTS.folder}": (_LISTS.train, _LISTS.test)},
    protocols={"": _LISTS.split},
    remarks=(
        "Layout and counts are those of public programs and were not verified on the files.",
        "Views of defective objects without a mask count as normal.",
    ),
    marks=("*/OK/S[0-9]*/*_C[1-5]_*", "realiadvariety_*"),
)  # fmt: skip
FAMILY = realiad.Family(
    about=ABOUT, lists={"": _LISTS}, prefix="realiadvariety_", categories=160, suffix=".png",
    name=re.compile(r".+_(C[1-5])_.+"),
)  # fmt: skip


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    return realiad.index(config, FAMILY)
