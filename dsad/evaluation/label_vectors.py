"""Images as the pooled vectors of a frozen backbone, a part at a time, kept until all are used."""

import hashlib
import io
import json
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dsad.core import paths
from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError
from dsad.core.types import Backbone, FeatureMaps, HasFurther, HasTokens, Progress, Source, silent
from dsad.data.base import selected
from dsad.evaluation.batches import batches
from dsad.evaluation.extract import Extractor
from dsad.evaluation.label_probe import EncodeConfig
from dsad.evaluation.probe import by_depth

#: Images of a kept part: what a stopped encoding loses at most.
PART = 20_000
#: Folder of the kept parts below the working directory.
FOLDER = "vectors"


def layer_of(backbone: Backbone, layer: str, size: tuple[int, int]) -> str:
    """The map or token that a probe reads: ``layer``, or the deepest map; no weight is touched.

    ConfigError for one that the backbone does not have, or where no name tells the depth.
    """
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    maps = list(jax.eval_shape(backbone, images))
    further = backbone.further if isinstance(backbone, HasFurther) else ()
    have = [*maps, *further, *_tokens(backbone)]
    if layer and layer not in have:
        raise ConfigError(
            f"config.probe.layer: {backbone.arch} has no feature map {layer!r}."
            f"{suggestion(layer, have)} It has: {listed(have)}."
        )
    deepest = by_depth(maps)[-1:] or (maps if len(maps) == 1 else [])
    if not layer and not deepest:
        raise ConfigError(
            f"config.probe.layer: no name tells which map of {backbone.arch} is the deepest; "
            f"name one of: {listed(have)}."
        )
    return layer or deepest[0]


def _tokens(backbone: Backbone) -> tuple[str, ...]:
    return backbone.tokens if isinstance(backbone, HasTokens) else ()


class Kept(NamedTuple):
    """Where encoded parts lie, and the ``support.version`` of the files that they are made of."""

    folder: epath.Path
    version: str

    def place(self, source: Source, network: str) -> epath.Path:
        """The file of the vectors that a network gives of a source; by its name never stale."""
        about = [network, self.version, [record.path for record in source.records]]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return self.folder / FOLDER / f"{name[:32]}.npz"

    def remove(self) -> None:
        """Nobody needs the vectors any more."""
        if (folder := self.folder / FOLDER).is_dir():
            folder.rmtree()


class Encoder:
    """The vectors (n, d) float32 of images: a token, or the mean over the cells of a map."""

    def __init__(self, backbone: Backbone, layer: str, config: EncodeConfig, mesh: Mesh) -> None:
        self.config, self.mesh, self.layer = config.reading, mesh, layer
        self.batch = -(-config.batch_size // mesh.size) * mesh.size
        is_token = layer in _tokens(backbone)
        self.pooling = "class token" if is_token else "mean over cells"
        self._extractor = Extractor(
            () if is_token else (layer,), self.config.preprocessing.size, mesh,
            then=self._pooled, tokens=(layer,) if is_token else (),
        )  # fmt: skip
        self._extractor.use(backbone)

    def _pooled(self, maps: FeatureMaps) -> jax.Array:
        values = maps[self.layer]
        return values if values.ndim == 2 else jnp.mean(values, axis=(1, 2))

    def __call__(
        self, source: Source, kept: Kept | None = None, progress: Progress = silent
    ) -> np.ndarray:
        """Those of all samples of a source, in its order.

        With ``kept`` parts are on disk as soon as they are made; what is there and was made of the
        same files by the same network and program is not made again.
        """
        total, parts = len(source), []
        fingerprint = self._extractor.fingerprint() if kept else ""
        for start in range(0, total, PART):
            part = selected(source, range(start, min(start + PART, total)))
            place = kept.place(part, f"{fingerprint} {self.config.preprocessing}") if kept else None
            known = _read(place, len(part)) if place else None
            if known is None:
                known = self._made(part, start, total, progress)
                if place:
                    packed = io.BytesIO()
                    np.savez(packed, vectors=known)
                    paths.write_whole(place, packed.getvalue())
            else:
                progress(start + len(part), total, "encoded before")
            parts.append(known)
        return np.concatenate(parts)

    def _made(self, source: Source, start: int, total: int, progress: Progress) -> np.ndarray:
        vectors, done = [], start
        for host in batches(source, self.config, self.mesh, self.batch):
            vectors.append(np.asarray(self._extractor(host.images), np.float32)[host.valid])
            done += len(vectors[-1])
            progress(done, total, "")
        return np.concatenate(vectors)


def _read(path: epath.Path, count: int) -> np.ndarray | None:
    """The vectors of a kept part; None for one that is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as packed:
            vectors = packed["vectors"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return vectors if len(vectors) == count else None
