"""A backbone as files that other libraries load: published names and what belongs to them."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.numpy
from etils import epath

from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.models import registry
from dsad.models.backbone import Backbone
from dsad.models.weights import pretrained

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write(
    backbone: Backbone,
    folder: str | epath.PathLike,
    *,
    form: str,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, epath.Path]:
    """Write ``model.safetensors`` and then ``config.json`` into a folder, also of a bucket.

    The tensors are contiguous f32 under the names of ``form``, without a classifier: what
    ``timm.create_model(architecture, num_classes=0)`` loads with ``strict=True``. The config is
    timm's, with the pixel statistics, input size, interpolation and crop of the weights, and a
    section ``dsad`` with the weights' description and ``about``. Both files carry the terms of a
    licence that asks for it.

    Args:
      backbone: what to export; it must be complete.
      folder: made if needed.
      form: one of the family's ``formats``, such as "timm".
      about: further plain values for the section ``dsad``.
      overwrite: replace an earlier export; other files are never touched.

    Returns:
      The written files by name.

    Raises:
      ConfigError: a format that does not suit, or a folder that is in use.
      WorkdirError: a folder that cannot be written.

    """
    family = registry.family_of(backbone.arch)
    if form not in family.formats:
        raise ConfigError(
            f"format {form!r} does not suit {backbone.arch}; expected "
            f"{' or '.join(repr(f) for f in family.formats)}. Formats: {formats()}."
        )
    options = dict(backbone.options)
    family.check_complete(backbone.arch, **options)
    folder = paths.directory(folder)
    check_free(folder, overwrite)
    state = family.save(backbone.arch, backbone.params, backbone.extra, form, **options)
    config = json.dumps(_config(backbone, form, dict(about or {})), indent=2) + "\n"
    weights = safetensors.numpy.save(state, metadata={"format": "pt", **_terms(backbone)})
    files = {WEIGHTS: weights, CONFIG: config}
    return {name: paths.write_whole(folder / name, data) for name, data in files.items()}


def formats() -> str:
    """Which formats suit which architectures, for people."""
    groups: dict[str, list[str]] = {}
    for family in registry.FAMILIES:
        groups.setdefault(", ".join(family.formats), []).extend(family.archs)
    return "; ".join(f"{form} for {_short(tuple(which))}" for form, which in groups.items() if form)


def _short(archs: tuple[str, ...]) -> str:
    return ", ".join(archs) if len(archs) <= 4 else f"{archs[0]}, {archs[1]}, .. {archs[-1]}"


def check_free(folder: epath.Path, overwrite: bool) -> None:
    """Refuse a folder that is in use or cannot be written, as ``write`` does."""
    paths.check_place(folder, "Choose another --out.")
    used = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if not used:
        return
    if not overwrite:
        raise ConfigError(
            f"{folder}: in use ({' and '.join(used)}). Replace an earlier export with --overwrite, "
            "or choose another directory."
        )
    try:
        ours = "dsad" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{folder}: holds files that dsad export did not write; choose another directory."
        )


def _config(backbone: Backbone, form: str, about: dict[str, Any]) -> dict[str, Any]:
    family = registry.family_of(backbone.arch)
    options = dict(backbone.options)
    name, arguments = family.published(backbone.arch, **options)
    size = [3, backbone.image_size, backbone.image_size]
    channels = family.channels(backbone.arch, **options)
    crop = backbone.crop
    crop = family.preprocessing(backbone.arch).crop if crop is None else crop
    found = {
        "architecture": name,
        "num_classes": 0,
        "num_features": channels,
        "pretrained_cfg": {
            "architecture": name,
            "custom_load": False,
            "num_classes": 0,
            "input_size": size,
            "interpolation": backbone.interpolation,
            "crop_pct": crop,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "dsad": {
            "arch": backbone.arch, "format": form, "weights": backbone.description,
            **_terms(backbone), **about,
        },
    }  # fmt: skip
    return {**found, "model_args": arguments} if arguments else found


def _terms(backbone: Backbone) -> dict[str, str]:
    terms = registry.family_of(backbone.arch).terms(backbone.arch)
    return {"licence": terms} if terms else {}


def as_weights(backbone: Backbone) -> pretrained.Weights:
    """A backbone as ``pretrained.read`` would give it."""
    family, options = registry.family_of(backbone.arch), dict(backbone.options)
    tensors = family.save(
        backbone.arch, backbone.params, backbone.extra, family.formats[0], **options
    )
    return pretrained.Weights(
        tensors=tensors,
        mean=backbone.mean, std=backbone.std, input_size=backbone.image_size,
        interpolation=backbone.interpolation, crop=backbone.crop, options=options,
        architecture=family.published(backbone.arch, **options)[0],
        source=backbone.description,
    )  # fmt: skip
