"""Single damages that stopped a program with a traceback, or never ended."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from dsad.core.errors import ConfigError, DataError
from dsad.data import files
from dsad.data.base import DataConfig, FaultError, indexed, load
from dsad.data.checks import check
from dsad.data.deeppcb import boxes
from tests.data import published_trees, trees

DEEP = 100_000 * "["


def errors(config):
    return [str(f) for f in check(config).faults if f.severity == "error"]


def test_pipes_and_devices_are_no_images(tmp_path):
    config = trees.mvtec(tmp_path)
    pipe, device = (tmp_path / f"disc/train/good/00{i}.png" for i in (0, 1))
    pipe.unlink()
    device.unlink()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    found = errors(config)
    assert len(found) == 2
    for file, text in zip((pipe, device), found, strict=True):
        assert text.startswith(f"{file.relative_to(tmp_path)}: [K8] cannot be read: it is a device")


def test_a_list_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "list.csv")
    assert "it is a device" in errors(
        DataConfig(name="folder", manifest=str(tmp_path / "list.csv"))
    )[0]  # fmt: skip


@pytest.mark.parametrize("kind", ["tar", "tars"])
def test_a_tar_may_be_a_pipe(tmp_path, kind):
    config = trees.imagenet(tmp_path, kind)
    file = min(tmp_path.iterdir())
    file.unlink()
    os.mkfifo(file)
    expected = {"tar": "no image", "tars": "it is a device or a pipe"}
    assert any(expected[kind] in text for text in errors(config))


def test_links_that_lead_in_circles(tmp_path):
    trees.save(tmp_path / "a/1.png", trees.pixels(0))
    trees.save(tmp_path / "b/2.png", trees.pixels(1))
    for i in range(8):  # 8^40 ways if each was followed
        (tmp_path / f"a/to{i}").symlink_to("../b")
        (tmp_path / f"b/to{i}").symlink_to("../a")
    expected = {f"{p}/to{i}/{n}" for p, n in (("a", "2.png"), ("b", "1.png")) for i in range(8)}
    assert files.below(tmp_path, "") == expected | {"a/1.png", "b/2.png"}
    found = indexed(DataConfig(name="folder", root=str(tmp_path))).splits["train"]
    assert {r.path for r in found} == expected | {"a/1.png", "b/2.png"}


@pytest.mark.parametrize("name", ["mvtec", "btad", "folder", "realiad", "visa", "deeppcb", "dtd"])
@pytest.mark.parametrize("root", ["circle", "x" * 300, "~nobody at all/data"])
def test_roots_that_are_none(tmp_path, monkeypatch, name, root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(DataError, match=root[:200]):
        load(DataConfig(name=name, root=root))


@pytest.mark.parametrize("key", ["root", "normal", "manifest"])
def test_no_place_has_a_nul(key):
    with pytest.raises(ConfigError, match=rf"config\.data\.{key}: .*without NUL"):
        DataConfig(**{"name": "folder", key: "a\0b"})


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    config, listdir = trees.mvtec(tmp_path), os.listdir

    def refused(path="."):
        if str(path).endswith("train/good"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(DataError, match="disc/train/good: cannot be read: Permission denied"):
        indexed(config)


def every_error(config):
    try:
        return errors(config)
    except FaultError as stop:
        return list(map(str, stop.faults))


CLOSED = ("disc/test/dent", "plate/ground_truth", "plate/train/good")


@pytest.mark.parametrize("name", ["mvtec", "folder", "mvtec_loco"])
def test_all_unreadable_folders_are_told_at_once(tmp_path, monkeypatch, name):
    """And links to nothing beside them."""
    if name == "mvtec_loco":
        config = published_trees.write(name, tmp_path)
        closed = [f"pushpins/{part}" for part in ("ground_truth", "test", "train/good")]
    else:
        trees.mvtec(tmp_path)
        config, closed = DataConfig(name=name, root=str(tmp_path)), list(CLOSED)
    for link in ("gone", "gone too"):
        (tmp_path / link).symlink_to(tmp_path / "nowhere")
    listings = {"listdir": os.listdir, "scandir": os.scandir}

    def refusing(listing):
        def refused(path="."):
            if os.path.relpath(path, tmp_path) in closed:
                raise PermissionError(13, "Permission denied", str(path))
            return listing(path)

        return refused

    for key, listing in listings.items():
        monkeypatch.setattr(os, key, refusing(listing))
    found = every_error(config)
    told = sorted({path for path in (*closed, "gone", "gone too") for text in found
                   if text.strip().startswith(f"{path}: [K8]")})  # fmt: skip
    assert told == sorted([*closed, "gone", "gone too"]), found
    for key, listing in listings.items():
        monkeypatch.setattr(os, key, listing)
    assert sum("a link to nothing" in text for text in every_error(config)) == 2


@pytest.mark.parametrize("what", ["image", "folder"])
def test_names_that_are_not_utf8(tmp_path, what):
    config = trees.mvtec(tmp_path)
    place = tmp_path / ("disc/train/good/000.png" if what == "image" else "disc/test/dent")
    place.rename(place.with_name(f"\udce4{place.suffix}"))
    with pytest.raises(FaultError, match=r"\\udce4.*the name is not UTF-8") as stop:
        load(config)
    str(stop.value).encode()


@pytest.mark.parametrize("name", ["list.jsonl", "realiad", "mvtec_loco"])
def test_json_nested_too_deeply(tmp_path, name):
    if name == "realiad":
        config = trees.realiad(tmp_path)
        file = tmp_path / "realiad_jsons/realiad_jsons/zipper.json"
    elif name == "mvtec_loco":
        config = published_trees.write(name, tmp_path)
        file = tmp_path / "pushpins/defects_config.json"
    else:
        file = tmp_path / name
        config = DataConfig(name="folder", manifest=str(file))
    file.write_text(DEEP)
    (found,) = (text for text in errors(config) if file.name in text)
    assert "nested too deeply" in found


def test_saturation_is_a_number(tmp_path):
    config = published_trees.write("mvtec_loco", tmp_path)
    item = {**published_trees.DEFECTS[0], "saturation_threshold": float("nan")}
    (tmp_path / "pushpins/defects_config.json").write_text(json.dumps([item]))
    assert any("saturation_threshold nan" in text for text in errors(config))


def test_floats_that_are_no_numbers(tmp_path):
    config = trees.mvtec(tmp_path, lossy=("F",))
    image = Image.fromarray(np.full((16, 24), np.nan, np.float32))
    image.save(tmp_path / "disc/train/good/000.png", "TIFF")
    assert not load(config).source("train")[0].image.any()


def test_numbers_of_boxes():
    with pytest.raises(FaultError, match=r"a\.txt: \[K4\] line 1: .*whole numbers"):
        boxes(f"1 1 3 {5000 * '9'} 1", "a.txt")


@pytest.mark.parametrize("side", [16000, 60000])
def test_boxes_of_an_image_that_declares_too_many_pixels(tmp_path, side):
    config = trees.deeppcb(tmp_path)
    file = tmp_path / "PCBData/group00041/00041/00041002_test.jpg"
    data = bytearray(file.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = side.to_bytes(2, "big") * 2
    file.write_bytes(data)
    found = errors(config)
    assert found
    assert all(text.startswith("group00041/00041/00041002_test.jpg: [K8]") for text in found)


def test_a_tar_that_goes_round_for_ever(tmp_path):
    info = tarfile.TarInfo("n00000001_1.JPEG")
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:512]))
    (tmp_path / "n00000001.tar").write_bytes(bytes(data) + bytes(1024))
    found = errors(DataConfig(name="imagenet", root=str(tmp_path)))
    assert "n00000001.tar: [K8] not a whole tar file" in found[-1] + found[0]


def test_labels_of_kaputt(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    config, rows = trees.kaputt(tmp_path), trees.kaputt_rows("train")
    rows[0]["defect"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "query-train.parquet")
    (found,) = errors(config)
    assert found.startswith("data/train/query-data/crop/train-bag-0.jpg: [K11] defect None")


@pytest.mark.parametrize("name", ["{root}", "", "..", "a\0b"])
def test_objects_of_visa_lie_below_its_root(tmp_path, name):
    rows = trees.visa_rows()
    config = trees.visa(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name} outside"
    trees.save(outside / "Data/1.png", trees.pixels(0))
    rows[0]["object"] = name.format(root=outside)
    trees.visa_csv(tmp_path, "1cls", rows)
    assert any("is no normal image of" in text for text in errors(config))


@pytest.mark.parametrize("name", ["dtd:1", "deeppcb", "visa"])
def test_lists_without_training_images(tmp_path, name):
    if name == "dtd:1":
        config = trees.dtd(tmp_path, name)
        (tmp_path / "labels/train1.txt").write_text("")
    elif name == "visa":
        config = trees.visa(tmp_path)
        trees.visa_csv(tmp_path, "1cls", [r for r in trees.visa_rows() if r["split"] == "test"])
    else:
        config = trees.deeppcb(tmp_path)
        (tmp_path / "PCBData/trainval.txt").write_text("")
    faults = [str(f) for f in indexed(config).faults]
    assert any("[K0] no training image" in text for text in faults)
