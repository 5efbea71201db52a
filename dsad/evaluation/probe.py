"""A small localization on held-out normal images, to see during a training what it is good for."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dsad.core.config import Settings, field, listed
from dsad.core.errors import ConfigError
from dsad.core.types import Backbone, FeatureMaps, Record, Source, silent
from dsad.data.combined import selected
from dsad.data.defective import WithDefects
from dsad.data.heldout import group, order
from dsad.detectors import knn
from dsad.evaluation import numbers
from dsad.evaluation.batches import HostBatch, Picture, batches
from dsad.evaluation.compiled import Device, Fitted
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.reader import Features, Reader
from dsad.evaluation.scored import score

#: What is logged, and which number it is: the mean over the categories.
NAMES = {
    "probe_aupro": "aupro_30",
    "probe_pixel_auroc": "pixel_auroc",
    "probe_pixel_ap": "pixel_ap",
    "probe_image_auroc": "image_auroc",
}


class ProbeConfig(Settings, place="config.probe"):
    """What is measured of the encoder during the training, at step 0 and at the last one.

    Normal images are held out of the training for it. Each is scored as it is and with a procedural
    defect, by its distance to images that are trained on. An encoder that is frozen gives the same
    numbers at every step.

    Attributes:
      every: steps between two measurements; 0: nothing is measured, nothing held out.
      images: about so many normal images are held out, in proportion from all categories, groups as
        a whole.
      support: so many of the images that are trained on are what the held-out ones are compared
        with.
      layers: feature maps; empty: those at a third and two thirds of the depth.
      image_size: side of the network's input in pixels; 0: that of the encoder.
      batch_size: images per device step.

    """

    every: int = field(0, at_least=0)
    images: int = field(16, at_least=1)
    support: int = field(32, at_least=1)
    layers: tuple[str, ...] = field((), distinct=True)
    image_size: int = field(0, at_least=0)
    batch_size: int = field(32, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Numbers of records: those that are trained on, and by category what the probe takes.

    ``queries`` are held out, ``support`` is trained on. ``normals`` counts the normal images of
    all, ``held`` those that are not trained on.
    """

    training: Sequence[int]
    queries: Mapping[str, Sequence[int]]
    support: Mapping[str, Sequence[int]]
    normals: int
    held: int

    def __str__(self) -> str:
        queries, support = (sum(map(len, x.values())) for x in (self.queries, self.support))
        return (
            f"probe: {self.held} of {self.normals} normal images held out "
            f"({self.held / self.normals:.0%}, by group), {queries} of them scored, clean and with "
            f"a procedural defect; support {support} training images"
        )


def hold_out(records: Sequence[Record], config: ProbeConfig, seed: int) -> HeldOut:
    """Choose among the records by (seed, category, group, path), in whichever order they are.

    More ``images`` hold out the same and further ones. Raises ConfigError where a category would
    lose more than half of its normal images.
    """
    normal: dict[str, list[int]] = {}
    for i, record in sorted(enumerate(records), key=lambda pair: pair[1].category):
        if not record.label:
            normal.setdefault(record.category, []).append(i)

    def place(i: int) -> tuple[str, str]:
        return order(records[i], seed)

    counts = shares(config.images, {c: len(rows) for c, rows in normal.items()})
    queries = {c: sorted(normal[c], key=place)[:n] for c, n in counts.items() if n}
    groups = {group(records[i]) for rows in queries.values() for i in rows}
    training = [i for i, record in enumerate(records) if group(record) not in groups]
    left = {c: [i for i in normal[c] if group(records[i]) not in groups] for c in queries}
    few = [f"{len(normal[c]) - len(left[c])} of {len(normal[c])} {c}" for c in queries
           if 2 * len(left[c]) < len(normal[c])]  # fmt: skip
    if few or not normal:
        raise ConfigError(
            "config.probe.images: expected so few that every category keeps half of its normal "
            f"images; {config.images} and the rest of their groups would be {listed(few)}. Lower "
            "it, name more images, or set config.probe.every=0."
        )
    counts = shares(config.support, {c: len(rows) for c, rows in left.items()})
    support = {c: sorted(rows, key=place)[: max(1, counts[c])] for c, rows in left.items()}
    total = sum(map(len, normal.values()))
    return HeldOut(
        training=training, queries=queries, support=support, normals=total,
        held=total - sum(not records[i].label for i in training),
    )  # fmt: skip


