"""DeepPCB: pairs, lists and boxes, on a miniature and on the real pairs."""

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import deeppcb, records_builder
from dsad.data.base import DataConfig, FaultError, load
from dsad.data.checks import check
from tests.data import trees
from tests.helpers import real_data

GROUP = "group00041/00041"


@pytest.fixture
def tree(tmp_path):
    trees.deeppcb(tmp_path)
    return tmp_path


def config(tree, name="deeppcb", **kwargs):
    return DataConfig(name=name, root=str(tree), **kwargs)


def faults(tree, severity="error", **kwargs):
    found = check(config(tree, **kwargs)).faults
    return [(f.check, f"{f.path}: {f.message}") for f in found if f.severity == severity]


def test_templates_train_and_pairs_are_tested(tree):
    data = load(config(tree))
    assert [r.path for r in data.splits["train"]] == [
        f"{GROUP}/0004100{i}_temp.jpg" for i in (0, 1)
    ]
    test = data.source("test")
    assert [(r.path[-8:-4], r.label, r.kind) for r in test.records] == [
        ("temp", 0, "good"), ("test", 1, "mouse_bite"), ("temp", 0, "good"), ("test", 1, "mixed"),
    ]  # fmt: skip
    assert [r.group[-1] for r in test.records] == ["2", "2", "3", "3"]
    assert deeppcb.template(test.records[1].path) == test.records[0].path
    assert data.protocol["unused"] == "2 tested images of training pairs"
    assert "research only" in data.protocol["licence"]
    assert load(config(tree / "PCBData")).splits == data.splits
    report = check(config(tree))
    assert report.ok
    assert report.rows[0].modes == "L, RGB"


def test_masks_are_the_filled_boxes(tree):
    test = load(config(tree)).source("test")
    want = np.zeros((16, 24), bool)
    want[4:7, 10:15] = True
    np.testing.assert_array_equal(test[1].mask, want)
    want[1:2, 1:3] = True
    np.testing.assert_array_equal(test[3].mask, want)
    assert not test[0].mask.any()


def test_lines_with_commas_are_read_and_others_named():
    assert deeppcb.boxes("1,2,3,4,5\n\n6 7 8 9 1\n", "a.txt") == [(1, 2, 3, 4, 5), (6, 7, 8, 9, 1)]
    with pytest.raises(FaultError) as caught:
        deeppcb.boxes("1 2 3 4\n1 2 3 4 7\n3 2 1 4 1\n1 2 x 4 1\n", "a.txt")
    assert [f.check for f in caught.value.faults] == 4 * ["K4"]
    assert "a.txt: [K4] line 2: '1 2 3 4 7'; expected x1 < x2" in str(caught.value)


def test_faults_of_boxes(tree):
    notes = tree / "PCBData/group00041/00041_not"
    (notes / "00041002.txt").write_text("1 2 3 4\n")
    (notes / "00041003.txt").write_text("20 4 25 7 3\n")  # the image is 24 pixels wide
    found = faults(tree)
    assert [k for k, _ in found] == ["K2", "K4"]
    assert "box (20, 4, 25, 7) of an image of 24×16 pixels" in found[0][1]
    (notes / "00041002.txt").write_text("")
    assert ("K5", True) in [(k, "the mask is empty" in t) for k, t in faults(tree, "warning")]


def test_missing_parts_of_pairs(tree):
    base = tree / "PCBData" / GROUP
    (base / "00041000_temp.jpg").unlink()
    (base / "00041002_test.jpg").unlink()
    (tree / "PCBData/group00041/00041_not/00041003.txt").unlink()
    texts = [text for k, text in faults(tree) if k == "K1"]
    assert len(texts) == 3
    assert "00041000_temp.jpg: no such file, the template of pair group00041/00041000" in texts[0]
    assert "00041002_test.jpg: no such file, the tested image" in texts[1]
    assert "00041003_test.jpg: anomalous image without mask; expected group00041/" in texts[2]


def test_orphans_and_strays_are_ignored(tree):
    base = tree / "PCBData" / GROUP
    trees.save(base / "90100034_temp.jpg", trees.pixels(99, 1))
    (base / "Thumbs.db").touch()
    ignored = [text for k, text in faults(tree, "warning") if k == "K9"]
    assert ignored == [
        f"{GROUP}/90100034_temp.jpg: ignored: a template of no listed pair.",
        f"{GROUP}/Thumbs.db: ignored: suffix '.db' is not one of .bmp, .jpeg, .jpg, .png, .tif, "
        ".tiff.",
    ]


