"""Detectors that train, and those fitted on the test images, through ``dsad evaluate``."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import detectors, evaluate
from dsad.assembly.detectors import Trainer
from dsad.cli import main
from dsad.core.config import resolve
from dsad.core.errors import ConfigError, DataError, StoppedError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import silent
from dsad.evaluation import fitting, stamp
from dsad.evaluation.compiled import transformed
from dsad.evaluation.frozen import FrozenMaps
from dsad.models import backbone
from tests.contracts.detectors.common import Batches, fitted, maps_of
from tests.seams.detectors import linear

COMPILED = "/jax/core/compile/backend_compile_duration"
SMALL = (
    "--config.data.name=synthetic", "--config.data.synthetic.size=32",
    "--config.data.synthetic.good=2", "--config.data.synthetic.bad=1",
    "--config.evaluation.image_size=32", "--config.evaluation.batch_size=8",
    "--config.weights=random",
)  # fmt: skip
ONE, TWO = (f"--config.data.categories=({names})" for names in ("'tiles',", "'wood','tiles'"))
UNCHANGED = functools.partial(transformed, (), None)
TRAINED = (
    "--config.data.synthetic.train=11", "--config.detector.layers=('layer1',)",
    "--config.detector.recipe.steps=6",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Programs for one of the eight devices take less time to compile, and less memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture
def compiled():
    """How many programs have been compiled since the test began."""
    events = []
    count = lambda event, seconds, **about: events.append(event == COMPILED)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(count)
    yield lambda: sum(events)
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture
def trainings(monkeypatch, compiled):
    """(category, seed, programs compiled before) of every training that took place."""
    seen, original = [], Trainer._train

    def noted(self, detector, data):
        seen.append((data.title, data.seed, compiled()))
        return original(self, detector, data)

    monkeypatch.setattr(Trainer, "_train", noted)
    return seen


def evaluated(tmp_path, name, method, *argv):
    """Exit code, and results if there are any."""
    file = tmp_path / f"{method}.py"
    file.write_text(
        "from dsad.assembly.evaluate import default_config\n"
        f"def get_config(words=''):\n    return default_config('tests.seams.detectors.{method}')\n"
    )
    folder = tmp_path / name
    code = main.main(["evaluate", f"--config={file}", *SMALL, *argv, f"--workdir={folder}"])
    path = folder / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def numbers(results):
    """All that does not tell how fast, and what was in memory."""
    other = {"seconds": 0, "features_between_seeds": 0}
    about = {c: {**row, **other} for c, row in results["categories"].items()}
    shared = {n: results[n] for n in ("mean", "kinds", "images", "seeds", "std", "support")}
    return {**shared, "categories": about, "detector": results["stamp"]["detector"]}


def test_two_categories_and_two_seeds_interrupted_and_continued(
    tmp_path, capsys, monkeypatch, trainings, compiled
):
    argv = (*TRAINED, TWO, "--config.seeds=(0,3)")
    code, whole = evaluated(tmp_path, "whole", "linear", *argv)
    assert code == 0
    assert [row[:2] for row in trainings] == [(c, s) for c in ("tiles", "wood") for s in (0, 3)]
    assert compiled() == trainings[2][2] > 0  # the second category compiles nothing
    assert not (tmp_path / "whole" / fitting.TRAINED).exists()
    recipe = whole["stamp"]["detector"]["config"]["recipe"]
    assert recipe["steps"] == 6
    assert whole["seeds"]["0"]["mean"] != whole["seeds"]["3"]["mean"]

    del trainings[:]
    next_batch = detectors._Batches.__next__

    def stopped(self):
        if len(trainings) == 3 and self._at == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(detectors._Batches, "__next__", stopped)
        code, nothing = evaluated(tmp_path, "part", "linear", *argv)
    assert (code, nothing) == (StoppedError.code, None)
    assert "step 5 of 6 of the detector of wood, seed 0" in capsys.readouterr().err
    assert len(list((tmp_path / "part" / fitting.TRAINED).iterdir())) == 2
    del trainings[:]
    code, again = evaluated(tmp_path, "part", "linear", *argv)
    assert code == 0
    assert [row[:2] for row in trainings] == [("wood", 0), ("wood", 3)]
    assert numbers(again) == numbers(whole)


@pytest.mark.slow
def test_a_longer_recipe_is_another_number(tmp_path):
    argv = (*TRAINED, ONE)
    one = evaluated(tmp_path, "a", "linear", *argv)[1]
    ten = evaluated(tmp_path, "b", "linear", *argv, "--config.detector.recipe.steps=60")[1]
    lines = stamp.differences(one["stamp"], ten["stamp"])
    assert lines == ["detector.config.recipe.steps: 6 against 60"]
    assert one["mean"] != ten["mean"]


@pytest.mark.slow
def test_a_failure_blocks_no_retry(tmp_path, capsys, trainings):
    """What cannot be trained leaves nothing; a changed recipe goes on from what fits."""
    argv, broken = (*TRAINED, ONE), "--config.detector.recipe.optim.lr=1e38"
    code, nothing = evaluated(tmp_path, "x", "linear", *argv, broken)
    assert (code, nothing) == (2, None)
    assert "kept no checkpoint. Lower config.detector.recipe.optim.lr" in capsys.readouterr().err
    assert not (tmp_path / "x" / fitting.TRAINED).exists()
    code, found = evaluated(tmp_path, "x", "linear", *argv)
    assert code == 0
    assert found["mean"] == evaluated(tmp_path, "y", "linear", *argv)[1]["mean"]


@pytest.mark.slow
def test_images_pass_through_the_frozen_backbone(tmp_path, trainings, compiled):
    argv = (*TRAINED, TWO, "--config.detector.on=images")
    code, found = evaluated(tmp_path, "images", "linear", *argv)
    assert code == 0
    assert [row[0] for row in trainings] == ["tiles", "wood"]
    assert compiled() == trainings[1][2]
    assert found["stamp"]["detector"]["config"]["on"] == "images"


_maps = jax.jit(lambda frozen, images: frozen(images, jnp.arange(len(images))))


def data_of(network, count=11, mesh=None, **changes):
    """The network's inputs and, for a detector of features, its maps of them."""
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
    network = FrozenMaps(network=network, banks=(), layers=("layer1",), transform=UNCHANGED)
    maps = {n: np.asarray(x) for n, x in _maps(network, images).items()}
    values = {
        "features": Batches(maps), "images": lambda: iter([images[:4], images[4:]]),
        "backbone": network, "title": "tiles", "seed": 0, "key": jax.random.key(1),
        "mesh": mesh or make_mesh(MeshConfig(), jax.devices()[:1]), "folder": None,
        "progress": silent,
    }  # fmt: skip
    return fitting.TrainingData(**values | changes)


