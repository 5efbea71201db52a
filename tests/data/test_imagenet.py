"""ImageNet read from inside its tars: the same images as unpacked, every damage named."""

import dataclasses

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import imagenet, records_builder
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from tests.data import trees

KINDS = ("tar", "tars", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_files(tmp_path, kind):
    data = load(trees.imagenet(tmp_path, kind))
    source, contents = data.source("train"), trees.imagenet_files()
    assert data.name == "imagenet"
    assert data.categories == ("n00000002", "n00000010")
    assert [r.path for r in source.records] == sorted(contents)
    assert [r.category for r in source.records] == [p[:9] for p in sorted(contents)]
    for i, record in enumerate(source.records):
        assert source.encoded(i) == contents[record.path]
        assert source.size_of(i) == len(contents[record.path])


def test_all_layouts_are_one_data_set(tmp_path):
    found = [load(trees.imagenet(tmp_path / kind, kind)) for kind in KINDS]
    assert len({data.protocol["split_hash"] for data in found}) == 1
    assert len({data.source("train").records for data in found}) == 1
    file = load(DataConfig(name="imagenet", root=str(tmp_path / "tar" / imagenet.ARCHIVE)))
    assert file.source("train").records == found[0].source("train").records
    assert file.protocol["licence"] == "ImageNet terms of access: research only"


def test_records_of_a_tar(tmp_path):
    config = trees.imagenet(tmp_path / "root")
    planned = records_builder.plan(load(config))
    assert planned.bytes == sum(map(len, trees.imagenet_files().values()))
    records_builder.write(planned, str(tmp_path / "out"))
    made = load(DataConfig(name="records", root=str(tmp_path / "out")))
    contents = trees.imagenet_files()
    source = made.source("train")
    assert [source.encoded(i) for i in range(6)] == [contents[p] for p in sorted(contents)]


def test_counts_are_compared_with_the_published_ones(tmp_path):
    for kind in KINDS:
        config = trees.imagenet(tmp_path / kind, kind)
        (fault,) = (f for f in load(config).faults if f.check == "K12")
        assert fault.severity == "warning"
        assert "6 images of 2 classes; ImageNet has 1,281,167 of 1,000" in fault.message
        with pytest.raises(DataError, match=r"\[K12\] 6 images"):
            load(dataclasses.replace(config, strict=True))
        part = load(dataclasses.replace(config, categories=("n00000010",), strict=True))
        assert len(part.source("train")) == 3


def test_what_does_not_belong_there_is_said(tmp_path):
    images = {"./n00000002_1.JPEG": trees.jpeg(1), "._n00000002_1.JPEG": b"", "notes.txt": b"x"}
    outer = {"n00000002.tar": trees.tar(images), "readme": b"hello"}
    (tmp_path / imagenet.ARCHIVE).write_bytes(trees.tar(outer))
    data = load(DataConfig(name="imagenet", root=str(tmp_path)))
    assert [r.path for r in data.source("train").records] == ["n00000002/n00000002_1.JPEG"]
    warned = [f.path for f in data.faults if f.check == "K9"]
    assert warned == [
        f"{imagenet.ARCHIVE}/readme", "n00000002/._n00000002_1.JPEG", "n00000002/notes.txt"
    ]  # fmt: skip


def test_damaged_tars_are_named(tmp_path):
    config = trees.imagenet(tmp_path)
    file = tmp_path / imagenet.ARCHIVE
    whole = file.read_bytes()
    for cut in (len(whole) // 4, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"\[K8\] not a whole tar file: .*copy ILSVRC2012"):
            load(config)
    file.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DataError, match=r"\[K8\] not a whole tar file"):
        load(config)
    file.write_bytes(trees.tar({"a.jpg": trees.jpeg(0)}))
    with pytest.raises(DataError, match=r"\[K0\] no tar of a class in it"):
        load(config)
    file.write_bytes(trees.tar({"n00000002.tar": trees.tar({"notes.txt": b""})}))
    with pytest.raises(DataError, match=r"n00000002.tar: \[K0\] empty class"):
        load(config)
    with pytest.raises(DataError, match="does not exist"):
        load(dataclasses.replace(config, root=str(tmp_path / "gone")))


def test_an_inner_tar_cut_short(tmp_path):
    """The published tar is whole, one class in it is not."""
    tars = trees.class_tars()
    # In the last header's place: what follows the cut is the header of the next class.
    tars["n00000010.tar"] = tars["n00000010.tar"][: 512 + 100]
    (tmp_path / imagenet.ARCHIVE).write_bytes(trees.tar(tars))
    with pytest.raises(DataError, match=r"n00000010.tar: \[K8\] not a whole tar file"):
        load(DataConfig(name="imagenet", root=str(tmp_path)))


@pytest.mark.parametrize("kind", ["tar", "tars"])
def test_damage_inside_an_image_names_its_tar(tmp_path, kind):
    config = trees.imagenet(tmp_path, kind)
    name = imagenet.ARCHIVE if kind == "tar" else "n00000002.tar"
    file, image = tmp_path / name, trees.imagenet_files()["n00000002/n00000002_7.JPEG"]
    file.write_bytes(file.read_bytes().replace(image, image[:20] + bytes(len(image) - 20)))
    (found,) = (f for f in check(config).faults if f.severity == "error")
    assert (found.check, found.path) == ("K8", "n00000002/n00000002_7.JPEG")
    assert found.message.endswith(f"copy it again. It lies in {name}.")


def test_a_tar_that_changed_since(tmp_path):
    config = trees.imagenet(tmp_path)
    source = load(config).source("train")
    file = tmp_path / imagenet.ARCHIVE
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DataError, match=r"\[K8\] ILSVRC2012_img_train.tar ends within this image"):
        source[5]
    file.unlink()
    with pytest.raises(DataError, match=r"\[K8\] ILSVRC2012_img_train.tar cannot be read"):
        source[5]


def test_lossy_images_need_permission(tmp_path):
    from PIL import Image

    trees.imagenet(tmp_path, "folder")
    path = "n00000002/n00000002_7.JPEG"
    Image.fromarray(trees.pixels(0)).convert("CMYK").save(tmp_path / path, "JPEG")
    contents = {p.name: p.read_bytes() for p in (tmp_path / "n00000002").iterdir()}
    (tmp_path / "n00000002.tar").write_bytes(trees.tar(contents))
    config = DataConfig(name="imagenet", root=str(tmp_path))
    source = load(config).source("train")
    position = [r.path for r in source.records].index(path)
    with pytest.raises(DataError, match=rf"{path}: \[K3\] image mode CMYK"):
        source[position]
    allowed = load(dataclasses.replace(config, lossy=("CMYK",))).source("train")[position].image
    expected = np.asarray(Image.open(tmp_path / path).convert("RGB"))
    np.testing.assert_array_equal(allowed, expected)


def test_unknown_class(tmp_path):
    config = trees.imagenet(tmp_path, categories=("n00000011",))
    with pytest.raises(ConfigError, match=r"n00000011 not found. Did you mean 'n00000010'"):
        load(config)
