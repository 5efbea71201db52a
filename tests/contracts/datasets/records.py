from dsad.data import records_builder
from dsad.data.base import DataConfig, load
from tests.data import trees


def small(name, root):
    source = load(trees.mvtec(root / "files"))
    records_builder.write(records_builder.plan(source), str(root / "records"))
    return DataConfig(name=name, root=str(root / "records"))
