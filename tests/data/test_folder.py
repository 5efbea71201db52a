"""A folder of images: categories, what is refused, and images by the hundred thousand."""

import builtins
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from dsad.core.errors import ConfigError, DataError
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from dsad.data.pipeline import make_pipeline
from tests.data import trees


def paths(data, category=None):
    return [r.path for r in data.source("train", category).records]


def test_first_folders_are_the_categories(tmp_path):
    data = load(trees.folder(tmp_path))
    assert data.categories == ("ant", "bee")
    assert paths(data) == ["ant/1.png", "ant/old/1.png", "ant/old/raw/2.JPEG", "bee/1.jpg"]
    assert paths(data, "bee") == ["bee/1.jpg"]
    assert {(r.label, r.kind, r.masks) for r in data.source("train").records} == {(0, "good", ())}
    sample = data.source("train")[1]
    np.testing.assert_array_equal(sample.image, trees.pixels(1))
    assert not sample.mask.any()
    assert data.protocol["dataset"] == f"{tmp_path.name} (folder of images)"
    assert data.protocol["licence"] == "not stated in the data folder"
    (tmp_path / "LICENSE").write_text("free")
    assert load(data.config).protocol["licence"] == "see LICENSE in the data folder"


def test_images_in_the_root_are_one_category(tmp_path):
    for i in range(3):
        trees.save(tmp_path / f"{i}.bmp", trees.pixels(i))
    (tmp_path / "notes" / "more").mkdir(parents=True)
    data = load(DataConfig(name="folder", root=str(tmp_path)))
    assert data.categories == (tmp_path.name,)
    assert paths(data) == ["0.bmp", "1.bmp", "2.bmp"]
    assert [str(f) for f in data.faults] == [
        "notes: [K9] ignored: no image in the folder or below it."
    ]


def test_images_beside_folders_of_images_are_refused(tmp_path):
    config = trees.folder(tmp_path)
    trees.save(tmp_path / "0.png", trees.pixels(8))
    trees.save(tmp_path / "9.png", trees.pixels(9))
    with pytest.raises(DataError) as caught:
        load(config)
    text = str(caught.value)
    assert "ant: [K0] 3 images here and 2 directly in the folder above, such as 0.png:" in text
    assert "bee: [K0] 1 images here" in text


def test_nothing_to_read_is_an_error(tmp_path):
    def fails(root, match):
        with pytest.raises(DataError, match=match):
            load(DataConfig(name="folder", root=str(root)))

    fails(tmp_path / "typo", r"\[K0\] does not exist; set config.data.root")
    fails(tmp_path, r"\[K0\] no image and no folder with images; expected files with .*\.jpeg")
    trees.folder(tmp_path)
    (tmp_path / "cat" / "deep").mkdir(parents=True)
    fails(tmp_path, r"cat: \[K0\] empty class: no image in the folder or below it")
    assert load(DataConfig(name="folder", root=str(tmp_path), categories=("bee",)))
    with pytest.raises(ConfigError, match="config.data.root: empty"):
        load(DataConfig(name="folder"))
    with pytest.raises(ConfigError, match=r"expected one of folder; found 'folder:x'"):
        load(DataConfig(name="folder:x", root=str(tmp_path)))
    with pytest.raises(ConfigError, match="Did you mean 'bee'"):
        load(DataConfig(name="folder", root=str(tmp_path), categories=("be",)))


def test_check_lists_every_fault_at_once(tmp_path):
    config = trees.folder(tmp_path)
    (tmp_path / "bee" / "0.jpg").write_bytes(b"")
    (tmp_path / "ant" / "0.png").write_bytes((tmp_path / "ant" / "1.png").read_bytes()[:60])
    trees.save(tmp_path / "ant" / "clear.png", trees.pixels(5, 4))
    trees.save(tmp_path / "ant" / "2 (copy).png", trees.pixels(6))
    (tmp_path / "ant" / "Thumbs.db").write_text("x")
    trees.save(tmp_path / ".cache" / "x.png", trees.pixels(7))
    load(config)  # no file is opened
    report = check(config)
    assert not report.ok
    assert [(f.severity, f.check, f.path) for f in report.faults] == [
        ("error", "K3", "ant/clear.png"),
        ("error", "K8", "ant/0.png"),
        ("error", "K8", "bee/0.jpg"),
        ("warning", "K9", ".cache"),
        ("warning", "K9", "ant/2 (copy).png"),
        ("warning", "K9", "ant/Thumbs.db"),
    ]
    assert report.skipped["K14"] == "there is no test image"


def test_links_are_followed_but_not_in_circles(tmp_path):
    trees.folder(tmp_path / "real")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "real" / "ant")
    (tmp_path / "real" / "ant" / "old" / "up").symlink_to(tmp_path / "real" / "ant")
    data = load(DataConfig(name="folder", root=str(tmp_path / "set")))
    assert paths(data) == ["ant/1.png", "ant/old/1.png", "ant/old/raw/2.JPEG"]
    assert [str(f) for f in data.faults] == [
        "ant/old/up: [K9] ignored: a link to a folder that it lies in."
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    config = trees.folder(tmp_path)
    scandir = os.scandir

    def closed(path):
        if os.fspath(path).endswith("raw"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"ant/old/raw: \[K8\] .*Permission denied; make it"):
        load(config)


def test_the_index_opens_no_file(tmp_path, monkeypatch):
    """Nor asks for its size: for a million files either would take minutes."""
    for c in range(20):
        (tmp_path / f"c{c:02d}").mkdir()
        for i in range(100):
            (tmp_path / f"c{c:02d}" / f"{i}.JPEG").touch()

    def refuse(*args, **kwargs):
        raise AssertionError("a file was touched")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(pathlib.Path, "open", refuse)
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: asked.append(a) or stat(*a, **k))
    data = load(DataConfig(name="folder", root=str(tmp_path)))
    assert len(data.source("train")) == 2000
    assert len(asked) < 20


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_every_cache_gives_the_same_pixels(tmp_path, cache):
    source = load(trees.folder(tmp_path)).source("train")
    pipeline = make_pipeline(source, trees.batch_spec(32), cache=cache, batch_size=4, seed=3)
    batch = next(pipeline.iterator())
    assert sorted(batch["index"]) == [0, 1, 2, 3]
    rows = pipeline.store if cache == "device" else batch
    for at, index in enumerate(batch["index"]):
        row = index if cache == "device" else at
        want = source[int(index)].image
        np.testing.assert_array_equal(rows["image"][row, :16, :24], want)
        assert not rows["image"][row, 16:].any()
        np.testing.assert_array_equal(rows["size"][row], (16, 24))
        assert rows["category"][row] == (index == 3)


def test_a_file_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    config = trees.folder(tmp_path)
    (tmp_path / "bee" / "0.jpg").write_bytes(b"no image")
    source = load(config).source("train")
    with pytest.raises(DataError, match=r"bee/0.jpg: \[K8\]"):
        make_pipeline(source, trees.batch_spec(32), cache="host", batch_size=4, seed=0)


def test_it_has_no_test_image(tmp_path):
    assert len(load(trees.folder(tmp_path)).source("test")) == 0
