"""Tensors by name from the files that weights are published in. No pickle runs code here."""

import argparse
import importlib
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dsad.core.config import listed
from dsad.core.errors import ConfigError

TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH)
#: What a directory or repository of weights holds, by preference.
STANDARD = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)  # fmt: skip
#: How people make safetensors of a torch file whose tensors stand by name.
CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({{n: t.clone().contiguous() for '
    "n, t in torch.load('{}', map_location='cpu', weights_only=True).items()}}, "
    "'{}.safetensors')\""
)
#: Put in front of every name by torch's wrappers for several devices and for compilation.
_WRAPPERS = ("module.", "_orig_mod.")


def choose(folder: pathlib.Path) -> pathlib.Path:
    """The file of weights in a directory: a standard name, else the only one."""
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files of weights ({listed(p.name for p in found)})" if found else "none"
    raise ConfigError(
        f"weights {folder}: expected {' or '.join(STANDARD)}, or a single file of weights; found "
        f"{what}. Name the file."
    )


def tensors(path: pathlib.Path, key: str = "") -> dict[str, np.ndarray]:
    """All tensors of a file by name, without the prefix that torch's wrappers add.

    ``key`` chooses one of several state dicts in a torch file, such as "model_ema".
    """
    if path.suffix in TORCH:
        found = _torch(path, key)
    elif key:
        raise ConfigError(f"weights {path}: #{key} only chooses within {', '.join(TORCH)} files.")
    elif path.suffix == ".npz":
        found = _npz(path)
    elif path.suffix == ".safetensors":
        found = _safetensors(path)
    else:
        raise ConfigError(
            f"weights {path}: expected a file that ends in {', '.join(SUFFIXES)}, found "
            f"{path.suffix or 'no suffix'}."
        )
    if not found:
        raise ConfigError(f"weights {path}: holds no tensors.")
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """A numpy array from an array of any library; torch's bf16 is widened to f32."""
    if str(getattr(value, "device", "")) == "meta":
        raise ConfigError(
            f"weights {where}: {name} is a meta tensor, a shape without values; the model was "
            "saved before its weights were loaded. Load them and save it again."
        )
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"weights {where}: {name} is no plain tensor: {error}.") from error
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise ConfigError(
            f"weights {where}: expected a tensor of numbers for {name}, found "
            f"{type(value).__name__} ({array.dtype})."
        )
    return array


def _npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"weights {path}: not a readable npz of plain arrays: {error}."
        ) from error


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ConfigError(f"weights {path}: not a readable safetensors file: {error}.") from error


def _torch(path: pathlib.Path, key: str) -> dict[str, np.ndarray]:
    _refuse_torchscript(path)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise ConfigError(
            f"weights {path}: {path.suffix} files need torch to be read: pip install "
            "'dsad[torch]'; or give the same weights as safetensors, which this makes where torch "
            f"is: {CONVERT.format(path.name, path.stem)}"
        ) from error
    try:
        # Checkpoints of MAE and DeiT hold their command line, in an inert container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle's, zip's and torch's own
        raise ConfigError(
            f"weights {path}: torch's weights-only loader cannot read it: "
            f"{str(error).strip().splitlines()[0]} dsad reads no other pickles; save the tensors "
            "alone, as safetensors or with torch.save(model.state_dict(), FILE)."
        ) from error
    state = _state_dict(loaded, path, key)
    return {name: as_array(value, name, str(path)) for name, value in state.items()}


def _refuse_torchscript(path: pathlib.Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(n.rpartition("/")[2] == "constants.pkl" for n in archive.namelist())
        if scripted:
            raise ConfigError(
                f"weights {path}: a TorchScript archive, which holds code; OpenAI published CLIP "
                "like this. Use the same weights as tensors: hf:timm/vit_base_patch16_clip_224."
                "openai for vit_base_patch16_clip_quickgelu_224 and its like, or those of "
                "open_clip."
            )


def _state_dict(loaded: Any, path: pathlib.Path, key: str) -> Mapping[str, Any]:
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"weights {path}: expected tensors by name, found {type(loaded).__name__}."
        )
    inside = {str(k): v for k, v in loaded.items() if _holds_tensors(v)}
    if key:
        if key not in inside:
            raise ConfigError(
                f"weights {path}#{key}: no tensors by that name; it has: {listed(inside)}."
            )
        return inside[key]
    if _holds_tensors(loaded):
        return loaded
    if len(inside) == 1:
        return next(iter(inside.values()))
    if not inside:
        raise ConfigError(f"weights {path}: no tensors by name; it holds: {listed(loaded)}.")
    raise ConfigError(
        f"weights {path}: holds tensors under {listed(inside)}; choose with "
        f"{path}#{sorted(inside)[0]}."
    )


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_tensor, value.values()))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "shape")
