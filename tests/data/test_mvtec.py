"""MVTec-layout folders: the sound tree, then one planted fault per test, then all at once."""

import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from dsad.core.errors import ConfigError, DataError
from dsad.data import mvtec
from dsad.data.base import DataConfig, FaultError, load
from dsad.data.checks import check
from dsad.terminal import flags
from tests.data import trees
from tests.helpers import real_data


def faults(report, severity):
    return [(f.check, f.path) for f in report.faults if f.severity == severity]


def cut(file, share=2 / 3):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def test_sound_tree(tmp_path):
    config = trees.mvtec(tmp_path)
    data = load(config)
    assert data.categories == ("disc", "plate")
    assert len(data.source("train")) == 6
    assert len(data.source("test", "plate")) == 4
    test = data.source("test", "disc")
    assert [r.path for r in test.records] == [
        "disc/test/dent/000.png",
        "disc/test/dent/001.png",
        "disc/test/good/000.png",
        "disc/test/good/001.png",
    ]
    sample = test[1]
    assert sample.record.kind == "dent"
    assert sample.record.label == 1
    np.testing.assert_array_equal(sample.image, trees.pixels(21))
    np.testing.assert_array_equal(sample.mask, trees.mask() > 0)
    assert not test[2].mask.any()
    assert check(config).faults == ()


def test_root_may_be_one_category(tmp_path):
    trees.mvtec(tmp_path)
    data = load(DataConfig(name="mvtec", root=str(tmp_path / "disc")))
    assert data.categories == ("disc",)
    assert data.source("train").records[0].path == "train/good/000.png"


def test_creation_order_changes_nothing(tmp_path):
    made = [load(trees.mvtec(tmp_path / str(order), order=order)) for order in range(4)]
    for split in ("train", "test"):
        first = made[0].source(split)
        for other in made[1:]:
            source = other.source(split)
            assert list(source.records) == list(first.records)
            for a, b in zip(first, source, strict=True):
                np.testing.assert_array_equal(a.image, b.image)
                np.testing.assert_array_equal(a.mask, b.mask)
    assert len({data.protocol["split_hash"] for data in made}) == 1


def test_split_hash_follows_split_path_and_label(tmp_path):
    config = trees.mvtec(tmp_path)
    before = load(config).protocol["split_hash"]
    assert len(before) == 16
    (tmp_path / "disc/train/good/002.png").rename(tmp_path / "disc/train/good/003.png")
    assert load(config).protocol["split_hash"] != before


def test_missing_folder(tmp_path):
    gone = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"nowhere: \[K0\] does not exist; set config.data.root"):
        load(DataConfig(name="mvtec", root=str(gone)))
    with pytest.raises(ConfigError, match=r"config.data.root: empty"):
        load(DataConfig(name="mvtec"))
    with pytest.raises(DataError, match="no category found"):
        load(DataConfig(name="mvtec", root=str(tmp_path)))


@pytest.mark.parametrize("folder", ["train/good", "test/good", "test/dent"])
def test_empty_class(tmp_path, folder):
    config = trees.mvtec(tmp_path)
    for file in (tmp_path / "disc" / folder).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=rf"disc/{folder}: \[K0\] empty class"):
        load(config)


def test_missing_train_folder(tmp_path):
    config = trees.mvtec(tmp_path)
    shutil.rmtree(tmp_path / "disc/train")
    data = load(config)
    assert "disc/train: [K0] missing: nothing can be fitted on the category" in str(data.faults[0])
    assert (len(data.source("train", "disc")), len(data.source("test", "disc"))) != (0, 0)
    assert len(data.source("train", "disc")) == 0


def test_without_test_folder_pretraining_works(tmp_path):
    config = trees.mvtec(tmp_path)
    for category in ("disc", "plate"):
        shutil.rmtree(tmp_path / category / "test")
        shutil.rmtree(tmp_path / category / "ground_truth")
    assert len(load(config).source("train")) == 6
    assert faults(check(config), "warning") == [("K0", "disc/test"), ("K0", "plate/test")]


