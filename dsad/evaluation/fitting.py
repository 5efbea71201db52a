"""Which images a detector is fitted on, and what one that trains is given before."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dsad.core import paths
from dsad.core.config import listed
from dsad.core.detection import Detector, FeatureSource, ImageMaps
from dsad.core.errors import ConfigError, DataError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Backbone, Dataset, Progress, Source, Tree
from dsad.data.base import IndexedDataset
from dsad.data.canvases import nearest_pixels
from dsad.evaluation import maps, stamp, support, thresholds
from dsad.evaluation.batches import batches
from dsad.evaluation.compiled import Device, Fitted
from dsad.evaluation.config import EvalConfig
from dsad.evaluation.extract import placed, untitled
from dsad.evaluation.results import Results

_SAID = {"train": "training", "test": "test"}
#: Below the folder of an evaluation: what was trained, until all of it is done.
TRAINED = "trained"


class Labelled(NamedTuple):
    """One image (H, W, 3) uint8 as the network's input, and what is known of it.

    ``label`` is 1 for an anomalous one; ``mask`` (H, W) uint8 is 1 on defects, and says nothing of
    an image that is not ``masked``.
    """

    image: np.ndarray
    label: int
    mask: np.ndarray
    masked: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a detector of one category (or of all) and one seed may learn from.

    Attributes:
      features: those of the images that it will be fitted on.
      images: gives a new pass over the network's inputs (n, H, W, 3) uint8, in the same order.
      backbone: gives the features of the images, on the mesh, for the rows of ``images`` as index;
        None if the network is not arrays.
      title: the category's name.
      seed: of the support set.
      key: of all random draws.
      folder: of this training alone, for its result; None if that must not be kept.
      count: number of images; 0 if it is not known.
      labelled: gives a new pass over the same images with labels and masks.
      network: the backbone itself, on the mesh, for a detector that trains it.

    """

    features: FeatureSource
    images: Callable[[], Iterator[np.ndarray]]
    backbone: ImageMaps | None
    title: str
    seed: int
    key: jax.Array
    mesh: Mesh
    folder: epath.Path | None
    progress: Progress
    count: int = 0
    labelled: Callable[[], Iterator[Labelled]] | None = None
    network: Backbone | None = None


#: Runs a detector's objective; returns what its ``fit`` takes as ``trained``.
Train = Callable[[Detector, TrainingData], Tree]


class Keeper(Protocol):
    """Takes what is fitted, such as ``assembly.model.Writer``."""

    def check(self, detector: Detector, backbone: Backbone | None, seeds: Sequence[int]) -> None:
        """Raises ConfigError for what cannot be kept, before it is fitted; None: not known yet."""
        ...

    def keep(
        self, title: str, categories: Sequence[str], backbone: Backbone, fitted: Fitted,
        results: Results,
    ) -> None:  # fmt: skip
        """Called with a category's name or "all categories", once they are measured."""
        ...


class Given(Protocol):
    """What was fitted before, such as ``assembly.model.Saved``."""

    @property
    def stamp(self) -> Mapping[str, Any]:
        """Of the evaluation that fitted it."""
        ...

    def fitted(self, title: str) -> Fitted:
        """Of a category's name or "all categories"."""
        ...

    def threshold(self, category: str) -> dict[str, Any]:
        """What ``thresholds.measure`` gave."""
        ...


def split_of(detector: Detector) -> str:
    """The split whose images it is fitted on."""
    return "test" if detector.traits.fits_on == "test" else "train"


