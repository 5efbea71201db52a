"""A procedural data set: four textures and one object, seven defect kinds, exact masks, no files.

``synthetic:development`` has other categories (textures knit, leather and sheet, object board) and
other kinds: what is chosen by its numbers was not chosen by those of the first.

Every image is a function of (seed, category, split, kind, index) alone: asking for more images
leaves the first ones unchanged. Content is defined in image sides, so another size shows the same
scene at another resolution. Normal images differ in pose, tone of the material, lighting (gain,
gradient, white balance) and sensor noise. The mask is where the defect's blending weight is at
least a quarter.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dsad.core.types import Record, Sample
from dsad.data import _development_defects, _development_scenes, files
from dsad.data._defects import MASK_WEIGHT, Drawn, kinds
from dsad.data._fields import Rng, grid
from dsad.data._scenes import SCENES
from dsad.data.base import DataConfig, IndexedDataset, SyntheticConfig, chosen, variant

#: Scenes by category, of each variant of the name.
VARIANTS = {"": SCENES, "development": _development_scenes.SCENES}
_SCENES = {category: scene for scenes in VARIANTS.values() for category, scene in scenes.items()}


def _kinds(category: str) -> Mapping[str, Callable[..., Drawn]]:
    return _development_defects.KINDS if category in VARIANTS["development"] else kinds(category)


def _generator(seed: int, purpose: str, record: Record, index: int) -> Rng:
    folder = record.path.rsplit("/", 1)[0]
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}/{folder}".encode()), index])


def _light(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Factor (h, w, 3): gain, a linear gradient and the white balance."""
    gain = 1 + rng.uniform(-0.03, 0.03)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.06)
    field = gain * (1 + slope * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)))
    balance = (1 + rng.normal(0, 0.004, 3)).astype(np.float32)
    return field[..., None] * balance


def render(record: Record, config: SyntheticConfig, *, clean: bool = False) -> Sample:
    """The sample of a record: image (size, size, 3) uint8 and mask (size, size) bool.

    ``clean`` leaves the defect out and keeps everything else: the defect-free twin.
    """
    index = int(record.path.rsplit("/", 1)[1].split(".")[0])
    rng = _generator(config.seed, "scene", record, index)
    x, y = grid(config.size)
    scene = _SCENES[record.category](rng)
    if record.label and not clean:
        defect = _kinds(record.category)[record.kind]
        pixels, weight = defect(scene, x, y, _generator(config.seed, "defect", record, index))
        mask = weight >= MASK_WEIGHT
    else:
        pixels, mask = scene.colour(x, y), np.zeros(x.shape, bool)
    pixels = pixels * _light(rng, x, y)
    noise = rng.standard_normal(pixels.shape, np.float32)
    pixels = pixels + np.float32(0.012) * noise
    image = np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)
    return Sample(record=record, image=image, mask=mask)


class SyntheticSource:
    """Samples rendered on access; safe to use from several threads."""

    def __init__(self, records: Sequence[Record], config: SyntheticConfig):
        self.records = records
        self._config = config

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Sample:
        """Render one sample."""
        return render(self.records[index], self._config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticDataset(IndexedDataset):
    """The procedural data set of one config."""

    def source(self, split: str, category: str | None = None) -> SyntheticSource:
        """Samples of "train" or "test", of one category or of all, sorted by path."""
        records = files.select(self.splits, self.categories, split, category)
        return SyntheticSource(records, self.config.synthetic)


def _records(category: str, split: str, kind: str, count: int) -> list[Record]:
    label = int(kind != "good")
    digits = max(3, len(str(count - 1)))
    made = []
    for stem in (f"{i:0{digits}d}" for i in range(count)):
        masks = (f"{category}/ground_truth/{kind}/{stem}_mask.png",) if label else ()
        path = f"{category}/{split}/{kind}/{stem}.png"
        made.append(Record(path=path, category=category, label=label, kind=kind, masks=masks))
    return made


def scan(config: DataConfig) -> SyntheticDataset:
    """The data set; categories weave, wood, tiles, speckle, washer, or those of its variant."""
    scenes = VARIANTS[variant(config, tuple(VARIANTS))]
    counts = config.synthetic
    categories = chosen(config, tuple(sorted(scenes)))
    train, test = [], []
    for category in categories:
        train += _records(category, "train", "good", counts.train)
        test += _records(category, "test", "good", counts.good)
        for kind in _kinds(category):
            test += _records(category, "test", kind, counts.bad)
    splits = {"train": files.by_path(train), "test": files.by_path(test)}
    return SyntheticDataset(
        name=config.name,
        categories=categories,
        protocol={
            "dataset": config.name,
            "split": "generated",
            "split_hash": files.split_hash(splits),
            "licence": "generated by dsad; no restriction",
            "missing_masks": config.missing_masks,
            "canvas_crop": "none",
            "synthetic": dataclasses.asdict(counts),
        },
        config=config,
        splits=splits,
    )
