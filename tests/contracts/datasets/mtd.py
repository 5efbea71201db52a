from dsad.data import mtd
from dsad.data.base import DataConfig
from tests.data import trees

NAMES = ("mtd:grouped", "mtd:random")


def small(name, root):
    rows = mtd.group_list()
    sides = {"train": [], "test": []}
    for path, row in rows.items():
        if path.startswith("MT_Free/"):
            sides[row["split"]].append(path)
    defects = [next(p for p in rows if p.startswith(f"MT_{d}/")) for d in mtd.COUNTS]
    trees.mtd(root, sorted({*sides["train"][:4], *sides["test"][:3], *defects}))
    return DataConfig(name=name, root=str(root))
