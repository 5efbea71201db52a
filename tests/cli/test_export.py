"""``dsad export``: what other libraries load, and the same features there."""

import json
import sys
from importlib import metadata

import numpy as np
import pytest
import safetensors.numpy

from dsad.assembly import pretrain, runs
from dsad.cli import main
from dsad.core.errors import DsadError
from dsad.core.tree import flatten
from dsad.models import backbone
from dsad.models.weights import export, pretrained
from dsad.models.weights.pretrained import Weights
from tests.helpers import untrained_run
from tests.models import published

SMALL = {"width": 24, "depth": 2, "heads": 3, "patch": 8, "image": 32}


def images(side=32):
    return np.random.default_rng(3).standard_normal((2, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "resnet18.npz"
    np.savez(path, **published.by_rule(published.resnet()))
    return path


def test_names_shapes_config_and_the_way_back(resnet_file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["export", "--backbone=resnet18", f"--weights={resnet_file}", "--format=torchvision"]
    assert main.main([*argv, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "left out, classifier: fc.weight, fc.bias" in text
    assert f"written: {out / 'model.safetensors'} (44," in text
    assert "11,176,512 parameters" in text
    assert "net.fc = torch.nn.Identity()" in text
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    want = {n: tuple(s) for n, s in published.resnet(classes=0).items()}
    assert {n: t.shape for n, t in tensors.items()} == want
    source = np.load(resnet_file)
    assert all(t.tobytes() == source[n].tobytes() for n, t in tensors.items())
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (
        "resnet18", 0, 512,
    )  # fmt: skip
    known = config["pretrained_cfg"]
    assert known["mean"] == [0.485, 0.456, 0.406]
    assert known["input_size"] == [3, 224, 224]
    assert (known["interpolation"], known["crop_pct"]) == ("bilinear", 0.875)
    assert config["dsad"]["weights"] == "resnet18.npz"
    assert config["dsad"]["code"]["dsad"]
    back, first = backbone("resnet18", out), backbone("resnet18", resnet_file)
    for (path, a), b in zip(flatten(back).items(), flatten(first).values(), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def test_nothing_is_overwritten_unless_told_to(resnet_file, tmp_path, capsys):
    argv = ["export", "--backbone=resnet18", f"--weights={resnet_file}", f"--out={tmp_path}"]
    (tmp_path / "other.txt").write_text("mine")
    assert main.main(argv) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert main.main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main.main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "other.txt").read_text() == "mine"
    (tmp_path / "config.json").write_text("{}")
    assert main.main([*argv, "--overwrite"]) == 2
    assert "did not write" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_what_cannot_be_exported_says_why(resnet_file, tmp_path, capsys):
    def fails(*argv):
        assert main.main(["export", *argv, f"--out={tmp_path / 'x'}"]) == 2
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "expected --backbone=SPEC" in fails()
    assert "name its weights" in fails("--backbone=resnet18")
    assert "Did you mean 'resnet18'" in fails("--backbone=resnet8", f"--weights={resnet_file}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    assert "a fitted model, which dsad predict" in fails(f"--backbone={tmp_path / 'model'}")
    assert "wrapper" in fails("--backbone=patches:32/4:resnet18")
    text = fails("--backbone=resnet18", f"--weights={resnet_file}", "--format=onnx")
    assert "expected 'timm' or 'torchvision'" in text
    assert "timm for vit_tiny_patch16_224" in text
    part = {n: t for n, t in np.load(resnet_file).items() if "layer4" not in n}
    np.savez(tmp_path / "part.npz", **part)
    text = fails("--backbone=resnet18", f"--weights={tmp_path / 'part.npz'}")
    assert "end after layer3" in text


@pytest.mark.slow
def test_a_transformer_of_another_size_carries_its_arguments(tmp_path):
    weights = Weights(
        tensors=published.with_sines(published.by_rule(published.mae(2, 24, 8, 4))),
        options=SMALL, mean=(0.1, 0.2, 0.3), source="somewhere",
    )  # fmt: skip
    found = backbone("mae_vit_base_patch16", weights)
    export.write(found, tmp_path, form="timm")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224"
    assert config["num_features"] == 24
    assert config["model_args"] == {
        "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32,
    }  # fmt: skip
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {
        n: tuple(s) for n, s in published.mae(2, 24, 8, 4).items()
    }
    for arch in ("mae_vit_base_patch16", "vit_base_patch16_224"):
        back = backbone(arch, tmp_path)
        assert (back.mean, back.image_size) == ((0.1, 0.2, 0.3), 32)
        for name, values in found(images()).items():
            np.testing.assert_array_equal(back(images())[name], values)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilenet_v2", "squeezenet1_1"])
def test_small_networks_are_written_under_their_own_names(arch, tmp_path):
    found = backbone(arch, seed=3)
    export.write(found, tmp_path, form="plain")
    back = backbone(arch, tmp_path)
    for (path, a), b in zip(flatten(found).items(), flatten(back).values(), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    assert (back.mean, back.std, back.image_size) == (found.mean, found.std, found.image_size)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_features"] == {"mobilenet_v2": 320, "squeezenet1_1": 512}[arch]


# --- dsad's own runs


def test_runs_are_exported_and_read_as_weights(tmp_path, monkeypatch, capsys):
    decoder = {"width": 16, "depth": 1, "heads": 2}
    encoder = {"arch": "mae_vit_tiny_patch16", "width": 24, "depth": 2, "heads": 3, "patch": 8}
    run = untrained_run(
        tmp_path / "run", "mae", encoder=encoder, decoder=decoder,
        view={**pretrain.default_config("mae").objective.view.to_dict(), "side": 32},
    )  # fmt: skip
    assert main.main(["export", f"--backbone=run:{run}@0", f"--out={tmp_path / 'out'}"]) == 0
    assert "untouched initialisation" in capsys.readouterr().out
    # A run sees whole images, also where its architecture's published weights saw a centre crop.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    own = runs.backbone(f"run:{run}@0", "", 0)
    back = backbone("mae_vit_tiny_patch16", tmp_path / "out")
    for name, values in own(images()).items():
        np.testing.assert_array_equal(back(images())[name], values)
    assert (back.mean, back.image_size, back.interpolation) == (own.mean, 32, "bicubic")
    installed(monkeypatch)
    read = backbone("mae_vit_tiny_patch16", f"run:{run}@0")
    for a, b in zip(flatten(back).values(), flatten(read).values(), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert read.description == f"{run} untouched initialisation, seed 0"
    with pytest.raises(DsadError, match=r"no dsad run there"):
        pretrained.read(f"run:{tmp_path}")


@pytest.mark.slow
def test_the_encoder_of_a_contrastive_run(tmp_path):
    run = untrained_run(tmp_path / "run", "ds2", hidden=8, out=4)
    own = runs.backbone(f"run:{run}@0", "", 0)
    read = backbone("resnet18", runs.read_run(f"run:{run}@0"))
    for name, values in own(images(64)).items():
        np.testing.assert_array_equal(read(images(64))[name], values)
    found = export.write(read, tmp_path / "out", form="torchvision")
    tensors = safetensors.numpy.load_file(found["model.safetensors"])
    assert tensors.keys() == published.resnet(classes=0).keys()
    config = json.loads(found["config.json"].read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]


def installed(monkeypatch):
    """The entry points as pyproject.toml declares them, also where dsad is not installed."""
    import tomllib

    from tests.helpers import ROOT

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = [
        metadata.EntryPoint(name, value, pretrained.GROUP)
        for name, value in project["entry-points"][pretrained.GROUP].items()
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)


# --- in other libraries


def _torch():
    return pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)


def same_features(network, found, side):
    torch = _torch()
    x = images(side)
    with torch.no_grad():
        theirs = network.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    for name, values in found(x).items():
        want = theirs[name].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(values, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_torch_networks_load_strictly_and_compute_the_same(resnet_file, tmp_path):
    torch = _torch()
    from tests.models import torch_networks

    found = backbone("resnet18", resnet_file)
    vit_weights = Weights(tensors=published.by_rule(published.timm_vit(2, 24, 8, 4)), options=SMALL)
    small = backbone("vit_base_patch16_224", vit_weights)
    for ours, theirs, side in (
        (found, torch_networks.ResNet18(), 64), (small, torch_networks.ViT(**SMALL), 32),
    ):  # fmt: skip
        export.write(ours, tmp_path / ours.arch, form="timm")
        tensors = safetensors.numpy.load_file(tmp_path / ours.arch / "model.safetensors")
        state = {n: torch.from_numpy(t) for n, t in tensors.items()}
        assert all(t.is_contiguous() for t in state.values())
        theirs.load_state_dict(state, strict=True)
        same_features(theirs, ours, side)


def test_torchvision_loads_strictly_and_computes_the_same(resnet_file, tmp_path):
    torch = _torch()
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    found = backbone("resnet18", resnet_file)
    written = export.write(found, tmp_path, form="torchvision")
    tensors = safetensors.numpy.load_file(written["model.safetensors"])
    network = torchvision.models.resnet18().eval()
    network.fc = torch.nn.Identity()
    network.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=True)
    with torch.no_grad():
        pooled = network(torch.from_numpy(images(64).transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.asarray(found(images(64))["layer4"]).mean((1, 2))
    np.testing.assert_allclose(ours, pooled, rtol=1e-3, atol=1e-4 * np.abs(pooled).max())


TIMM = {
    "vit_base_patch16_224": {},
    "deit_small_distilled_patch16_224": {"distilled": True},
    "vit_small_patch14_dinov2": {"layer_scale": True, "hub": True},
    "vit_small_patch14_reg4_dinov2": {"layer_scale": True, "hub": True, "registers": 4},
    "vit_base_patch16_clip_quickgelu_224": {"pre_norm": True, "patch_bias": False},
    "mae_vit_base_patch16": {},
    "vit_small_patch16_dinov3": {"biases": True},
    "vit_large_plus_patch16_dinov3": {"gated": True},
    "resnet18": None,
}


@pytest.mark.parametrize("arch", sorted(TIMM))
def test_timm_loads_strictly_and_computes_the_same(arch, tmp_path):
    torch = _torch()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    if TIMM[arch] is None:
        found = backbone(arch, published.by_rule(published.resnet()))
    else:
        shapes = (
            published.dinov3(2, 24, 8, **TIMM[arch])
            if "dinov3" in arch
            else published.timm_vit(2, 24, 8, 4, **TIMM[arch])
        )
        state = published.by_rule(shapes)
        state = published.with_sines(state) if arch.startswith("mae") else state
        found = backbone(arch, Weights(tensors=state, options=SMALL))
    written = export.write(found, tmp_path, form="timm")
    config = json.loads(written["config.json"].read_text())
    arguments = config.get("model_args", {})
    model = timm.create_model(config["architecture"], num_classes=0, **arguments).eval()
    tensors = safetensors.numpy.load_file(written["model.safetensors"])
    model.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=True)
    assert model.num_features == config["num_features"]
    if arguments.pop("qkv_bias", False):  # the name under which timm publishes such weights
        alike = timm.create_model(f"{arch}_qkvb", num_classes=0, **arguments)
        alike.load_state_dict(model.state_dict(), strict=True)
    side = 32 if arguments else 64
    with torch.no_grad():
        x = torch.from_numpy(images(side).transpose(0, 3, 1, 2).copy())
        theirs = model.forward_intermediates(x, intermediates_only=True, norm=False)
        whole = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        np.testing.assert_array_equal(whole(x), model(x))
    ours = list(found(images(side)).values())
    for a, b in zip(ours, theirs[-len(ours) :], strict=True):
        want = b.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(a, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_nothing_of_torch_is_loaded_without_need(resnet_file, tmp_path):
    before = "torch" in sys.modules
    export.write(backbone("resnet18", resnet_file), tmp_path / "o", form="timm")
    assert ("torch" in sys.modules) == before
