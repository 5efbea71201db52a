"""DAGM 2007: ten generated textures, each with one kind of defect, roughly marked.

``Class<1..10>/{Train,Test}/NNNN.PNG`` with ``Label/NNNN_label.PNG`` for defective images. An image
is defective where it has a mask; ``Label/Labels.txt`` names the masks, and none may be missing.
"""

import dataclasses
import pathlib
import re

from dsad.data import files, published
from dsad.data.about import About
from dsad.data.base import DataConfig, error
from dsad.data.published import Layout, Pattern

#: Images of each split, defective ones in training and test, of Class1 to Class10.
_SIZES = (
    *((575, bad, 150 - bad) for bad in (79, 66, 66, 82, 70, 83)),
    *((1150, 150, 150),) * 4,
)
ABOUT = About(
    title="DAGM 2007", licence="see the owner's page",
    citation="Wieler and Hahn, Weakly supervised learning for industrial optical inspection, DAGM "
    "2007",
    address="https://doi.org/10.5281/zenodo.12750201",
    masks="every value but 0 is a defect", columns=("train", "dropped", "good", "bad"),
    counts={
        f"Class{i}": (n - train, train, n - test, test)
        for i, (n, train, test) in enumerate(_SIZES, start=1)
    },
    protocols={"": "official, one-class"},
    remarks=(
        "Training uses normal images only; methods with labels have 1,046 defective ones.",
        "Masks are ellipses around the defects: numbers of pixels say little.",
        "Counts of defective images and the licence were not checked on the real files.",
    ),
    marks=("Class[0-9]*/Train", "Class[0-9]*/Test"),
)  # fmt: skip
_FOLDER = r"(?P<category>Class\d+)/(?P<split>Train|Test)"
LAYOUT = Layout(
    images=(Pattern(_FOLDER, r"(?P<stem>\d{4})\.(?i:png)"),),
    masks=(Pattern(f"{_FOLDER}/Label", r"(?P<stem>\d{4})_label\.(?i:png)"),),
    aside=(f"{_FOLDER}/Label/Labels.txt",),
    expected="Class<1..10>/{Train,Test}/NNNN.PNG with Label/NNNN_label.PNG for defective images",
    mask="{category}/{split}/Label/{stem}_label.PNG",
    label="mask",
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    data = published.index(config, LAYOUT, ABOUT)
    faults = []
    records = [r for records in data.splits.values() for r in records]
    for folder in sorted({pathlib.PurePosixPath(r.path).parent / "Label" for r in records}):
        lines = data.root / folder / "Labels.txt"
        # Only the names of masks are read: what else a line holds differs between copies.
        text = lines.read_text("utf-8", errors="replace") if lines.is_file() else ""
        for name in sorted(set(re.findall(r"\d{4}_label\.(?i:png)", text))):
            if not (data.root / folder / name).is_file():
                text = "no such file, though Labels.txt names it: its image would count as normal."
                faults.append(error("K1", f"{folder}/{name}", f"{text} Copy the data set again."))
    return dataclasses.replace(data, faults=(*data.faults, *faults))