def shares(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """So many seats by size, Webster's method: a further one takes none from anybody."""
    given = dict.fromkeys(sizes, 0)
    for _ in range(total if sizes else 0):
        first = max(sizes, key=lambda name: sizes[name] / (2 * given[name] + 1))
        given[first] += 1
    return given


def default_layers(maps: Iterable[str]) -> tuple[str, ...]:
    """Those at a third and two thirds of the depth: layer2 and layer3 of a ResNet.

    All of them where names have no number at their end.
    """
    maps = list(maps)
    names = by_depth(maps)
    third, depth = len(names) // 3, 2 * len(names) // 3
    return tuple(dict.fromkeys((names[third], names[depth]) if names else maps))


def by_depth(maps: Iterable[str]) -> list[str]:
    """The names with a number at their end, by it: layer1 to layer4, block0 to block11."""
    numbered = [(int(found[0]), name) for name in maps if (found := re.search(r"\d+$", name))]
    return [name for _, name in sorted(numbered)]


class _Decoded(Reader):
    """A reader of images that were decoded before, whose features are new in every pass."""

    def __init__(
        self, device: Device, config: EvalConfig, decoded: Mapping[str, Sequence[HostBatch]]
    ) -> None:
        super().__init__(device, config)
        self.decoded = decoded

    def read(
        self, source: Source, name: str, *, keep: bool, picture: Picture | None = None
    ) -> Iterator[tuple[HostBatch, FeatureMaps]]:
        for host in self.decoded[name]:
            yield host, self.device.stored_features(host)


class Probe:
    """Measures backbones of one architecture on the same images, which are decoded only once.

    A detector of nearest neighbours is fitted and measured for every category, as an evaluation
    does it, by counting. Of a network that lies on the mesh no copy is made, and everything is
    compiled at the first call. Several processes make the same calls.
    """

    def __init__(
        self,
        source: Source,
        held: HeldOut,
        config: ProbeConfig,
        *,
        layers: tuple[str, ...],
        image_size: int,
        mesh: Mesh,
        seed: int,
    ) -> None:
        self.parts = {
            c: (selected(source, held.support[c]), WithDefects(selected(source, rows), seed))
            for c, rows in held.queries.items()
        }
        most = max(len(part) for pair in self.parts.values() for part in pair)
        batch = -(-min(config.batch_size, most) // mesh.size) * mesh.size
        self.detector = knn.build(knn.Config(layers=layers))
        self.config = EvalConfig(
            image_size=image_size, batch_size=batch, method="streaming", gallery=0
        )
        self.mesh, self.device = mesh, None
        self.decoded = {
            f"{c}/{name}": list(batches(part, self.config, mesh, batch))
            for c, pair in self.parts.items()
            for name, part in zip(("support", "queries"), pair, strict=True)
        }

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """``NAMES`` by value, but those that no category defines."""
        if self.device is None:
            self.device: Device | None = Device(backbone, self.detector, self.config, self.mesh)
        else:
            self.device.use(backbone)
        reader = _Decoded(self.device, self.config, self.decoded)
        rows = [self._measured(reader, category) for category in self.parts]
        values = {
            name: [value for row in rows if (value := row[key]) is not None]
            for name, key in NAMES.items()
        }
        return {name: float(np.mean(found)) for name, found in values.items() if found}

    def _measured(self, reader: Reader, category: str) -> dict[str, float | None]:
        support, queries = self.parts[category]
        features = Features(reader, [(category, support)], _untold, keep=False, split="support")
        state = self.detector.fit(
            features, mesh=self.mesh, key=jax.random.key(0), progress=silent
        )  # its bank holds every row: nothing is drawn
        fitted = Fitted((), reader.device.place(state), {})
        name = f"{category}/queries"
        scored = score(reader, fitted, queries, name, _untold, keep=False)
        return numbers.measure(scored, self.config, category, curve_points=0)[0]


def _untold(images: int) -> None:
    """Nobody watches how far a probe is."""