def test_unknown_category_and_variant(tmp_path):
    config = trees.mvtec(tmp_path, categories=("disk",))
    with pytest.raises(ConfigError, match=r"disk not found\. Did you mean 'disc'\?.*disc, plate"):
        load(config)
    with pytest.raises(ConfigError, match=r"expected one of mvtec; found 'mvtec:grouped'"):
        load(DataConfig(name="mvtec:grouped", root=str(tmp_path)))
    data = load(trees.mvtec(tmp_path))
    with pytest.raises(ConfigError, match="no split 'val': expected one of test, train"):
        data.source("val")
    with pytest.raises(ConfigError, match=r"no category 'plaet'\. Did you mean 'plate'"):
        data.source("test", "plaet")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_file(tmp_path, suffix):
    config = trees.mvtec(tmp_path)
    broken = trees.save(tmp_path / f"disc/train/good/007.{suffix}", trees.pixels(7))
    cut(broken)
    data = load(config)  # the index does not decode
    expected = rf"disc/train/good/007.{suffix}: \[K8\] cannot be decoded"
    with pytest.raises(DataError, match=expected):
        data.source("train")[3]
    assert faults(check(config), "error") == [("K8", f"disc/train/good/007.{suffix}")]


def test_file_of_zero_bytes(tmp_path):
    config = trees.mvtec(tmp_path)
    (tmp_path / "disc/test/good/001.png").write_bytes(b"")
    (fault,) = check(config).faults
    assert str(fault).startswith("disc/test/good/001.png: [K8] the file has zero bytes")


def test_mask_of_another_size(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "plate/ground_truth/dent/001_mask.png", trees.mask().T)
    with pytest.raises(DataError, match=r"001_mask.png: \[K2\] mask of 16×24 .* image of 24×16"):
        load(config).source("test", "plate")[1]
    assert faults(check(config), "error") == [("K2", "plate/ground_truth/dent/001_mask.png")]


def test_a_mask_lies_on_the_image_as_its_exif_turns_it(tmp_path):
    config = trees.mvtec(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    image, mask = (
        tmp_path / f"plate/{x}.png" for x in ("test/dent/001", "ground_truth/dent/001_mask")
    )
    Image.fromarray(trees.pixels(7)).save(image, exif=exif)
    with pytest.raises(
        DataError, match=r"\[K2\] mask of 24×16 .* image of 16×24, turned as its EXIF"
    ):
        load(config).source("test", "plate")[1]
    trees.save(mask, trees.mask().T)
    sample = load(config).source("test", "plate")[1]
    np.testing.assert_array_equal(sample.image, trees.pixels(7)[::-1].swapaxes(0, 1))
    np.testing.assert_array_equal(sample.mask, trees.mask().T > 0)
    report = check(config)
    assert report.faults == ()
    assert next(row.sizes for row in report.rows if row.category == "plate") == "16–24×16–24"


def test_anomalous_image_without_mask(tmp_path):
    config = trees.mvtec(tmp_path)
    (tmp_path / "disc/ground_truth/dent/000_mask.png").unlink()
    expected = r"disc/test/dent/000.png: \[K1\] .*expected disc/ground_truth/dent/000_mask.png"
    with pytest.raises(DataError, match=expected):
        load(config)
    allowed = trees.mvtec(tmp_path / "x", missing_masks="image_only")
    (tmp_path / "x/disc/ground_truth/dent/000_mask.png").unlink()
    data = load(allowed)
    assert data.protocol["missing_masks"] == "image_only"
    assert data.protocol["lossy"] == []
    assert data.source("test")[0].mask is None
    report = check(allowed)
    assert report.ok
    assert faults(report, "warning") == [("K1", "disc/test/dent/000.png")]
    assert report.rows[0].without_mask == 1


@pytest.mark.parametrize("kind", ["dent", "scratch"])
def test_mask_without_image(tmp_path, kind):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / f"disc/ground_truth/{kind}/009_mask.png", trees.mask())
    with pytest.raises(DataError, match=rf"{kind}/009_mask.png: \[K1\] mask without image"):
        load(config)


