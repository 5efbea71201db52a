"""Where weights come from: files, configs beside them, the hub, other packages."""

import argparse
import contextlib
import json
import sys
import types
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dsad.core.errors import ConfigError
from dsad.models import backbone, registry
from dsad.models.weights import _files, imagenet, pretrained
from tests.models import published


def arrays(dtype=np.float32):
    g = np.random.default_rng(0)
    return {"a.weight": g.standard_normal((3, 4)).astype(dtype), "b": np.ones(2, dtype)}


def same(found, want):
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


# --- files


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_keep_their_type(dtype, tmp_path):
    safetensors.numpy.save_file(arrays(dtype), tmp_path / "w.safetensors")
    same(pretrained.read(tmp_path / "w.safetensors"), arrays(dtype))


def test_half_precision_is_widened_exactly(tmp_path):
    state = published.by_rule(published.resnet())
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {n: t.astype(dtype) for n, t in state.items()}
        safetensors.numpy.save_file(half, tmp_path / "w.safetensors")
        found = backbone("resnet18", tmp_path / "w.safetensors")
        kernel = np.asarray(found.params["layer4_block1"]["conv2"]["kernel"])
        assert kernel.dtype == np.float32
        want = half["layer4.1.conv2.weight"].astype(np.float32).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, want)


def test_a_read_mapping_is_read_only_and_says_where_it_is_from(tmp_path):
    np.savez(tmp_path / "w.npz", **arrays())
    found = pretrained.read(str(tmp_path / "w.npz"))
    same(found, arrays())
    assert found.source == "w.npz"
    assert (found.mean, found.std, found.input_size, found.interpolation) == (None,) * 4
    with pytest.raises(TypeError):
        found["b"] = 1
    assert pretrained.read(found) is found
    assert pretrained.read(arrays()).source == "given arrays"
    with pytest.raises(ConfigError, match="a tensor of numbers for x"):
        pretrained.read({"x": "text"})


def test_a_directory_holds_a_standard_name_or_one_file(tmp_path):
    with pytest.raises(ConfigError, match="found none"):
        pretrained.read(tmp_path)
    np.savez(tmp_path / "one.npz", **arrays())
    assert pretrained.read(tmp_path).source == f"{tmp_path.name}/one.npz"
    np.savez(tmp_path / "two.npz", **arrays())
    with pytest.raises(ConfigError, match=r"2 files of weights \(one.npz, two.npz\)"):
        pretrained.read(tmp_path)
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    assert pretrained.read(tmp_path).source == f"{tmp_path.name}/model.safetensors"


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no header")
    (tmp_path / "w.h5").write_bytes(b"x")
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    np.save(tmp_path / "w.npy", np.ones(2))
    (tmp_path / "w.npy").rename(tmp_path / "single.npz")
    for name, text in (
        ("w.safetensors", "not a readable safetensors"), ("w.h5", r"\.safetensors, \.npz, \.pth"),
        ("gone.npz", "no such file"), ("empty.npz", "no tensors"),
        ("pickled.npz", "not a readable npz"), ("single.npz", "not a readable npz"),
        ("empty.npz#x", "only chooses within"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            pretrained.read(tmp_path / name)


def test_prefixes_of_torchs_wrappers_are_removed(tmp_path):
    for prefix in ("module.", "module._orig_mod."):
        np.savez(tmp_path / "w.npz", **{prefix + n: t for n, t in arrays().items()})
        same(pretrained.read(tmp_path / "w.npz"), arrays())
    np.savez(tmp_path / "w.npz", **{"module.a": np.ones(1), "b": np.ones(1)})
    assert set(pretrained.read(tmp_path / "w.npz")) == {"module.a", "b"}


# --- configs


TIMM = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 384, 384],
        "interpolation": "bicubic", "crop_pct": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "vit_base_patch16_384", "num_classes": 0, "pretrained_cfg": TIMM},
        {"architecture": "vit_base_patch16_384", **TIMM},
    ],
    ids=["new", "old"],
)
def test_timms_config(config, tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for spec in (tmp_path, tmp_path / "model.safetensors"):
        found = pretrained.read(spec)
        assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
        assert (found.input_size, found.interpolation) == (384, "bicubic")
        assert (found.architecture, found.crop) == ("vit_base_patch16_384", 1.0)
        assert found.quick_gelu is None


def test_open_clips_config_belongs_to_its_own_file(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"image_size": 224, "layers": 12}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", **TIMM}))
    found = pretrained.read(tmp_path)
    assert found.source.endswith("/open_clip_model.safetensors")
    assert (found.mean, found.input_size, found.interpolation) == ((0.1, 0.2, 0.3), 224, None)
    assert found.quick_gelu is True
    np.savez(tmp_path / "other.npz", **arrays())
    assert pretrained.read(tmp_path / "other.npz").input_size == 384


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mean": [0.5, 0.5]}, "mean: expected three numbers"),
        ({"mean": [0.5, 0.5, "x"]}, "mean: expected three numbers"),
        ({"std": [0.2, 0.2, 0]}, "std: expected three positive numbers"),
        ({"crop_pct": 0}, "crop_pct: expected a positive number, found 0"),
        ({"crop_pct": "0.9"}, "crop_pct: expected a positive number, found '0.9'"),
        ({"input_size": [3, 224, 256]}, "input size: expected one side of a square"),
        ({"input_size": "224"}, "input size: expected one side of a square"),
        ({"interpolation": 3}, "interpolation: expected text"),
    ],
)
def test_a_config_with_a_fault_is_refused(changes, text, tmp_path):
    np.savez(tmp_path / "w.npz", **arrays())
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {**TIMM, **changes}}))
    with pytest.raises(ConfigError, match=rf"config\.json: {text}"):
        pretrained.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        pretrained.read(tmp_path)