def test_features_beyond_the_memory_are_refused_after_the_first_batch(monkeypatch):
    monkeypatch.setattr(detectors, "free_memory", lambda: 3_000_000)
    data = dataclasses.replace(data_of(backbone("resnet18")), count=1000)
    detector = linear.Linear(linear.Config(layers=("layer1",)))
    with pytest.raises(ConfigError, match=r"tiles: .* 1,000 images at once, which take 16\.4 MB"):
        Trainer()(detector, data)


@pytest.mark.slow
def test_weights_lengths_and_seeds_are_arguments_of_one_program():
    trainer, found, recipe = Trainer(), [], linear.Config().recipe
    recipe = dataclasses.replace(recipe, epochs=2.0, steps=0, batch_size=4)
    config = linear.Config(layers=("layer1",), on="images", recipe=recipe)
    for weights, count, key in ((0, 11, 1), (1, 11, 1), (0, 7, 1), (0, 11, 2)):
        network = backbone("resnet18", seed=weights).only(("layer1",))
        network = dataclasses.replace(network, description="")
        data = data_of(network, count, key=jax.random.key(key))
        found.append(trainer(linear.Linear(config), data)["params"]["kernel"])
        assert not any(x.is_deleted() for x in jax.tree.leaves(network))
    assert len(trainer.programs) == 1
    program = next(iter(trainer.programs.values()))
    assert program.step._cache_size() == program.fresh._cache_size() == 1
    assert len({row.tobytes() for row in found}) == 4


@pytest.mark.slow
def test_images_and_their_features_train_alike():
    """The same detector on either: what the steps compute of the images are its features."""
    network, found = backbone("resnet18").only(("layer1",)), []
    for on in ("features", "images"):
        config = linear.Config(layers=("layer1",), on=on)
        found.append(Trainer()(linear.Linear(config), data_of(network)))
    assert found[0].keys() == found[1].keys() == {"params", "extra"}
    assert found[1]["extra"].keys() == {"centre"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), *found)


