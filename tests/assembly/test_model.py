"""Fitted models: what was measured is measured again, bit by bit; damage and misuse are refused."""

import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from dsad import models
from dsad.assembly import evaluate
from dsad.assembly.model import FittedModel, Saved
from dsad.assembly.saving import FORMAT, Writer
from dsad.cli import main
from dsad.core import paths
from dsad.core.config import members
from dsad.core.detection import DetectorTraits
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.data import base
from dsad.evaluation import categories, localize, stamp
from dsad.evaluation.compiled import Fitted
from dsad.evaluation.localize import Results, read_results
from dsad.evaluation.report import panels
from dsad.evaluation.support import Sampling
from dsad.models import wrappers
from tests.assembly.test_runs import SMALL as TINY
from tests.evaluation.test_localize import Distance, Pooled
from tests.evaluation.test_undefined import Unread
from tests.helpers import untrained_run
from tests.seams.wrappers import away

SMALL = (
    "--config.data.synthetic.size=48", "--config.data.synthetic.train=6",
    "--config.data.synthetic.good=2", "--config.data.synthetic.bad=1",
    "--config.data.name=synthetic",
    "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
)  # fmt: skip
BOTH = ("--config.data.categories=('tiles','wood')",)
LIGHT = (
    "--config.weights=random", "--config.detector.layers=('layer1',)",
    "--config.evaluation.gallery=1",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Programs for one of the eight devices take less time to compile, and less memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


def run(*argv):
    assert main.main(["evaluate", *argv]) == 0


def fails(capsys, *argv):
    assert main.main(["evaluate", *argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def same(one, other):
    """Numbers, image scores, thresholds and pictures, bit by bit."""
    for name in ("mean", "kinds", "images", "thresholds", "scales", "cases"):
        assert getattr(one, name) == getattr(other, name), name
    for packed in ("gallery", "curves"):
        left, right = getattr(one, packed), getattr(other, packed)
        assert left.keys() == right.keys()
        for name, values in left.items():
            np.testing.assert_array_equal(values, right[name], err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An evaluation with thresholds, and its models."""
    base = tmp_path_factory.mktemp("models")
    run(
        *SMALL, *BOTH, *LIGHT, "--config.evaluation.false_alarm_rate=0.3",
        f"--workdir={base / 'live'}", f"--save-model={base / 'model'}",
    )  # fmt: skip
    return base


def test_a_saved_model_measures_the_same(folder, tmp_path):
    run(f"--model={folder / 'model'}", f"--workdir={tmp_path / 'again'}")
    live, again = read_results(folder / "live"), read_results(tmp_path / "again")
    same(live, again)
    assert again.stamp["model_sha256"] == Saved.read(folder / "model").sha256
    assert not stamp.differences(live.stamp, again.stamp)
    one = ("--config.data.categories=('wood',)", "--config.evaluation.batch_size=8")
    run(f"--model={folder / 'model'}", *one, f"--workdir={tmp_path / 'one'}")
    live, alone = read_results(folder / "live"), read_results(tmp_path / "one")
    for name in live.metric_names:
        assert alone.categories["wood"][name] == live.categories["wood"][name]


def data_of(model):
    """The data that a model was fitted to."""
    config = Saved.read(model).config()["data"]
    synthetic = base.SyntheticConfig(**config["synthetic"])
    return base.load(base.DataConfig(**{**config, "synthetic": synthetic}))


def test_saved_thresholds_are_measured_without_a_training_image(folder, tmp_path):
    source = data_of(folder / "model").source("test", "wood")
    for i, record in enumerate(source.records):
        path = tmp_path / "root" / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(source[i].image).save(path)
    argv = (
        "--config.data.name=mvtec", f"--config.data.root={tmp_path / 'root'}",
        "--config.data.missing_masks=image_only", "--config.data.categories=('wood',)",
    )  # fmt: skip
    run(f"--model={folder / 'model'}", *argv, f"--workdir={tmp_path / 'w'}")
    live, alone = read_results(folder / "live"), read_results(tmp_path / "w")
    expected = {row["path"]: row["score"] for row in live.images["wood"]}
    assert {row["path"]: row["score"] for row in alone.images["wood"]} == expected
    row = {**live.thresholds["wood"]["0"], "pixel_recall": None}
    assert alone.thresholds["wood"]["0"] == row
    assert alone.stamp["support"] == live.stamp["support"]
    assert alone.categories["wood"]["counts"]["train"] == 0


def test_three_lines_of_python_score_images(folder):
    live = read_results(folder / "live")
    model = FittedModel.load(folder / "model", "wood")
    source = data_of(folder / "model").source("test", "wood")
    scores, maps = model.score([source[i].image for i in range(len(source))])
    np.testing.assert_array_equal(scores, [row["score"] for row in live.images["wood"]])
    assert maps[0].shape == source[0].image.shape[:2]
    assert model.thresholds == {"wood": live.thresholds["wood"]}
    assert model.scales == {"wood": live.scales["wood"]}
    assert model.stamp["detector"]["name"] == "knn"
    with pytest.raises(ConfigError, match=r"category, found ''.*tiles, wood. .* --category="):
        FittedModel.load(folder / "model")


def test_scoring_leaves_no_feature_cache(folder, tmp_path):
    saved = Saved.read(folder / "model")
    saved.index["config"]["evaluation"]["feature_cache"] = str(tmp_path / "cache")
    saved.model("wood").score([np.zeros((40, 30, 3), np.uint8)])
    assert not (tmp_path / "cache").exists()


def test_a_category_may_be_called_like_a_file_of_the_network(tmp_path):
    network, writer = models.backbone("resnet18"), Writer(str(tmp_path / "m"), overwrite=False)
    writer.keep("backbone-0", ["backbone-0"], network, Fitted((), np.arange(3.0), {}), Results())
    writer.finish({"backbone": "resnet18"}, Results(), {})
    saved = Saved.read(tmp_path / "m")
    np.testing.assert_array_equal(saved.fitted("backbone-0").state, np.arange(3.0))
    jax.tree.map(np.testing.assert_array_equal, saved.backbone("backbone-0").params, network.params)


OTHER = {
    "patches and a pooled model": (
        "--config=gde", "--config.backbone=patches:16/4:resnet18", "--config.one_for_all=True",
        "--config.weights=random",
        "--config.detector.patch=16", "--config.detector.components=2",
    ),
    "a map wrapper": ("--config.backbone=away:resnet18", *LIGHT),
    "another seed": ("--config.seeds=(5,)", "--config.shots=3", "--config.seed=2", *LIGHT),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("argv", [pytest.param(argv, id=name) for name, argv in OTHER.items()])
def test_whatever_is_fitted_is_kept(argv, tmp_path, monkeypatch):
    monkeypatch.setitem(wrappers.KINDS, "away", away.KIND)
    run(
        *argv[:1], *SMALL, *BOTH, *argv[1:], f"--workdir={tmp_path}/a", f"--save-model={tmp_path}/m"
    )
    run(f"--model={tmp_path}/m", f"--workdir={tmp_path}/b")
    same(read_results(tmp_path / "a"), read_results(tmp_path / "b"))


@pytest.mark.slow
def test_the_encoder_of_a_run_needs_its_directory_no_more(tmp_path):
    untrained_run(tmp_path / "run", "ds2")
    spec = f"--config.backbone=run:{tmp_path}/run@0"
    run(spec, *SMALL, *BOTH, *LIGHT[1:], f"--workdir={tmp_path}/a", f"--save-model={tmp_path}/m")
    shutil.rmtree(tmp_path / "run")
    Saved.read(tmp_path / "m").model("wood").save(tmp_path / "copy")
    for model, place in (("m", "b"), ("copy", "c")):
        only = [] if model == "m" else ["--config.data.categories=('wood',)"]
        run(f"--model={tmp_path / model}", *only, f"--workdir={tmp_path / place}")
    same(read_results(tmp_path / "a"), read_results(tmp_path / "b"))
    copied, live = read_results(tmp_path / "c"), read_results(tmp_path / "a")
    left, right = dict(copied.categories["wood"]), dict(live.categories["wood"])
    assert left.pop("seconds").keys() == right.pop("seconds").keys()  # times differ from run to run
    assert left == right


@pytest.mark.slow
def test_panels_are_those_of_the_evaluation(tmp_path):
    untrained_run(tmp_path / "run", "isstad", **TINY, side=32)
    spec = f"--config.backbone=run:{tmp_path}/run@0"
    run(
        "--config=isstad_detector", spec, *SMALL, "--config.data.categories=('wood',)",
        f"--workdir={tmp_path}/a", f"--save-model={tmp_path}/m",
    )  # fmt: skip
    run(f"--model={tmp_path}/m", f"--workdir={tmp_path}/b")
    live = read_results(tmp_path / "a")
    assert panels.names(live.gallery) == ["reconstruction", "error", "probability"]
    same(live, read_results(tmp_path / "b"))


#: ISSTAD needs a run. What is fitted on test images is not kept, or not measured on these again.
APART = ("isstad", "musc", "twoclass")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in members("detectors") if n not in APART])
def test_every_detector(name, tmp_path):
    run(f"--config={name}:smoke", f"--workdir={tmp_path}/a", f"--save-model={tmp_path}/m")
    run(f"--model={tmp_path}/m", f"--workdir={tmp_path}/b")
    same(read_results(tmp_path / "a"), read_results(tmp_path / "b"))


def test_faults_are_named(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    argv = (f"--model={model}", f"--workdir={tmp_path / 'w'}")
    text = fails(capsys, *argv, "--config.detector.k=2")
    assert "config.detector.k: 1 → 2" in text
    assert "--config out" in fails(capsys, *argv, "--config=knn")
    text = fails(capsys, *argv, "--config.data.categories=('wood','weave')")
    assert "no model of weave; it has: tiles, wood" in text
    assert "expected a fit" in fails(capsys, *argv, f"--save-model={tmp_path / 'n'}")
    text = fails(capsys, *SMALL, *LIGHT, f"--workdir={tmp_path / 'w'}", f"--save-model={model}")
    assert "holds a model. Replace it with --overwrite" in text
    assert "no fitted model there" in fails(capsys, f"--model={tmp_path}", argv[1])
    for place in ("b", "b/w"):
        both = (f"--save-model={tmp_path / 'b'}", f"--workdir={tmp_path / place}")
        text = fails(capsys, *SMALL, *LIGHT, *both)
        assert "expected a directory for models alone" in text
        assert not (tmp_path / "b").exists()
    (tmp_path / "file").write_text("")
    text = fails(capsys, *SMALL, *LIGHT, argv[1], f"--save-model={tmp_path / 'file'}")
    assert "expected a directory, found a file" in text
    weights = model / "fitted-wood.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WorkdirError, match=r"wood\.safetensors: damaged"):
        FittedModel.load(model, "wood")
    assert FittedModel.load(model, "tiles").categories == ("tiles",)
    text = (model / "model.json").read_text()
    for other in ("[1]", '{"format": 1}'):
        (model / "model.json").write_text(other)
        assert "a model of format" in fails(capsys, *argv)
    threshold = str(FittedModel.load(folder / "model", "wood").thresholds["wood"]["0"]["pixel"])
    assert threshold in text
    (model / "model.json").write_text(text.replace(threshold, "0.5"))
    assert "model.json: damaged" in fails(capsys, *argv)
    index = json.loads(text)
    (model / "model.json").write_text(json.dumps({**index, "format": FORMAT - 1}))
    assert f"a model of format {FORMAT - 1}, expected {FORMAT}. Fit it again" in fails(
        capsys, *argv
    )
    assert not (tmp_path / "w").exists()


class OnTest(Distance):
    traits = property(lambda self: DetectorTraits(fits_on="test"))


@pytest.mark.parametrize("argv", [("musc:smoke",), ("anomalydino:smoke", "fits_on=test")])
def test_what_is_fitted_on_test_images_is_never_kept(argv, tmp_path, capsys):
    """Which is said before keys that could be changed, and before data is looked for."""
    keys = [f"--config.detector.{key}" for key in argv[1:]]
    given = (f"--config={argv[0]}", *keys, "--config.data.root=nowhere")
    assert main.main(["fit", *given, f"--out={tmp_path / 'm'}"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    name = argv[0].partition(":")[0]
    assert f"config.detector: {name} is fitted on the test images" in text
    assert "Measure it with dsad evaluate" in text
    assert "false_alarm_rate" not in text
    assert not (tmp_path / "m").exists()


def test_what_cannot_be_saved_is_refused_before_it_is_fitted(tmp_path):
    def refused(message, backbone, detector, **sampling):
        with pytest.raises(ConfigError, match=message):
            localize.localize(
                backbone, detector, Unread(categories=("disc", "ring")),
                localize.EvalConfig(image_size=48), mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
                key=jax.random.key(0), sampling=Sampling(**sampling),
                keep=Writer(str(tmp_path / "model"), overwrite=False),
            )  # fmt: skip

    network = models.backbone("resnet18")
    on_layers = Distance(layers=("layer1",))
    refused("a Pooled cannot be saved; expected a network", Pooled(), Distance())
    wrapped = wrappers.Patches(encoder=Pooled(), size=16, stride=4)
    refused("a Pooled cannot be saved", wrapped, Distance())
    refused("single seed, found config.seeds", network, on_layers, seeds=(0, 1))
    refused("fitted on the test images", network, OnTest(layers=("layer1",)))
    assert not (tmp_path / "model").exists()


def test_weights_of_others_are_no_part_of_a_model(tmp_path):
    weights = tmp_path / "resnet18.safetensors"
    weights.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(WorkdirError, match=r"holds resnet18\.safetensors, which is no part"):
            Writer(str(tmp_path), overwrite=overwrite)
    assert weights.read_text() == "mine"


def test_what_a_kill_left_blocks_no_model(tmp_path):
    left = tmp_path / f".1234{paths.TEMPORARY}"
    left.write_text("half")
    writer = Writer(str(tmp_path), overwrite=False)
    network = models.backbone("resnet18", None, seed=0)
    writer.keep("a", ["a"], network, Fitted((), {"x": np.zeros(3)}, {}), Results())
    assert not left.exists()
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_costs_no_older_model(tmp_path):
    network = models.backbone("resnet18", None, seed=0)
    fitted = Fitted((), {"x": np.zeros(3)}, {})
    writer = Writer(str(tmp_path), overwrite=False)
    writer.keep("a", ["a"], network, fitted, Results())
    writer.finish({}, Results(), {})
    files = sorted(p.name for p in tmp_path.iterdir())
    writer = Writer(str(tmp_path), overwrite=True)
    with pytest.raises(ConfigError, match="a Pooled cannot be saved"):
        writer.keep("a", ["a"], Pooled(), fitted, Results())
    assert sorted(p.name for p in tmp_path.iterdir()) == files


@pytest.mark.slow
def test_an_old_model_is_replaced_only_by_a_new_one(folder, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    one = (*SMALL, *LIGHT, "--config.data.categories=('tiles',)")
    both = (*one, f"--save-model={model}", "--overwrite")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    assert "no dsad run" in fails(capsys, *both, f"--workdir={tmp_path / 'letters'}")
    assert {p.name: p.read_bytes() for p in model.iterdir()} == files
    with monkeypatch.context() as patch:
        patch.setattr(categories, "score", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main.main(["evaluate", *both, f"--workdir={tmp_path / 'w'}"])
    assert {p.name: p.read_bytes() for p in model.iterdir()} == files
    run(*both, f"--workdir={tmp_path / 'w'}")
    assert Saved.read(model).titles() == ("tiles",)
    assert not (model / "fitted-wood.safetensors").exists()


@pytest.mark.slow
def test_what_a_stopped_evaluation_left_blocks_nothing(folder, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(folder / "model" / "fitted-wood.safetensors", model)
    one = "--config.data.categories=('tiles',)"
    run(*SMALL, *LIGHT, one, f"--workdir={tmp_path / 'w'}", f"--save-model={model}")
    assert sorted(p.name for p in model.iterdir()) == [
        "backbone-0.safetensors", "fitted-tiles.safetensors", "model.json",
    ]  # fmt: skip
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "letter.txt").write_text("dear")
    argv = (*SMALL, *LIGHT, f"--workdir={tmp_path / 'v'}", f"--save-model={tmp_path / 'x'}")
    assert main.main(["evaluate", *argv]) == 2
    assert (tmp_path / "x" / "letter.txt").exists()
