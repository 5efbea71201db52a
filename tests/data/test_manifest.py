"""Lists of images: CSV and JSON lines, groups, and every fault by its line."""

import dataclasses
import hashlib
import json

import pytest

from dsad.core.errors import DataError
from dsad.data import _manifest, heldout
from dsad.data.base import DataConfig, indexed, load
from dsad.data.checks import check
from tests.data import trees


def listed(root, text, name="list.csv", files=()):
    for i, path in enumerate(files):
        trees.save(root / path, trees.mask() if "mask" in path else trees.pixels(i))
    (root / name).write_text(text, "utf-8")
    return DataConfig(name="folder", manifest=str(root / name))


GOOD = [f"a b/Prüf {i}.png" for i in range(6)]


def test_csv_of_a_spreadsheet(tmp_path):
    rows = [f"{p};gut;" for p in GOOD]
    text = "\ufeffpath;label;mask\n" + "\n".join(rows).replace("gut", "Good")
    config = listed(tmp_path, text + "\nbad.png;BAD;bad_mask.png\n", "Teile.csv",
                    [*GOOD, "bad.png", "bad_mask.png"])  # fmt: skip
    data = load(config)
    assert data.categories == ("Teile",)
    assert len(data.source("train")) == 5
    assert [r.masks for r in data.source("test").records] == [(), ("bad_mask.png",)]
    assert data.source("test")[1].mask.any()
    assert check(config).ok
    assert "1 of 6 normal images held out" in data.protocol["split"]


def test_json_lines_with_splits_categories_and_kinds(tmp_path):
    rows = [
        {"path": "0.png", "label": 0, "split": "train", "category": "x"},
        {"path": "./1.png", "label": False, "split": "test", "category": "x"},
        {"path": str(tmp_path / "2.png"), "label": True, "category": "x", "kind": "dent"},
        {"path": "3.png", "label": "normal", "split": "train", "category": "y", "mask": None},
        {"path": "4.png", "label": "normal", "split": "test", "category": "y"},
    ]
    config = listed(
        tmp_path, "\n".join(map(json.dumps, rows)) + "\n", "list.jsonl",
        [f"{i}.png" for i in range(5)],
    )  # fmt: skip
    data = load(config)
    assert [r.path for r in data.source("train").records] == ["0.png", "3.png"]
    kinds = [(r.path, r.kind, r.category) for r in data.source("test").records]
    assert kinds == [("1.png", "good", "x"), ("2.png", "dent", "x"), ("4.png", "good", "y")]
    assert [str(f) for f in data.faults] == [
        "y: [K0] no abnormal image: nothing is measured of it."
    ]


