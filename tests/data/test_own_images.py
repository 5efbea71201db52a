"""Own folders of good and bad images: categories, kinds, masks, hold-out, and what is refused."""

import dataclasses
import hashlib
import shlex

import numpy as np
import pytest

from dsad.core.errors import ConfigError, DataError
from dsad.data import heldout
from dsad.data.base import DataConfig, indexed, load
from dsad.data.checks import check
from tests.data import trees


def flat(root, good=10, bad=2, **kwargs):
    """Images directly in pics/good and pics/bad below ``root``."""
    trees.good_and_bad(root / "pics", good, bad)
    places = {"normal": "pics/good", **({"abnormal": "pics/bad"} if bad else {})}
    return DataConfig(name="folder", root=str(root), **{**places, **kwargs})


def paths(data, split, label=None):
    return [r.path for r in data.source(split).records if label in (None, r.label)]


def refused(config, *matches):
    with pytest.raises(DataError) as caught:
        load(config)
    for text in matches:
        assert text in str(caught.value)


def test_a_flat_folder_is_one_category_and_a_fifth_is_held_out(tmp_path):
    data = load(flat(tmp_path))
    assert data.categories == ("pics",)
    assert paths(data, "test", 1) == ["pics/bad/0.png", "pics/bad/1.png"]
    assert {r.kind for r in data.source("test").records} == {"good", "bad"}
    names = [f"pics/good/{i}.png" for i in range(10)]

    def drawn(path):
        return hashlib.sha256(f"0\tpics\t{path}".encode()).hexdigest()

    assert set(paths(data, "test", 0)) == set(sorted(names, key=drawn)[:2])
    assert sorted(paths(data, "train") + paths(data, "test", 0)) == names
    assert data.protocol["split"].startswith("2 of 10 normal images held out (share 0.2, seed 0,")
    assert data.protocol["defects"] == "real"


def test_the_hold_out_changes_with_the_seed_and_grows_with_the_share(tmp_path):
    config = flat(tmp_path, good=30)
    held = {
        (seed, share): set(
            paths(load(dataclasses.replace(config, seed=seed, holdout=share)), "test", 0)
        )
        for seed in (0, 1)
        for share in (0.01, 0.2, 0.5)
    }
    assert {key: len(value) for key, value in held.items() if key[0] == 0} == {
        (0, 0.01): 1, (0, 0.2): 6, (0, 0.5): 15,
    }  # fmt: skip
    assert held[0, 0.01] < held[0, 0.2] < held[0, 0.5]
    assert held[0, 0.2] != held[1, 0.2]


def test_without_a_share_no_normal_image_is_tested_and_with_the_whole_share_everything(tmp_path):
    config = flat(tmp_path)
    none, every = (load(dataclasses.replace(config, holdout=share)) for share in (0, 1))
    assert (len(none.source("train")), len(none.source("test"))) == (10, 2)
    assert none.protocol["split"] == "all 10 normal images train, none is tested"
    assert (len(every.source("train")), len(every.source("test"))) == (0, 12)
    alone = load(dataclasses.replace(config, holdout=0, abnormal=""))
    assert (len(alone.source("train")), len(alone.source("test"))) == (10, 0)