def test_lines_that_repeat_or_are_none(tree):
    test = tree / "PCBData/test.txt"
    first = (tree / "PCBData/trainval.txt").read_text().splitlines()[0]
    line = test.read_text().splitlines()[0]
    test.write_text(f"{test.read_text()}{line}\n{first}\nsome words here\n\n")
    assert [k for k, _ in faults(tree)] == ["K0", "K7", "K14"]


def test_without_lists_pairs_are_cut_by_the_seed(tree):
    for name in ("trainval", "test"):
        (tree / f"PCBData/{name}.txt").unlink()
    data = load(config(tree))
    assert [len(data.splits[s]) for s in ("train", "test")] == [2, 4]
    assert data.protocol["split"].startswith("no lists: a third, by seed 0, is tested; one-class")
    assert any("no trainval.txt and test.txt" in f.message for f in data.faults)
    assert [f.path for f in data.faults if f.check == "K12"] == ["trainval", "test"]
    others = {load(config(tree, seed=seed)).splits["train"] for seed in range(9)}
    assert len(others) > 1


def test_one_list_alone_is_no_reason_to_cut_anew(tree):
    (tree / "PCBData/test.txt").unlink()
    with pytest.raises(
        FaultError, match=r"test\.txt: \[K0\] no such file, though the other"
    ) as stop:
        load(config(tree))
    assert len(stop.value.faults) == 1


def test_counts_of_pairs_and_boxes(tree):
    found = [text for k, text in faults(tree, strict=True) if k == "K12"]
    assert found[0].startswith("test.txt: 2 pairs with 0/0/2/0/0/1 boxes; DeepPCB has 500 with 659")
    assert found[1].startswith("trainval.txt: 2 pairs with 0/0/2/0/0/0 boxes")


def test_no_pair(tmp_path):
    with pytest.raises(DataError, match=r"\[K0\] no pair found"):
        load(config(tmp_path))


def test_records_hold_the_drawn_masks(tree):
    pytest.importorskip("tensorflow_datasets")
    data = load(config(tree))
    records_builder.write(records_builder.plan(data), str(tree / "records"))
    again = load(DataConfig(name="records", root=str(tree / "records")))
    assert again.splits == data.splits
    for i in range(4):
        np.testing.assert_array_equal(again.source("test")[i].mask, data.source("test")[i].mask)


def test_each_pair_alone(tree):
    data = load(config(tree, name="deeppcb:pairs"))
    assert data.categories == ("00041002", "00041003")
    for name in data.categories:
        (template,), (tested,) = (data.source(s, name).records for s in ("train", "test"))
        assert deeppcb.template(tested.path) == template.path == f"{GROUP}/{name}_temp.jpg"
        assert (template.label, tested.label) == (0, 1)
    assert data.protocol["unused"] == "2 pairs of trainval.txt"
    assert "own template" in data.protocol["split"]
    assert check(config(tree, name="deeppcb:pairs")).ok
    one = load(config(tree, name="deeppcb:pairs", categories=("00041003",)))
    assert [len(one.splits[s]) for s in ("train", "test")] == [1, 1]
    with pytest.raises(ConfigError, match="00041009 not found"):
        load(config(tree, name="deeppcb:pairs", categories=("00041009",)))
    for name in ("trainval", "test"):
        (tree / f"PCBData/{name}.txt").unlink()
    assert len(load(config(tree, name="deeppcb:pairs")).categories) == 4
    told = faults(tree, "warning", name="deeppcb:pairs")
    assert next(text for check, text in told if check == "K12").startswith("test: 4 pairs")
    assert not any("trainval" in text for check, text in told if check == "K12")


def test_real_pairs():
    root = real_data("deeppcb", "PCBData")
    data = load(config(root))
    assert [len(data.splits[s]) for s in ("train", "test")] == [20, 20]
    source = data.source("test")
    row = next(i for i, r in enumerate(source.records) if r.label)
    boxes = deeppcb.boxes((root / source.records[row].masks[0]).read_text(), "")
    mask = source[row].mask
    assert mask.shape == (640, 640)
    assert all(mask[b.y1 : b.y2, b.x1 : b.x2].all() for b in boxes)
    # The defects lie in the boxes; elsewhere only edges differ from the template, by their place.
    other = source[row - 1].image.astype(int) - source[row].image
    changed = (abs(other) > 128).any(axis=2)
    assert all(changed[b.y1 : b.y2, b.x1 : b.x2].any() for b in boxes)
    assert changed[mask].mean() > 5 * changed[~mask].mean()
