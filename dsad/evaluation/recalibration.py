"""Batch statistics of an encoder, measured anew on the images that a detector is fitted on."""

from collections.abc import Sequence

import jax

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Backbone, Record, Sample, Source, Tree
from dsad.evaluation.batches import batches
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.extract import normalised, untitled
from dsad.models.statistics import HasStatistics, Moments, is_folded

#: Images of a batch, at most.
BATCH = 32
#: Said in the stamp.
RULE = f"mean and variance over the support set, in equal batches of at most {BATCH} images"


def check(backbone: Backbone) -> None:
    """Refuse a backbone that has nothing to measure; raises ConfigError."""
    there = backbone.statistics if isinstance(backbone, HasStatistics) else {}
    if not there:
        why = f"{backbone.arch} has no batch norm"
    elif is_folded(there):
        why = (
            f"the batch norms of {backbone.description} are folded into its convolutions, so that "
            "it has no statistics left"
        )
    else:
        return
    raise ConfigError(
        f"config.evaluation.recalibrate: expected False, as {why}. Leave the key out, or name "
        "another encoder."
    )


def measured(backbone: Backbone, sources: Sequence[Source], config: EvalConfig) -> Tree:
    """Statistics of every norm over all images of the sources, (c,) f32 on the host.

    The images go through the network in batches of equal size (up to one), each a cross-section of
    them all in their order, and every norm normalises a batch by its mean and biased variance, as
    in training. What it gets are the moments of its input over the union of all batches; with up to
    ``BATCH`` images those of the one batch.

    Every process measures all images on its first device, so that a mesh changes nothing.
    """
    assert isinstance(backbone, HasStatistics)
    alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
    network, images = untitled(backbone), _Mixed(sources)
    moments = Moments()
    size = -(-len(images) // images.batches)
    for host in batches(images, config, alone, size):
        rows = host.images[host.valid]
        moments.add(_measured(network, rows), len(rows))
    return moments.statistics()


@jax.jit
def _measured(network: HasStatistics, images: jax.Array) -> Tree:
    return network.measured(normalised(network, images))


class _Mixed:
    """The samples of several sources, so that a batch takes every ``batches``-th of them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        places = [(source, i) for source in sources for i in range(len(source))]
        self.batches = max(-(-len(places) // BATCH), 1)
        self._places = [x for start in range(self.batches) for x in places[start :: self.batches]]
        self.records: Sequence[Record] = [source.records[i] for source, i in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Sample:
        source, i = self._places[index]
        return source[i]
