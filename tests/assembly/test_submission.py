"""Submissions of MVTec AD 2: files, sizes, ranks, the archive, and every fault of one at once."""

import json
import shutil
import tarfile

import jax
import numpy as np
import PIL.Image
import pytest
import tifffile

from dsad.assembly import evaluate, submission, submission_check
from dsad.assembly.model import FittedModel
from dsad.cli import main
from dsad.core.errors import DataError
from dsad.core.mesh import make_mesh
from dsad.evaluation.results import read_results
from tests.data import published_trees, trees

COUNTS = {"can": 2, "vial": 2}
NAMES = [
    f"{c}/{s}/{i:03d}_{light}"
    for c in COUNTS
    for s, light in (("test_private", "regular"), ("test_private_mixed", "mixed"))
    for i in range(2)
]


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Programs for one of the eight devices take less time to compile, and less memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """A model of the data set in miniature, and what was submitted with it."""
    base = tmp_path_factory.mktemp("ad2")
    published_trees.write("mvtec_ad2", base / "data")
    code = main.main([
        "fit", "--config=configs/patchcore.py:mvtec_ad2", f"--config.data.root={base / 'data'}",
        "--config.weights=random", "--config.detector.layers=('layer1',)",
        "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
        "--config.evaluation.false_alarm_rate=0.4", f"--out={base / 'model'}",
    ])  # fmt: skip
    assert code == 0
    assert submit(base / "model", f"--out={base / 'sent'}", "--partial", "--rule=sigma") == 0
    return base


def submit(*argv):
    return main.main(["submit", *map(str, argv)])


def fails(capsys, *argv):
    assert submit(*argv) == 2
    return " ".join(capsys.readouterr().err.split())


def test_files_are_maps_and_masks_of_every_private_image(folder):
    sent = folder / "sent"
    assert submission_check.check(sent, COUNTS) == []
    about = json.loads((folder / "sent.json").read_text())
    for name in NAMES:
        half = tifffile.imread(sent / "anomaly_images" / f"{name}.tiff")
        mask = np.asarray(PIL.Image.open(sent / "anomaly_images_thresholded" / f"{name}.png"))
        assert (half.dtype, half.shape) == (np.float16, (trees.HEIGHT, trees.WIDTH))
        model = FittedModel.load(folder / "model", name.partition("/")[0])
        _, (scores,) = model.score([folder / "data" / f"{name}.png"])
        limit = about["thresholds"][name.partition("/")[0]]
        near = np.isclose(scores, limit, rtol=1e-5)  # batches differ by rounding
        assert ((mask == 255) == (scores > limit))[~near].all()
        np.testing.assert_allclose(half, scores * about["scale"], rtol=2**-11 + 2e-5)
    row = model.thresholds["vial"]["0"]
    assert about["rule"] == "sigma"
    assert about["thresholds"]["vial"] == row["decisions"]["sigma"]


def test_the_archive_holds_the_two_trees_and_no_owner(folder):
    with tarfile.open(folder / "sent.tar.gz") as packed:
        entries = packed.getmembers()
    found = sorted(e.name for e in entries)
    assert found == sorted(
        f"{tree}/{name}{suffix}" for tree, suffix in submission.SUFFIXES.items() for name in NAMES
    )
    assert {(e.uid, e.gid, e.uname, e.gname) for e in entries} == {(0, 0, "", "")}


