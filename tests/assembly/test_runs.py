"""Runs by name, what is rebuilt of them, and weights that go from one method to another."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from dsad.assembly import runs, workdir
from dsad.assembly.pretrain import DataFacts, assemble
from dsad.cli import main, report
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.tree import flatten
from dsad.core.types import RunInfo
from dsad.models.decoder import DecoderConfig
from dsad.objectives import ds2, isstad, mae
from dsad.terminal import flags
from tests.helpers import untrained_run
from tests.models import published
from tests.models.published import mae_state

INFO = RunInfo(total_steps=7, batch_size=2, samples=5, classes=3)  # that of untrained runs

# --- the grammar


@pytest.fixture
def held(monkeypatch):
    """Directories that hold a run, wherever they lie."""
    directories = set()
    monkeypatch.setattr(workdir, "has_checkpoint", lambda d: d in directories)
    return directories


@pytest.mark.parametrize(
    ("spec", "directory", "step"),
    [
        ("run:runs/a", "runs/a", None),
        ("run:runs/a@12", "runs/a", 12),
        ("run:runs/a@0", "runs/a", 0),
        ("patches:32/4:run:runs/a@12", "runs/a", 12),
        ("run:me@home/a", "me@home/a", None),
        ("run:me@home/a@3", "me@home/a", 3),
        ("run:runs/a@b@3", "runs/a@b", 3),
        ("run:runs/a@latest", "runs/a@latest", None),
        ("run:runs/a@²", "runs/a@²", None),
        ("run:@5", "@5", None),
        ("run:gs://bucket/runs/a", "gs://bucket/runs/a", None),
        ("patches:16/8:run:gs://bucket/a@400", "gs://bucket/a", 400),
        ("run:gs://bucket/a@b/c", "gs://bucket/a@b/c", None),
        ("runs/a@12", "runs/a", 12),  # as init_from may say it
        ("gs://bucket/a@400", "gs://bucket/a", 400),
    ],
)
def test_a_name_is_a_directory_and_a_step(held, spec, directory, step):
    assert runs.place(spec) == (directory, step)


def test_a_number_behind_an_at_may_be_the_path(held):
    held.add("runs/a@5")
    assert runs.place("run:runs/a@5") == ("runs/a@5", None)
    assert runs.place("run:runs/a@5@7") == ("runs/a@5", 7)
    assert runs.place("run:runs/b@5") == ("runs/b", 5)
    held.add("runs/a")
    with pytest.raises(ConfigError, match=r"both runs/a@5 and runs/a hold a run.*runs/a@5@STEP"):
        runs.place("run:runs/a@5")
    assert runs.place("run:runs/a@5@7") == ("runs/a@5", 7)
    assert runs.place("run:runs/a@6") == ("runs/a", 6)


def test_what_names_a_run(held):
    held |= {"runs/a", "gs://bucket/a"}
    for spec in ("run:nowhere", "patches:32/4:run:nowhere", "run:nowhere@3"):
        assert runs.is_run(spec)
    for spec in ("runs/a", "runs/a@3", "gs://bucket/a", "patches:32/4:runs/a"):
        assert runs.is_run(spec)
    held.add("resnet18")  # an architecture keeps its name
    for spec in ("resnet18", "runs/b", "w.npz", "hf:owner/name", ""):
        assert not runs.is_run(spec)


def test_weights_are_chosen(held):
    held.add("runs/a")
    for spec, weights in (
        ("runs/a", ""), ("run:gone", ""), ("resnet18", "random"), ("patches:32/8:resnet18", "x.npz")
    ):  # fmt: skip
        runs.check_named(spec, weights)
    for spec, weights, message in (
        ("resnet18", "", "resnet18 needs some; expected .*imagenet, or random"),
        ("patches:32/8:resnet18", "", "resnet18 needs some"),
        ("resnet81", "", "Did you mean 'resnet18'"),
        ("runs/a", "random", "a run brings its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.check_named(spec, weights)


def test_one_run_for_each_category():
    spec = "patches:32/4:run:runs/{category}/x@9"
    assert runs.per_category(spec)
    assert runs.of_category(spec, "wood") == "patches:32/4:run:runs/wood/x@9"
    assert not runs.per_category("run:runs/wood")
    assert not runs.per_category("resnet18{category}")


def test_only_a_directory_with_checkpoints_holds_a_run(tmp_path):
    assert not workdir.has_checkpoint("")
    path = untrained_run(tmp_path / "a", "mae")
    assert not workdir.has_checkpoint(str(path))
    (path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not runs.is_run(str(path))
    (path / "checkpoints" / "4").mkdir()
    assert runs.is_run(str(path))
    assert runs.is_run(f"{path}@2")


def test_a_report_finds_the_curves_behind_any_backbone(tmp_path):
    path = untrained_run(tmp_path / "a@home", "mae")
    folders = []
    for name, spec in (
        ("arch", "resnet18"), ("gone", f"run:{tmp_path}/gone"),
        ("run", f"patches:32/4:run:{path}@5"),
    ):  # fmt: skip
        folders.append(str(tmp_path / name))
        workdir.claim(folders[-1], "evaluate", {"backbone": spec})
    assert report._training(folders) == ""  # it has written no curves yet
    (path / "metrics.jsonl").write_text("")
    assert report._training(folders) == str(path)


# --- what is rebuilt


def test_a_rebuilt_run_knows_its_data(tmp_path, monkeypatch):
    path, known, build = untrained_run(tmp_path / "a", "mae"), [], mae.build
    monkeypatch.setattr(mae, "build", lambda cfg, info: known.append(info) or build(cfg, info))
    runs.opened(str(path))
    assert known[0] == INFO
    assert all(info.classes == INFO.classes for info in known)  # which may shape features


@pytest.mark.parametrize("name", ["mae", pytest.param("isstad", marks=pytest.mark.slow)])
def test_a_transformer_gives_its_class_token(name, tmp_path):
    path = untrained_run(
        tmp_path / "a", name, **SMALL, **({"side": 32} if name == "isstad" else {})
    )
    network, exported = runs.backbone(f"run:{path}@0", "", 0), runs.encoder(f"run:{path}@0", "")
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    names = ("block1", "norm1", "cls")
    given, expected = network.only(names)(pixels), exported.only(names)(pixels)
    assert (network.tokens, given.keys()) == (("cls",), set(names))
    for layer in names:
        np.testing.assert_array_equal(given[layer], expected[layer])
    assert not np.allclose(*given["cls"], rtol=1e-3)  # of each image, not of the network
    assert runs.backbone(f"run:{untrained_run(tmp_path / 'b', 'ds2')}@0", "", 0).tokens == ()


def test_what_is_no_run_of_today_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="(?s)no dsad run there.*dsad report also takes"):
        runs.opened(str(tmp_path))
    for command, text in (("evaluate", "found one of dsad evaluate"), ("demo", "a/pretrain")):
        workdir.claim(str(tmp_path / "a"), command, {}, overwrite=command == "demo")
        with pytest.raises(ConfigError, match=f"expected a pretraining run, .*{text}"):
            runs.opened(str(tmp_path / "a"))
    path = untrained_run(tmp_path / "b", "mae")
    stored = json.loads((path / workdir.CONFIG).read_text())
    del stored["info"]
    (path / workdir.CONFIG).write_text(json.dumps(stored))
    with pytest.raises(WorkdirError, match=r"b: written by an older dsad.*the key info.*again"):
        runs.backbone(f"run:{path}@0", "", 0)
    workdir.claim(str(path), "pretrain", stored["config"], info=INFO, overwrite=True)
    assert runs.opened(str(path))
    stored["info"] = {"samples": 5}
    (path / workdir.CONFIG).write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="info.total_steps: missing"):
        runs.opened(str(path))


def test_a_run_goes_on_with_its_own_images_alone(tmp_path, capsys):
    """Also in a directory whose name could be another run's at a step."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{i}.png")
    argv = ["--config=mae:smoke", "--config.data.name=folder",
            f"--config.data.root={tmp_path / 'images'}"]  # fmt: skip
    config, _, _ = flags.Command("x", "", config="mae").parse(argv)
    for name in ("a", "a@5"):
        path = workdir.claim(str(tmp_path / name), "pretrain", config.to_dict(), info=INFO)
        (path / "checkpoints" / "4").mkdir(parents=True)
    assert main.main(["pretrain", *argv, f"--workdir={path}", "--resume"]) != 0
    text = " ".join(capsys.readouterr().err.split())
    assert "a@5: --resume needs the run's own config and data" in text
    assert "data.samples: 5 → 3" in text
    assert "data.classes: 3 → 1" in text
    assert "total_steps" not in text  # which follows from these and the config


