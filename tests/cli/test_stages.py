"""The way of ISSTAD through the commands: stage 1, stage 2, scores, report; in and out of files."""

import contextlib
import json
import re
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy

from dsad import models
from dsad.assembly import pretrain, runs, training, workdir
from dsad.cli import main
from dsad.core.mesh import make_mesh
from dsad.core.tree import flatten
from dsad.data.pipeline import Pipeline
from dsad.terminal import console, flags
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from tests.models.published import mae_state
from tests.models.test_models import torch_names

SMALL = ("--config.data.synthetic.train=4", "--config.data.categories=('tiles','wood')")


@contextlib.contextmanager
def one_device():
    """Programs for one of the eight devices take less time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_mesh", lambda cfg, _: make_mesh(cfg, jax.devices()[:1]))
        yield


def run(command, *argv):
    assert main.main([command, *argv]) == 0


def fails(capsys, *argv):
    assert main.main(argv) == 2
    return " ".join(capsys.readouterr().err.split())


def isstad(path, source, *argv):
    """A run of the second stage."""
    start = (f"--config.init_from={source}",) if source else ()
    return ("pretrain", "--config=isstad:smoke", *SMALL, *start, f"--workdir={path}", *argv)


def weights(path):
    """(params, extra, step) of the newest checkpoint."""
    checkpointer = Checkpointer(path, CheckpointConfig(), read_only=True)
    found = checkpointer.weights()
    checkpointer.close()
    return jax.device_get(found)


def same(a, b):
    """Bitwise, leaf by leaf."""
    one, two = flatten(a), flatten(b)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "mae"
    with one_device():  # the second stage runs on eight
        run("pretrain", "--config=mae:smoke", *SMALL, f"--workdir={path}")
    return path


@pytest.fixture(scope="module")
def stage2(stage1):
    path = stage1.parent / "isstad"
    run(*isstad(path, stage1))
    return path


@pytest.fixture(scope="module")
def published(stage1):
    """The first stage as a file in the names of the published checkpoints."""
    params, extra, _ = weights(stage1)
    there = runs.opened(str(stage1))
    assert there.config.steps == 4
    info = workdir.read(stage1)["info"]
    assert info == {"total_steps": 4, "batch_size": 8, "samples": 8, "classes": 2}
    spec = there.objective.encoder.spec
    path = stage1.parent / "mae.safetensors"
    safetensors.numpy.save_file(mae_state(spec, params, extra), path)
    return path


def test_the_second_stage_keeps_the_encoder_and_grows_the_decoder(stage1, stage2):
    before, _, _ = weights(stage1)
    params, extra, step = weights(stage2)
    assert step == 4
    same(extra["encoder"], before["encoder"])
    old, new = (x["decoder"]["blocks"]["fc1"]["kernel"] for x in (before, params))
    assert (old.shape[0], new.shape[0]) == (2, 3)
    # Four updates of AdamW at a rate below 1e-3 move no weight by more than about 4e-3.
    assert 0 < np.abs(new[:2] - old).max() < 0.01


@pytest.mark.slow
def test_scores_and_a_report_with_panels(stage2, capsys):
    out = stage2.parent / "scores"
    run(
        "evaluate", "--config=configs/isstad_detector.py", f"--config.backbone=run:{stage2}",
        "--config.evaluation.image_size=32", f"--workdir={out}",
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert set(results["categories"]) == {"tiles", "wood"}
    for row in results["categories"].values():
        assert all(0 <= row[n] <= 1 for n in ("image_auroc", "pixel_auroc", "aupro_30"))
    assert results["stamp"]["detector"]["name"].lower().endswith("isstad")
    assert "step 4" in results["stamp"]["backbone"]["weights"]
    run("report", str(out))
    page = (out / "report.html").read_text()
    for panel in ("reconstruction", "probability", "error"):
        assert re.search(rf"\b{panel}\b", page), panel
    assert '<div class="panels">' in page
    assert "<h2>Pretraining</h2>" in page  # with the curves of the second stage
    capsys.readouterr()


@pytest.mark.slow
def test_a_stopped_second_stage_ends_as_an_undisturbed_one(stage1, stage2, monkeypatch, capsys):
    """SIGTERM while the third batch is fetched; resuming does not need stage 1, which is gone."""
    path = stage1.parent / "stopped"
    plain = Pipeline.iterator

    def stopping(self):
        batches = plain(self)

        class Stopping:
            taken = 0

            def __getattr__(self, name):
                return getattr(batches, name)

            def __next__(self):
                self.taken += 1
                if self.taken == 3:
                    signal.raise_signal(signal.SIGTERM)
                return next(batches)

        return Stopping()

    monkeypatch.setattr(Pipeline, "iterator", stopping)
    run(*isstad(path, stage1))
    assert "stopped and saved" in capsys.readouterr().out
    assert weights(path)[2] == 3
    monkeypatch.undo()
    away = stage1.rename(stage1.with_name("away"))
    try:
        run(*isstad(path, stage1, "--resume"))
    finally:
        away.rename(stage1)
    text = capsys.readouterr().out
    assert "resumed at step 3 of 4" in text
    assert "frozen" not in text
    same(weights(path), weights(stage2))


@pytest.mark.slow
def test_published_names_are_as_good_as_the_run(stage1, stage2, published, capsys):
    path = stage1.parent / "from-file"
    run(*isstad(path, published))
    text = capsys.readouterr().out
    assert "from mae.safetensors: encoder: " in text
    assert "frozen; decoder: 2 blocks taken over, 1 new" in text
    same(weights(path), weights(stage2))


def test_a_second_stage_without_a_first_is_refused(stage1, tmp_path, capsys):
    text = fails(capsys, *isstad(tmp_path / "x", ""))
    assert "config.init_from: this objective starts from a run of the objective mae" in text
    text = fails(capsys, *isstad(tmp_path / "x", tmp_path / "typo"))
    assert "config.init_from=" in text
    assert "neither a pretraining run (no checkpoints there) nor weights" in text
    assert "no such file" in text
    (tmp_path / "empty").mkdir()
    assert "neither a pretraining run" in fails(capsys, *isstad(tmp_path / "x", tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("no weights")
    text = fails(capsys, *isstad(tmp_path / "x", tmp_path / "notes.txt"))
    assert "neither a pretraining run" in text
    assert not (tmp_path / "x").exists()


def first_state(config, *argv):
    """The state before step 0 of a run that starts from other weights."""
    found, _, _ = flags.Command("pretrain", "", config=config).parse(list(argv))
    out = console.console()
    with one_device():
        made = training.prepare(found, out)
    return jax.device_get(training.first_state(made, runs.checked_weights(made.run), out))


@pytest.mark.slow
def test_ds2_starts_from_torchvision_names(tmp_path, capsys):
    state = torch_names()
    np.savez(tmp_path / "w.npz", **state)
    found = first_state("ds2:smoke", *SMALL, f"--config.init_from={tmp_path / 'w.npz'}")
    assert "from w.npz: " in capsys.readouterr().out
    encoder, statistics = found.params["encoder"], found.extra["stats"]["encoder"]
    want = models.backbone("resnet18", state)
    for path, leaf in flatten(want.params).items():
        if path in flatten(encoder):
            np.testing.assert_array_equal(flatten(encoder)[path], leaf, err_msg=path)
    assert flatten(encoder).keys() <= flatten(want.params).keys()
    for path, leaf in flatten(statistics).items():
        np.testing.assert_array_equal(leaf, flatten(want.extra)[path], err_msg=path)
    # The teacher starts as a copy of what was taken.
    same(found.extra["teacher"]["encoder"], encoder)


def test_a_damaged_file_is_refused_before_step_0(published, tmp_path, capsys):
    tensors = safetensors.numpy.load_file(published)
    del tensors["blocks.1.norm1.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    text = fails(capsys, *isstad(tmp_path / "x", tmp_path / "w.safetensors"))
    assert re.search(r"blocks\.1\.norm1\.weight +\(48,\) +missing", text)


@pytest.mark.slow
def test_an_exported_encoder_gives_the_features_of_the_run(stage1, capsys):
    out = stage1.parent / "exported"
    run("export", f"--backbone=run:{stage1}", f"--out={out}")
    capsys.readouterr()
    arch = json.loads((out / "config.json").read_text())["architecture"]
    own, read = runs.backbone(f"run:{stage1}", "", 0), models.backbone(arch, out)
    assert (read.mean, read.std) == (own.mean, own.std)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    one, two = jax.jit(lambda f, x: f(x))(own, images), jax.jit(lambda f, x: f(x))(read, images)
    assert one.keys() == two.keys() == {"block0", "block1"}
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-5)


@pytest.mark.slow
def test_an_exported_encoder_gives_the_numbers_of_the_run(stage1, capsys):
    out = stage1.parent / "exported-too"
    run("export", f"--backbone=run:{stage1}", f"--out={out}")
    arch = json.loads((out / "config.json").read_text())["architecture"]
    found = []
    for name, backbone in (("r", (f"run:{stage1}", "")), ("e", (arch, out))):
        path = stage1.parent / f"knn-{name}"
        run(
            "evaluate", "--config=knn", f"--config.backbone={backbone[0]}",
            f"--config.weights={backbone[1]}", "--config.data.name=synthetic", *SMALL,
            "--config.data.synthetic.size=64", "--config.evaluation.image_size=32",
            "--config.detector.layers=('block0','block1')", f"--workdir={path}",
        )  # fmt: skip
        found.append(json.loads((path / "results.json").read_text())["mean"])
    for metric, value in found[0].items():
        assert found[1][metric] == pytest.approx(value, abs=1e-3), metric
