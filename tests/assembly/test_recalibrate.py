"""Recalibrated evaluations as users run them, and training from folded weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from rich.console import Console

import dsad
from dsad.assembly import evaluate, training
from dsad.assembly.model import FittedModel, Saved
from dsad.cli import main
from dsad.core.mesh import make_mesh
from dsad.core.pixels import IMAGENET_MEAN, IMAGENET_STD
from dsad.data import base
from dsad.evaluation.localize import read_results
from dsad.models import statistics
from dsad.terminal import flags
from tests.assembly.test_model import LIGHT, SMALL, same
from tests.helpers import untrained_run
from tests.models.test_statistics import first_convolution, folded, folded_state

ON = "--config.evaluation.recalibrate=True"
WOOD = "--config.data.categories=('wood',)"
TINY = {
    "layers": ("layer1",), "hidden": 8, "out": 4, "view1": {"side": 32}, "view2": {"side": 32},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


def test_a_model_of_a_run_keeps_its_statistics(tmp_path):
    place = tmp_path / "Größe 1"
    untrained_run(place / "run", "ds2", **TINY)
    argv = (
        f"--config.backbone=run:{place}/run@0", ON, *SMALL, WOOD, *LIGHT[1:],
        "--config.evaluation.false_alarm_rate=0.3",
    )  # fmt: skip
    live, again = f"{place}/live", f"{place}/again"
    assert main.main(["evaluate", *argv, f"--workdir={live}", f"--save-model={place}/m"]) == 0
    assert main.main(["evaluate", f"--model={place}/m", f"--workdir={again}"]) == 0
    found = read_results(live)
    same(found, read_results(again))
    assert "batch_norm" in found.stamp
    # The fit alone, loaded, scores like the evaluation.
    assert main.main(["fit", "--config=knn", *argv, f"--out={place}/fit"]) == 0
    assert Saved.read(f"{place}/fit").index["sha256"] == Saved.read(f"{place}/m").index["sha256"]
    data = evaluate.prepare(
        {**Saved.read(f"{place}/fit").config()}, None, saved=None
    ).dataset.source("test", "wood")  # fmt: skip
    model = dsad.load(f"{place}/fit")
    scores, _ = model.score([data[i].image for i in range(len(data))])
    expected = [row["score"] for row in found.images["wood"]]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # It is no model of the plain encoder, which has other scores.
    kept = model.fitted.statistics
    assert not np.allclose(kept["norm1"]["var"], model.backbone.statistics["norm1"]["var"])
    loose = FittedModel(**{
        n: getattr(model, n) for n in model.__dataclass_fields__ if n != "fitted"
    }, fitted=model.fitted._replace(statistics={}))  # fmt: skip
    assert not np.allclose(loose.score([data[0].image])[0], scores[:1], rtol=1e-3)


def test_folded_and_norm_free_encoders_are_refused_before_anything_is_written(tmp_path, capsys):
    safetensors.numpy.save_file(folded_state(), tmp_path / "folded.safetensors")
    for spec, why in (
        (("resnet18", str(tmp_path / "folded.safetensors")), "are folded into its convolutions"),
        (("squeezenet1_1", "random"), "squeezenet1_1 has no batch norm"),
    ):
        argv = (f"--config.backbone={spec[0]}", f"--config.weights={spec[1]}", ON, *SMALL, WOOD)
        assert main.main(["evaluate", *argv, f"--workdir={tmp_path}/w"]) == 2
        text = " ".join(capsys.readouterr().err.split())
        assert "config.evaluation.recalibrate: expected False" in text
        assert why in text
        assert not (tmp_path / "w").exists()


def test_training_from_folded_weights_begins_with_statistics_of_the_data(tmp_path, capsys):
    file = tmp_path / "gefaltet é.safetensors"
    safetensors.numpy.save_file(folded_state(), file)
    config = flags.Command("config", "", config="ds2:smoke").parse([])[0]
    config.init_from = str(file)
    config.objective.update(layers=("layer1", "layer2"), hidden=8, zero_init_last=False)
    out = Console()
    prepared = training.prepare(config, out)
    state = training.first_state(prepared, prepared.earlier, out)
    assert "its folded batch norms have statistics" in " ".join(capsys.readouterr().out.split())
    encoder = prepared.run.objective.encoder_weights(state.params, state.extra)
    assert not statistics.is_folded(encoder.extra)
    # The first norm has the moments of whole training images, as Pillow resizes them.
    source = base.load(prepared.run.config.data).source("train")
    side = prepared.run.config.data.canvas
    images = np.stack([
        np.asarray(PIL.Image.fromarray(source[i].image).resize((side, side), 2), np.float32)
        for i in range(len(source))
    ])  # fmt: skip
    images = (images / 255 - IMAGENET_MEAN) / IMAGENET_STD
    plain = folded()
    direct = first_convolution(plain, images)
    np.testing.assert_allclose(
        encoder.extra["norm1"]["var"], direct.var((0, 1, 2)), rtol=0.02, atol=1e-4
    )
    np.testing.assert_allclose(encoder.extra["norm1"]["mean"], direct.mean((0, 1, 2)), atol=5e-3)
    images = jnp.asarray(images[:4], jnp.float32)
    before = plain(images)["layer2"]
    network = dataclasses.replace(plain, params=encoder.params, extra=encoder.extra)
    scale = float(np.std(before))
    np.testing.assert_allclose(network(images)["layer2"], before, atol=2e-4 * scale, rtol=1e-4)
