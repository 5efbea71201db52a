"""The scored images of one source: anomaly maps on original pixels, image scores, labels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dsad.core.types import Source, Tree
from dsad.evaluation.geometry import input_affine, to_original
from dsad.evaluation.maps import MapWriter
from dsad.evaluation.scoring import Reader


class Scored(NamedTuple):
    """The scored images of one category, in source order, on original pixels."""

    maps: list[np.ndarray]  # (h, w) f32
    masks: list[np.ndarray | None]  # (h, w) bool
    scores: np.ndarray  # (n,) f32
    labels: np.ndarray  # (n,) int
    kinds: list[str]

    def counts(self) -> dict[str, int]:
        """Images by label, and anomalous ones without a defect pixel."""
        return {
            "normal": int(np.sum(self.labels == 0)),
            "anomalous": int(np.sum(self.labels == 1)),
            "anomalous_without_mask": sum(m is None for m in self.masks),
            "anomalous_with_empty_mask": sum(
                m is not None and not bool(m.any()) and int(label) == 1
                for m, label in zip(self.masks, self.labels, strict=True)
            ),
        }


def score(
    reader: Reader,
    state: Tree,
    source: Source,
    name: str,
    tick: Callable[[int], None],
    *,
    keep: bool,
    writer: MapWriter | None = None,
) -> Scored:
    """Score the images of a source and bring their maps back to original pixels.

    ``keep`` lets the reader hold the features for the next seed; ``writer`` saves every map as
    soon as it is made.
    """
    found: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    scores: list[float] = []
    device, size = reader.device, reader.config.image_size
    for host, features in reader.read(source, name, keep=keep):
        maps, image = device.score(state, features)
        for row, (height, width) in enumerate(host.shapes):
            affine = input_affine(height, width, size)
            found.append(to_original(maps[row], affine, height, width))
            if writer:
                writer.write(source.records[len(found) - 1].path, found[-1])
        scores.extend(image[host.valid].tolist())
        masks.extend(host.masks)
        tick(len(host.shapes))
    return Scored(
        found,
        masks,
        np.asarray(scores, np.float32),
        np.asarray([r.label for r in source.records], np.int64),
        [r.kind for r in source.records],
    )
