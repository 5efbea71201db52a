"""The printed outcome of check-data."""

import csv
import io
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dsad.cli import main
from dsad.cli.check_data import _table, data_config, run
from dsad.core.errors import ConfigError
from dsad.data import about, layout
from dsad.data.base import DataConfig, SyntheticConfig, indexed, load
from dsad.data.checks import REMEDIES, TITLES, CheckReport, Row, check
from dsad.terminal import flags
from tests.data import published_trees, trees


def printed(config, width=40):
    out = io.StringIO()
    code = run(config, Console(file=out, width=width, soft_wrap=True))
    return code, out.getvalue()


def test_sound_set():
    code, text = printed(
        DataConfig(synthetic=SyntheticConfig(size=32, train=2, good=1, bad=1)), 120
    )
    assert code == 0
    assert "0 errors, 0 warnings: usable" in text
    for number in range(16):
        assert f"\nK{number} " in f"\n{text}"
    for category in ("speckle", "tiles", "washer", "weave", "wood"):
        assert category in text


def test_names_are_never_cut(tmp_path):
    config = trees.mvtec(tmp_path)
    name = "disc/train/good/" + 60 * "long_name_" + ".png"
    (tmp_path / "disc/train/good/000.png").rename(tmp_path / name[:240])
    long = name[:236] + ".png"
    (tmp_path / name[:240]).rename(tmp_path / long)
    (tmp_path / long).write_bytes(b"")
    (tmp_path / "disc/ground_truth/dent/000_mask.png").unlink()
    code, text = printed(config)
    assert code == 1
    assert f"{long}: [K8] the file has zero bytes" in text
    assert "disc/test/dent/000.png: [K1]" in text
    assert "2 errors, 0 warnings: NOT usable" in " ".join(text.split())


