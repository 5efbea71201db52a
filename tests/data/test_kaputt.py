"""Kaputt: its tables and images, on a miniature of the layout that programs read."""

import importlib.util

import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data.base import load
from dsad.data.checks import check
from tests.data import trees

pytest.importorskip("pyarrow")
from pyarrow import Table, parquet


def faults(config, severity="error"):
    found = check(config).faults
    return [(f.check, f"{f.path}: {f.message}") for f in found if f.severity == severity]


def test_normal_queries_train_and_all_of_the_test_are_measured(tmp_path):
    config = trees.kaputt(tmp_path)
    data = load(config)
    assert data.categories == ("bag", "box")
    assert [len(data.splits[s]) for s in ("train", "validation", "test")] == [4, 4, 6]
    bad = [r for r in data.splits["test"] if r.label]
    assert {r.kind for r in bad} == {"penetration"}
    assert bad[0].group == "item test-bag-2"
    assert data.protocol["unused"] == "2 anomalous images of train, 2 of validation"
    assert faults(config) == []
    images = load(trees.kaputt(tmp_path, "kaputt:image")).splits["train"]
    assert images[0].path == "data/train/query-data/image/train-bag-0.jpg"


def test_numbers_of_pixels_are_refused(tmp_path):
    config = trees.kaputt(tmp_path, missing_masks="error")
    with pytest.raises(DataError, match=r"\[K1\] 2 anomalous test images, and Kaputt has no masks"):
        load(config)


def test_faults_of_tables_and_files(tmp_path):
    config = trees.kaputt(tmp_path)
    rows = trees.kaputt_rows("test")
    rows[0]["item_identifier"] = "item train-bag-0"
    parquet.write_table(Table.from_pylist([*rows, rows[1]]), tmp_path / "query-test.parquet")
    crops = tmp_path / "data/test/query-data/crop"
    (crops / "test-box-1.jpg").unlink()
    trees.save(crops / "new.jpg", trees.pixels(999))
    assert [k for k, _ in faults(config)] == ["K7", "K8"]
    texts = [text for _, text in faults(config, "warning")]
    assert "test: 1 items of the test are in train too; the first is item train-bag-0." in texts
    assert any("new.jpg: ignored: not in query-test.parquet" in text for text in texts)
    (tmp_path / "query-train.parquet").write_bytes(b"no table")
    parquet.write_table(Table.from_pylist([{"x": 1}]), tmp_path / "query-validation.parquet")
    found = [text for k, text in faults(config) if k == "K0"]
    assert found[0].startswith("query-train.parquet: cannot be read: ")
    assert found[1].startswith("query-validation.parquet: no column capture_id, ")


def test_without_the_library(tmp_path, monkeypatch):
    config = trees.kaputt(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pyarrow" else find(n))
    with pytest.raises(ConfigError, match=r"kaputt needs pyarrow: pip install 'dsad\[records\]'"):
        load(config)
