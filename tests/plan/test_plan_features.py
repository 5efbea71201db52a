"""``dsad plan`` of evaluations: the program is theirs, its numbers are those of the arithmetic."""

import json
import math

import jax
import numpy as np
import pytest

from dsad.assembly import datasets, evaluate, runs
from dsad.cli import main
from dsad.core.errors import ConfigError
from dsad.core.hosts import put
from dsad.core.mesh import batch_sharding, make_mesh
from dsad.evaluation.batches import batches
from dsad.evaluation.compiled import Device
from dsad.models import vit, wrappers
from dsad.plan import _compile, _hardware, _jobs
from dsad.terminal import console, flags

pytestmark = pytest.mark.usefixtures("quick_machine")

SMOKE = "--config=superadd:smoke"
#: A backbone whose maps are cheap to compile.
TINY = ("--config.backbone=vit_tiny_patch16_224", "--config.evaluation.image_size=64")


def config(spec, *overrides):
    return flags.Command("x", "", config=spec).parse(list(overrides))[0]


def plan(*argv):
    return main.main(["plan", "--cache=off", *argv])


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        ("superadd:smoke", ("--config.evaluation.batch_size=6",)),
        ("musc:smoke", ()),
        ("knn:smoke", ("--config.backbone=residual:patches:32/8:resnet18",)),
    ],
)
def test_the_program_is_that_of_an_evaluation(spec, overrides):
    """Same text as for real weights and a real batch, from shapes alone."""
    chosen = config(spec, *overrides)
    cfg, detector = evaluate.parse(chosen)
    mesh = make_mesh(cfg.mesh)
    network = wrappers.unwrap(cfg.backbone).network
    device = Device(runs.backbone(network, "random", 0), detector, cfg.evaluation, mesh)
    source = datasets.loaded(cfg.data, console.console()).source("train", "tiles")
    host = next(batches(source, cfg.evaluation, mesh, device.batch))
    images = put(host.images, batch_sharding(mesh))
    extractor = device._features
    text = extractor._with_tree.lower(extractor.network, images).as_text()
    job = _jobs.features(chosen, jax.devices())
    assert job.lower().as_text() == text
    assert job.batch_size == len(host.images) == 8
    weights = sum(x.nbytes for x in jax.tree.leaves(extractor.network))
    assert job.held == {"weights": weights, "batch": host.images.nbytes // 8}
    assert job.unit == ("window" if "superadd" in spec else "image")


def counted(arch, side):
    """Of all blocks of a transformer, by hand: FLOPs of one square image."""
    spec = vit.arch(arch)
    c, cells = spec.width, (side // spec.patch) ** 2
    tokens = cells + spec.prefix
    inner = spec.hidden or 4 * c
    matrices = 3 if spec.activation == "swiglu" else 2
    per_token = 2 * (4 * c * c + matrices * c * inner) + 4 * tokens * c
    return spec.depth * tokens * per_token + 2 * cells * 3 * spec.patch**2 * c


@pytest.mark.parametrize(
    ("spec", "arch", "side"),
    [
        ("superadd:smoke", "vit_tiny_patch16_224", 64),
        ("superadd:smoke", "vit_small_plus_patch16_dinov3", 96),
        ("superadd:published", "vit_huge_plus_patch16_dinov3", 640),
    ],
)
def test_work_is_that_of_the_architecture(spec, arch, side):
    before = {id(a) for a in jax.live_arrays()}
    argv = (f"--config.backbone={arch}", f"--config.evaluation.image_size={side}")
    job = _jobs.features(config(spec, *argv), jax.devices())
    assert job.model_flops == pytest.approx(counted(arch, side), rel=0.01)
    assert sum(a.nbytes for a in jax.live_arrays() if id(a) not in before) < 2**20


def test_stages_that_no_map_needs_are_no_work():
    """ResNet-18 at 64 px up to its third stage, by hand; the fourth is not computed."""
    first = 32**2 * 64 * 3 * 49 + 4 * 16**2 * 64 * 64 * 9
    second = 8**2 * 128 * (64 * 9 + 3 * 128 * 9 + 64)
    third = 4**2 * 256 * (128 * 9 + 3 * 256 * 9 + 128)
    job = _jobs.features(config("knn:smoke"), jax.devices())
    assert job.model_flops == 2 * (first + second + third)


def test_prints_memory_work_and_time(capsys, tmp_path):
    file = tmp_path / "plan.json"
    side = "--config.evaluation.image_size=64"
    assert plan(SMOKE, side, "--config.evaluation.batch_size=16", f"--json={file}") == 0
    text = capsys.readouterr().out
    for words in (
        "16 windows a batch, 2 a chip", "feature maps in float32", "fits:", "work per chip and",
        "per window, forward;", "batch, bound by", "windows/s/chip", "1,000 windows:", "chip-hours",
        "batch = the largest", "collectives: none", "config.evaluation.cache_mb",
    ):  # fmt: skip
        assert words in text, words
    assert "epochs" not in text
    (found,) = json.loads(file.read_text())
    program, estimate = found["program"], found["estimate"]
    assert (found["kind"], found["unit"], found["steps"]) == ("features", "window", None)
    assert program["outputs"] == pytest.approx(4 * 2 * 4 * 4 * 192 * 4, abs=64)  # and pointers
    needed = counted("vit_tiny_patch16_224", 64)
    assert program["flops"] == pytest.approx(2 * needed, rel=0.02)
    speed = estimate["images_per_s"]
    assert speed == pytest.approx(16 / estimate["step"])
    assert estimate["chip_hours_per_thousand"] == pytest.approx(8 * 1000 / speed / 3600)


def test_weights_that_no_map_needs_take_memory(tmp_path, monkeypatch):
    """The last stage of a ResNet has most of them, and is no argument of the program."""
    monkeypatch.setattr(_compile, "_compile", lambda *_: _compile.Program(arguments=5))
    file = tmp_path / "plan.json"
    assert plan("--config=knn:smoke", f"--json={file}") == 0
    (found,) = json.loads(file.read_text())
    assert found["program"]["arguments"] == sum(found["held"].values()) > 40e6


def test_what_does_not_fit_ends_with_1(capsys, monkeypatch):
    monkeypatch.setattr(_compile, "_compile", lambda *_: _compile.Program(temporaries=10**9))
    for limit, code, words in ((2 * 10**9, 0, "fits: "), (10**9, 1, "DOES NOT FIT")):
        monkeypatch.setattr(_hardware, "limit", lambda devices, limit=limit: limit)
        assert plan(SMOKE) == code
        text = capsys.readouterr().out
        assert words in text
    assert "config.evaluation.batch_size" in text
    assert "config.accumulate" not in text


def test_sweep_of_batches(capsys, monkeypatch, tmp_path):
    def compiled(lower, mesh, effort, out, cache, about):
        count = math.prod(jax.tree.leaves(lower().in_avals)[-1].shape) // (32 * 32 * 3)
        return _compile.Program(peak=count * 2**20, bytes=1e9), False

    monkeypatch.setattr(_compile, "compiled", compiled)
    monkeypatch.setattr(_hardware, "limit", lambda devices: 2**30)
    file = tmp_path / "sweep.json"
    assert plan(SMOKE, "--sweep", "--batch=8,12,32", f"--json={file}") == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "8 × 1" in line]
    assert [line.split()[3] for line in lines] == ["8", "16", "32"]  # as the evaluation rounds up
    assert "best" in lines[2]
    assert max(map(len, lines)) <= 80
    assert "windows/s" in text
    assert "/1000" in text
    assert "config.evaluation.cache_mb" in text
    assert [p["batch_size"] for p in json.loads(file.read_text())] == [8, 16, 32]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=compare"], "planned one by one"),
        (["--config=demo:smoke"], "two configs"),
        (["--config=probe:smoke"], "--config=configs/knn.py"),
        (["--config=data"], "neither 'objective' nor 'detector'"),
        (["--config=twoclass", *TINY], "there are no features to plan"),
        (["--config=knn:smoke", "--samples=5"], "--samples: the features of a batch"),
        (["--config=knn:smoke", "--sweep", "--fsdp=1,2"], "--fsdp: an evaluation has all weights"),
        (["--config=knn", "--config.backbone=run:runs/{category}"], "a run of its own; name one"),
        (["--config=knn", "--config.backbone=run:nowhere"], "nowhere"),
        (["--config=knn", *TINY], "no feature map layer2"),
        (["--config=gde", "--config.evaluation.image_size=0"], "does not tell the size"),
        (["--config=musc"], "class token"),
        (["--config=gde", "--config.backbone=resnet18"], "patches:32"),
        (["--config=knn", "--config.backbone=resnet19"], "resnet18"),
    ],
)
def test_what_is_no_evaluation_is_refused(argv, words, capsys):
    assert plan(*argv) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error


