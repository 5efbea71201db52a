"""VisA: its three setups and the traps of its CSV files, on a miniature of the archive."""

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import records_builder, visa
from dsad.data.base import DataConfig, load
from dsad.data.checks import check
from dsad.evaluation import support
from tests.data import trees


@pytest.fixture
def tree(tmp_path):
    trees.visa(tmp_path)
    return tmp_path


def config(tree, name="visa", **kwargs):
    return DataConfig(name=name, root=str(tree), **kwargs)


def edit(tree, number, setup="1cls", **values):
    """Change a row of a CSV file; number 5 is the first anomalous image of the first object."""
    rows = trees.visa_rows(setup)
    rows[number] |= values
    trees.visa_csv(tree, setup, rows)


def faults(tree, severity="error", name="visa", **kwargs):
    found = check(config(tree, name, **kwargs)).faults
    return [(f.check, f"{f.path}: {f.message}") for f in found if f.severity == severity]


def test_files_of_the_system_and_copies_beside_masks_are_no_masks(tree):
    for name in (".DS_Store", "._000.png", "Thumbs.db", "000 (copy).png"):
        (tree / "candle/Data/Masks/Anomaly" / name).write_bytes(b"x")
    assert faults(tree) == []
    assert [kind for kind, _ in faults(tree, "warning")].count("K9") == 4


def test_masks_of_other_images_are_told_of(tree):
    rows = [row for row in trees.visa_rows() if row["mask"]]
    number = trees.visa_rows().index(rows[0])
    edit(tree, number, mask=rows[1]["mask"])
    assert faults(tree) == []
    (told,) = (text for kind, text in faults(tree, "warning") if kind == "K11")
    assert told.startswith(f"{rows[0]['image']}: its mask has another stem in 1cls.csv")
    assert rows[1]["mask"] in told


def test_one_class(tree):
    data = load(config(tree))
    assert data.categories == ("candle", "pcb1")
    assert (len(data.splits["train"]), len(data.splits["test"])) == (6, 10)
    test = data.source("test", "candle")
    assert [r.kind for r in test.records] == 3 * ["anomaly"] + 2 * ["good"]
    np.testing.assert_array_equal(test[1].mask, trees.mask() > 0)  # of class 7
    # The same stem in Normal and Anomaly is no fault.
    assert faults(tree) == []


def test_only_published_counts_are_stamped_as_the_set_itself(tree, monkeypatch):
    told = load(config(tree)).protocol
    assert told["dataset"].endswith("(VisA layout)")
    assert told["licence"] == "not stated in the data folder"
    counts = {"candle": (3, 0, 2, 3), "pcb1": (3, 0, 2, 3)}
    monkeypatch.setattr(visa, "published", lambda setup: counts)
    told = load(config(tree)).protocol
    assert (told["dataset"], told["licence"]) == ("VisA", "CC BY 4.0 (VisA)")
    assert told["split"] == "published, 1-class"


def test_two_classes_train_on_labelled_defects_and_fit_on_normal_ones(tree):
    data = load(config(tree, "visa:highshot"))
    train = data.source("train", "candle").records
    assert [r.label for r in train] == [1, 0, 0, 0]
    assert train[0].masks == ("candle/Data/Masks/Anomaly/000.png",)
    assert data.source("train", "candle")[0].mask.any()
    chosen = support.choose(data, ["candle"], shots=0, seeds=[0])["candle"][0].bank
    assert len(chosen) == 3
    assert all("/Normal/" in path for path in chosen)
    with pytest.raises(ConfigError, match="candle: 3 training images, shots = 4"):
        support.choose(data, ["candle"], shots=4, seeds=[0])
    assert data.protocol["split_hash"] != load(config(tree)).protocol["split_hash"]


def test_published_counts():
    """The totals of the published files, each with 10,821 rows."""
    for setup, totals in {
        "": (8659, 0, 962, 1200), "highshot": (5773, 720, 3848, 480),
        "fewshot": (1924, 240, 7697, 960),
    }.items():  # fmt: skip
        counts = np.asarray(list(visa.published(setup).values()))
        assert tuple(counts.sum(axis=0)) == totals
        assert counts.sum() == 10_821