def test_duplicate_stem(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/train/good/001.jpg", trees.pixels(70))
    expected = r"disc/train/good/001.png: \[K7\] the stem '001' .* disc/train/good/001.jpg"
    with pytest.raises(DataError, match=expected):
        load(config)


def test_second_mask_of_one_image(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/001.png", trees.mask())
    with pytest.raises(DataError, match=r"\[K7\] second mask of disc/test/dent/001.png"):
        load(config)


def test_mask_named_like_its_image(tmp_path):
    config = trees.mvtec(tmp_path)
    folder = tmp_path / "disc/ground_truth/dent"
    (folder / "001_mask.png").rename(folder / "001.png")
    assert load(config).source("test")[1].mask.sum() == 15


def grey16(file):
    Image.fromarray(np.full((16, 24), 4000, np.uint16)).save(file)


def rgba(file):
    Image.fromarray(trees.pixels(1, 4)).save(file)


@pytest.mark.parametrize(("write", "mode"), [(grey16, "I;16"), (rgba, "RGBA")])
def test_mode_that_would_lose_information(tmp_path, write, mode):
    config = trees.mvtec(tmp_path)
    write(tmp_path / "disc/train/good/002.png")
    with pytest.raises(DataError, match=rf"002.png: \[K3\] image mode {mode}: ") as told:
        load(config).source("train")[2]
    (hint,) = [word for word in shlex.split(str(told.value)) if word.startswith("--config")]
    parsed, _, _ = flags.Command("x", "", config="data").parse([hint.removesuffix(".")])
    assert parsed.data.lossy == (mode,)
    assert faults(check(config), "error") == [("K3", "disc/train/good/002.png")]
    allowed = DataConfig(name="mvtec", root=str(tmp_path), lossy=(mode,))
    assert load(allowed).source("train")[2].image.shape == (16, 24, 3)
    assert check(allowed).ok


def test_images_outside_the_folders_of_the_layout_are_told(tmp_path):
    config = trees.mvtec(tmp_path)
    for name in ("extra.png", "disc/extra.png", "license.txt", "disc/readme.txt"):
        (tmp_path / name).write_text("x")
    paths = [f.path for f in check(config).faults]
    assert paths == ["disc/extra.png", "extra.png"]
    alone = check(DataConfig(name="mvtec", root=str(tmp_path / "disc"))).faults
    assert [f.path for f in alone] == ["extra.png"]


def test_licences_of_categories_are_named(tmp_path):
    config = trees.mvtec(tmp_path)
    assert load(config).protocol["licence"] == "not stated in the data folder"
    for name in ("plate/Licence", "disc/license.txt"):
        (tmp_path / name).write_text("x")
    told = load(config).protocol["licence"]
    assert told == "see disc/license.txt, plate/Licence in the data folder"
    (tmp_path / "LICENSE").write_text("x")
    assert load(config).protocol["licence"] == "see LICENSE in the data folder"


def test_stray_files_are_ignored_with_a_warning(tmp_path):
    config = trees.mvtec(tmp_path)
    good = tmp_path / "disc/train/good"
    shutil.copy(good / "000.png", good / "000 (copy).png")
    shutil.copy(good / "000.png", good / ".001.png")
    (good / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "disc/train/notes.txt").write_text("x")
    (tmp_path / "docs").mkdir()
    assert len(load(config).source("train")) == 6
    report = check(config)
    assert report.ok
    assert faults(report, "warning") == [
        ("K9", "disc/train/good/.001.png"),
        ("K9", "disc/train/good/000 (copy).png"),
        ("K9", "disc/train/good/Thumbs.db"),
        ("K9", "disc/train/notes.txt"),
        ("K9", "docs"),
    ]


def test_empty_mask_is_a_warning(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/001_mask.png", 0 * trees.mask())
    report = check(config)
    assert report.ok
    assert faults(report, "warning") == [("K5", "disc/ground_truth/dent/001_mask.png")]


def test_mask_on_a_normal_image(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/good/000_mask.png", trees.mask())
    trees.save(tmp_path / "disc/ground_truth/good/001_mask.png", 0 * trees.mask())
    report = check(config)
    assert faults(report, "error") == [("K6", "disc/ground_truth/good/000_mask.png")]
    assert "marks 15 pixels" in report.faults[0].message


def test_mask_of_zero_and_one(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", trees.mask(1))
    with pytest.raises(DataError, match=r"\[K4\] mask values 0, 1: expected only \(0, 255\)"):
        load(config).source("test")[0]
    assert faults(check(config), "error") == [("K4", "disc/ground_truth/dent/000_mask.png")]


def test_palette_mask(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", trees.mask(), "P")
    with pytest.raises(DataError, match=r"000_mask.png: \[K3\] mask mode P"):
        load(config).source("test")[0]


def test_same_pixels_in_train_and_test(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/test/good/000.png", trees.pixels(2))
    (fault,) = check(config).faults
    assert (fault.check, fault.severity) == ("K14", "warning")
    assert fault.path == "disc/test/good/000.png"
    assert "same pixels as disc/train/good/002.png (train, good)" in fault.message


def test_region_that_vanishes_on_the_canvas(tmp_path):
    config = trees.mvtec(tmp_path, canvas=6)
    grey = trees.mask()
    grey[0, 0] = 255  # nearest sampling of 24 → 6 reads columns 2, 6, 10, ...
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", grey)
    report = check(config)
    assert faults(report, "warning") == [("K15", "disc")]
    assert "1 of 3 defect regions" in report.faults[0].message


def test_all_faults_at_once(tmp_path):
    config = trees.mvtec(tmp_path)
    disc, plate = tmp_path / "disc", tmp_path / "plate"
    (disc / "ground_truth/dent/000_mask.png").unlink()
    trees.save(disc / "ground_truth/dent/009_mask.png", trees.mask())
    trees.save(disc / "train/good/001.bmp", trees.pixels(71))
    shutil.copy(disc / "train/good/000.png", disc / "train/good/000 (copy).png")
    cut(disc / "train/good/002.png")
    rgba(disc / "test/good/000.png")
    trees.save(plate / "ground_truth/dent/000_mask.png", trees.mask().T)
    trees.save(plate / "ground_truth/dent/001_mask.png", trees.mask(1))
    trees.save(plate / "ground_truth/good/001_mask.png", trees.mask())
    (plate / "test/scratch").mkdir()
    index = [
        ("K0", "plate/test/scratch"),
        ("K1", "disc/ground_truth/dent/009_mask.png"),
        ("K1", "disc/test/dent/000.png"),
        ("K7", "disc/train/good/001.png"),
    ]
    with pytest.raises(FaultError, match=r"mvtec in .*: 4 faults") as caught:
        load(config)
    assert sorted((f.check, f.path) for f in caught.value.faults) == index
    report = check(config)
    assert not report.ok
    assert faults(report, "error") == [
        *index[:3],
        ("K2", "plate/ground_truth/dent/000_mask.png"),
        ("K3", "disc/test/good/000.png"),
        ("K4", "plate/ground_truth/dent/001_mask.png"),
        ("K6", "plate/ground_truth/good/001_mask.png"),
        ("K7", "disc/train/good/001.png"),
        ("K8", "disc/train/good/002.png"),
    ]
    assert faults(report, "warning") == [("K9", "disc/train/good/000 (copy).png")]


def test_official_counts_only_for_official_names(tmp_path):
    config = trees.mvtec(tmp_path)
    (tmp_path / "disc").rename(tmp_path / "bottle")
    (fault,) = check(config).faults
    assert str(fault) == (
        "bottle: [K12] 3/2/2/1 train/good/anomalous images/kinds; MVTec AD has 209/20/63/3."
    )
    assert fault.severity == "warning"
    with pytest.raises(DataError, match="K12"):
        load(DataConfig(name="mvtec", root=str(tmp_path), strict=True))


def test_official_table_sums():
    totals = [sum(row[i] for row in mvtec.OFFICIAL.values()) for i in range(4)]
    assert totals == [3629, 467, 1258, 73]


def test_bottle():
    config = DataConfig(name="mvtec", root=str(real_data("mvtec", "bottle256")))
    report = check(config)
    (row,) = report.rows
    assert report.faults == ()
    assert (row.train, row.good, row.bad, row.kinds) == mvtec.OFFICIAL["bottle"]
    assert row.sizes == "256×256"


def test_cookie_set_lacks_eight_masks():
    root = str(real_data("lookout", "cookie_288x384"))
    with pytest.raises(FaultError) as caught:
        load(DataConfig(name="mvtec", root=root))
    assert [f.check for f in caught.value.faults] == ["K1"] * 8
    names = {f.path for f in caught.value.faults}
    assert names == {f"test/defect_nomask/test-anomaly-{i}.png" for i in range(1, 9)}
    data = load(DataConfig(name="mvtec", root=root, missing_masks="image_only"))
    assert sum(r.label for r in data.source("test").records) == 40
