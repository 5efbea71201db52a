"""How images are read for batches."""

import threading

import jax
import numpy as np
import pytest

from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Record, Sample
from dsad.evaluation.batches import batches
from dsad.evaluation.config import EvalConfig


class Meeting:
    """Images whose decoding ends only while that of another one goes on."""

    def __init__(self, count):
        self.records = [
            Record(path=f"{i}", category="a", label=0, kind="good") for i in range(count)
        ]
        self.both = threading.Barrier(2, timeout=5)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.both.wait()
        image = np.full((32, 32, 3), index, np.uint8)
        return Sample(record=self.records[index], image=image, mask=None)


@pytest.mark.parametrize("method", ["stretched", "longer", "windows"])
def test_images_are_decoded_at_once(method):
    config = EvalConfig(image_size=32, resize=method, overlap=4, workers=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    seen = [x.images[:, 0, 0, 0] for x in batches(Meeting(6), config, mesh, 3)]
    np.testing.assert_array_equal(np.concatenate(seen), range(6))