def test_the_csv_beside_the_objects(tree):
    (tree / "split_csv/1cls.csv").rename(tree / "1cls.csv")
    assert len(load(config(tree)).splits["train"]) == 6
    (tree / "1cls.csv").unlink()
    with pytest.raises(DataError, match=r"split_csv/1cls.csv: \[K0\] no such file; it is part"):
        load(config(tree))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("object,set,label,image_path,mask_path\r\n", "columns object, set, label, image_path"),
        ("object,split,label,image,mask\r\n", "no row"),
        ("", "columns"),
    ],
)
def test_other_csv_files_are_refused(tree, text, message):
    (tree / "split_csv/1cls.csv").write_text(text)
    with pytest.raises(DataError, match=rf"1cls.csv: \[K0\] {message}"):
        load(config(tree))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"mask": ""}, "K1", "(the CSV has none)"),
        ({"mask": "candle/Data/Masks/Anomaly/9.png"}, "K1", "expected candle/Data/Masks/Anomaly/9"),
        ({"label": "normal"}, "K11", "is no normal image of candle"),
        ({"label": "defect"}, "K11", "label 'defect': expected train or test, and normal"),
        ({"split": "val"}, "K11", "split 'val'"),
        ({"object": "pcb1"}, "K11", "is no anomaly image of pcb1"),
        ({"split": "train"}, "K11", "is anomalous: 1-class training is normal"),
        ({"image": "candle/Data/Images/Anomaly/9.JPG"}, "K8", "no such file, though 1cls.csv:7"),
        ({"image": "candle/Data/Images/Anomaly/001.JPG"}, "K7", "again, as in 1cls.csv:7"),
    ],
)
def test_faults_of_rows(tree, values, kind, message):
    edit(tree, 5, **values)
    found = faults(tree)
    assert found[0][0] == kind
    assert any(message in text for _, text in found)


def test_an_image_in_train_and_test(tree):
    edit(tree, 4, image="candle/Data/Images/Normal/000.JPG")
    assert [k for k, _ in faults(tree)] == ["K14"]


def test_a_normal_image_with_a_mask(tree):
    edit(tree, 3, mask="candle/Data/Masks/Anomaly/000.png")
    assert [k for k, _ in faults(tree)] == ["K1"]


def test_files_that_the_csv_does_not_name(tree):
    trees.save(tree / "candle/Data/Images/Normal/000 (copy).JPG", trees.pixels(99))
    trees.save(tree / "candle/Data/Images/Normal/000.png", trees.pixels(98))
    trees.save(tree / "candle/Data/Masks/Anomaly/777.png", trees.mask())
    assert [k for k, _ in faults(tree)] == ["K1"]
    ignored = [text for k, text in faults(tree, "warning") if k == "K9"]
    assert ignored == [
        "candle/Data/Images/Normal/000 (copy).JPG: ignored: looks like a copy.",
        "candle/Data/Images/Normal/000.png: ignored: not in 1cls.csv.",
    ]


def test_missing_masks_and_counts(tree):
    (tree / "pcb1/Data/Masks/Anomaly/000.png").unlink()
    assert [k for k, _ in faults(tree)] == ["K1"]
    data = load(config(tree, missing_masks="image_only"))
    assert sum(r.label and not r.masks for r in data.splits["test"]) == 1
    counted = faults(tree, name="visa:fewshot", strict=True, missing_masks="image_only")
    assert [k for k, _ in counted] == ["K12", "K12"]
    assert (
        "3+1 training and 2+2 test images (normal + anomalous); VisA has 200+20 and 800+80"
        in (counted[0][1])
    )


def test_a_transposed_mask_and_the_order_of_rows(tree):
    rows = trees.visa_rows()
    trees.visa_csv(tree, "1cls", rows[::-1])
    assert load(config(tree)).splits == load(trees.visa(tree)).splits
    trees.save(tree / rows[5]["mask"], trees.mask().T)
    assert [k for k, _ in faults(tree)] == ["K2"]


def test_records_keep_labelled_training(tree):
    pytest.importorskip("tensorflow_datasets")
    data = load(config(tree, "visa:highshot"))
    records_builder.write(records_builder.plan(data), str(tree / "records"))
    again = load(config(tree / "records", "records"))
    assert again.splits == data.splits
    np.testing.assert_array_equal(again.source("train")[0].mask, trees.mask() > 0)