def test_groups_stay_together(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    text = "path,label,group\n" + "".join(f"{n},0,tile {i // 4}\n" for i, n in enumerate(names))
    config = listed(tmp_path, text, files=names)
    for seed in range(4):
        data = load(DataConfig(name="folder", manifest=config.manifest, seed=seed))
        sides = [{r.group for r in data.source(s).records} for s in ("train", "test")]
        assert not sides[0] & sides[1]
        assert len(data.source("train")) == 32
        assert data.protocol["groups"] == "named"
    one = listed(tmp_path, text.replace("tile ", "tile 1 #").partition("\n4.png")[0], "one.csv")
    with pytest.raises(
        DataError, match=r"\[K13\] all 4 normal images are held out with their 1 groups"
    ):
        load(one)


def test_normal_images_of_a_bad_group_are_not_trained_on(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    rows = [f"{n},{int(i == 19)},{'tile 9' if i > 16 else ''}\n" for i, n in enumerate(names)]
    data = load(listed(tmp_path, "path,label,group\n" + "".join(rows), files=names))
    held = {r.path for r in data.source("test").records}
    assert len(held) == 5
    assert held > {"17.png", "18.png", "19.png"}


def test_a_list_of_test_images_is_for_a_model_that_was_fitted(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    rows = "0.png,0,test,\n1.png,0,test,a\n2.png,1,test,a\n3.png,0,test,b\n4.png,0,test,b\n"
    config = listed(tmp_path, f"path,label,split,group\n{rows}", files=names)
    assert "nothing can be fitted" in str(load(config).faults[0])
    data = load(dataclasses.replace(config, holdout=1))
    assert not data.faults
    assert len(data.source("test")) == 5
    content = hashlib.sha256((tmp_path / "3.png").read_bytes()).hexdigest()[:16]
    left = heldout.left(data, {content}, "part")
    assert [(r.path, r.category) for r in left.source("test").records] == [
        (name, "part") for name in ("0.png", "1.png", "2.png", "4.png")
    ]
    assert left.protocol["split"] == (
        "3 normal images tested, 1 that the model was fitted on are not; 1 groups are tested of "
        "which it was fitted on other images"
    )
    only = listed(tmp_path, "path,label,split\n2.png,1,test\n", "bad.csv")
    assert len(load(dataclasses.replace(only, holdout=1)).source("test")) == 1


def test_groups_on_both_sides_of_a_named_split(tmp_path):
    text = "path,label,group,split\n0.png,0,g,train\n1.png,0,g,test\n2.png,1,g,test\n"
    config = listed(tmp_path, text, files=["0.png", "1.png", "2.png"])
    with pytest.raises(DataError, match=r"1.png: \[K13\] its group g is also in train, as 0.png"):
        load(config)


def test_every_fault_with_its_line(tmp_path):
    config = listed(
        tmp_path,
        "path,label,split,mask,kind,grup\n"
        "0.png,good,train,,,\n"
        "1.png,fine,test,,,\n"
        "0.png,good,train,,,\n"
        "gone.png,good,tset,,,\n"
        "2.png,bad,train,2_mask.png,,\n"
        "3.png,bad,,,,\n"
        "4.txt,good,,,,\n"
        "5.png,good\n"
        ",good,train,,,\n"
        "../6.png,good,train,,,\n"
        "7.png,bad,,gone_mask.png,good,\n"
        "missing.png,good,train,,,\n"
        "8.png,bad,,8_mask.png,,\n",
        files=["0.png", "3.png", "8.png", "8_mask.png"],
    )
    told = {str(f) for f in indexed(config).faults}
    for start in (
        "list.csv: [K9] column 'grup' is ignored. Did you mean 'group'?",
        "list.csv:3: [K0] label 'fine': expected one of normal, good, 0, abnormal, bad, 1.",
        "list.csv:4: [K14] '0.png' again, as in list.csv:2; remove one.",
        "list.csv:5: [K0] split 'tset': expected one of train, test, or nothing. Did you mean",
        "list.csv:6: [K0] an abnormal image in train",
        "list.csv:7: [K1] anomalous image without mask; expected in its column",
        "list.csv:8: [K8] no file '4.txt' in ",
        "list.csv:8: [K9] '4.txt': suffix '.txt' is not one of",
        "list.csv:8: [K0] no split, though other lines have one",
        "list.csv:9: [K0] 2 fields, expected 6, as the first line has; quote what has a ','",
        "list.csv:10: [K0] no path.",
        "list.csv:11: [K0] path '../6.png' lies outside of",
        "list.csv:12: [K0] kind 'good' of an abnormal image",
        "list.csv:13: [K8] no file 'missing.png' in ",
    ):
        assert [t for t in told if t.startswith(start)], (start, told)


@pytest.mark.parametrize(
    ("text", "name", "match"),
    [
        ("pth,label\n0.png,0\n", "l.csv", r"no column 'path'. Did you mean 'pth'\? Found: label"),
        ("path\n0.png\n", "l.csv", r"no column 'label'\. Found: path"),
        ("", "l.csv", r"l.csv: \[K0\] names no image"),
        ("path,label\n0.png,0\n1.png,1\n", "l.csv", r"l.csv:2: \[K8\] none of its images is"),
        ("path,label,path\n0.png,0,1.png\n", "l.csv", r"\[K0\] column 'path' stands twice"),
        ('{"path": "a\\u0000b/0.png", "label": 0}\n', "l.jsonl", r"l.jsonl:1: \[K0\] a NUL"),
        ('{"path": "0.png"\n', "l.jsonl", r"l.jsonl:1: \[K0\] is no JSON"),
        ("[1]\n", "l.jsonl", r"l.jsonl:1: \[K0\] expected a JSON object, found \[1\]"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, name, match):
    with pytest.raises(DataError, match=match):
        load(listed(tmp_path, text, name))


def test_masks_alone_that_are_missing_are_named(tmp_path):
    text = "path,label,mask\n0.png,good,gone/0.png\n1.png,bad,gone/1.png\n"
    faults = []
    listed(tmp_path, text, files=["0.png", "1.png"])
    _manifest.read(tmp_path / "list.csv", faults)
    assert [f.path for f in faults] == ["list.csv:2", "list.csv:3"]
    assert all(f"no file 'gone/{i}.png'" in f.message for i, f in enumerate(faults))


def test_files_that_are_no_list(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"path,label\nPr\xfcf.png,0\n")
    with pytest.raises(DataError, match=r"l.csv:2: \[K0\] expected UTF-8"):
        load(DataConfig(name="folder", manifest=str(tmp_path / "l.csv")))
    with pytest.raises(DataError, match=r"gone.csv: \[K0\] cannot be read: No such file"):
        load(DataConfig(name="folder", manifest=str(tmp_path / "gone.csv")))


def test_names_may_hold_what_unicode_calls_an_end_of_line(tmp_path):
    name = "teil\u2028eins.png"
    trees.save(tmp_path / name, trees.pixels(0))
    trees.save(tmp_path / "b.png", trees.pixels(1))
    (tmp_path / "list.csv").write_text(f"path,label\n{name},good\nb.png,good\n", encoding="utf-8")
    faults = []
    lines = _manifest.read(tmp_path / "list.csv", faults)
    assert faults == []
    assert [line.record.path for line in lines] == [name, "b.png"]
