"""DTD: all its textures, and those of an official split."""

import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data.base import load
from dsad.data.checks import check
from tests.data import trees


def test_all_and_a_split(tmp_path):
    every = load(trees.dtd(tmp_path / "a"))
    assert len(every.splits["train"]) == 6
    assert every.splits["test"] == ()
    some = load(trees.dtd(tmp_path / "b", "dtd:1"))
    assert [r.path for r in some.splits["train"]] == [
        f"{texture}/{texture}_{i:04d}.jpg" for texture in ("banded", "dotted") for i in (0, 2)
    ]
    assert some.protocol["split"] == "training images of official split 1"
    with pytest.raises(ConfigError, match="expected one of dtd, dtd:1"):
        load(trees.dtd(tmp_path / "c", "dtd:11"))


def test_faults(tmp_path):
    config = trees.dtd(tmp_path, "dtd:1", strict=True)
    (tmp_path / "images/banded/banded_0002.jpg").unlink()
    (tmp_path / "images/dotted/.directory").touch()
    found = [(f.check, f.severity, f.path) for f in check(config).faults]
    assert found == [
        ("K8", "error", "banded/banded_0002.jpg"),
        ("K12", "error", "images"),
        ("K9", "warning", "dotted/.directory"),
    ]
    (tmp_path / "labels/train1.txt").unlink()
    with pytest.raises(DataError, match=r"labels/train1.txt: \[K0\] cannot be read"):
        load(config)