def test_maps_of_a_quarter_are_means_and_masks_stay_whole(folder, tmp_path):
    argv = (folder / "model", f"--out={tmp_path / 'small'}", "--partial", "--quarter")
    assert submit(*argv, "--rule=superadd") == 0
    scale = json.loads((tmp_path / "small.json").read_text())["scale"]
    whole = tifffile.imread(folder / "sent" / "anomaly_images" / f"{NAMES[0]}.tiff")
    small = tifffile.imread(tmp_path / "small" / "anomaly_images" / f"{NAMES[0]}.tiff")
    assert small.shape == (trees.HEIGHT // 4, trees.WIDTH // 4)
    expected = np.float64(whole[:4, :4]).mean()
    assert small[0, 0] == pytest.approx(expected, rel=2e-3)
    assert scale == json.loads((folder / "sent.json").read_text())["scale"]
    mask = tmp_path / "small" / "anomaly_images_thresholded" / f"{NAMES[0]}.png"
    assert PIL.Image.open(mask).size == (trees.WIDTH, trees.HEIGHT)
    check = (f"--check={tmp_path / 'small'}", f"--root={folder / 'data'}", "--partial")
    assert submit(*check) == 0


def test_a_saved_model_is_measured_at_its_own_thresholds(folder, tmp_path, capsys):
    morphology = "--config.evaluation.morphology.smallest=2"  # no part of what is fitted
    argv = (f"--model={folder / 'model'}", f"--workdir={tmp_path / 'out'}", morphology)
    assert main.main(["evaluate", *argv]) == 0
    results, model = read_results(tmp_path / "out"), FittedModel.load(folder / "model", "can")
    for category, rows in results.thresholds.items():
        assert rows["0"]["decisions"] == model.thresholds.get(category, rows)["0"]["decisions"]
    assert results.stamp["thresholds"]["held_out"] == "all normal validation images"
    assert results.stamp["morphology"]["smallest"] == 2
    text = capsys.readouterr().out
    assert "SegF1" in text
    assert f"{results.mean['pixel_f1_sigma']:.3f}" in text


def test_maps_alone_are_a_submission(folder, tmp_path):
    assert submit(folder / "model", f"--out={tmp_path / 'x'}", "--partial", "--rule=none") == 0
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["anomaly_images"]


def test_every_fault_is_told_at_once(folder, tmp_path, capsys):
    sent = shutil.copytree(folder / "sent", tmp_path / "sent")
    maps, masks = sent / "anomaly_images", sent / "anomaly_images_thresholded"
    half = tifffile.imread(maps / f"{NAMES[0]}.tiff")
    (maps / f"{NAMES[0]}.tiff").unlink()
    tifffile.imwrite(maps / f"{NAMES[1]}.tiff", half.astype(np.float32))
    tifffile.imwrite(maps / f"{NAMES[2]}.tiff", np.stack([half] * 3, -1), photometric="rgb")
    tifffile.imwrite(maps / f"{NAMES[3]}.tiff", np.where(half == half.max(), np.nan, half))
    cut = maps / f"{NAMES[4]}.tiff"
    cut.write_bytes(cut.read_bytes()[:-300])
    tifffile.imwrite(maps / f"{NAMES[5]}.tiff", half.T)
    trees.save(masks / f"{NAMES[6]}.png", np.ones((trees.HEIGHT, trees.WIDTH), np.uint8))
    trees.save(masks / f"{NAMES[7]}.png", np.zeros((trees.HEIGHT, trees.WIDTH, 3), np.uint8))
    (maps / "can" / "notes.txt").write_text("mine")
    (sent / "empty").mkdir()
    faults = submission_check.check(sent, COUNTS)
    told = {
        f"{MAPS}/can/test_private: 1 of 2 files are missing: 000",
        f"{MAPS}/can/notes.txt: no part", "empty: no part",
        f"{MAPS}/{NAMES[1]}.tiff: expected one page of two dimensions, float16; found 1 of 16 × 24",
        f"{MAPS}/{NAMES[2]}.tiff: expected one page of two dimensions",
        f"{MAPS}/{NAMES[3]}.tiff: expected finite scores", f"{MAPS}/{NAMES[4]}.tiff: not readable",
        f"{MAPS}/{NAMES[5]}.tiff: expected", f"{MASKS}/{NAMES[6]}.png: expected the values 0 and 2",
        f"{MASKS}/{NAMES[7]}.png: expected a PNG of mode L, found PNG of RGB",
    }  # fmt: skip
    assert {t for t in told if not any(f.startswith(t) for f in faults)} == set()
    assert len(faults) == len(told)
    assert submit(f"--check={sent}", f"--root={folder / 'data'}", "--partial") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "16 × 24 pixels as its image, or 4 × 6; found 24 × 16" in text
    assert "the server will refuse it" in text


MAPS, MASKS = submission.SUFFIXES
#: Images of each private set.
PRIVATE = {
    "can": 321, "fabric": 314, "fruit_jelly": 255, "rice": 277, "sheet_metal": 142, "vial": 276,
    "wallplugs": 232, "walnuts": 228,
}  # fmt: skip


def test_published_counts_are_asked_for(folder, tmp_path, capsys):
    names = submission.expected(submission.PUBLISHED)
    assert len(names) == 2 * 2045
    assert sum("/test_private_mixed/" in n and n.endswith("_mixed") for n in names) == 2045
    assert len({n.partition("/")[0] for n in names}) == 8
    for folder_of, light in (("test_private", "regular"), ("test_private_mixed", "mixed")):
        for c, count in PRIVATE.items():
            wanted = [f"{c}/{folder_of}/{i:03d}_{light}" for i in range(count)]
            assert [n for n in names if n.startswith(f"{c}/{folder_of}/")] == wanted
    text = fails(capsys, folder / "model", f"--out={tmp_path / 'x'}")
    assert "can/test_private: 319 of 321 files are missing: 002 to 320" in text
    assert "walnuts/test_private_mixed: 228 of 228 files are missing: 000 to 227" in text
    assert not (tmp_path / "x").exists()
    assert submit(f"--check={folder / 'sent'}") == 1


def test_faults_of_a_call_are_told_before_an_image_is_read(folder, tmp_path, capsys):
    model = folder / "model"
    assert "one of bound, none, sigma, superadd" in fails(
        capsys, model, f"--out={tmp_path / 'x'}", "--partial", "--rule=best"
    )
    assert "is there already" in fails(capsys, model, f"--out={folder / 'sent'}", "--partial")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert "holds file" in fails(capsys, model, f"--out={tmp_path / 'mine'}", "--overwrite")
    assert "folder of this machine" in fails(capsys, model, "--out=gs://bucket/x")
    gone = shutil.copytree(folder / "data", tmp_path / "data")
    for name in COUNTS:
        shutil.rmtree(gone / name / "test_private")
        shutil.rmtree(gone / name / "test_private_mixed")
    text = fails(capsys, model, f"--out={tmp_path / 'x'}", f"--root={gone}", "--partial")
    assert "expected test_private and test_private_mixed" in text


def test_a_stopped_submission_is_begun_anew(folder, tmp_path):
    sent = shutil.copytree(folder / "sent", tmp_path / "sent")
    (sent / "anomaly_images" / "can" / "test_private" / "left.writing").write_text("half")
    assert submit(folder / "model", f"--out={sent}", "--partial", "--rule=sigma") == 0
    assert submission_check.check(sent, COUNTS) == []


def test_half_precision_keeps_ranks_after_one_factor():
    rng = np.random.default_rng(0)
    maps = [(rng.gamma(2.0, size=(40, 30)) * 1e-7).astype(np.float32) for _ in range(3)]
    scale = submission.factor(max(float(m.max()) for m in maps))
    assert 1 <= max(m.max() for m in maps) * scale < 2
    halves = [submission.halved(m, scale, "x") for m in maps]
    before, after = np.concatenate(maps).ravel(), np.concatenate(halves).ravel()
    order = np.argsort(before, kind="stable")
    assert (np.diff(after[order].astype(np.float64)) >= 0).all()  # no two change places
    lost = np.concatenate([m.astype(np.float16) for m in maps])
    assert np.unique(lost).size < 30 < np.unique(after).size / 20  # which it would without
    assert submission.factor(0.0) == 1.0
    assert submission.factor(3e6) == 2.0**-21


def test_half_precision_keeps_eleven_bits():
    values = np.geomspace(7e-5, 65504, 999, dtype=np.float32)[None]
    away = np.abs(submission.halved(values, 1.0, "x") / np.float64(values) - 1)
    assert 2**-12 < away.max() <= 2**-11
    ends = submission.halved(np.float32([[65504, 6e-8, 2.9e-8]]), 1.0, "x")
    assert ends.tolist() == [[65504, 2**-24, 0]]


def test_scores_beyond_half_precision_are_refused_by_name():
    with pytest.raises(DataError, match="can/test_private/000_regular: a score of 70000"):
        submission.halved(np.full((2, 2), 7e4, np.float32), 1.0, NAMES[0])
    with pytest.raises(DataError, match="NaN or infinite"):
        submission.halved(np.full((2, 2), np.nan, np.float32), 1.0, NAMES[0])


def test_a_neighbour_of_the_submission_is_recognised(tmp_path):
    """Not every one of its files is called foreign, with the advice to remove it."""
    inner = tmp_path / "made" / submission.MAPS / "can" / "test_private"
    inner.mkdir(parents=True)
    for i in range(3):
        (inner / f"copy{i}.tiff").touch()
    for named in (tmp_path, inner.parents[1]):
        (fault,) = submission_check.check(named)
        assert "made does. Name that folder." in fault
    foreign = [x for x in submission_check.check(tmp_path / "made") if "no part" in x]
    assert foreign == [
        "anomaly_images/can/test_private/copy0.tiff, and 2 more there: no part of a submission. "
        "Remove them."
    ]


def test_missing_numbers_are_ranges():
    wanted = [f"can/test_private/{i:03d}_regular" for i in range(12)]
    found = [w for i, w in enumerate(wanted) if i not in (0, 3, 4, 5, 11)]
    assert submission_check.absent(found, wanted) == [
        "can/test_private: 5 of 12 files are missing: 000, 003 to 005, 011"
    ]
    assert submission_check.absent(wanted, wanted) == []
