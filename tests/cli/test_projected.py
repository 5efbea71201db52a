"""ADPretrain through the commands: pretrained, evaluated behind its projectors, kept in a model."""

import json
import shutil

import pytest

from tests.cli.test_stages import fails, one_device, run

LAYERS = "--config.detector.layers=('layer1','layer2')"


def evaluate(path, backbone, *argv):
    return (
        "evaluate", "--config=featurenorm:smoke", "--config.weights=", LAYERS,
        f"--config.backbone={backbone}", f"--workdir={path}", *argv,
    )  # fmt: skip


def numbers(path):
    return json.loads((path / "results.json").read_text())


@pytest.mark.slow
def test_from_pretraining_to_a_model_without_its_run(tmp_path, capsys):
    pretrained = tmp_path / "run"
    probed = (
        "pretrain",
        "--config=adpretrain:smoke",
        "--config.probe.every=2",
        "--config.probe.images=2",
    )
    assert "config.probe.every: expected 0" in fails(capsys, *probed, f"--workdir={pretrained}")
    with one_device():
        run("pretrain", "--config=adpretrain:smoke", f"--workdir={pretrained}")
    said = " ".join(capsys.readouterr().out.split())
    backbone = f"projected:{pretrained}:run:{pretrained}"
    assert f"--config.backbone={backbone}" in said.replace(" ", "")
    results = {}
    for name in ("", "residual:", f"projected:{pretrained}:"):
        path = tmp_path / f"results{len(results)}"
        model = (f"--save-model={tmp_path / 'model'}",) if "projected" in name else ()
        run(*evaluate(path, f"{name}run:{pretrained}", *model))
        results[name] = numbers(path)
    projected = results[f"projected:{pretrained}:"]
    assert len({str(x["mean"]) for x in results.values()}) == 3
    (named,) = projected["stamp"]["map_wrappers"]
    assert "step 4, seed 0, trained on split all with test images, sha256" in named

    other = evaluate(tmp_path / "a", f"projected:{pretrained}:resnet18", "--config.weights=random")
    assert "whose layer1 differs from that of resnet18" in fails(capsys, *other)
    deeper = evaluate(tmp_path / "a", backbone, "--config.detector.layers=layer3")
    assert "no feature map layer3" in fails(capsys, *deeper)
    shutil.rmtree(pretrained)
    measured = tmp_path / "measured"
    run("evaluate", f"--model={tmp_path / 'model'}", f"--workdir={measured}")
    assert numbers(measured)["mean"] == projected["mean"]
    assert "no dsad run there" in fails(capsys, *evaluate(tmp_path / "b", backbone))