# --- weights for another method

SMALL = {
    "encoder": {"arch": "mae_vit_tiny_patch16", "width": 48, "depth": 2, "heads": 4, "patch": 8},
    "decoder": {"width": 32, "depth": 2, "heads": 4},
}
HEADS = {"hidden": 8, "out": 4}


def of(module, **changes):
    """An objective, and its parameters and extra before the first step."""
    objective = module.build(module.Config(**changes), INFO)
    return objective, *jax.jit(objective.init)(jax.random.key(5))


def masked(**changes):
    """A small masked autoencoder that trains on images of 32 pixels."""
    view = dataclasses.replace(mae.CROP, side=32)
    return of(
        mae,
        encoder=mae.EncoderConfig(**SMALL["encoder"]),
        decoder=DecoderConfig(**SMALL["decoder"]),
        view=view,
        **changes,
    )


def same(one, two):
    one, two = flatten(one), flatten(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


def test_a_masked_autoencoder_takes_the_encoder_of_a_second_stage(tmp_path):
    path = untrained_run(tmp_path / "a", "isstad", **SMALL, side=32)
    objective, params, extra = masked(adopt_decoder="none")
    earlier = runs.earlier_weights(f"run:{path}@0", objective)
    assert isinstance(runs.opened(str(path)).objective, isstad.ISSTAD)
    taken, held, said = objective.adopt(earlier, params, extra)
    same(taken["encoder"], earlier.extra["encoder"])
    same(taken["decoder"], params["decoder"])
    same(held, extra)
    assert "decoder starts anew" in said
    # Its decoder saw no masked images, and is not taken unasked.
    objective, params, extra = masked()
    with pytest.raises(ConfigError, match=r"'none' starts anew[\s\S]*mask_token"):
        objective.adopt(earlier, params, extra)


def test_a_masked_autoencoder_takes_a_published_one(tmp_path):
    other, params, extra = masked()
    params = jax.tree.map(lambda x: x + 1, params)
    state = mae_state(other.encoder.spec, params, extra)
    objective, fresh, tables = masked()
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    earlier = runs.earlier_weights(str(tmp_path / "w.safetensors"), objective)
    taken, _, _ = objective.adopt(earlier, fresh, tables)
    same(taken, params)
    assert earlier.origin == "w.safetensors"
    alone = {name: t for name, t in state.items() if not name.startswith(("decoder", "mask"))}
    safetensors.numpy.save_file(alone, tmp_path / "encoder.safetensors")
    earlier = runs.earlier_weights(str(tmp_path / "encoder.safetensors"), objective)
    taken, _, said = objective.adopt(earlier, fresh, tables)
    same(taken["encoder"], params["encoder"])
    same(taken["decoder"], fresh["decoder"])
    assert "anew" in said


def test_later_stages_of_a_deeper_network_are_left_out(tmp_path):
    np.savez(tmp_path / "w.npz", **published.by_rule(published.resnet()))
    objective, params, extra = of(ds2, layers=("layer1", "layer2"), **HEADS)
    earlier = runs.earlier_weights(str(tmp_path / "w.npz"), objective)
    taken, held, said = objective.adopt(earlier, params, extra)
    assert "without layer3, layer4" in said
    assert "heads start anew" in said
    assert taken["encoder"].keys() == params["encoder"].keys()
    for name, part in taken["encoder"].items():
        same(part, earlier.encoder.params[name])
    same(held["teacher"]["encoder"], taken["encoder"])
    for name, part in held["stats"]["encoder"].items():
        same(part, earlier.encoder.extra[name])
    same(held["teacher_stats"]["encoder"], held["stats"]["encoder"])


def test_runs_of_early_stages(tmp_path):
    """The encoder of one ends after its second stage: enough for its like, not for a longer one."""
    path = untrained_run(tmp_path / "a", "ds2", layers=("layer1", "layer2"), **HEADS)
    objective, params, extra = of(ds2, layers=("layer2",), **HEADS)
    earlier = runs.earlier_weights(f"run:{path}@0", objective)
    taken, _, said = objective.adopt(earlier, params, extra)
    same(taken["encoder"], earlier.params["encoder"])
    assert "without" not in said
    objective, params, extra = of(ds2, layers=("layer3",), **HEADS)
    with pytest.raises(ConfigError, match=r"is not this resnet18[\s\S]*layer3.*missing"):
        objective.adopt(earlier, params, extra)


def assembled(spec, source):
    config, _, _ = flags.Command("x", "", config=spec).parse([f"--config.init_from={source}"])
    return assemble(config, jax.devices()[:1], DataFacts(samples=8))


def test_what_cannot_be_taken_is_refused_before_anything_is_claimed(tmp_path):
    path = untrained_run(tmp_path / "a", "mae", **SMALL)
    text = r"expected an encoder resnet18, found an encoder mae_vit_tiny_patch16 in .*a step 0"
    with pytest.raises(ConfigError, match=text):
        runs.checked_weights(assembled("ds2:smoke", f"run:{path}@0"))
    with pytest.raises(ConfigError, match=r"init_from=patches.*a wrapper has no weights"):
        runs.checked_weights(assembled("ds2:smoke", f"patches:32/4:run:{path}@0"))
    with pytest.raises(ConfigError, match="starts from a run of the objective mae"):
        runs.checked_weights(assembled("isstad:smoke", ""))
    with pytest.raises(
        WorkdirError, match="checkpoints: no such directory; expected a pretraining run"
    ):
        runs.checked_weights(assembled("mae:smoke", f"run:{path}"))
    assert runs.checked_weights(assembled("ds2:smoke", "")) is None


def test_step_0_of_a_run_that_began_with_other_weights_is_not_drawn_again(tmp_path):
    path = untrained_run(tmp_path / "a", "ds2", **HEADS)
    stored = json.loads((path / workdir.CONFIG).read_text())
    stored["config"]["init_from"] = "resnet18.npz"
    (path / workdir.CONFIG).write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"began with the weights of resnet18\.npz"):
        runs.backbone(f"run:{path}@0", "", 0)
