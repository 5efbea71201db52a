"""Published weights, from files, repositories and dsad's own runs, with what belongs to them."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsad.core.config import listed
from dsad.core.errors import ConfigError
from dsad.models import vit
from dsad.models.decoder import DecoderConfig
from dsad.models.weights import _configs, _family_vit, _files, _hub, names

#: What ``read`` takes.
Spec = str | os.PathLike[str] | Mapping[str, Any]

#: Entry points of this group read what stands behind their name and a colon: ``run:DIR``.
GROUP = "dsad.weights"
_SCHEME = re.compile(r"([a-z][a-z0-9_]+):(.*)", re.S)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Weights(Mapping[str, np.ndarray]):
    """Tensors by published name; a read-only mapping.

    The attributes are None where the source does not say.

    Attributes:
      tensors: arrays in their published layout and type.
      mean: of RGB pixels in [0, 1], which the images were normalised with; likewise ``std``.
      input_size: side in pixels of the square images the weights were trained on.
      interpolation: name of the resampling filter.
      crop: share of a resized image's side that its centre crop kept.
      architecture: timm's name of the network.
      options: what differs from that architecture, see ``Family.network``.
      quick_gelu: whether the network's activation is x · sigmoid(1.702 x), which no shape tells.
      source: where the weights are from, for people.

    """

    tensors: Mapping[str, np.ndarray]
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    input_size: int | None = None
    interpolation: str | None = None
    crop: float | None = None
    architecture: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick_gelu: bool | None = None
    source: str = "given arrays"

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read(spec: Spec) -> Weights:
    """Weights from a specification; nothing is ever unpickled freely.

    Args:
      spec: one of

        - a ``.safetensors`` or ``.npz`` file, or a ``.pth``, ``.pt`` or ``.bin`` file (through
          torch's weights-only loader; ``FILE#KEY`` chooses one of several state dicts in it). A
          ``config.json`` of timm or ``dsad export``, or an ``open_clip_config.json``, beside the
          file tells mean, std, size, interpolation and crop;
        - a directory with such files;
        - ``hf:owner/name[@revision][/file]``, through huggingface_hub and its cache;
        - ``run:DIR[@STEP]``, the encoder of a dsad run, or another scheme that an installed package
          offers as an entry point of the group ``dsad.weights``;
        - a mapping of arrays, whose ``mean``, ``std``, ... are kept if it is a ``Weights``.

    Raises:
      ConfigError: what cannot be found or read, and what to do.

    """
    if isinstance(spec, Weights):
        return spec
    if isinstance(spec, Mapping):
        return Weights(tensors={n: _files.as_array(v, n, "given") for n, v in spec.items()})
    text = os.fspath(spec)
    scheme = _SCHEME.fullmatch(text)
    if scheme and not pathlib.Path(text).exists():
        return _from_hub(text) if scheme[1] == "hf" else _from_entry_point(text, scheme[1])
    return _from_path(text)


def _from_path(text: str) -> Weights:
    path, key = pathlib.Path(text).expanduser(), ""
    if not path.exists() and "#" in path.name:
        stem, _, key = path.name.rpartition("#")
        path = path.with_name(stem)
    inside = path.is_dir()
    if inside:
        path = _files.choose(path)
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file.")
    tensors = _files.tensors(path, key)

    def find(name: str) -> pathlib.Path | None:
        other = path.with_name(name)
        return other if other.is_file() else None

    source = f"{path.parent.name}/{path.name}" if inside else path.name
    source += f"#{key}" if key else ""
    return Weights(tensors=tensors, source=source, **_configs.beside(path.name, find))


def _from_hub(spec: str) -> Weights:
    found = _hub.fetch(spec)
    return Weights(
        tensors=_files.tensors(found.path),
        source=found.source,
        **_configs.beside(found.path.name, found.repository.get),
    )


def _from_entry_point(spec: str, scheme: str) -> Weights:
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if scheme not in points:
        raise ConfigError(
            f"weights {spec}: no such file, and no installed package reads "
            f"{scheme}:... (known: {listed(['hf', *points])})."
        )
    return points[scheme].load()(spec)


def mae_trees(
    arch: str | vit.Arch, state: Mapping[str, Any], decoder: DecoderConfig | None = None
) -> tuple[Any, Any]:
    """Trees of a masked autoencoder from the names of its published checkpoints.

    Args:
      arch: a name of ``vit.ARCHS`` or a specification; the table's size comes from the tensors.
      state: tensors of a pretraining checkpoint (encoder alone) or a visualisation checkpoint
        (with the decoder).
      decoder: the decoder that must be there; None takes what the tensors have.

    Returns:
      (params, extra), each {"encoder": .., "decoder": ..} without a decoder that is not there;
      extra holds the fixed tables of positions.

    Raises:
      ConfigError: a table of all tensors that are missing, left over or misshapen; positions that
        are not the fixed table, such as a supervised transformer's.

    """
    spec = vit.arch(arch) if isinstance(arch, str) else arch
    encoder, chosen = _family_vit.mae_networks(spec, state, decoder)
    entries, shapes = _family_vit.mae_entries(encoder, chosen)
    what = f"the masked autoencoder {arch}" if isinstance(arch, str) else "the masked autoencoder"
    ignored = _family_vit.MAE_IGNORED
    params, extra = names.to_trees(entries, state, shapes, ignored=ignored, what=what)
    for name in ("pos_embed", "decoder_pos_embed")[: len(params)]:
        _family_vit.check_table(state, name, encoder.spec, what)
    return jax.tree.map(jnp.asarray, (params, extra))
