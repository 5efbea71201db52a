"""What the config beside published weights says about images: timm's, open_clip's and dsad's."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dsad.core.errors import ConfigError
from dsad.models.weights._family_vit import TIMM_ARGUMENTS


def beside(file: str, find: Callable[[str], pathlib.Path | None]) -> dict[str, Any]:
    """Fields of ``pretrained.Weights`` from the config that belongs to the file of weights.

    ``find`` gives the path of a file that lies beside the weights, None if there is none. Configs
    of other kinds say nothing.
    """
    names = ("open_clip_config.json", "config.json")
    for name in names if file.startswith("open_clip") else reversed(names):
        path = find(name)
        if path is None:
            continue
        if found := _fields(_json(path), path):
            return found
    return {}


def _json(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _fields(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    if "model_cfg" in config:
        return _open_clip(config, path)
    # timm's older configs are one flat group.
    own = config.get("pretrained_cfg", config if {"mean", "std"} <= config.keys() else None)
    if not isinstance(own, Mapping):
        return {}
    size = own.get("input_size")
    if isinstance(size, list) and len(size) == 3:  # channels, height, width
        size = size[1:]
    name = config.get("architecture")
    arguments = config.get("model_args", {})
    return {
        "mean": _triple(own, "mean", path), "std": _triple(own, "std", path, positive=True),
        "input_size": _side(size, path), "interpolation": _text(own, "interpolation", path),
        "crop": _share(own, "crop_pct", path),
        "architecture": name if isinstance(name, str) else None,
        "options": {
            ours: arguments[theirs]
            for ours, theirs in TIMM_ARGUMENTS.items()
            if isinstance(arguments, Mapping) and isinstance(arguments.get(theirs), int)
        },
        "quick_gelu": _quick_gelu(config, own, name),
    }  # fmt: skip


def _quick_gelu(config: Mapping[str, Any], own: Mapping[str, Any], name: Any) -> bool | None:
    """Whether the weights want QuickGELU; None where the config does not tell.

    timm's name of a file tells little: it publishes OpenAI's CLIP, and others trained like it,
    under the architecture with GELU and only notes what they were trained with.
    """
    arguments, notes = config.get("model_args"), own.get("notes")
    if isinstance(arguments, Mapping) and "act_layer" in arguments:
        return arguments["act_layer"] == "quick_gelu"
    if not isinstance(name, str) or "clip" not in name:
        return None
    lines = [notes] if isinstance(notes, str) else notes if isinstance(notes, list) else []
    noted = any("natively quickgelu" in str(line).lower() for line in lines)
    # Tags such as openai_ft_in1k are of weights that were trained further, with GELU.
    if "quickgelu" in name or noted or own.get("tag") == "openai":
        return True
    return False if "dsad" in config else None  # dsad export writes the name of what it has


def _open_clip(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    model, own = config["model_cfg"], config.get("preprocess_cfg", {})
    if not isinstance(model, Mapping) or not isinstance(own, Mapping):
        raise ConfigError(f"{path}: expected groups of keys as model_cfg and preprocess_cfg.")
    vision = model.get("vision_cfg", {})
    size = own.get("size", vision.get("image_size") if isinstance(vision, Mapping) else None)
    return {
        "mean": _triple(own, "mean", path), "std": _triple(own, "std", path, positive=True),
        "input_size": _side(size, path), "interpolation": _text(own, "interpolation", path),
        "quick_gelu": bool(model.get("quick_gelu", False)),
    }  # fmt: skip


def _triple(
    own: Mapping[str, Any], key: str, path: pathlib.Path, *, positive: bool = False
) -> tuple[float, float, float] | None:
    value = own.get(key)
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
    if not numbers or (positive and min(value) <= 0):
        raise ConfigError(
            f"{path}: {key}: expected three {'positive ' if positive else ''}numbers for RGB in "
            f"[0, 1], found {value!r}."
        )
    return (float(value[0]), float(value[1]), float(value[2]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _side(value: Any, path: pathlib.Path) -> int | None:
    if value is None:
        return None
    sides = value if isinstance(value, list) else [value]
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
    if not whole or not 1 <= len(sides) <= 2 or len(set(sides)) != 1:
        raise ConfigError(
            f"{path}: input size: expected one side of a square in pixels, found {value!r}."
        )
    return sides[0]


def _share(own: Mapping[str, Any], key: str, path: pathlib.Path) -> float | None:
    value = own.get(key)
    if value is not None and not (_is_number(value) and value > 0):
        raise ConfigError(f"{path}: {key}: expected a positive number, found {value!r}.")
    return None if value is None else float(value)


def _text(own: Mapping[str, Any], key: str, path: pathlib.Path) -> str | None:
    value = own.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}: {key}: expected text, found {value!r}.")
    return value or None