@pytest.mark.parametrize("bad", [0, 2])
def test_a_model_is_not_tested_on_what_it_was_fitted_on(tmp_path, bad):
    live = load(flat(tmp_path, bad=bad, seed=3))
    fitted = set(heldout.contents(live.source("train")))
    for file in (tmp_path / "pics").glob("*/*.png"):  # the same images under other names
        copy = tmp_path / "neu" / file.parent.name / f"Bild {file.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    places = {"normal": "neu/good", **({"abnormal": "neu/bad"} if bad else {})}
    given = load(dataclasses.replace(live.config, **places, holdout=1))
    again = heldout.left(given, fitted, "pics")
    assert again.categories == ("pics",)
    for label in {0, bad // 2}:  # procedural defects are drawn by name
        one, other = (
            [source[i] for i, r in enumerate(source.records) if r.label == label]
            for source in (live.source("test"), again.source("test"))
        )
        for left, right in zip(one, other, strict=True):
            assert (right.record.kind, right.record.category) == (left.record.kind, "pics")
            np.testing.assert_array_equal(left.image, right.image)
    kinds = [[r.kind for r in data.source("test").records] for data in (live, again)]
    assert sorted(kinds[0]) == sorted(kinds[1])
    split = "2 normal images tested, 8 that the model was fitted on are not"
    assert again.protocol["split"] == split
    assert len(again.source("train")) == 8
    every = set(heldout.contents(load(dataclasses.replace(live.config, holdout=0)).source("train")))
    if bad:
        alone = heldout.left(given, every)
        assert [r.label for r in alone.source("test").records] == [1, 1]
    else:
        with pytest.raises(DataError, match="fitted on all 10 normal images.*data.abnormal=DIR"):
            heldout.left(given, every)


def test_a_model_is_not_tested_on_defects_that_it_learnt_from(tmp_path):
    live = load(flat(tmp_path, bad=3))
    test = live.source("test")
    bad = paths(live, "test", 1)
    fitted = {*heldout.contents(live.source("train")), *heldout.contents(test, bad[:2])}
    left = heldout.left(load(dataclasses.replace(live.config, holdout=1)), fitted)
    assert paths(left, "test", 1) == bad[2:]
    assert paths(left, "test", 0) == paths(live, "test", 0)
    assert left.protocol["split"].endswith("; 1 abnormal ones are, 2 that it learnt from are not")
    everything = {*fitted, *heldout.contents(test)}
    with pytest.raises(DataError, match="all 10 normal images, and on all 3 abnormal ones"):
        heldout.left(load(dataclasses.replace(live.config, holdout=1)), everything)


@pytest.mark.parametrize("holdout", [0, 0.2])
def test_places_that_hold_no_image_are_refused(tmp_path, holdout):
    config = dataclasses.replace(flat(tmp_path), abnormal="pics/none_*/*.png", holdout=holdout)
    with pytest.raises(DataError, match=r"config\.data\.abnormal=pics/none_\*/\*\.png.*no image"):
        load(config)


def test_without_any_mask_kinds_may_share_names(tmp_path):
    for i, name in enumerate(("bad/dent", "bad/hole", *(["good"] * 3))):
        trees.save(tmp_path / "pics" / name / f"{max(0, i - 2)}.png", trees.pixels(i))
    (tmp_path / "none").mkdir()
    faults = indexed(flat(tmp_path, 0, 0, abnormal="pics/bad", masks="none")).faults
    told = sorted((f.check, f.path) for f in faults)
    assert told == [("K0", "config.data.masks=none")] + [
        ("K1", f"pics/bad/{kind}/0.png") for kind in ("dent", "hole")
    ]


def test_bad_images_and_masks_do_not_move_the_hold_out(tmp_path):
    config = flat(tmp_path)
    trees.save(tmp_path / "pics/masks/0.png", trees.mask())
    trees.save(tmp_path / "pics/masks/1_mask.png", trees.mask())
    alone = load(dataclasses.replace(config, abnormal=""))
    masked = load(dataclasses.replace(config, masks="pics/masks"))
    assert paths(alone, "train") == paths(load(config), "train") == paths(masked, "train")
    assert [r.masks for r in masked.source("test").records if r.label] == [
        ("pics/masks/0.png",), ("pics/masks/1_mask.png",),
    ]  # fmt: skip
    assert masked.source("test")[0].mask.any()
    assert load(config).source("test")[0].mask is None


def test_places_are_relative_to_the_working_directory_without_a_root(tmp_path, monkeypatch):
    config = flat(tmp_path / "deep")
    monkeypatch.chdir(tmp_path / "deep" / "pics")
    there = load(DataConfig(name="folder", normal="good", abnormal="../pics/bad"))
    assert there.root == tmp_path / "deep" / "pics"
    absolute = {
        k: f"{tmp_path}/deep/pics/{p}" for k, p in (("normal", "good"), ("abnormal", "bad"))
    }
    assert load(DataConfig(name="folder", **absolute)).protocol == there.protocol
    assert [p.removeprefix("pics/") for p in paths(load(config), "test", 1)] == paths(
        there, "test", 1
    )


def test_categories_and_kinds_are_folders_with_awkward_names(tmp_path):
    data = load(trees.labelled(tmp_path))
    assert data.categories == ("Teil ä", "part [2]")
    bad = [r for r in data.source("test", "part [2]").records if r.label]
    assert [(r.path, r.kind, r.masks) for r in bad] == [
        (f"bad/part [2]/{kind}/{i} !.png", kind, (f"masks/part [2]/{kind}/{i} !_mask.png",))
        for kind in ("Riß #1", "dent")
        for i in (0, 1)
    ]
    assert check(data.config).ok
    swapped = {
        "normal": "gut/{category}",
        "abnormal": "bad/{category}",
        "masks": "masks/{category}",
    }
    assert load(dataclasses.replace(data.config, **swapped)).protocol == data.protocol


def test_categories_above_good_and_bad(tmp_path):
    for category in "ab":
        flat(tmp_path / category)
    (tmp_path / "notes").mkdir()
    config = DataConfig(
        name="folder", root=str(tmp_path), normal="{category}/pics/good",
        abnormal="{category}/pics/bad/*.png",
    )  # fmt: skip
    data = load(config)
    assert data.categories == ("a", "b")
    assert paths(data, "test", 1)[:2] == ["a/pics/bad/0.png", "a/pics/bad/1.png"]
    only = load(dataclasses.replace(config, categories=("b",)))
    assert only.source("train").records == data.source("train", "b").records


def test_globs_name_images_of_one_folder(tmp_path):
    for i in range(4):
        trees.save(tmp_path / f"shots/monday/ok_{i}.png", trees.pixels(i))
        trees.save(tmp_path / f"shots/tuesday/ok_{i}.png", trees.pixels(10 + i))
    trees.save(tmp_path / "shots/monday/ng_1.png", trees.pixels(20))
    trees.save(tmp_path / "shots/monday/ng_1_mask.bmp", trees.mask())
    data = load(DataConfig(
        name="folder", root=str(tmp_path), normal="shots/**/ok_*", abnormal="shots/*/ng_?.png",
        masks="shots/**/*_mask.bmp",
    ))  # fmt: skip
    assert data.categories == ("shots",)
    (bad,) = [r for r in data.source("test").records if r.label]
    assert (bad.kind, bad.masks) == ("bad", ("shots/monday/ng_1_mask.bmp",))
    assert len(data.source("train")) == 6


def test_named_test_images_replace_the_hold_out(tmp_path):
    config = flat(tmp_path, test_normal="pics/more")
    trees.save(tmp_path / "pics/more/x.png", trees.pixels(50))
    data = load(config)
    assert len(data.source("train")) == 10
    assert paths(data, "test", 0) == ["pics/more/x.png"]
    assert data.protocol["split"] == "1 of 11 normal images named for the test"


def test_good_images_alone_are_tested_with_procedural_defects(tmp_path):
    config = flat(tmp_path, bad=0)
    trees.save(tmp_path / "pics/good/one more.png", trees.pixels(50))
    data = load(config)
    records = data.source("test").records
    assert data.protocol["defects"] == "procedural, no real ones"
    assert [r.path for r in records] == sorted(r.path for r in records)
    bad = [r for r in records if r.label]
    assert len(bad) == len(records) / 2 == 2
    assert all(r.kind.startswith("procedural ") for r in bad)
    by_path = {s.record.path: s for s in data.source("test")}
    for record in bad:
        stem = record.path.partition(f" with {record.kind.removeprefix('procedural ')}")[0]
        clean, drawn = by_path[f"{stem}.png"], by_path[record.path]
        changed = (clean.image != drawn.image).any(axis=-1)
        assert drawn.mask.any()
        assert changed[drawn.mask].mean() > 0.9
        assert not clean.mask.any()
    report = check(config)
    assert report.ok
    assert (report.rows[0].good, report.rows[0].bad, report.rows[0].without_mask) == (2, 2, 0)
    broken = next(r.path for r in records if not r.label)
    (tmp_path / broken).write_bytes(b"")
    assert [(f.check, f.path) for f in check(config).faults] == [("K8", broken)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normal": "pics/god"}, "config.data.normal: expected a folder .* No 'god' in .*'good'"),
        ({"normal": "pics/good/0.png"}, "It is a file"),
        ({"abnormal": "pisc/bad"}, "config.data.abnormal: .* No 'pisc' in .* Did you mean 'pics'"),
        ({"normal": ""}, "config.data.abnormal: expected config.data.normal beside it"),
        ({"abnormal": "", "masks": "m"}, "config.data.masks: expected config.data.abnormal"),
        ({"name": "mvtec"}, "config.data.name: expected 'folder' with config.data.abnormal"),
        ({"manifest": "x.csv"}, "config.data.manifest: expected nothing beside .*normal out"),
        ({"holdout": 1.1}, "config.data.holdout: expected a finite number >= 0, <= 1, found 1.1"),
    ],
)
def test_keys_that_cannot_be_meant(tmp_path, change, match):
    config = flat(tmp_path)
    with pytest.raises(ConfigError, match=match):
        load(dataclasses.replace(config, **change))