def supports(
    detector: Detector,
    dataset: Dataset,
    categories: Sequence[str],
    config: EvalConfig,
    sampling: support.Sampling,
    *,
    fitted: bool = False,
    measured: bool = True,
) -> support.Sets:
    """The images that the detector is fitted on, by category and seed; nothing is decoded.

    With what was ``fitted`` before there are none, and no training image is needed. Where nothing
    is ``measured``, a detector that learns from labels may take all anomalous test images.

    Refuses what is sure to fail: raises DataError for categories without images to fit on, for
    fewer than the detector needs, and for anomaly maps that cannot be saved beside each other;
    ConfigError for support sets that cannot be drawn, or are asked for where the test images are
    what it is fitted on. What cannot be measured for want of test images or masks is no fault: it
    is None in the results, with a note.
    """
    split = split_of(detector)
    if detector.traits.positions and config.resize == "windows":
        warnings.warn(
            "config.evaluation.resize: this detector learns what belongs to each place of its "
            "input, and a place of a window is none of the image; numbers will be worse. Set it to "
            '"longer", or choose a detector without positions, such as patchcore.',
            RuntimeWarning,
            stacklevel=2,
        )
    if config.save_maps != "none":
        paths_of_maps = [r.path for c in categories for r in dataset.source("test", c).records]
        maps.check_paths(paths_of_maps, config.save_maps)
    if fitted:
        return support.Sets(sampling, {})
    if empty := [c for c in categories if not len(dataset.source(split, c))]:
        raise DataError(
            f"{dataset.name}: no {_SAID[split]} image in {listed(empty)}. Add some, or leave these "
            "categories out of config.data.categories."
        )
    labelled = detector.traits.trains_on == "labelled"
    if labelled and config.recalibrate:
        raise ConfigError(
            "config.evaluation.recalibrate: this detector trains the network itself; expected "
            "False, found True."
        )
    if sampling.contamination:
        _check_contaminated(dataset, labelled)
    if split == "test":
        return _test_images(detector, dataset, categories, config, sampling)
    seeds = sampling.seeds
    rate = config.false_alarm_rate

    def holdout(images: int) -> tuple[int, int]:
        return thresholds.needed(rate), -(-images // config.holdout)

    validated = rate > 0 and _validated(dataset, categories)
    sets = support.choose(
        dataset, categories, shots=sampling.shots, seeds=seeds,
        holdout=holdout if rate and not validated else None, labelled=labelled, measured=measured,
        contamination=sampling.contamination,
    )  # fmt: skip
    fewest = {
        c: min(len(x.bank) - len(x.held_out) - len(x.anomalous) for x in sets[c].values())
        for c in categories
    }
    images = {c: n * sampling.support.rotations for c, n in fewest.items()}
    if sampling.pooled:
        images = {"all categories": sum(images.values())}
    least = detector.traits.least_images
    if few := [f"{n} of {c}" for c, n in images.items() if n < least]:
        raise DataError(
            f"{dataset.name}: this detector needs at least {least} normal images, found "
            f"{listed(few)}{' that are not held out' if rate and not validated else ''}. Add "
            "images, raise shots, or choose another detector or other components of it."
        )
    return support.Sets(sampling, sets, validated)


def _check_contaminated(dataset: Dataset, labelled: bool) -> None:
    """Refuse anomalous images as normal ones where labels are learnt, or defects are drawn."""
    if labelled:
        raise ConfigError(
            "config.contamination: this detector learns from labelled images, among which no "
            "anomalous one counts as normal; expected 0. Choose one that learns from normal images."
        )
    if (defects := dataset.protocol.get("defects", "real")) != "real":
        raise ConfigError(
            f"config.contamination: needs anomalous test images, but of {dataset.name} the defects "
            f"are {defects}. Name some with config.data.abnormal, or another data set."
        )


def _validated(dataset: Dataset, categories: Sequence[str]) -> bool:
    """Whether the data set brings images to set thresholds with; DataError where some lack them."""
    if not isinstance(dataset, IndexedDataset) or not dataset.splits.get("validation"):
        return False
    if lack := [c for c in categories if not len(support.validation(dataset, c))]:
        raise DataError(
            f"{dataset.name}: no normal validation image in {listed(lack)}, which others have to "
            "set their thresholds (evaluation.false_alarm_rate > 0). Add some, or leave these "
            "categories out of config.data.categories."
        )
    return True


def _test_images(
    detector: Detector,
    dataset: Dataset,
    categories: Sequence[str],
    config: EvalConfig,
    sampling: support.Sampling,
) -> support.Sets:
    """All test images, for every seed."""
    for key, value, alone in (
        ("shots", sampling.shots, 0),
        ("contamination", sampling.contamination, 0),
        ("evaluation.false_alarm_rate", config.false_alarm_rate, 0),
        ("support.rotations", sampling.support.rotations, 1),
        ("support.brightness", sampling.support.brightness, 0),
        ("evaluation.recalibrate", config.recalibrate, False),
    ):
        if value != alone:
            raise ConfigError(
                f"config.{key}: this detector is fitted on the test images and takes no training "
                f"image; expected {alone}, found {value:g}."
            )
    if not config.preprocessing.single:
        raise ConfigError(
            "config.evaluation.resize: this detector is fitted on the test images, which score "
            "each other, and the windows of one would count as images of their own; expected "
            f'"stretched", "longer" or "shorter", found "{config.preprocessing.method}".'
        )
    images = {c: tuple(r.path for r in dataset.source("test", c).records) for c in categories}
    least, counts = detector.traits.least_images, {c: len(paths) for c, paths in images.items()}
    if sampling.pooled:
        counts = {"all categories": sum(counts.values())}
    if few := [f"{n} of {c}" for c, n in counts.items() if n < least]:
        raise DataError(
            f"{dataset.name}: this detector compares test images with each other and needs at "
            f"least {least}, found {listed(few)}. Add images, or choose other settings of it."
        )
    sets = {c: dict.fromkeys(sampling.seeds, support.Support(bank=images[c])) for c in categories}
    return support.Sets(sampling, sets)


def training_data(
    detector: Detector,
    device: Device,
    config: EvalConfig,
    about: Mapping[str, Any],
    features: FeatureSource,
    sources: Sequence[Source],
    *,
    backbone: ImageMaps | None,
    title: str,
    seed: int,
    key: jax.Array,
    folder: str | epath.PathLike | None,
    version: str,
    progress: Progress,
) -> TrainingData:
    """What one training may learn from.

    ``about`` is the stamp, ``folder`` the evaluation's, ``version`` that of the images' files.
    """
    own = network = None
    if detector.traits.trains_on == "labelled":
        network = placed(untitled(device.backbone), device.mesh)
    if folder is not None and split_of(detector) == "train":
        name = _identity(device, about, sources, version, title, key)
        own = paths.directory(folder) / TRAINED / name
    return TrainingData(
        features=features, images=lambda: _images(sources, config), backbone=backbone,
        title=title, seed=seed, key=key, mesh=device.mesh, folder=own, progress=progress,
        count=sum(map(len, sources)), labelled=lambda: _labelled(sources, config, title),
        network=network,
    )  # fmt: skip


def _identity(
    device: Device,
    about: Mapping[str, Any],
    sources: Sequence[Source],
    version: str,
    title: str,
    key: jax.Array,
) -> str:
    """Tells a training from all others: its images, network, settings and draws."""
    same = [
        about[name] for name in ("dataset", "detector", "preprocessing", "colour", "map_wrappers")
    ]
    images = [record.path for source in sources for record in source.records]
    network = device.identity(about["backbone"])
    content = json.dumps([same, network, images, version, title, stamp.key_data(key)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _labelled(sources: Sequence[Source], config: EvalConfig, title: str) -> Iterator[Labelled]:
    """Images with labels and masks, all of them on every process.

    A defect that no pixel of the input shows must not be learnt as normal: its image is not
    ``masked``, and a warning says how many there are.
    """
    into, lost = config.preprocessing, 0

    def read(source: Source, index: int) -> tuple[Labelled, bool]:
        sample = source[index]
        label = sample.record.label
        mask, shown = np.zeros(into.size, np.uint8), not label
        if label and sample.mask is not None:
            mask[...] = nearest_pixels(sample.mask, into.size)
            shown = bool(mask.any()) or not sample.mask.any()
        gone = bool(label) and not shown and sample.mask is not None
        return Labelled(into.to_input(sample.image), label, mask, shown), gone

    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        for source in sources:
            for found, gone in pool.map(functools.partial(read, source), range(len(source))):
                lost += gone
                yield found
    if lost:
        warnings.warn(
            f"{title}: the defects of {lost} training images are smaller than a pixel of the "
            f"{into.height} x {into.width} input; only their labels are learnt from. Raise "
            "config.evaluation.image_size.",
            RuntimeWarning,
            stacklevel=2,
        )


def _images(sources: Sequence[Source], config: EvalConfig) -> Iterator[np.ndarray]:
    """The network's inputs (n, H, W, 3) uint8 of every source, all of them on every process."""
    alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
    for source in sources:
        for host in batches(source, config, alone, config.batch_size):
            yield host.images[host.valid]