def test_no_size_is_cut_at_80_columns(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/train/good/000.png", np.zeros((1357, 2468), np.uint8))
    _, text = printed(config, 80)
    rows = text.rpartition("category ")[2].partition("kinds: ")[0]
    assert max(map(len, rows.splitlines())) <= 80
    for span in ("24–2468", "×16–1357"):
        assert span in rows.split()


def test_nothing_is_said_to_be_sound_where_there_is_no_image(tmp_path):
    code, text = printed(DataConfig(name="imagenet", root=str(tmp_path)), 120)
    assert code == 1
    assert ": ok" not in text
    assert "published ones: does not apply: no image was found" in text


def test_warnings_do_not_fail(tmp_path):
    config = trees.mvtec(tmp_path)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", 0 * trees.mask())
    code, text = printed(config, 100)
    assert code == 0
    assert "warning disc/ground_truth/dent/000_mask.png: [K5]" in text


def test_config_that_cannot_be_meant():
    with pytest.raises(ConfigError, match=r"config\.data\.root: empty"):
        printed(DataConfig(name="mvtec"))


def lines(text, severity):
    return [line for line in text.splitlines() if line.startswith(severity)]


def test_equal_faults_are_one_line_with_the_first_file(tmp_path):
    config = trees.mvtec(tmp_path)
    for path in ("disc/train/good/000", "disc/train/good/001", "plate/test/good/001"):
        (tmp_path / f"{path}.png").write_bytes(b"")
    for name in ("b.txt", "notes about it.txt"):  # "b" is in the words of the message, too
        (tmp_path / "disc/train/good" / name).write_text("x")
    for category in ("disc", "plate"):
        (tmp_path / category / "ground_truth/dent/000_mask.png").unlink()
    code, text = printed(config)
    assert code == 1
    k1, k8 = lines(text, "error")
    assert k1.startswith("error   2 alike, the first: disc/test/dent/000.png: [K1] anomalous")
    assert k8.startswith("error   3 alike, the first: disc/train/good/000.png: [K8] the file has")
    (k9,) = lines(text, "warning")
    assert k9.startswith("warning 2 alike, the first: disc/train/good/b.txt: [K9] ignored: suffix")
    assert "--all" in text
    assert "5 errors, 2 warnings" in text
    out = io.StringIO()
    assert run(config, Console(file=out, width=80, soft_wrap=True), every=True) == 1
    assert len(lines(out.getvalue(), "error")) == 5
    assert "--all" not in out.getvalue()


def test_all_faults_of_an_image_and_its_mask_come_in_one_run(tmp_path):
    config = trees.mvtec(tmp_path)
    grey = np.full((8, 24), 7, np.uint8)
    trees.save(tmp_path / "disc/ground_truth/dent/000_mask.png", grey)  # values and size
    alpha = trees.pixels(3, 4)
    trees.save(tmp_path / "disc/test/dent/000.png", alpha)  # mode
    trees.save(tmp_path / "plate/ground_truth/dent/001_mask.png", grey, "RGB")  # mode and size
    faults = {(f.check, f.path) for f in check(config).faults}
    assert faults == {
        ("K3", "disc/test/dent/000.png"),
        ("K2", "disc/ground_truth/dent/000_mask.png"),
        ("K4", "disc/ground_truth/dent/000_mask.png"),
        ("K2", "plate/ground_truth/dent/001_mask.png"),
        ("K3", "plate/ground_truth/dent/001_mask.png"),
    }


def test_turned_photographs_and_masks_are_checked_as_they_are_loaded(tmp_path):
    trees.good_and_bad(tmp_path / "pics", 4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown as 16 × 24 (width × height)
    for i, shape in enumerate(((24, 16), (16, 24))):
        Image.fromarray(trees.pixels(i + 50)).save(tmp_path / f"pics/bad/{i}.jpg", exif=exif)
        (tmp_path / f"pics/bad/{i}.png").unlink()
        trees.save(tmp_path / f"pics/masks/{i}.png", np.full(shape, 255, np.uint8))
    keys = layout.of(str(tmp_path / "pics")).keys
    report = check(DataConfig(**keys))
    assert [(f.check, f.path) for f in report.faults] == [("K2", "masks/1.png")]
    assert "24×16 pixels (width × height) for an image of 16×24, turned" in report.faults[0].message
    assert report.rows[0].sizes == "16–24×16–24"


@pytest.mark.parametrize(
    ("folders", "keys"),
    [
        ((".",), {"normal": ""}),
        (("good",), {"normal": "good"}),
        (("Gut (neu)", "schlecht [ß]"), {"normal": "Gut (neu)", "abnormal": "schlecht [ß]"}),
        (("not_good", "OK"), {"normal": "OK", "abnormal": None}),
        (("ok", "NG", "ng_masks"), {"normal": "ok", "abnormal": "NG", "masks": "ng_masks"}),
        (("train_good", "test_good", "defect"),
         {"normal": "train_good", "test_normal": "test_good", "abnormal": "defect"}),
        (("a/ok", "a/nok", "b ü/ok"), {"normal": "{category}/ok", "abnormal": "{category}/nok"}),
    ],
)  # fmt: skip
def test_folders_are_taken_for_what_they_are_named(tmp_path, folders, keys):
    base = tmp_path / "Prüf teile"
    for i, name in enumerate(folders):
        for k in range(5):
            trees.save(base / name / f"{k} ä.png", trees.pixels(10 * i + k))
    told = layout.of(str(base))
    want = {key: str(base / name) for key, name in keys.items() if name is not None}
    assert told.keys == {"name": "folder", **want}
    assert told.others == (("not_good",) if "not_good" in folders else ())
    config = DataConfig(**told.keys, missing_masks="image_only")
    assert len(indexed(config).source("train")) >= 4


def test_other_layouts_are_known_and_what_is_none_is_refused(tmp_path):
    trees.mvtec(tmp_path / "mv")
    assert layout.of(str(tmp_path / "mv")).keys == {"name": "mvtec", "root": f"{tmp_path}/mv"}
    one = str(tmp_path / "mv" / "disc")
    assert layout.of(one).keys == {"name": "mvtec", "root": one}
    (tmp_path / "list.csv").write_text("path,label\n")
    assert layout.of(f"{tmp_path}/list.csv").keys["manifest"] == f"{tmp_path}/list.csv"
    for name in ("x/good", "x/ok", "y/scratch", "y/new"):
        trees.save(tmp_path / name / "0.png", trees.pixels(0))
    for path, text in (
        ("x", "both good and ok may be the normal images"),
        ("y", "found the folders new, scratch"),
        ("mvv", "does not exist.*Did you mean 'mv'"),
        ("x/good/0.png", "is a file"),
    ):
        with pytest.raises(ConfigError, match=text):
            layout.of(str(tmp_path / path))


@pytest.mark.parametrize("name", ["mvtec_ad2", "mvtec_loco", "mpdd", "btad", "ksdd2", "dagm"])
def test_published_sets_are_taken_by_their_names(tmp_path, name):
    published_trees.write(name, tmp_path)
    assert layout.of(str(tmp_path)).keys == {"name": name, "root": str(tmp_path)}


def test_a_set_with_variants_or_twins(tmp_path):
    trees.mtd(tmp_path / "tiles", ["MT_Free/Imgs/a.jpg", "MT_Fray/Imgs/b.jpg"])
    assert layout.of(f"{tmp_path}/tiles").keys["name"] == "mtd:grouped"
    published_trees.write("mvtec_3d", tmp_path / "cloud")
    with pytest.raises(ConfigError, match="say which: .*name=adam3d or .*name=mvtec_3d"):
        layout.of(f"{tmp_path}/cloud")


def test_a_wrong_name_is_refused_with_the_right_one(tmp_path, capsys):
    for name in ("mvtec_ad2", "mpdd"):
        root = published_trees.write(name, tmp_path / name).root
        data = ["check-data", "--config.data.name=mvtec", f"--config.data.root={root}"]
        assert main.main(data) == 2
        told = capsys.readouterr().err
        assert f"config.data.name: expected {name}, found 'mvtec'. {root} holds MPDD" in told or (
            f"config.data.name: expected {name}, found 'mvtec'. {root} holds MVTec AD 2" in told
        )
    root = trees.visa(tmp_path / "visa").root
    with pytest.raises(ConfigError, match="expected visa or visa:highshot or .*holds VisA, as"):
        indexed(DataConfig(name="folder", root=root))
    own = DataConfig(name="folder", normal=f"{root}/candle/Data/Images/Normal")
    assert indexed(own).source("train")  # named by hand


def test_images_beside_the_folders_of_categories_are_told_of(tmp_path):
    for i, name in enumerate(("a/ok/0", "b/ok/0", "b/lose", "c")):
        trees.save(tmp_path / f"{name}.png", trees.pixels(i))
    assert layout.of(str(tmp_path)).others == ("2 images beside the folders",)


def test_the_command_takes_a_folder_and_says_how_to_go_on(tmp_path, capsys):
    base = tmp_path / "Teile ü"
    trees.good_and_bad(base, 5, 2)
    assert main.main(["check-data", str(base)]) == 0
    text = capsys.readouterr().out
    assert "checking: 0/7 (0 s)" in text
    assert "checking: 7/7" in text
    assert "\x1b" not in text
    assert "\r" not in text
    command = text[text.index("\n  dsad ") :].strip()
    words = shlex.split(command)
    assert words[:2] == ["dsad", "evaluate"]
    assert f"--config.data.normal={base}/good" in words
    config, _, _ = flags.Command("evaluate", "", config="knn").parse(
        [w for w in words[2:] if not w.startswith("--workdir")]
    )
    assert load(data_config(config)).splits["test"]
    trees.save(base / "lose.png", trees.pixels(99))
    assert main.main(["check-data", str(base)]) == 0
    assert "neither good nor bad: 1 images beside the folders\n" in capsys.readouterr().out
    assert main.main(["check-data", str(base / "good")]) == 0
    assert "\n  dsad fit --config=configs/patchcore.py" in capsys.readouterr().out
    assert main.main(["check-data", str(base), "--config.data.name=mvtec"]) == 2
    assert main.main(["check-data", str(base), "more"]) == 2


def test_the_table_fits_80_columns_with_whole_numbers():
    row = Row(
        category="Gehäuse_vorne_links_mit_langem_Namen", train=12345, good=4321, bad=1234,
        kinds=12, without_mask=321, sizes="1024–4096×1024–4096", modes="L, RGB, RGBA",
        area=0.00123, regions=12345, vanished=1234,
    )  # fmt: skip
    report = CheckReport(
        name="folder", faults=(), rows=(row,), skipped={}, protocol={"dataset": "x", "split": "y"}
    )
    out = io.StringIO()
    Console(file=out, width=80).print(_table(report))
    text = out.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for number in ("12345", "4321", "1234", "321 no mask", "1024–4096", "0.00123", "1234/12345"):
        assert number in text
    assert "…" not in text


def test_pictures_and_fix_list_are_written_and_nothing_else_is_changed(tmp_path, capsys):
    config = trees.mvtec(tmp_path / "mv")
    (tmp_path / "mv/disc/ground_truth/dent/000_mask.png").unlink()
    (tmp_path / "mv/disc/train/good/a, b.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    data = ["check-data", "--config.data.name=mvtec", f"--config.data.root={config.root}"]
    page, fixes = f"{tmp_path}/out/page.png", f"{tmp_path}/out/fixes.csv"
    assert main.main([*data, f"--pictures={page}", f"--fix-list={fixes}"]) == 1
    text = capsys.readouterr().out
    assert f"pictures: {page}\n" in text
    assert f"2 faults and what to do: {fixes}" in text
    assert Image.open(page).width > 1000
    with open(fixes, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["check"], r["severity"], r["path"]) for r in rows] == [
        ("K1", "error", "disc/test/dent/000.png"),
        ("K9", "warning", "disc/train/good/a, b.txt"),
    ]
    assert rows[0]["message"].startswith("anomalous image without mask")
    assert all(r["what to do"] for r in rows)
    new = sorted({*tmp_path.rglob("*")} - {*before})
    assert [p.name for p in new] == ["out", "fixes.csv", "page.png"]


def test_files_that_cannot_be_written_are_refused_before_the_check(tmp_path, capsys):
    for flag in ("--pictures=page.jpg", "--fix-list=faults.txt"):
        assert main.main(["check-data", flag]) == 2
        assert "expected a file name that ends in ." in capsys.readouterr().err
    (tmp_path / "p.png").mkdir()
    assert main.main(["check-data", f"--pictures={tmp_path}/p.png"]) != 0
    captured = capsys.readouterr()
    assert "expected a file, found a directory" in captured.err
    assert "checking" not in captured.out


def test_strict_is_short_for_the_key(tmp_path, capsys):
    trees.mvtec(tmp_path)
    (tmp_path / "disc").rename(tmp_path / "bottle")
    data = ["check-data", "--config.data.name=mvtec", f"--config.data.root={tmp_path}"]
    assert main.main(data) == 0
    assert main.main([*data, "--strict"]) == 1
    assert "error   bottle: [K12]" in capsys.readouterr().out


def test_the_list_tells_what_is_not_known_for_sure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main(["check-data", "--list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    whole = " ".join(text.split())
    for name, item in about.every().items():
        assert main.main(["check-data", "--list", f"--config.data.name={name}"]) == 0
        one = capsys.readouterr().out
        for fact in (item.licence, item.citation, *item.remarks):
            assert fact in whole
            assert fact in " ".join(one.split())


def test_every_check_says_what_to_do():
    assert REMEDIES.keys() == TITLES.keys()


def k14(config):
    return [(f.severity, f.path, f.message) for f in check(config).faults if f.check == "K14"]


def test_images_that_occur_twice_on_one_side_are_counted_once_per_category(tmp_path):
    config = trees.mvtec(tmp_path)
    good = tmp_path / "disc/train/good"
    shutil.copy(good / "000.png", good / "twin1.png")
    trees.save(good / "twin2.bmp", trees.pixels(0))  # the same pixels in another file
    assert k14(config) == [
        ("warning", "disc", "2 train images repeat the pixels of another; the first is "
         "disc/train/good/twin1.png, as disc/train/good/000.png."),
    ]  # fmt: skip


def test_equal_images_with_equal_masks_are_twins_and_with_other_masks_a_contradiction(tmp_path):
    config = trees.mvtec(tmp_path)
    shutil.copy(tmp_path / "disc/test/dent/000.png", tmp_path / "disc/test/dent/001.png")
    [(_, path, text)] = k14(config)
    assert (path, text.startswith("1 test image repeats the pixels")) == ("disc", True)
    trees.save(tmp_path / "disc/ground_truth/dent/001_mask.png", trees.mask()[::-1])
    [(_, path, text)] = k14(config)
    assert path == "disc/test/dent/001.png"
    assert text == "same pixels as disc/test/dent/000.png (test, dent), but another mask."