def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path):
    config = flat(tmp_path)
    trees.save(tmp_path / "pics/good/old/1.png", trees.pixels(60))
    refused(
        config,
        "pics/good/old: [K0] 1 images here and 10 directly in the folder above",
        "ends in /**/*",
    )
    assert len(load(dataclasses.replace(config, normal="pics/good/*")).source("train")) == 8
    whole = load(dataclasses.replace(config, normal="pics/good/**/*"))
    assert len(paths(whole, "train") + paths(whole, "test", 0)) == 11
    both = dataclasses.replace(config, normal="pics/**/*")
    refused(both, "[K14] 2 images such as this are named by normal=pics/**/* and by abnormal=")


@pytest.mark.parametrize("key", ["root", "normal"])
@pytest.mark.parametrize("names", [("good", "bad"), ("OK", "NG")])
def test_labels_are_not_taken_for_categories(tmp_path, key, names):
    """What the message says to write works, whatever else stays there."""
    place = tmp_path / "Prüf teile"
    trees.good_and_bad(place)
    for old, new in zip(("good", "bad"), names, strict=True):
        (place / old).rename(place / new)
    (place / "masks").mkdir()
    config = DataConfig(name="folder", **{key: str(place)})
    with pytest.raises(DataError, match=f"{names[0]} and {names[1]} are no categories") as caught:
        load(config)
    hint = str(caught.value).partition("Name them apart: ")[2].partition("\n")[0]
    flags = [x for x in shlex.split(hint) if x.startswith("--config.data.")]
    given = dict(flag.removeprefix("--config.data.").split("=", 1) for flag in flags)
    assert list(given) == ["normal", "abnormal"]
    data = load(dataclasses.replace(config, **given))
    assert len(paths(data, "train") + paths(data, "test", 0)) == 10
    assert len(paths(data, "test", 1)) == 2
    trees.good_and_bad(tmp_path / "fine" / "a")
    (tmp_path / "fine/a/bad").rename(tmp_path / "fine/a/dent")
    assert load(dataclasses.replace(config, **{key: str(tmp_path / "fine")})).categories == ("a",)