def test_windows_on_several_hosts_are_named():
    class Far:
        platform, process_index = "tpu", 1

    chosen = config("superadd:smoke")
    devices = list(jax.devices())
    assert _jobs.features(chosen, devices).warnings(_compile.Program()) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jobs, "make_mesh", lambda cfg, _: make_mesh(cfg, devices))
        (line,) = _jobs.features(chosen, [*devices, Far()]).warnings(_compile.Program())
    assert "windows" in line
    assert "2 hosts" in line
    whole = config("knn:smoke")
    assert _jobs.features(whole, devices).warnings(_compile.Program()) == []


@pytest.mark.slow
def test_the_encoder_of_a_run(tmp_path):
    assert main.main(["pretrain", "--config=mae:smoke", f"--workdir={tmp_path / 'run'}"]) == 0
    spec = f"run:{tmp_path / 'run'}"
    own = runs.backbone(spec, "", 0)
    abstract = runs.abstract(spec, "", 0)
    assert jax.tree.structure(abstract) == jax.tree.structure(own)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    argv = (f"--config.backbone={spec}", "--config.evaluation.image_size=64",
            "--config.detector.layers=('block0',)")  # fmt: skip
    job = _jobs.features(config("knn", *argv), jax.devices())
    assert job.held["weights"] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(own))
    with pytest.raises(ConfigError, match="a run brings its own"):
        runs.abstract(spec, "imagenet", 0)
