"""What a run trains on, drawn: the views of its steps, with the training left as it is."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from rich.console import Console

from dsad.assembly import training
from dsad.assembly.pretrain import default_config
from dsad.assembly.strips import Strips
from dsad.cli import main
from dsad.core import rng
from dsad.core.errors import WorkdirError
from dsad.core.mesh import make_mesh, place_batch
from dsad.core.metric_files import read_metrics
from dsad.core.types import HasPictures
from dsad.evaluation.report.page import write_training
from dsad.objectives.mae import patch_targets, random_masking
from tests.assembly.test_runs import SMALL


def config_of(name, **objective):
    config = default_config(name)
    config.data.update(name="synthetic", canvas=32)
    config.data.synthetic.update(size=48, train=2, good=1, bad=1)
    config.batch_size, config.steps, config.log_every, config.pictures = 8, 2, 1, 3
    config.objective.update(objective)
    return config


def mae():
    config = config_of("mae", **SMALL)
    config.objective.view.side = 32
    return config


def cells(strip, side=32):
    """The images of a strip, (n, side, side, 3) in [0, 1]."""
    pixels = np.asarray(PIL.Image.open(io.BytesIO(strip)), np.float32) / 255
    return np.stack([pixels[:, x : x + side] for x in range(0, pixels.shape[1], side + 4)])


def files(path):
    return {p.name: p.read_bytes() for p in (path / "pictures").iterdir()}


def trained(path, **changes):
    config, out = mae(), Console(file=io.StringIO())
    config.update(changes)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"command": "pretrain", "config": {}}))
    assert training.pretrain(training.prepare(config, out), epath.Path(path), out)
    keep = ("step", "loss", "grad_norm", "param_norm", "unexplained")
    return [{n: row[n] for n in keep if n in row} for row in read_metrics(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("Streifen für %d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsad.assembly.pretrain.make_mesh", one)
        return base, trained(base / "mit", pictures=3), trained(base / "ohne", pictures=0)


def one(config, devices=None):
    return make_mesh(config, (devices or jax.devices())[:1])


def test_training_is_the_same_without_them(runs):
    base, with_pictures, without = runs
    assert with_pictures == without
    assert [row["step"] for row in without] == [1, 2]
    assert not (base / "ohne" / "pictures").exists()


def test_strips_show_the_views_of_the_first_epoch(runs):
    base, *_ = runs
    found = files(base / "mit")
    titles = ["0 input", "1 seen by the encoder", "2 hidden patches predicted"]
    assert sorted(found) == [f"{s:08d} {t}.png" for s in (0, 2) for t in titles]
    made = training.build(mae())
    batches = made.pipeline.iterator()
    placed = place_batch(next(batches), made.run.mesh)
    batches.close()
    batch = made.pass_functions[0](made.store, placed)
    assert list(batch["index"]) != list(range(8))  # as shuffled, not by category
    batch = jax.tree.map(lambda x: np.asarray(x)[1:4], batch)  # behind the one they may need
    views = jax.jit(made.run.objective.views)(batch, rng.named(made.run.key, "views"))
    objective = made.run.objective
    mean, std = (np.asarray(x, np.float32) for x in (objective.mean, objective.std))
    image = np.clip(np.asarray(views["image"]) * std + mean, 0, 1)
    for step in (0, 2):
        np.testing.assert_allclose(cells(found[f"{step:08d} 0 input.png"]), image, atol=0.51 / 255)
    _, _, mask = random_masking(views["noise"], made.run.objective.keep)
    hidden = np.asarray(mask).reshape(3, 4, 4).repeat(8, 1).repeat(8, 2).astype(bool)
    seen, filled = (cells(found[f"00000002 {t}.png"]) for t in titles[1:])
    np.testing.assert_allclose(seen[~hidden], image[~hidden], atol=0.51 / 255)
    np.testing.assert_allclose(
        seen[hidden], np.broadcast_to(mean, seen[hidden].shape), atol=0.6 / 255
    )
    np.testing.assert_allclose(filled[~hidden], image[~hidden], atol=0.51 / 255)
    assert np.abs(filled[hidden] - image[hidden]).mean() > 0.01
    assert found["00000000 2 hidden patches predicted.png"] != found[f"00000002 {titles[2]}.png"]


def test_the_report_shows_what_changes_twice(runs, capsys):
    place = runs[0] / "mit"
    assert main.main(["report", str(place)]) == 0
    text = (place / "report.html").read_text()
    captions = ["Input", "Seen by the encoder", "Hidden patches predicted, before the training",
                "Hidden patches predicted, after 2 steps"]  # fmt: skip
    places = [text.index(f"<figcaption>{c}</figcaption>") for c in captions]
    assert places == sorted(places)
    assert text.count('<img class="sample"') == 4
    assert text.index("What it trained on") < text.index('aria-label="Loss"')
    assert main.main(["report", str(place), str(place)]) == 2
    assert "of probes by labels or of a pretraining run" in capsys.readouterr().err
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl: no such file"):
        write_training(place / "r.html", place / "pictures")


def test_norm_pix_predictions_get_their_light_back():
    """A decoder that predicts the normalised target shows the image itself."""
    config = mae()
    config.objective.norm_pix = True
    made = training.build(config)
    objective, batch = made.run.objective, next(training.passes(made))
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    objective.decode = lambda p, e, latent, restore: patch_targets(
        objective.views(batch, jax.random.key(1))["image"], 8, True
    )
    drawn = jax.jit(objective.pictures)(params, extra, batch, jax.random.key(1))
    np.testing.assert_allclose(drawn["hidden patches predicted"], drawn["input"], atol=1e-4)


def test_positive_cells_have_the_colour_of_their_place(tmp_path):
    """Of two equal views each cell is paired with itself, and the tints are the same."""
    config = config_of("ds2", hidden=8, out=4, layers=("layer2",), top1="off")
    for view in (config.objective.view1, config.objective.view2):
        view.update(side=32, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, blur_probability=0.0,
                    jitter_probability=0.0)  # fmt: skip
    made = training.build(config)
    objective, batch = made.run.objective, next(training.passes(made))
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    drawn = jax.jit(objective.pictures)(params, extra, batch, jax.random.key(1))
    np.testing.assert_array_equal(drawn["view 1"], drawn["view 2"])
    tinted = drawn["positive cells of view 1"]
    np.testing.assert_allclose(tinted, drawn["positive cells of view 2"], atol=1e-6)
    tint = (tinted - 0.4 * drawn["view 1"]) / 0.6
    expected = np.array([[0, 0, 1], [1, 0, 0.5], [0, 1, 0.5], [1, 1, 0]])  # of the corners
    corners = np.asarray(tint)[:, [2, 2, -2, -2], [2, -2, 2, -2]]
    np.testing.assert_allclose(corners, np.broadcast_to(expected, corners.shape), atol=1e-4)


@pytest.mark.parametrize("name", ["corrupt", pytest.param("ds2", marks=pytest.mark.slow)])
def test_corruptions_are_shown_with_their_labels(name):
    term = {"layers": ("layer1",), "view": {"side": 64}}
    if name == "ds2":
        term = {"hidden": 8, "out": 4, "layers": ("layer2",), "corrupt": {"weight": 1.0, **term}}
    made = training.build(config_of(name, **term))
    objective, batch = made.run.objective, next(training.passes(made))
    assert isinstance(objective, HasPictures)
    state, key = jax.jit(objective.init)(jax.random.key(0)), jax.random.key(1)
    drawn = jax.jit(objective.pictures)(*state, batch, key)
    views = jax.jit(objective.views)(batch, key)
    assert ("view 1" in drawn) == (name == "ds2")
    views = views.get("corruption", views)
    np.testing.assert_array_equal(drawn["changed pixels"][..., 1], views["label"])
    image = np.asarray(views["image"]) * objective.std + objective.mean
    np.testing.assert_allclose(drawn["corrupted view"], image, atol=1e-6)
    assert drawn["changes seen"].shape == drawn["corrupted view"].shape


def test_order_and_clipping(tmp_path):
    class Objective:
        def pictures(self, params, extra, batch, key):
            flat = jnp.ones((len(batch["index"]), 4, 4, 3))
            return {"z first": params * flat, "a second": -flat}

    batch = {"index": np.arange(5)}
    strips = Strips(Objective(), batch, jax.random.key(0), epath.Path(tmp_path), 2)

    class State:
        step, params, extra = np.int32(7), np.float32(0.5), {}

    strips.write(State())
    found = files(tmp_path)
    assert sorted(found) == ["00000007 0 z first.png", "00000007 1 a second.png"]
    for name, value in (("0 z first", 128), ("1 a second", 0)):
        images = cells(found[f"00000007 {name}.png"], 4)
        assert images.shape == (2, 4, 4, 3)
        np.testing.assert_allclose(images, value / 255, atol=1e-6)
