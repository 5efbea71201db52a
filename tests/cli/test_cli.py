"""What people type, and what they read when it cannot be done."""

import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath

from dsad.assembly import pretrain, workdir
from dsad.cli import main
from dsad.core.config import build_dataclass
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.types import RunInfo
from dsad.data.base import DataConfig
from dsad.terminal import flags
from tests.helpers import alone, command, dsad

INFO = RunInfo(total_steps=4, batch_size=8, samples=40, classes=2)
GPath = type(epath.Path("."))


def fails(capsys, *argv):
    """Exit code 2 and the message on standard error."""
    assert main.main(argv) == 2
    return capsys.readouterr().err


def test_usage_lists_the_commands(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("demo", "check-data", "pretrain", "evaluate", "report", "bench"):
        assert re.search(rf"^  {name} ", text, re.M)
    assert main.main([]) == 2
    assert main.main(["pretrian"]) == 2


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([name, "--help"])
    assert stop.value.code == 0
    assert "dsad" in capsys.readouterr().out


def test_unknown_config_key_lists_what_exists(capsys):
    text = fails(capsys, "pretrain", "--config=ds2", "--config.optim.lrr=1", "--workdir=x")
    assert "config.optim.lrr: unknown key" in text
    assert "Did you mean --config.optim.lr?" in text
    assert "momentum" in text


@pytest.mark.parametrize(
    "override",
    [
        "--config.optim.lr=fast",
        "--config.batch_size=1.5",
        "--config.data.cache=disk",
        "--config.objective.layers=3",
    ],
)
def test_wrong_type_names_the_key(capsys, override, tmp_path):
    text = fails(capsys, "pretrain", "--config=ds2:smoke", override, f"--workdir={tmp_path / 'x'}")
    assert override.split("=")[0].removeprefix("--").removeprefix("config.").split(".")[-1] in text
    assert "expected" in text
    assert not (tmp_path / "x").exists()


def test_unknown_names_list_what_exists(capsys):
    assert "ds2" in fails(capsys, "pretrain", "--config=ds3", "--workdir=x")
    assert "smoke" in fails(capsys, "pretrain", "--config=ds2:smok", "--workdir=x")
    assert "--workdir" in fails(capsys, "pretrain", "--wrkdir=x")
    assert "synthetic" in fails(
        capsys,
        "pretrain",
        "--config=ds2",
        "--config.data.name=sinthetic",
        "--workdir=/nonexistent/x",
    )


def test_variants_combine_and_overrides_win():
    command = flags.Command("pretrain", "", config="configs/ds2.py")
    config, _, _ = command.parse(
        ["--config=ds2:synthetic,pixpro", "--config.objective.threshold=0.5"]
    )
    assert config.data.name == "synthetic"
    assert config.objective.top1 == "off"
    assert config.objective.threshold == 0.5
    run, _, method = pretrain.parse(config)
    assert run.batch_size == 32
    assert method.layers == ("layer4",)


def test_the_config_may_follow_its_keys():
    keys, file = ["--config.evaluation.image_size=96", "DIR"], ["--config", "patchcore"]
    for argv in (keys + file, file + keys):
        config, _, rest = flags.Command("x", "", config="knn", positional=True).parse(argv)
        assert config.evaluation.image_size == 96
        assert config.detector.bank == "coreset"
        assert rest == ["DIR"]


@pytest.mark.parametrize("name", flags.shipped_configs())
def test_shipped_configs_are_complete(name):
    from dsad.assembly import comparison, evaluate, label_probe
    from dsad.cli import demo

    config, _, _ = flags.Command("x", "", config=name).parse([])
    if comparison.is_meant(config):
        comparison.parse(config)
    elif "pretrain" in config:
        pretrain.parse(config.pretrain)
        evaluate.parse(config.evaluate)
        assert demo.COMMAND_CONFIG == "configs/demo.py"
    elif "objective" in config:
        pretrain.parse(config)
    elif "detector" in config:
        evaluate.parse(config)
    elif "probe" in config:
        label_probe.parse(config)
    else:
        build_dataclass(DataConfig, dict(config.data.items()))


# --- work directories


def claim(path, config=None, **how):
    return workdir.claim(str(path), "pretrain", config or {"a": {"b": 1}}, info=INFO, **how)


def test_a_used_workdir_is_refused(tmp_path):
    claim(tmp_path / "run")
    with pytest.raises(WorkdirError, match="in use.*--resume.*--overwrite"):
        claim(tmp_path / "run")
    claim(tmp_path / "50 %s")
    with pytest.raises(WorkdirError, match="50 %s: in use"):
        claim(tmp_path / "50 %s")


def test_resume_needs_the_same_config(tmp_path):
    claim(tmp_path / "run")
    claim(tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="config.a.b: 1 → 2"):
        claim(tmp_path / "run", {"a": {"b": 2}}, resume=True)
    with pytest.raises(WorkdirError, match="nothing to resume"):
        claim(tmp_path / "other", resume=True)


def test_overwrite_replaces_runs_only(tmp_path):
    claim(tmp_path / "run")
    (tmp_path / "run" / "old").write_text("x")
    claim(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "old").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("x")
    with pytest.raises(WorkdirError, match="no dsad run"):
        claim(tmp_path / "photos", overwrite=True)
    (tmp_path / "photos" / "config.json").write_text('{"model_type": "bert"}')  # another tool's
    with pytest.raises(WorkdirError, match="no dsad run"):
        claim(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.png").exists()


def test_a_workdir_is_needed():
    with pytest.raises(ConfigError, match="--workdir"):
        claim("")


# --- the way through


def test_demo_writes_everything(tmp_path):
    where = tmp_path / "demo"
    argv = ["demo", "--config=configs/demo.py:smoke", "--workdir=demo"]
    done = command(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert "dsad pretrain" in done.stdout
    page = (where / "report.html").read_text()
    for name in ("pretrained", "untrained"):
        results = json.loads((where / name / "results.json").read_text())
        keys = {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_30"}
        assert keys <= set(results["mean"])
        assert name in page
    assert results["stamp"]["pixels"] == "original"
    told = [x for x in done.stdout.splitlines() if "mean AUPRO" in x or "drawn unlike" in x]
    assert len(told) == 2
    assert all(line in page for line in told)
    again = command(*argv, cwd=tmp_path)
    assert again.returncode == 2
    assert "in use" in again.stderr
    assert main.main(["report", str(where / "pretrained"), f"--out={tmp_path / 'one.html'}"]) == 0
    assert "pretrained" in (tmp_path / "one.html").read_text()


def test_evaluate_needs_data(capsys, tmp_path):
    argv = ("evaluate", "--config.backbone=resnet18", f"--workdir={tmp_path / 'e'}")
    text = fails(capsys, *argv)
    assert "config.weights: resnet18 needs some" in text
    assert "imagenet, or random" in text
    assert "config.data.name" in fails(capsys, *argv, "--config.weights=random")
    text = fails(capsys, "evaluate", f"--config.backbone=run:{tmp_path}", "--workdir=x")
    assert "no dsad run" in text


SMALL = (
    "--config.data.synthetic.size=32", "--config.data.synthetic.train=6",
    "--config.data.synthetic.good=2", "--config.data.synthetic.bad=1",
    "--config.evaluation.image_size=32", "--config.data.name=synthetic",
    "--config.weights=random",
    "--config.detector.layers=('layer1',)", "--config.detector.sigma=1.0",
)  # fmt: skip


@pytest.mark.parametrize(
    "file",
    [
        "results.json",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("stamp.json", "gallery.npz")),
        pytest.param("000.tiff", marks=pytest.mark.slow),
    ],
)
def test_evaluate_where_the_disk_fills_up_names_the_file(capsys, tmp_path, monkeypatch, file):
    """As it happens to maps, pictures and numbers; the feature store has a test of its own."""
    replace = GPath.replace

    def full(self, target):
        if pathlib.Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(GPath, "replace", full)
    text = fails(
        capsys, "evaluate", *SMALL, "--config.data.categories=('wood',)",
        "--config.evaluation.save_maps=tiff", f"--workdir={tmp_path}/run",
    )  # fmt: skip
    assert re.search(rf"^error: {tmp_path}/run/\S*{file}: the disk or quota is full", text, re.M)
    assert "Free space there" in text
    assert not list(tmp_path.rglob("*.writing"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(
    "argv",
    [("--help",), pytest.param(("evaluate", *SMALL), marks=pytest.mark.slow)],
    ids=["help", "evaluate"],
)
def test_output_to_a_full_disk_is_an_error_of_one_line(argv, tmp_path):
    argv = [*argv, f"--workdir={tmp_path}/run"] if len(argv) > 1 else argv
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dsad", *argv], env=alone(), stdout=full, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    assert done.returncode == 3
    assert re.fullmatch(
        "error: standard output: the disk or quota is full: No space left on device. .*\n",
        done.stderr,
    )


@pytest.mark.slow
def test_evaluate_with_seeds_thresholds_and_maps(capsys, tmp_path):
    """Few-shot support sets on two categories, all in one command; then two runs compared."""
    argv = (
        "evaluate", *SMALL, "--config.data.categories=('wood','tiles')", "--config.shots=3",
        "--config.evaluation.false_alarm_rate=0.2",
        "--config.evaluation.save_maps=tiff",
    )  # fmt: skip
    assert main.main([*argv, "--config.seeds=(0,5)", f"--workdir={tmp_path / 'a'}"]) == 0
    text = capsys.readouterr().out
    assert "mean ± sample standard deviation over 2 seeds (0, 5)" in text
    assert "Thresholds from normal images, false-alarm rate 0.2" in text
    assert re.search(
        r"wood, seed 5: \d+ of \d+ defects found, \d+ of \d+ false alarms at 50 % \(", text
    )
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [len(results["support"]["wood"][s]["paths"]) for s in ("0", "5")] == [3, 3]
    assert results["thresholds"]["wood"]["5"]["held_out"] == 1
    assert (tmp_path / "a/anomaly_maps_seed5/wood/test/good/001.tiff").is_file()
    assert main.main([*argv, "--config.seeds=(0,6)", f"--workdir={tmp_path / 'b'}"]) == 0
    capsys.readouterr()
    text = fails(capsys, "report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert "support.seeds: [0, 5] against [0, 6]" in text
    two = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main.main(["report", *two, "--allow-different", f"--out={tmp_path / 'r.html'}"]) == 0
    assert "b − a" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_one_model_per_category_and_one_for_all(capsys, tmp_path):
    runs = tmp_path / "runs"
    for seed, category in enumerate(("tiles", "wood")):  # step 0 of a run needs its config alone
        config, _, _ = flags.Command("x", "", config="ds2").parse(["--config=ds2:smoke"])
        config.seed = seed
        workdir.claim(str(runs / category), "pretrain", config.to_dict(), info=INFO)
    spec, two = f"--config.backbone=run:{runs}/{{category}}@0", "--config.data.categories={}"
    both, wood = two.format("('tiles','wood')"), two.format("('wood',)")
    own = "--config.weights="  # a run has its own
    text = fails(capsys, "evaluate", spec, "--workdir=x")
    assert "no single run has the data" in text
    text = fails(capsys, "evaluate", spec, *SMALL, own, both, "--config.one_for_all", "--workdir=x")
    assert "one_for_all" in text
    assert "speckle: no dsad run there" in fails(
        capsys, "evaluate", spec, *SMALL, own, "--workdir=x"
    )

    def evaluated(name, *argv):
        assert main.main(["evaluate", *SMALL, own, *argv, f"--workdir={tmp_path / name}"]) == 0
        return json.loads((tmp_path / name / "results.json").read_text())

    each = evaluated("each", spec, both)
    weights = [x["weights"] for x in each["stamp"]["backbone"]["per_category"].values()]
    assert "tiles untouched" in weights[0]
    assert "wood untouched" in weights[1]
    same = f"--config.backbone=run:{runs}/wood@0"
    assert evaluated("wood", same, wood)["images"]["wood"] == each["images"]["wood"]
    wrapped = evaluated("patches", spec.replace("=run", "=patches:16/16:run"), both)
    found = wrapped["stamp"]["backbone"]["per_category"]["wood"]
    assert found["arch"].startswith("patches:16/16:")
    assert "wood untouched" in found["weights"]
    shared = evaluated("all", same, both, "--config.one_for_all")["stamp"]
    assert shared["model"] == "one for all categories"
    rows = [each["stamp"]["detector_state"][c]["0"]["bank_rows"] for c in ("tiles", "wood")]
    assert shared["detector_state"]["all categories"]["0"]["bank_rows"] == sum(rows)


@pytest.mark.parametrize(
    "argv",
    [
        ("pretrain", "--config=knn"),
        ("evaluate", "--config=ds2"),
        ("demo", "--config=ds2"),
        ("check-data", "--config=demo"),
    ],
)
def test_a_config_of_another_command_is_refused(capsys, argv, tmp_path):
    text = fails(capsys, *argv, *([] if argv[0] == "check-data" else [f"--workdir={tmp_path}/x"]))
    assert "this command needs a config such as" in text


@pytest.mark.slow
def test_bench_step_names_the_parts(tmp_path):
    done = dsad("bench", "step", "--config=ds2:smoke", "--rounds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("views", "encoder", "teacher", "losses", "images/s"):
        assert part in done.stdout


@pytest.mark.slow
def test_bench_step_of_transformers_tells_masking_memory_and_compile_time(tmp_path):
    done = dsad(
        "bench", "step", "--objective=mae", "--config=mae:smoke", "--rounds=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for part in ("views", "encoder", "decoder", "GFLOP", "4 of 16 patches", "faster per image"):
        assert part in text
    for policy in ("none", "dots", "full"):
        assert re.search(rf"{policy} \W*\d+\.\d", text), policy
    assert re.search(r"ViT-L \(24 blocks\) [\d.]+ s: [\d.]+ ×", text)


def test_bench_step_takes_an_objective_or_its_config(capsys):
    text = fails(capsys, "bench", "step", "--objective=maee")
    assert "Did you mean 'mae'?" in text
    text = fails(capsys, "bench", "step", "--objective=mae", "--config=ds2:smoke")
    assert "--objective=mae: the config's objective is ds2" in text


PATCHES = (
    "--config.data.categories=('wood',)", "--config.evaluation.batch_size=4",
    "--config.detector.components=3",
)  # fmt: skip


def test_gde_on_patches(capsys, tmp_path):
    """The wrapper through the whole command: 3 × 3 patches of 32 pixels on images of 40."""
    argv = ["--config=gde", *SMALL, *PATCHES, "--config.evaluation.image_size=40"]
    assert main.main(["evaluate", *argv, f"--workdir={tmp_path}/a"]) == 0
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert found["stamp"]["backbone"]["arch"] == "patches:32/4:resnet18"
    shapes = found["stamp"]["detector_state"]["wood"]["0"]["arrays"]
    assert shapes == {"mean": [3, 3, 64], "factor": [3, 3, 64, 3]}
    assert 0 < found["categories"]["wood"]["pixel_auroc"] < 1


@pytest.mark.parametrize(
    "spec", ["resnet18", "patches:32/8:resnet18", "patches:32/40:resnet18", "run:x"]
)
def test_gde_refuses_features_of_other_patches(capsys, spec):
    argv = ["--config=gde", *SMALL, *PATCHES, f"--config.backbone={spec}", "--workdir=x"]
    assert f"for patches:32/4:BACKBONE (its keys patch and stride), found '{spec}'" in fails(
        capsys, "evaluate", *argv
    ).replace("\n", " ")
