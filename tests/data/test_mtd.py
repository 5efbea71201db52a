"""Magnetic Tile Defect: the two cuts, on a miniature tree and on the real images."""

import csv
import pathlib

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import mtd
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from tests.data import trees
from tests.helpers import real_data


@pytest.fixture
def tree(tmp_path):
    """Six normals on each side of the grouped cut and two images of every defect."""
    rows = mtd.group_list()
    paths = []
    for split in ("train", "test"):
        normal = [p for p, r in rows.items() if p.startswith("MT_Free/") and r["split"] == split]
        paths += sorted(normal, key=lambda p: rows[p]["group"])[:6]  # one or two tiles
    for defect in mtd.COUNTS:
        if defect != "Free":
            paths += [p for p in rows if p.startswith(f"MT_{defect}/")][:2]
    trees.mtd(tmp_path, paths)
    return tmp_path


def test_what_lies_beside_the_folders_of_images_is_told(tree):
    before = {f.path for f in check(DataConfig(name="mtd:random", root=str(tree))).faults}
    trees.mtd(tree, ["MT_Rust/Imgs/a.jpg", "MT_Free/b.jpg"])
    for name in ("groups.csv", "README.md", "MT_Fray/license.txt"):
        (tree / name).write_text("x")
    faults = check(DataConfig(name="mtd:random", root=str(tree))).faults
    assert {f.path for f in faults} - before == {
        "MT_Rust", "MT_Free/b.jpg", "MT_Free/b.png", "groups.csv"
    }  # fmt: skip


def test_the_stamp_has_the_licence_that_is_known(tree):
    told = load(DataConfig(name="mtd:random", root=str(tree))).protocol
    assert (told["licence"], told["dataset"]) == (mtd.ABOUT.licence, "MTD")


def test_group_list_is_the_whole_set_and_disjoint():
    rows = mtd.group_list()
    assert len(rows) == 1344
    for defect, count in mtd.COUNTS.items():
        assert sum(p.startswith(f"MT_{defect}/") for p in rows) == count
    sides = {}
    for row in rows.values():
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    train = [p for p, row in rows.items() if row["split"] == "train"]
    assert len(train) == 599
    assert all(p.startswith("MT_Free/") for p in train)
    empty = {p for p, row in rows.items() if row["flag"] == "empty_mask"}
    assert {pathlib.PurePath(p).stem for p in empty} == {
        "exp3_num_45042",
        "exp4_num_45057",
        "exp4_num_124690",
        "exp4_num_352527",
    }


def test_random_cut_has_the_published_sizes():
    normals = [p for p in mtd.group_list() if p.startswith("MT_Free/")]
    train, test, unused = mtd.random_cut(normals, 0)
    assert (len(train), len(test), len(unused)) == (761, 190, 1)
    assert set(train) | set(test) | set(unused) == set(normals)
    assert mtd.random_cut(normals[::-1], 0) == (train, test, unused)
    assert mtd.random_cut(normals, 1)[0] != train


def test_grouped_miniature(tree):
    config = DataConfig(name="mtd:grouped", root=str(tree))
    data = load(config)
    assert data.categories == ("magnetic_tile",)
    assert len(data.source("train")) == 6
    test = data.source("test")
    assert len(test) == 6 + 10
    assert {r.kind for r in test.records} == {
        "good",
        "blowhole",
        "break",
        "crack",
        "fray",
        "uneven",
    }
    sample = test[0]
    assert sample.record.path.startswith("MT_Blowhole/Imgs/")
    assert sample.image.shape == (16, 24, 3)
    np.testing.assert_array_equal(sample.mask, trees.mask() > 0)  # 127 is not above 127
    report = check(config)
    assert report.ok
    assert {f.check for f in report.faults} == {"K12"}  # a miniature has not the published counts
    assert not check(DataConfig(name="mtd:grouped", root=str(tree), strict=True)).ok


