"""Real-IAD: the traps of its lists, on a miniature of the published layout."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import heldout, realiad, records_builder
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from tests.data import trees


@pytest.fixture
def tree(tmp_path):
    trees.realiad(tmp_path, categories=("audiojack",))
    return tmp_path


def config(tree, name="realiad", **kwargs):
    return DataConfig(name=name, root=str(tree), **kwargs)


def edit(tree, change, family="realiad_jsons"):
    """Apply ``change`` to the list of audiojack."""
    file = tree / "realiad_jsons" / family / "audiojack.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def view(content, end, split="test"):
    """The item whose image path contains ``end``."""
    return next(item for item in content[split] if end in item["image_path"])


def faults(tree, name="realiad", **kwargs):
    found = check(config(tree, name, **kwargs)).faults
    return [(f.check, f.severity, f"{f.path}: {f.message}") for f in found]


def errors(tree, name="realiad", **kwargs):
    return [(k, text) for k, severity, text in faults(tree, name, **kwargs) if severity == "error"]


FOLDER = "audiojack/NG/BX/S0001/"
FILE = FOLDER + "audiojack_0001_NG_BX_C{}_20231021130235.{}"


def test_files_of_the_system_and_copies_beside_images_are_no_masks(tree):
    name = FILE.format(1, "png").rpartition("/")[2]
    for stray in (f"._{name}", ".DS_Store", name.replace(".png", " (copy).png")):
        (tree / "realiad_512" / FOLDER / stray).write_bytes(b"x")
    assert errors(tree) == []
    assert [kind for kind, *_ in faults(tree)].count("K9") == 3


def test_multi_view(tree):
    data = load(config(tree))
    train, test = data.source("train"), data.source("test")
    assert (len(train), len(test)) == (10, 15)
    assert {r.kind for r in test.records} == {"good", "pit", "deformation"}
    assert sum(r.label for r in test.records) == 6
    assert {r.group for r in test.records} == {"OK/S0003", "NG/BX/S0001", "NG/AK/S0001"}
    assert data.protocol["images"] == "realiad_512"
    assert data.protocol["licence"].startswith("CC BY-NC-SA 4.0")
    assert "CVPR 2024" in data.protocol["citation"]
    row = next(i for i, r in enumerate(test.records) if r.path == FILE.format(2, "jpg"))
    assert test.records[row].masks == (FILE.format(2, "png"),)
    np.testing.assert_array_equal(test[row].mask, trees.mask() > 0)  # grey of 1 and more


def test_every_record_has_a_camera_and_objects_stay_together(tree):
    records = load(config(tree)).splits["train"]
    assert [r.camera for r in records] == [f"C{i}" for i in range(1, 6)] * 2
    stays, held = heldout.divided(records, 0.3, 0)
    assert (len(stays), len(held)) == (5, 5)
    assert len({r.group for r in stays} | {r.group for r in held}) == 2


def test_single_view_is_the_top_camera(tree):
    data = load(config(tree, "realiad:single"))
    both = [*data.splits["train"], *data.splits["test"]]
    assert {r.camera for r in both} == {"C1"}
    assert [r.label for r in data.splits["test"]] == [1, 1, 0]
    assert data.protocol["split"] != load(config(tree)).protocol["split"]
    # Images and masks of the other cameras are no strays.
    assert faults(tree, "realiad:single") == []


def test_views_without_a_visible_defect_are_normal(tree):
    (only,) = faults(tree)
    assert only[:2] == ("K11", "warning")
    assert only[2].startswith("audiojack: 4 images in NG folders labelled OK by the list, which")


def test_labels_that_the_folder_denies(tree):
    def change(content):
        view(content, "OK_C1")["anomaly_class"] = "HS"
        view(content, "BX_C1")["anomaly_class"] = "AK"

    edit(tree, change)
    found = faults(tree)
    assert any("1 image in OK folders labelled anomalous by the list" in t for _, _, t in found)
    assert any("1 image in the folder of another defect than the list" in t for *_, t in found)
    [(kind, text)] = errors(tree)  # no mask for the first
    assert (kind, "the list has null" in text) == ("K1", True)


@pytest.mark.parametrize(
    ("place", "family"), [(".", "."), ("realiad_512", "."), ("realiad_512", "flat")]
)
def test_places_of_images_and_lists(tree, place, family):
    if family == "flat":
        (tree / "realiad_jsons/realiad_jsons").rename(tree / "lists")
        shutil.rmtree(tree / "realiad_jsons")
        (tree / "lists").rename(tree / "realiad_jsons")
    data = load(config(tree / place))
    assert data.splits["test"][0].path.startswith("audiojack/NG/AK/S0001/")
    assert data.protocol["images"] == "realiad_512"


def test_several_releases_need_a_choice(tree):
    shutil.copytree(tree / "realiad_512", tree / "realiad_256")
    with pytest.raises(DataError, match=r"several releases: realiad_256, realiad_512; set config"):
        load(config(tree))
    low, high = (load(config(tree / f"realiad_{side}")) for side in (256, 512))
    assert low.protocol["split_hash"] == high.protocol["split_hash"]
    assert low.protocol["images"] != high.protocol["images"]


def test_missing_lists(tree):
    (tree / "realiad_jsons/realiad_jsons_sv/audiojack.json").unlink()
    with pytest.raises(DataError, match=r"\[K0\] no lists: expected <category>.json in"):
        load(config(tree, "realiad:single"))
    shutil.copytree(tree / "realiad_512/audiojack", tree / "realiad_512/toy")
    with pytest.raises(DataError, match=r"toy: \[K0\] no list realiad_jsons/toy.json"):
        load(config(tree))
    (tree / "realiad_512/notes").mkdir()
    ignored = [t for k, _, t in faults(tree) if k == "K9"]
    assert ignored == ["notes: ignored: not a category (no OK/ or NG/ inside)."]


def test_list_without_images(tree):
    lists = tree / "realiad_jsons/realiad_jsons"
    shutil.copy(lists / "audiojack.json", lists / "usb.json")
    data = load(config(tree))
    assert data.categories == ("audiojack",)
    assert ("K0", "warning") in [f[:2] for f in faults(tree)]
    with pytest.raises(DataError, match=r"usb: \[K0\] its list is here, but no folder"):
        load(config(tree, categories=("usb",)))
    (tree / "realiad_512/usb.zip").touch()
    assert any("unpack usb.zip" in text for _, text in errors(tree, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", 'expected an object of "meta"'),
        ('{"meta": {}, "train": [], "test": {}}', 'expected an object of "meta"'),
        ('{"meta": {"prefix": "x/", "normal_class": "OK"}, "train": [], "test": []}',
         "has prefix 'x/'; expected 'audiojack/'"),
        ('{"meta": {"prefix": "audiojack/", "normal_class": "good"}, "train": [], "test": []}',
         "has normal_class 'good'; expected 'OK'"),
        ('{"meta": {"prefix": "audiojack/", "normal_class": "OK"}, "train": [1], "test": []}',
         "expected an object with the texts image_path"),
    ],
)  # fmt: skip
def test_lists_of_another_form(tree, text, message):
    (tree / "realiad_jsons/realiad_jsons/audiojack.json").write_text(text)
    assert any(k == "K0" and message in found for k, found in errors(tree))


def test_faults_of_items(tree):
    def change(content):
        view(content, "BX_C1")["anomaly_class"] = "XX"
        view(content, "BX_C2")["category"] = "toy"
        view(content, "BX_C3")["mask_path"] = None
        view(content, "OK_C4")["mask_path"] = "OK/S0003/none.png"
        content["train"].append(content["train"][0])
        content["test"].append(content["train"][1])

    edit(tree, change)
    (tree / "realiad_512" / FILE.format(4, "jpg")).unlink()
    found = errors(tree)
    assert sorted(k for k, _ in found) == ["K1", "K1", "K11", "K11", "K14", "K7", "K8"]
    texts = "\n".join(text for _, text in found)
    assert "anomaly_class 'XX' of audiojack/NG/BX/S0001" in texts
    assert "expected one of AK, BX, CH, HS, OK, PS, QS, YW, ZW" in texts
    assert "category 'toy' in the list of audiojack" in texts
    assert "no such file, though realiad_jsons/audiojack.json lists it" in texts
    assert "(the list has null)" in texts
    assert "no file audiojack/OK/S0003/none.png" in texts
    assert texts.count("again, as in realiad_jsons/audiojack.json:train[") == 2


def test_anomalous_image_without_its_mask_file(tree):
    (tree / "realiad_512" / FILE.format(1, "png")).unlink()
    [(kind, text)] = errors(tree)
    assert (kind, FILE.format(1, "png") in text) == ("K1", True)
    data = load(config(tree, missing_masks="image_only"))
    assert [r.path for r in data.splits["test"] if r.label and not r.masks] == [
        FILE.format(1, "jpg")
    ]


def test_files_that_the_list_does_not_name(tree):
    images = tree / "realiad_512"
    trees.save(images / FOLDER / "alone.png", trees.mask())
    trees.save(images / FILE.format(5, "png"), trees.mask())  # of a view labelled OK
    trees.save(images / FOLDER / "audiojack_0001_NG_BX_C1_2.jpg", trees.pixels(900))
    (images / FOLDER / "Thumbs.db").touch()
    found = faults(tree)
    assert [(k, text) for k, severity, text in found if severity == "error"] == [
        ("K1", f"{FOLDER}alone.png: mask without image: no image has this stem; rename or remove "
         "it.")
    ]  # fmt: skip
    texts = "\n".join(text for _, _, text in found)
    assert "1 image with a mask beside it that the list does not name" in texts
    assert "1 image not in the list: ignored; the first is " in texts
    assert f"{FOLDER}Thumbs.db: ignored: suffix" in texts
    # The label stays that of the list.
    assert sum(r.label for r in load_without(tree, "alone.png").splits["test"]) == 6


def load_without(tree, name):
    (tree / "realiad_512" / FOLDER / name).unlink()
    return load(config(tree))


def test_normal_image_with_a_mask_in_the_list(tree):
    edit(tree, lambda c: view(c, "BX_C5").update(mask_path=FILE.format(5, "png")[10:]))
    trees.save(tree / "realiad_512" / FILE.format(5, "png"), np.zeros((16, 24), np.uint8))
    assert errors(tree) == []
    trees.save(tree / "realiad_512" / FILE.format(5, "png"), trees.mask())
    assert [k for k, _ in errors(tree)] == ["K6"]


def test_lists_with_noise_in_training_are_refused(tree):
    edit(tree, lambda c: c["train"].append(c["test"].pop(c["test"].index(view(c, "BX_C1")))))
    [(kind, text)] = errors(tree)
    assert kind == "K11"
    assert "is anomalous (BX): expected normal training images only" in text
    with pytest.raises(ConfigError, match=r"expected one of realiad, realiad:single; found"):
        load(config(tree, "realiad:noisy"))


def test_an_object_in_train_and_test(tree):
    edit(tree, lambda c: c["test"].append(c["train"].pop()))
    found = faults(tree)
    [(kind, text)] = [(k, text) for k, severity, text in found if severity == "error"]
    assert (kind, "is also in train, as audiojack/OK/S000" in text) == ("K13", True)


def test_objects_with_views_missing(tree):
    edit(tree, lambda c: c["test"].remove(view(c, "OK_C2")))
    texts = [text for k, _, text in faults(tree) if k == "K13"]
    assert texts == [
        "audiojack: 1 of 5 objects have not one image of each of C1, C2, C3, C4, C5; the first is "
        "OK/S0003, which has C1, C3, C4, C5."
    ]
    # Another camera has no place in the list of the top one.
    other = FILE.format(2, "jpg")[10:]
    edit(tree, lambda c: view(c, "BX_C1").update(image_path=other), "realiad_jsons_sv")
    assert any("camera C2 in the list of C1" in text for _, text in errors(tree, "realiad:single"))


def test_names_that_tell_no_object_or_camera(tree):
    new = FOLDER + "view1.jpg"
    (tree / "realiad_512" / FILE.format(4, "jpg")).rename(tree / "realiad_512" / new)
    edit(tree, lambda c: view(c, "BX_C4").update(image_path=new[10:]))
    [(kind, text)] = errors(tree)
    assert (kind, "object and camera are known by them" in text) == ("K9", True)


def test_transform_of_the_list_is_not_applied(tree):
    edit(tree, lambda c: c["meta"].update(pre_transform="crop"))
    assert any("pre_transform 'crop' is not applied" in text for *_, text in faults(tree))


def test_counts_where_all_categories_are_there(tree, monkeypatch):
    report = check(config(tree))
    assert report.skipped["K12"] == "the published counts are of all 30 categories together"
    one = dataclasses.replace(realiad.FAMILY, categories=1)
    monkeypatch.setattr(realiad, "FAMILY", one)
    texts = [text for k, _, text in faults(tree) if k == "K12"]
    assert texts == [
        "realiad_jsons: 10/15/6 train/test/anomalous images; the published list has "
        "36,465/114,585/51,329.",
        "realiad_jsons: 4 test images of NG objects are labelled OK; the published list has "
        "26,881.",
    ]
    [(kind, text)] = errors(tree, "realiad:single", strict=True)
    assert (kind, text.endswith("has 10,408/19,802/9,415.")) == ("K12", True)


def test_published_counts_agree_with_each_other():
    """Every object has one image of every camera: 30,210 objects, 151,050 images."""
    both = realiad.PUBLISHED.values()
    assert [(p.train + p.test) / len(p.cameras) for p in both] == [30_210, 30_210]
    assert len(set(realiad.CATEGORIES)) == 30


def test_records_keep_objects_and_masks(tree):
    pytest.importorskip("tensorflow_datasets")
    data = load(config(tree))
    records_builder.write(records_builder.plan(data), str(tree / "records"))
    again = load(config(tree / "records", "records"))
    for split in ("train", "test"):
        assert again.splits[split] == data.splits[split]
    row = next(i for i, r in enumerate(data.splits["test"]) if r.label)
    np.testing.assert_array_equal(again.source("test")[row].mask, trees.mask() > 0)


def test_variety_reads_png_images_and_masks_by_the_list(tmp_path):
    data = load(trees.realiad_variety(tmp_path, categories=("ball_pin",)))
    test = data.source("test")
    assert (len(data.splits["train"]), len(test)) == (5, 10)
    bad = [r for r in test.records if r.label]
    assert {r.kind for r in bad} == {"porosity"}
    assert [r.camera for r in bad] == ["C1", "C2", "C3"]
    assert bad[0].masks[0].endswith("_C1_2024_mask.png")
    found = [(f.check, f.severity, f.message) for f in check(data.config).faults]
    # Views that do not see the defect count as normal; PNG masks are no strays.
    assert [(check, severity) for check, severity, _ in found] == [("K11", "warning")]
    assert found[0][2].startswith("2 images in NG folders without a mask by the list")
    (tmp_path / "realiadvariety_raw/ball_pin" / bad[0].masks[0][9:]).unlink()
    with pytest.raises(DataError, match=r"\[K1\] anomalous image without mask"):
        load(data.config)


def test_variety_lists_directly_in_their_folder(tmp_path):
    config = trees.realiad_variety(tmp_path)
    inner = tmp_path / "realiadvariety_jsons/Real-IAD_Variety_jsons"
    for file in inner.iterdir():
        file.rename(inner.parent / file.name)
    inner.rmdir()
    assert load(config).categories == ("3_adapter", "ball_pin")
