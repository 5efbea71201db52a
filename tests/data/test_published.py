"""Published data sets: one planted fault per case, and what each set is read as."""

import dataclasses
import functools
import io
import os

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dsad.cli import check_data
from dsad.core.errors import DataError
from dsad.core.types import Record
from dsad.data import files, ksdd, mvtec_ad2, mvtec_loco, published, records_builder
from dsad.data.base import DataConfig, FaultError, indexed, load
from dsad.data.checks import check
from dsad.data.saturation import Saturation
from dsad.plan._samples import published as published_size
from tests.data import published_trees, trees
from tests.data.published_trees import EMPTY, TREES, write


def png(array: np.ndarray, mode: str = "L", share: float = 1.0) -> bytes:
    """The first ``share`` of a PNG file of an array."""
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, "PNG")
    return out.getvalue()[: int(share * len(out.getvalue()))]


#: Set, fault, path where it is reported, files written, files left out.
FAULTS = [
    ("mvtec_ad2", "K1", "can/test_public/bad/001_shift_1.png", {},
     ["can/test_public/ground_truth/bad/001_shift_1_mask.png"]),
    ("mvtec_loco", "K1", "pushpins/test/logical_anomalies/001.png", {},
     ["pushpins/ground_truth/logical_anomalies/001/000.png"]),
    ("mvtec_3d", "K1", "tire/test/hole/rgb/000.png", {}, ["tire/test/hole/gt/000.png"]),
    ("btad", "K1", "03/test/ko/0001.bmp", {}, ["03/ground_truth/ko/0001.bmp"]),
    ("mpdd", "K1", "tubes/test/dent/000.png", {}, ["tubes/ground_truth/dent/000_mask.png"]),
    ("autovi", "K1", "pipe_clip/test/missing/0000.png", {},
     ["pipe_clip/ground_truth/missing/0000/0000.png"]),
    ("ksdd", "K1", "kos02/Part1.jpg", {}, ["kos02/Part1_label.bmp"]),
    ("ksdd2", "K1", "test/20003.png", {}, ["test/20003_GT.png"]),
    ("dagm", "K1", "Class1/Train/Label/0002_label.PNG", {}, ["Class1/Train/Label/0002_label.PNG"]),
    ("mpdd", "K1", "tubes/ground_truth/dent/007_mask.png",
     {"tubes/ground_truth/dent/007_mask.png": trees.mask()}, []),
    ("mvtec_loco", "K1", "pushpins/ground_truth/logical_anomalies/009/000.png",
     {"pushpins/ground_truth/logical_anomalies/009/000.png": trees.mask()}, []),
    ("ksdd2", "K1", "test/20009_GT.png", {"test/20009_GT.png": trees.mask()}, []),
    ("mvtec_loco", "K2", "pushpins/ground_truth/logical_anomalies/000/001.png",
     {"pushpins/ground_truth/logical_anomalies/000/001.png": trees.mask(254).T}, []),
    ("autovi", "K2", "pipe_clip/ground_truth/missing/0000/0000.png",
     {"pipe_clip/ground_truth/missing/0000/0000.png": trees.mask().T}, []),
    ("ksdd2", "K2", "test/20000_GT.png", {"test/20000_GT.png": trees.mask().T}, []),
    ("mpdd", "K3", "tubes/ground_truth/dent/000_mask.png",
     {"tubes/ground_truth/dent/000_mask.png": png(trees.mask(), "P")}, []),
    ("ksdd2", "K3", "train/10001_GT.png", {"train/10001_GT.png": png(EMPTY, "P")}, []),
    ("mvtec_ad2", "K3", "can/validation/good/000_regular.png",
     {"can/validation/good/000_regular.png": png(trees.pixels(7), "RGBA")}, []),
    ("mpdd", "K4", "tubes/ground_truth/dent/000_mask.png",
     {"tubes/ground_truth/dent/000_mask.png": trees.mask(1)}, []),
    ("mvtec_ad2", "K4", "vial/test_public/ground_truth/bad/000_regular_mask.png",
     {"vial/test_public/ground_truth/bad/000_regular_mask.png": trees.mask(1)}, []),
    ("mvtec_loco", "K4", "screw_bag/ground_truth/logical_anomalies/001/000.png",
     {"screw_bag/ground_truth/logical_anomalies/001/000.png": trees.mask(253)}, []),
    ("mvtec_loco", "K4", "screw_bag/defects_config.json", {}, ["screw_bag/defects_config.json"]),
    ("mvtec_loco", "K4", "screw_bag/defects_config.json",
     {"screw_bag/defects_config.json": "[{"}, []),
    ("mvtec_loco", "K4", "screw_bag/defects_config.json[0]",
     {"screw_bag/defects_config.json": '[{"pixel_value": 255}]'}, []),
    ("autovi", "K4", "tank_screw/ground_truth/missing/0001/0001.png",
     {"tank_screw/ground_truth/missing/0001/0001.png": trees.mask(9)}, []),
    ("mpdd", "K5", "tubes/ground_truth/dent/000_mask.png",
     {"tubes/ground_truth/dent/000_mask.png": EMPTY}, []),
    ("mvtec_3d", "K6", "tire/test/good/gt/001.png",
     {"tire/test/good/gt/001.png": trees.mask()}, []),
    ("mvtec_3d", "K6", "tire/validation/good/gt/001.png",
     {"tire/validation/good/gt/001.png": trees.mask()}, []),
    ("mpdd", "K6", "tubes/ground_truth/good/000_mask.png",
     {"tubes/ground_truth/good/000_mask.png": trees.mask()}, []),
    ("mvtec_loco", "K6", "pushpins/ground_truth/good/000/001.png",
     {f"pushpins/ground_truth/good/000/00{i}.png": EMPTY for i in range(2)}, []),
    ("btad", "K7", "01/test/ko/0000.png", {"01/test/ko/0000.png": trees.pixels(1)}, []),
    ("btad", "K7", "01/ground_truth/ko/0000.png",
     {"01/ground_truth/ko/0000.bmp": trees.mask()}, []),
    ("mvtec_loco", "K8", "pushpins/validation/good/001.png",
     {"pushpins/validation/good/001.png": png(trees.pixels(3), "RGB", 0.66)}, []),
    ("mvtec_ad2", "K8", "can/test_private_mixed/001_mixed.png",
     {"can/test_private_mixed/001_mixed.png": b""}, []),
    ("ksdd2", "K8", "train/10000_GT.png", {"train/10000_GT.png": png(trees.mask(), "L", 0.66)}, []),
    ("ksdd2", "K9", "train/10301_GT (copy).png", {}, []),
    ("mpdd", "K9", "tubes/train/good/001 (copy).png",
     {"tubes/train/good/001 (copy).png": trees.pixels(1)}, []),
    ("dagm", "K9", "Class1/Train/.0001.PNG", {"Class1/Train/.0001.PNG": "hidden"}, []),
    ("mvtec_3d", "K9", "tire/test/good/normals",
     {f"tire/test/good/normals/{i:03d}.png": EMPTY for i in range(3)}, []),
    ("mpdd", "K9", ".thumbs", {".thumbs/tubes/train/good/000.png": EMPTY}, []),
    ("ksdd2", "K12", "kolektor_sdd2", {}, []),
    ("mvtec_3d", "K14", "tire/validation/good/rgb/000.png",
     {f"tire/{s}/good/rgb/000.png": trees.pixels(5) for s in ("train", "validation")}, []),
    ("mvtec_ad2", "K0", "can", {},
     [f"can/validation/good/{i:03d}_regular.png" for i in range(2)]),
    ("mpdd", "K0", "tubes/test/scratch", {"tubes/test/scratch/notes.txt": "none yet"}, []),
    ("mpdd", "K0", "tubes", {}, [f"tubes/test/good/{i:03d}.png" for i in range(2)]),
]  # fmt: skip
WARNED = ("K5", "K9", "K12", "K14")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Check and path of the faults that a sound tree has: counts, and strays of the archive."""

    @functools.cache
    def faults(name):
        report = check(write(name, tmp_path_factory.mktemp(name)))
        assert report.ok
        return {(f.check, f.path) for f in report.faults}

    return faults


@pytest.mark.parametrize(
    ("name", "sort", "path", "more", "less"), FAULTS, ids=[f"{n}-{k}-{p}" for n, k, p, *_ in FAULTS]
)
def test_planted_fault(tmp_path, sound, name, sort, path, more, less):
    report = check(write(name, tmp_path, more=more, less=less))
    found = {(f.check, f.path): f for f in report.faults}
    planted = found.keys() - sound(name) if more or less else found.keys()
    assert (sort, path) in planted
    warned = sort in WARNED or (sort == "K0" and path in ("can", "tubes"))
    assert found[sort, path].severity == ("warning" if warned else "error")
    # Nothing else is an error but what is planted.
    errors = {key for key, fault in found.items() if fault.severity == "error"}
    assert errors <= {(sort, path)}


def test_all_faults_in_one_pass(tmp_path):
    more = {
        "tubes/ground_truth/dent/000_mask.png": trees.mask().T,
        "tubes/ground_truth/dent/001_mask.png": trees.mask(3),
        "bracket_black/train/good/001.png": b"",
    }
    less = ["bracket_black/ground_truth/dent/000_mask.png"]
    report = check(write("mpdd", tmp_path, more=more, less=less))
    errors = {f.check: f.path for f in report.faults if f.severity == "error"}
    assert errors == {
        "K1": "bracket_black/test/dent/000.png", "K2": "tubes/ground_truth/dent/000_mask.png",
        "K4": "tubes/ground_truth/dent/001_mask.png", "K8": "bracket_black/train/good/001.png",
    }  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_creation_order_changes_nothing(tmp_path, name):
    sets = [load(write(name, tmp_path / str(order), order=order)) for order in (1, 2)]
    assert sets[0].splits == sets[1].splits
    assert {f for f in sets[0].faults} == {f for f in sets[1].faults}
    assert sets[0].protocol["split_hash"] == sets[1].protocol["split_hash"]


@pytest.mark.parametrize("name", ["mvtec_ad2", "mvtec_loco", "mvtec_3d", "btad", "mpdd", "dagm"])
def test_root_may_be_a_category(tmp_path, name):
    whole = load(write(name, tmp_path))
    category = whole.categories[0]
    alone = load(DataConfig(name=name, root=str(tmp_path / category)))
    assert alone.categories == (category,)
    for split in whole.splits:
        paths = [r.path for r in whole.source(split, category).records]
        assert [f"{category}/{r.path}" for r in alone.source(split).records] == paths
        masks = [r.masks for r in whole.source(split, category).records]
        found = [r.masks for r in alone.source(split).records]
        assert [tuple(f"{category}/{m}" for m in of) for of in found] == masks


def test_faults_of_other_categories_are_not_told(tmp_path):
    more = {"tubes/train/good/001 (copy).png": EMPTY, "tubes/odd/x.png": EMPTY}
    config = write("mpdd", tmp_path / "a", more=more, categories=("bracket_black",))
    assert {f.path for f in load(config).faults} == {"bracket_black"}  # its count
    more = {"01/test/ko/0000.png": EMPTY}  # twice, as bmp and as png
    config = write("btad", tmp_path / "b", more=more, categories=("02",))
    assert {f.path for f in load(config).faults} == {"02"}
    less = ["Class1/Train/Label/0002_label.PNG"]
    config = write("dagm", tmp_path / "c", less=less, categories=("Class10",))
    assert {f.path for f in load(config).faults} == {"Class10"}


def test_strict_counts_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"K12.*3/2/2 train/good/bad; MPDD has 122/32/69"):
        load(write("mpdd", tmp_path, strict=True))


def test_either_of_two_published_counts_is_official(tmp_path):
    config = write("mvtec_loco", tmp_path)
    counts = {"pushpins": (3, 2, 2, 2, 2), "screw_bag": (4, 2, 2, 2, 2)}
    about = dataclasses.replace(mvtec_loco.ABOUT, counts=counts)
    data = published.index(config, mvtec_loco.LAYOUT, about)
    assert [f.path for f in data.faults if f.check == "K12"] == ["screw_bag"]
    assert data.protocol["dataset"].endswith("(MVTec LOCO AD layout)")
    about = dataclasses.replace(about, also={"screw_bag": (3, 2, 2, 2, 2)})
    data = published.index(config, mvtec_loco.LAYOUT, about)
    assert not data.faults
    assert data.protocol["dataset"] == "MVTec LOCO AD"
    assert "CC BY-NC-SA 4.0" in data.protocol["licence"]


@pytest.mark.parametrize("name", TREES)
def test_another_tree_is_refused_with_the_layout(tmp_path, name):
    trees.save(tmp_path / "a" / "b" / "c" / "x.gif.png", trees.pixels(1))
    with pytest.raises(FaultError, match="expected ") as stop:
        load(DataConfig(name=name, root=str(tmp_path)))
    assert [f.check for f in stop.value.faults] == ["K0"]
    with pytest.raises(FaultError, match="does not exist"):
        load(DataConfig(name=name, root=str(tmp_path / "nothing")))


def test_links_are_followed_and_never_in_circles(tmp_path):
    write("mpdd", tmp_path / "far")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "far" / "tubes", tmp_path / "set" / "tubes")
    os.symlink(tmp_path / "set", tmp_path / "set" / "again")
    data = load(DataConfig(name="mpdd", root=str(tmp_path / "set")))
    assert len(data.source("train")) == 3
    assert "again" in {f.path for f in data.faults if f.check == "K9"}


def test_image_only_takes_images_without_mask(tmp_path):
    less = ["tubes/ground_truth/dent/000_mask.png"]
    data = load(write("mpdd", tmp_path, less=less, missing_masks="image_only"))
    bare = next(s for s in data.source("test", "tubes") if s.record.label and not s.record.masks)
    assert bare.mask is None


def test_ad2_keeps_scenes_and_lights(tmp_path):
    data = load(write("mvtec_ad2", tmp_path))
    assert {s: len(data.source(s, "can")) for s in data.splits} == {
        "train": 3, "validation": 2, "test": 12, "private": 2, "private_mixed": 2,
    }  # fmt: skip
    scene = [r for r in data.source("test", "can").records if r.path.startswith(
        "can/test_public/bad/000_")]  # fmt: skip
    assert {r.camera for r in scene} == {"regular", "underexposed", "shift_1"}
    assert len({r.group for r in scene}) == 1
    groups = {r.group for s in data.splits for r in data.source(s, "can").records}
    assert len(groups) == 3 + 2 + 2 + 2 + 2 + 2  # scene 000 of a folder is not that of another
    private = data.source("private")[0]
    assert (private.record.label, private.record.kind) == (-1, "unlabelled")
    assert private.mask is None


def test_ad2_private_sets_are_in_no_hash(tmp_path):
    whole = load(write("mvtec_ad2", tmp_path / "whole"))
    gone = [path for path in published_trees.mvtec_ad2() if "test_private" in path]
    part = load(write("mvtec_ad2", tmp_path / "part", less=gone))
    assert list(part.splits) == ["train", "validation", "test"]
    assert part.protocol["split_hash"] == whole.protocol["split_hash"]
    gone = [path for path in published_trees.mvtec_ad2() if "validation/good/000" in path]
    other = load(write("mvtec_ad2", tmp_path / "other", less=gone))
    assert other.protocol["split_hash"] != whole.protocol["split_hash"]
    assert sum(row[-1] for row in mvtec_ad2.ABOUT.counts.values()) == 2045


def test_loco_joins_all_masks_of_an_image(tmp_path):
    data = load(write("mvtec_loco", tmp_path))
    record = next(s for s in data.source("test") if s.record.kind == "logical_anomalies")
    expected = (trees.mask() > 0) | np.roll(trees.mask() > 0, 6, axis=0)
    np.testing.assert_array_equal(record.mask, expected)
    assert len(record.record.masks) == 2


def test_saturations_of_loco(tmp_path):
    write("mvtec_loco", tmp_path)
    found = mvtec_loco.saturations(tmp_path, "pushpins")
    assert found == mvtec_loco.saturations(tmp_path / "pushpins", "pushpins")
    assert found[255] == Saturation(name="missing", threshold=10, relative=False)
    assert found[254] == Saturation(name="scratch", threshold=0.5, relative=True)


@pytest.mark.parametrize(
    ("threshold", "relative", "area", "pixels"),
    [(100, False, 400, 100), (100, False, 60, 60), (0.5, True, 7, 3), (0.1, True, 4, 1)],
)
def test_saturation_in_pixels(threshold, relative, area, pixels):
    rule = Saturation(name="x", threshold=threshold, relative=relative)
    assert rule.pixels(area) == pixels


def test_ksdd2_labels_by_any_pixel_at_full_size(tmp_path):
    data = load(write("ksdd2", tmp_path))
    bad = [r.path for r in data.source("test").records if r.label]
    assert bad == ["test/20000.png", "test/20001.png"]  # the second has a single faint pixel
    assert [r.path for r in data.source("train").records] == [
        *(f"train/1000{i}.png" for i in range(1, 5)), "train/10301.png",
    ]  # fmt: skip
    assert "1 anomalous training images are not used" in data.protocol["split"]


def test_dagm_drops_defects_from_training(tmp_path):
    data = load(write("dagm", tmp_path))
    assert len(data.source("train", "Class1")) == 3
    assert sum(r.label for r in data.source("test", "Class1").records) == 1
    assert "2 anomalous training images are not used" in data.protocol["split"]


def test_an_empty_mask_of_dagm_is_looked_for(tmp_path):
    label = "Class1/Test/Label/0003_label.PNG"
    report = check(write("dagm", tmp_path, more={label: EMPTY}))
    assert [f.path for f in report.faults if f.check == "K5"] == [label]
    assert "K5" not in report.skipped
    assert "K5" in check(write("ksdd2", tmp_path / "x")).skipped


def test_ksdd_is_cut_by_commutator(tmp_path):
    config = write("ksdd", tmp_path)
    cuts = set()
    for seed in range(4):
        data = load(dataclasses.replace(config, seed=seed))
        groups = {s: {r.group for r in data.source(s).records} for s in data.splits}
        assert not groups["train"] & groups["test"]
        assert {len(g) for g in groups.values()} == {3}
        assert len(data.protocol["unused"]) == 3  # the defective ones of training commutators
        assert f"seed {seed}" in data.protocol["split"]
        assert len(data.source("train")) == 6
        assert sum(r.label for r in data.source("test").records) == 3
        cuts.add(data.protocol["split_hash"])
    assert len(cuts) > 1
    assert sum(ksdd.ABOUT.counts[ksdd.CATEGORY]) == 399


@pytest.mark.parametrize("name", ["mvtec_ad2", "mvtec_loco"])
def test_prepared_records_have_every_split(tmp_path, name):
    data = load(write(name, tmp_path / "files"))
    records_builder.write(records_builder.plan(data), str(tmp_path / "records"))
    again = load(DataConfig(name="records", root=str(tmp_path / "records")))
    assert again.splits == data.splits
    assert again.protocol["split_hash"] == data.protocol["split_hash"]
    for split in data.splits:
        for a, b in zip(data.source(split), again.source(split), strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.mask, b.mask)


def test_groups_stay_apart_from_validation_too():
    def record(path):
        return Record(path=path, category="a", label=0, kind="good", group="g")

    splits = {"train": (), "validation": (record("v.png"),), "test": (record("t.png"),)}
    fault = files.split_groups(splits)[0]
    assert (fault.check, fault.path) == ("K13", "t.png")
    assert "also in validation, as v.png" in fault.message


def test_check_tells_validation_images(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=200, soft_wrap=True)
    assert check_data.run(write("mvtec_loco", tmp_path), console) == 0
    assert "(+2 val.)" in out.getvalue()


def test_plan_knows_published_sizes():
    config = DataConfig(name="mvtec_loco", categories=("pushpins", "screw_bag"))
    assert published_size(config) == (372 + 360, 2)
    assert published_size(DataConfig(name="mvtec")) == (3629, 15)
    for name in ("adam3d", "ksdd", "realiad"):
        assert published_size(DataConfig(name=name)) is None


def test_canvases_are_of_what_is_trained_on(tmp_path):
    data = indexed(write("mvtec_loco", tmp_path, split="all"))
    assert set(records_builder.plan(data, 16).sizes) == {"train", "test"}
