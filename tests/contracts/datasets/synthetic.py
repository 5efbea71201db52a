from dsad.data.base import DataConfig, SyntheticConfig

NAMES = ("synthetic", "synthetic:development")
FILES = False


def small(name, root):
    tiny = SyntheticConfig(size=32, train=2, good=1, bad=1)
    return DataConfig(
        name=name,
        synthetic=tiny,
        categories=("washer", "weave") if name == "synthetic" else ("board", "leather"),
    )
