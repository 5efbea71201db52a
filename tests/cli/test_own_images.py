"""What an inspection engineer types: photographs with and without masks, and only good ones."""

import json

import pytest

from tests.data import trees
from tests.helpers import command

PLACES = ("--config.data.name=folder", "--config.data.normal=pics/gut (neu)")
BAD = "--config.data.abnormal=pics/schlecht [ß]"
MASKS = "--config.data.masks=pics/Masken"
SMALL = (
    "--config.weights=random",
    "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of several suffixes and sizes under awkward names."""
    base = tmp_path_factory.mktemp("own")
    for i in range(5):
        image = trees.pixels(i).repeat(2, axis=0) if i % 2 else trees.pixels(i)
        suffix = ("png", "JPG", "tif", "bmp", "jpeg")[i]
        trees.save(base / "pics" / "gut (neu)" / f"Prüfung {i} [ok].{suffix}", image)
    for kind in ("Kratzer", "Loch 1"):
        name = f"{kind}/Teil ä.png"
        trees.save(base / "pics" / "schlecht [ß]" / name, trees.pixels(100 + len(kind)))
        trees.save(base / "pics" / "Masken" / name, trees.mask())
    return base


def evaluated(folder, workdir, *flags):
    done = command(
        "evaluate", "--config=configs/knn.py", "--config.backbone=resnet18", *PLACES, *SMALL,
        *flags, f"--workdir={workdir}", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / workdir / "results.json").read_text())


def test_without_masks_there_are_image_numbers_and_a_note(folder):
    text, results = evaluated(folder, "bad", BAD)
    assert results["mean"]["image_auroc"] is not None
    assert results["mean"]["pixel_auroc"] is None
    assert "pics: no pixel numbers: no anomalous test image has a mask" in text
    assert "procedural" not in text
    assert results["stamp"]["dataset"]["split"].startswith("1 of 5 normal images held out")
    assert (
        results["stamp"]["orientation"] == "images and masks turned as their EXIF orientation says"
    )


def test_masks_add_pixel_numbers(folder):
    _, results = evaluated(folder, "masks", BAD, MASKS)
    assert None not in results["mean"].values()
    assert set(results["kinds"]["pics"]) == {"Kratzer", "Loch 1"}


def test_good_images_alone_give_numbers_that_say_what_they_are(folder):
    text, results = evaluated(folder, "good", "--config.evaluation.false_alarm_rate=0.2")
    assert None not in results["mean"].values()
    assert results["stamp"]["dataset"]["defects"] == "procedural, no real ones"
    assert "defects: procedural, no real ones" in text
    line = next(line for line in text.splitlines() if "defects found, " in line)
    assert line.endswith("; defects: procedural, no real ones")
    assert all(kind.startswith("procedural ") for kind in results["kinds"]["pics"])
    done = command("report", "good", "--out=good.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "defects: procedural, no real ones.</b>" in (folder / "good.html").read_text()
    done = command("report", "good", "bad", "--out=both.html", cwd=folder)
    if (folder / "bad").exists():  # other tests may run elsewhere
        assert done.returncode == 2
        assert "dataset.defects: 'procedural, no real ones' against 'real'" in done.stderr


def test_check_data_takes_the_same_flags(folder):
    done = command("check-data", *PLACES, BAD, MASKS, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folder: 0 errors, 0 warnings: usable." in done.stdout
    done = command("check-data", *PLACES, "--config.data.abnormal=pics/schlecht", cwd=folder)
    assert done.returncode == 2
    assert "Did you mean 'schlecht [ß]'?" in done.stderr


def test_a_model_of_good_pictures_is_measured_with_bad_ones(folder):
    done = command(
        "fit", "--config=configs/knn.py", *PLACES, *SMALL,
        "--config.evaluation.false_alarm_rate=0.3", "--out=Modell ä", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pics: fitted on 5 good pictures; a second fit without" in done.stdout
    done = command("evaluate", "--model=Modell ä", BAD, "--workdir=gemessen", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "of 2 defects found, " in done.stdout
    done = command("predict", "Modell ä", "pics/schlecht [ß]", "--out=Urteile", cwd=folder)
    assert done.returncode == 0, done.stderr
    pictures = (folder / "Urteile" / "overlays").rglob("*.png")
    assert {p.relative_to(folder / "Urteile" / "overlays").as_posix() for p in pictures} == {
        "Kratzer/Teil ä.png", "Loch 1/Teil ä.png",
    }  # fmt: skip
    assert f"Urteile/predictions.csv; pictures: {folder / 'Urteile' / 'overlays'}\n" in done.stdout
    done = command("report", "Urteile", cwd=folder)
    assert (folder / "Urteile" / "report.html").is_file(), done.stderr


@pytest.mark.slow
def test_a_detector_of_labels_learns_from_all_bad_pictures_and_is_measured_with_others(folder):
    labels = (
        "--config=configs/twoclass.py:smoke", "--config.backbone=resnet18", *PLACES, BAD, MASKS,
        *SMALL, "--config.data.categories=()", "--config.detector.layers=stem", "--config.shots=0",
    )  # fmt: skip
    done = command("fit", *labels, "--out=gelernt", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "pics: fitted on 5 good pictures and 2 bad ones; " in done.stdout
    done = command("predict", "gelernt", "pics/schlecht [ß]", "--out=Urteil", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = command("evaluate", "--model=gelernt", "--workdir=selbst", cwd=folder)
    assert done.returncode == 2
    assert "fitted on all 5 normal images, and on all 2 abnormal ones" in done.stderr
    for i in (0, 1):
        trees.save(folder / "neu" / "gut" / f"{i}.png", trees.pixels(200 + i))
        trees.save(folder / "neu" / "Kratzer" / f"{i}.png", trees.pixels(300 + i))
    given = ("--config.data.normal=neu/gut", "--config.data.abnormal=neu/Kratzer")
    done = command("evaluate", "--model=gelernt", *given, "--workdir=anders", cwd=folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "anders" / "results.json").read_text())
    assert results["categories"]["pics"]["counts"]["anomalous"] == 2