def test_samples_wrap_around_and_all_batches_are_whole():
    data = data_of(backbone("resnet18").only(("layer1",)))
    drawn = detectors._Batches({"row": np.arange(11)}, 11, 4, data)
    rows = [next(drawn) for _ in range(11)]
    assert {len(row["row"]) for row in rows} == {4}
    index, epoch = (np.concatenate([row[n] for row in rows]) for n in ("index", "epoch"))
    assert [sorted(index[epoch == e]) for e in range(4)] == [list(range(11))] * 4
    np.testing.assert_array_equal(np.concatenate([row["row"] for row in rows]), index)
    assert list(index[:11]) != list(index[11:22])


def test_a_damaged_file_is_trained_again(tmp_path, trainings):
    data = data_of(backbone("resnet18").only(("layer1",)), folder=tmp_path)
    detector, trainer = linear.Linear(linear.Config(layers=("layer1",))), Trainer()
    first = trainer(detector, data)
    jax.tree.map(np.testing.assert_array_equal, trainer(detector, data), first)
    assert len(trainings) == 1
    file = tmp_path / detectors._FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="is damaged; trained again"):
        jax.tree.map(np.testing.assert_array_equal, trainer(detector, data), first)
    assert len(trainings) == 2


def test_what_cannot_be_trained_is_refused():
    detector = linear.Linear(linear.Config())
    with pytest.raises(ConfigError, match=r"recipe\.batch_size: .* of the 3 devices, found 8"):
        fitted(detector, Batches(maps_of(0, 6)), make_mesh(MeshConfig(), jax.devices()[:3]))
    with pytest.raises(DataError, match="tiles: expected images .* found 0"):
        fitted(detector, Batches({n: m[:0] for n, m in maps_of(0, 1).items()}))
    images = linear.Linear(linear.Config(on="images"))
    with pytest.raises(ConfigError, match=r"config\.backbone: .* a pytree of arrays"):
        fitted(images, Batches(maps_of(0, 6)))
    nothing = data_of(backbone("resnet18").only(("layer1",)), images=lambda: iter(()))
    with pytest.raises(DataError, match="tiles: expected images .* found 0"):
        Trainer()(images, nothing)
    optim = dataclasses.replace(linear.Config().recipe.optim, schedule="periodic")
    with pytest.raises(ConfigError, match=r"recipe\.optim\.schedule: expected another"):
        linear.Recipe(optim=optim)


def test_modules_elsewhere_have_to_be_detectors():
    with pytest.raises(ConfigError, match=r"no detector module 'tests\.nowhere'.*PYTHONPATH"):
        resolve("detectors", "tests.nowhere")
    with pytest.raises(ConfigError, match=r"tests\.helpers: expected Config and build"):
        resolve("detectors", "tests.helpers")


VIT = ("--config.backbone=vit_tiny_patch16_224", "--config.detector.layers=('block1','block2')")


def test_the_test_images_score_each_other_without_a_training_image(tmp_path, capsys):
    argv = (*VIT, ONE, "--config.data.synthetic.train=1")
    code, found = evaluated(tmp_path, "mutual", "mutual", *argv)
    assert code == 0
    support = found["stamp"]["support"]
    assert support["rule"] == "the test images themselves, without their labels"
    counts = found["categories"]["tiles"]["counts"]
    images = counts["normal"] + counts["anomalous"]
    assert found["support"]["tiles"]["0"]["images"] == images
    arrays = found["stamp"]["detector_state"]["tiles"]["0"]["arrays"]
    assert arrays["tokens"] == [images, 192]
    text = {
        "--config.shots=1": "config.shots: this detector is fitted on the test images",
        "--config.evaluation.false_alarm_rate=0.1": "config.evaluation.false_alarm_rate: this",
        "--config.evaluation.resize=windows": "the windows of one would count as images",
        "--config.backbone=resnet18": "reads the class token cls beside the maps, and resnet18",
    }
    for flag, message in text.items():
        small = (*argv, "--config.evaluation.overlap=8", flag)
        assert evaluated(tmp_path, flag[-9:], "mutual", *small)[0] == 2
        assert message in capsys.readouterr().err