def test_random_miniature_names_twins(tree):
    data = load(DataConfig(name="mtd:random", root=str(tree), seed=3))
    assert (len(data.source("train")), data.protocol["unused"]) == (10, [])
    assert data.protocol["split"] == "random, seed 3"
    assert data.protocol["cut"].startswith("a fifth of the normals to test: only")
    assert data.protocol["lossy"] == []
    twins = data.protocol["test_normals_with_twin_in_train"]
    warnings = [str(f) for f in check(data.config).faults if f.check == "K13"]
    assert twins > 0
    assert warnings == [
        f"magnetic_tile: [K13] {twins} of 2 test normals have another exposure of their tile in "
        "train; mtd:grouped avoids this."
    ]


def test_groups_must_not_straddle(tree, monkeypatch):
    rows = {p: dict(r) for p, r in mtd.group_list().items()}
    normals = sorted(p.name for p in (tree / "MT_Free/Imgs").glob("*.jpg"))
    group = rows[f"MT_Free/Imgs/{normals[0]}"]["group"]
    mates = [p for p in (f"MT_Free/Imgs/{n}" for n in normals) if rows[p]["group"] == group]
    assert len(mates) > 1
    rows[mates[0]]["split"] = "train" if rows[mates[1]]["split"] == "test" else "test"
    monkeypatch.setattr(mtd, "group_list", lambda: rows)
    found = [f for f in check(DataConfig(name="mtd:grouped", root=str(tree))).faults]
    errors = [f for f in found if f.severity == "error"]
    assert [f.check for f in errors] == ["K13"]
    assert f"group {group} is also in train" in errors[0].message


def test_image_that_the_group_list_does_not_know(tree):
    trees.mtd(tree, ["MT_Free/Imgs/exp9_num_1.jpg"])
    with pytest.raises(DataError, match=r"exp9_num_1.jpg: \[K13\] not in the group list"):
        load(DataConfig(name="mtd:grouped", root=str(tree)))


def test_faults_of_the_index(tree):
    (next((tree / "MT_Fray/Imgs").glob("*.png"))).unlink()
    for file in (tree / "MT_Crack/Imgs").iterdir():
        file.unlink()
    with pytest.raises(DataError) as caught:
        load(DataConfig(name="mtd:grouped", root=str(tree)))
    assert "MT_Crack/Imgs: [K0] empty class" in str(caught.value)
    assert "[K1] anomalous image without mask; expected MT_Fray/Imgs/" in str(caught.value)


def test_variant_must_be_named(tree):
    with pytest.raises(ConfigError, match=r"expected one of mtd:grouped, mtd:random; found 'mtd'"):
        load(DataConfig(name="mtd", root=str(tree)))
    with pytest.raises(ConfigError, match=r"Did you mean 'random'"):
        load(DataConfig(name="mtd:randm", root=str(tree)))


def counts(data):
    test = data.source("test").records
    bad = sum(r.label for r in test)
    return len(data.source("train")), len(test) - bad, bad


def test_real_counts():
    root = str(real_data("mtd", "MT_Free").parent)
    grouped = load(DataConfig(name="mtd:grouped", root=root))
    assert counts(grouped) == (599, 353, 392)
    random = load(DataConfig(name="mtd:random", root=root))
    assert counts(random) == (761, 190, 392)
    assert len(random.protocol["unused"]) == 1
    assert random.protocol["cut"] == "published sizes, 761 training and 190 test normals"
    assert random.protocol["test_normals_with_twin_in_train"] > 180


def test_group_list_agrees_with_the_real_one():
    rows = mtd.group_list()
    with real_data("mtd", "groups.csv").open() as stream:
        for row in csv.DictReader(stream):
            for column in ("split", "group", "exposure", "flag"):
                assert rows[row["image"]][column] == row[column]


def test_real_binarised_blowhole_masks():
    """The fact sheet counts 118 eight-connected regions above 127 in the blowhole masks."""
    from dsad.data.checks import vanishing

    root = real_data("mtd", "MT_Blowhole").parent
    source = load(DataConfig(name="mtd:grouped", root=str(root))).source("test")
    rows = [i for i, r in enumerate(source.records) if r.kind == "blowhole"]
    assert sum(vanishing(source[i].mask, 1000)[0] for i in rows) == 118
