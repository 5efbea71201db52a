"""``dsad prepare`` and training and measuring on what it wrote."""

import json
import shutil

import numpy as np
import pytest

from dsad.cli import main
from tests.data import trees
from tests.helpers import dsad

TRAIN = [
    "pretrain", "--config=configs/mae.py:smoke", "--config.data.canvas=24", "--config.batch_size=4",
    "--config.steps=4", "--config.log_every=1", "--config.data.cache=none",
]  # fmt: skip


def run(*argv, cwd):
    done = dsad(*argv, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def test_says_what_it_does(tmp_path, capsys):
    trees.mvtec(tmp_path / "files")
    data = ["--config.data.name=mvtec", f"--config.data.root={tmp_path}/files"]
    assert main.main(["prepare", *data, f"--out={tmp_path}/records"]) == 0
    text = capsys.readouterr().out
    assert "files (MVTec AD layout): 6 train, 8 test images as they are:" in text
    assert (
        f"records of image files (6 train, 8 test) prepared from mvtec in {tmp_path}/files" in text
    )
    assert main.main(["prepare", *data, f"--out={tmp_path}/records"]) == 2
    assert "in use. Replace its records with --overwrite" in capsys.readouterr().err
    again = ["prepare", *data, f"--out={tmp_path}/records", "--canvas=20", "--overwrite"]
    assert main.main(again) == 0
    text = capsys.readouterr().out
    assert "6 train canvases: 6 × 20² × 3 = 7.2 kB, less after compression" in text
    assert f"--config.data.root={tmp_path}/records --config.data.canvas=20" in text
    check = ["check-data", "--config.data.name=records", f"--config.data.root={tmp_path}/records"]
    assert main.main(check) == 2
    assert "canvases of the train images alone, not of the test images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_records_is_the_run_from_files(tmp_path):
    """Losses, also of a run that goes on with two worker processes where one without stopped."""
    trees.mvtec(tmp_path / "files")
    files = ["--config.data.name=mvtec", f"--config.data.root={tmp_path}/files"]
    run(*TRAIN, *files, "--workdir=files-run", cwd=tmp_path)
    expected = losses(tmp_path / "files-run")
    assert len(set(expected)) == 4
    for side in ("0", "24"):
        run("prepare", *files, f"--out=records{side}", f"--canvas={side}", cwd=tmp_path)
        made = ["--config.data.name=records", f"--config.data.root=records{side}"]
        command = [*TRAIN, *made, f"--workdir=run{side}", "--config.checkpoint.every=2"]
        assert "prepared from mvtec in" in run(*command, cwd=tmp_path)
        np.testing.assert_array_equal(losses(tmp_path / f"run{side}"), expected)
    shutil.rmtree(tmp_path / "run24/checkpoints/4")  # as if it had been stopped after two steps
    text = run(
        *command, "--resume", "--config.data.workers=2", "--config.data.prefetch=1", cwd=tmp_path
    )
    assert "resumed at step 2 of 4" in text
    np.testing.assert_array_equal(losses(tmp_path / "run24"), expected)


@pytest.mark.slow
def test_an_evaluation_of_records_is_that_of_the_files(tmp_path):
    trees.mvtec(tmp_path / "files")
    files = ["--config.data.name=mvtec", f"--config.data.root={tmp_path}/files"]
    run("prepare", *files, "--out=records", cwd=tmp_path)
    made = ["--config.data.name=records", "--config.data.root=records"]
    found = []
    for name, data in (("a", files), ("b", made)):
        run(
            "evaluate", *data, f"--workdir={name}", "--config.backbone=resnet18",
            "--config.weights=random", "--config.evaluation.image_size=32", cwd=tmp_path,
        )  # fmt: skip
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    for results in found:
        results["stamp"].pop("date")
        for category in results["categories"].values():
            category.pop("seconds")
    assert found[0]["stamp"] == found[1]["stamp"]
    assert found[0]["categories"] == found[1]["categories"]