def test_categories_must_agree(tmp_path):
    config = trees.labelled(tmp_path)
    trees.save(tmp_path / "bad" / "part 2" / "x.png", trees.pixels(3))
    refused(config, "config.data.abnormal: [K0] part 2 is no folder of a category", "end config")
    refused(dataclasses.replace(config, abnormal="bad/**/*"), "a glob without {category}")
    refused(flat(tmp_path / "flat", abnormal="pics/{category}"), "write it in both")
    (tmp_path / "gut" / "empty").mkdir()
    refused(config, "empty: [K0] empty class")
    folders = flat(tmp_path / "folders", normal="*", abnormal="pics/bad/*.png")
    refused(folders, "[K0] empty class", "let a glob match files, such as 'pics/*.png'")


def test_masks_match_strictly_and_all_faults_come_at_once(tmp_path):
    config = flat(tmp_path, bad=4, masks="pics/masks")
    for name in ("0.png", "0_mask.png", "1.bmp", "9.png"):
        trees.save(tmp_path / "pics/masks" / name, trees.mask())
    trees.save(tmp_path / "pics/bad/3.bmp", trees.pixels(200))
    refused(
        config,
        "pics/masks/0_mask.png: [K7] second mask of pics/bad/0.png",
        "pics/masks/9.png: [K1] mask without image",
        "pics/bad/2.png: [K1] anomalous image without mask; expected 2_mask.png or 2.png in",
        "pics/bad/3.png: [K7] the stem '3' occurs twice",
    )
    for name in ("masks/9.png", "masks/0_mask.png", "bad/3.bmp"):
        (tmp_path / "pics" / name).unlink()
    allowed = load(dataclasses.replace(config, missing_masks="image_only"))
    assert [len(r.masks) for r in allowed.source("test").records if r.label] == [1, 1, 0, 0]
    trees.save(tmp_path / "pics/masks/1.bmp", trees.mask().T)
    report = check(allowed.config)
    assert [(f.check, f.path) for f in report.faults if f.severity == "error"] == [
        ("K2", "pics/masks/1.bmp")
    ]


def test_the_same_picture_as_good_and_as_bad_is_told(tmp_path):
    config = flat(tmp_path)
    trees.save(tmp_path / "pics/bad/copied.png", trees.pixels(0))
    (fault,) = check(config).faults
    assert fault.check == "K14"
    assert "pics/bad/copied.png" in str(fault)
    assert "pics/good/0.png" in str(fault)


def test_a_single_good_image_cannot_be_split(tmp_path):
    refused(
        flat(tmp_path, good=1),
        "pics: [K0] all 1 normal images are held out: nothing is left to fit on",
    )
    np.testing.assert_array_equal(  # two can
        load(flat(tmp_path, good=2)).source("train")[0].image.shape, (16, 24, 3)
    )