def test_configs_of_other_kinds_say_nothing(tmp_path):
    np.savez(tmp_path / "w.npz", **arrays())
    for other in ({"command": "pretrain", "config": {}}, {"model_type": "vit"}, [1]):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert pretrained.read(tmp_path).mean is None


# --- torch


def test_without_torch_its_files_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pip install 'dsad\[torch\]'.*'w\.safetensors'\)"):
        pretrained.read(tmp_path / "w.pth")


def test_the_command_that_converts_torch_files_works(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    half = {n: torch.from_numpy(t).bfloat16().T for n, t in arrays().items() if t.ndim == 2}
    torch.save(half, tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    _, code, _ = _files.CONVERT.format("w.pth", "w").split('"')
    exec(code, {})
    found = pretrained.read(tmp_path / "w.safetensors")
    assert found["a.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["a.weight"].astype("f4"), half["a.weight"].float().numpy())


class Trap:
    """Unpickling it runs code."""

    def __reduce__(self):
        return print, ("ran",)


def test_torch_files(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    state = {n: torch.from_numpy(t) for n, t in arrays().items()}
    path = tmp_path / "w.pth"

    def saved(value, **options):
        torch.save(value, path, **options)
        return path

    wrapped = {f"module.{n}": t for n, t in state.items()}
    args = argparse.Namespace(lr=0.1, model="mae")
    for value in (
        state, {"model": state, "epoch": 3, "args": args}, {"state_dict": wrapped, "lr": 0.1},
        {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    ):  # fmt: skip
        same(pretrained.read(saved(value)), arrays())
    same(pretrained.read(saved(state, _use_new_zipfile_serialization=False)), arrays())
    half = {n: t.bfloat16() for n, t in state.items()}
    for name, tensor in pretrained.read(saved({"model": half})).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, half[name].float().numpy())
    saved({"model": state, "model_ema": {n: t + 1 for n, t in state.items()}})
    with pytest.raises(ConfigError, match=r"under model, model_ema; choose with .*w\.pth#model"):
        pretrained.read(path)
    found = pretrained.read(f"{path}#model_ema")
    assert found.source == "w.pth#model_ema"
    np.testing.assert_array_equal(found["b"], [2, 2])
    with pytest.raises(ConfigError, match="no tensors by that name; it has: model, model_ema"):
        pretrained.read(f"{path}#other")
    saved({"model": state, "trap": Trap()})
    with pytest.raises(ConfigError, match="weights-only loader cannot read it"):
        pretrained.read(path)
    assert "ran" not in capsys.readouterr().out
    for value in ([1, 2], {"epoch": 3}):
        with pytest.raises(ConfigError, match=r"expected tensors by name|no tensors by name"):
            pretrained.read(saved(value))
    path.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="weights-only loader cannot read it"):
        pretrained.read(path)
    same(pretrained.read({n: t.requires_grad_() for n, t in state.items()}), arrays())
    for value in (
        saved({n: t.to("meta") for n, t in state.items()}),
        saved(state["b"].to_sparse()),
    ):
        with pytest.raises(ConfigError, match=r"meta tensor|expected tensors by name"):
            pretrained.read(value)


class Valueless:
    """What torch makes of a tensor that has a device, but no values for numpy there."""

    shape, dtype = (2,), "torch.float32"

    def __init__(self, device):
        self.device = device

    def detach(self):
        return self

    def cpu(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


@pytest.mark.parametrize(
    ("device", "message"),
    [("meta", "b is a meta tensor, a shape without values.*Load them"), ("odd", "no plain tensor")],
)
def test_tensors_without_values_are_named(tmp_path, monkeypatch, device, message):
    torch = types.SimpleNamespace(
        load=lambda *_, **__: {"b": Valueless(device)},
        serialization=types.SimpleNamespace(safe_globals=lambda _: contextlib.nullcontext()),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"w\.pth: .*{message}"):
        pretrained.read(tmp_path / "w.pth")


def test_torchscript_archives_are_refused_with_what_to_use(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-B-32/{name}", b"")
    with pytest.raises(ConfigError, match=r"TorchScript archive.*hf:timm/vit_base_patch16_clip"):
        pretrained.read(tmp_path / "ViT-B-32.pt")


# --- the hub


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub with the files of one repository."""

    class errors:
        class EntryNotFoundError(Exception): ...

        class LocalEntryNotFoundError(EntryNotFoundError): ...

        class RepositoryNotFoundError(Exception): ...

        class RevisionNotFoundError(Exception): ...

        class HfHubHTTPError(OSError): ...

        class OfflineModeIsEnabled(ConnectionError): ...

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.asked, self.online = folder, [], True

    def hf_hub_download(self, repo, file, *, revision=None):
        self.asked.append((repo, file, revision))
        if repo != "owner/name.v1":
            raise self.errors.RepositoryNotFoundError("404\nmore")
        if revision not in (None, "main", "abc"):
            raise self.errors.RevisionNotFoundError("404")
        if not (self.folder / file).exists():
            known = self.errors
            raise known.EntryNotFoundError(file) if self.online else known.LocalEntryNotFoundError()
        return str(self.folder / file)

    def try_to_load_from_cache(self, repo, file, *, revision=None):
        path = self.folder / file
        return str(path) if path.exists() else getattr(self, "absent", None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    made = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
    return made


def test_hub_files_are_chosen_in_order_with_their_config(hub):
    safetensors.numpy.save_file(arrays(), hub.folder / "open_clip_model.safetensors")
    found = pretrained.read("hf:owner/name.v1")
    assert found.source == f"hf:owner/name.v1/open_clip_model.safetensors (commit {'0' * 40})"
    safetensors.numpy.save_file(arrays(np.float16), hub.folder / "model.safetensors")
    (hub.folder / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    found = pretrained.read("hf:owner/name.v1@main")
    assert found["b"].dtype == np.float16
    assert (found.input_size, found.mean) == (384, (0.5, 0.4, 0.3))
    assert hub.asked[-2:] == [
        ("owner/name.v1", "model.safetensors", "main"), ("owner/name.v1", "config.json", "main"),
    ]  # fmt: skip
    np.savez(hub.folder / "other.npz", **arrays())
    assert pretrained.read("hf:owner/name.v1@abc/other.npz")["b"].dtype == np.float32


def test_imagenet_is_a_repository_by_architecture(hub):
    with pytest.raises(ConfigError, match=r"hf:timm/resnet18\.tv_in1k: no such repository"):
        backbone("resnet18", "imagenet")
    with pytest.raises(ConfigError, match=r"none are agreed upon for mae_vit_tiny_patch16.*deit"):
        backbone("mae_vit_tiny_patch16", "imagenet")
    for arch in registry.archs():
        if arch.startswith(("resnet", "wide_resnet", "deit")):
            assert imagenet.repository(arch).startswith(f"hf:timm/{arch}.")


def test_what_the_hub_lacks(hub):
    for spec, text in (
        ("hf:owner", "expected hf:owner/name"), ("hf:owner/name.v1", "has no model.safetensors"),
        ("hf:owner/other", r"no such repository or revision.*404$"),
        ("hf:owner/name.v1@gone", "no such repository or revision"),
        ("hf:owner/name.v1/w.npz", "has no w.npz"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            pretrained.read(spec)


def test_without_network_nothing_is_guessed(hub):
    hub.online = False
    safetensors.numpy.save_file(arrays(), hub.folder / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not in the local cache"):
        pretrained.read("hf:owner/name.v1")
    hub.absent = object()  # the hub once answered that there is no such file
    assert pretrained.read("hf:owner/name.v1").mean is None
    safetensors.numpy.save_file(arrays(), hub.folder / "model.safetensors")
    del hub.absent
    with pytest.raises(ConfigError, match=r"config\.json is not in the local cache"):
        pretrained.read("hf:owner/name.v1")


def test_without_the_hubs_library_its_specs_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'dsad\[hf\]'"):
        pretrained.read("hf:owner/name")


def test_the_real_library_reads_its_cache_and_fails_clearly_offline(tmp_path, monkeypatch):
    settings = pytest.importorskip("huggingface_hub.constants", reason="the library is absent")
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="not in the local cache and the hub cannot be reached"):
        pretrained.read("hf:owner/name")
    commit, repository = "a" * 40, tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    safetensors.numpy.save_file(arrays(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    found = pretrained.read("hf:owner/name")
    same(found, arrays())
    assert found.input_size == 384
    assert commit in found.source


# --- other schemes


def test_other_packages_can_read_schemes(monkeypatch):
    point = metadata.EntryPoint("toy", "tests.models.test_pretrained:read_toy", pretrained.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    assert pretrained.read("toy:thing@3").source == "toy:thing@3"
    with pytest.raises(ConfigError, match=r"no installed package reads s3:\.\.\. .*hf, toy"):
        pretrained.read("s3://bucket/w.npz")


def read_toy(spec):
    return pretrained.Weights(tensors=arrays(), source=spec)
