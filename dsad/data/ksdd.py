"""KolektorSDD: 50 electrical commutators, each seen in about eight parts, cut by commutator.

``kosNN/PartM.jpg`` with ``kosNN/PartM_label.bmp`` beside it, all zero of normal images. An image is
defective where its mask has any pixel that is not zero, at full size. No split is published for
training without defects: half of the commutators, by ``config.data.seed``, are trained on with
their normal images, the others tested with all. ``Record.group`` is the commutator.
"""

import dataclasses

from dsad.data import files, heldout, published
from dsad.data.about import About
from dsad.data.base import DataConfig
from dsad.data.published import Layout, Pattern

CATEGORY = "kolektor_sdd"
ABOUT = About(
    title="KolektorSDD", licence="CC BY-NC-SA 4.0",
    citation="Tabernik et al., Segmentation-based deep-learning approach, J. Intell. Manuf. 2020",
    address="https://www.vicos.si/resources/kolektorsdd",
    masks="every value but 0 is a defect", columns=("good", "bad"), counts={CATEGORY: (347, 52)},
    protocols={"": "half of the commutators to test, a cut of dsad: none is published"},
    remarks=(
        "Published numbers are of three folds with labels, not of this cut.",
        "Nearly every commutator has a defect: those of the training ones are not used.",
        "The licence was not checked on the real files.",
    ),
    marks=("kos[0-9]*/Part*_label.bmp",),
)  # fmt: skip
LAYOUT = Layout(
    category=CATEGORY,
    images=(Pattern(r"(?P<group>kos\d+)", r"(?P<stem>Part\d+)\.jpg"),),
    masks=(Pattern(r"(?P<group>kos\d+)", r"(?P<stem>Part\d+)_label\.bmp"),),
    expected="kosNN/PartM.jpg with kosNN/PartM_label.bmp beside it",
    mask="{group}/{stem}_label.bmp",
    splits=("test",),
    label="pixels",
)


def scan(config: DataConfig) -> files.FileDataset:
    """The index with its faults, none of them raised."""
    data = published.index(config, LAYOUT, ABOUT)
    records = data.splits["test"]
    order = sorted({r.group for r in records}, key=lambda g: heldout.rank(g, config.seed, CATEGORY))
    tested = set(order[: -(-len(order) // 2)])
    train = tuple(r for r in records if r.group not in tested and not r.label)
    splits = {"train": train, "test": tuple(r for r in records if r.group in tested)}
    unused = [r.path for r in records if r.group not in tested and r.label]
    about = {
        **data.protocol, "split": f"{data.protocol['split']}, seed {config.seed}",
        "split_hash": files.split_hash(splits), "unused": unused,
    }  # fmt: skip
    return dataclasses.replace(data, splits=splits, protocol=about)
