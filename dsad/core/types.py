"""The seams: what a data set, an objective and a backbone promise; see ``core.detection`` too."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from dsad.core.batch import Batch, BatchSpec, Needs

#: Feature maps of one batch: stage name to array (batch, height, width, channels).
FeatureMaps = dict[str, jax.Array]
#: A nested dict of arrays.
Tree = Any
Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What an index knows of one image without decoding it.

    ``path`` is the identity of the image: its path relative to the data set's root.
    ``label`` is 0 for normal, 1 for anomalous, and -1 where only the data's owner knows: such
    images have a split of their own. ``kind`` is "good", the defect type or "unlabelled". ``masks``
    are the files of an anomalous image's defects, none without annotation. ``group`` names what
    several images of a category show, such as one photographed object; ``camera`` by which of
    several cameras, or in which light, it was taken.
    """

    path: str
    category: str
    label: int
    kind: str
    masks: tuple[str, ...] = ()
    group: str = ""
    camera: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One decoded image: ``image`` (h, w, 3) uint8 RGB, ``mask`` (h, w) bool, True on defects.

    Single-channel files are repeated to three equal channels. ``mask`` is all False for normal
    images and None for an anomalous image without annotation (only if the config allows that) and
    for an unlabelled one.
    """

    record: Record
    image: np.ndarray
    mask: np.ndarray | None


class Source(Protocol):
    """Random access to the samples of one split; ``records`` costs no decoding."""

    records: Sequence[Record]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@runtime_checkable
class KnownSource(Protocol):
    """A source that tells an image, and gives its mask, without decoding the image."""

    def identity(self, index: int) -> str:
        """Equal for equal pixels of the sample's image."""
        ...

    def annotation(self, index: int, shape: tuple[int, int]) -> np.ndarray | None:
        """The mask of a sample whose image has ``shape`` (h, w)."""
        ...


@runtime_checkable
class HasFiles(Protocol):
    """A source that tells which files of this machine a sample lies in, those of masks included."""

    def files(self, index: int) -> list[pathlib.Path]: ...


@runtime_checkable
class CanvasSource(Protocol):
    """A source that holds its samples ready on canvases."""

    def canvas_reader(self, spec: BatchSpec) -> Callable[[int, dict[str, Any]], None]:
        """Writes the fields ``spec.read`` of a sample; ConfigError for what was not prepared."""
        ...


@runtime_checkable
class Dataset(Protocol):
    """A data set: categories, splits and what numbers measured on it mean.

    ``protocol`` goes into the stamp of every number: name, split rule, split hash, licence.
    ``faults`` are what its index shows, ``origin`` says from what it was prepared, or nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def categories(self) -> tuple[str, ...]: ...
    @property
    def protocol(self) -> Mapping[str, Any]: ...
    @property
    def faults(self) -> tuple[Any, ...]: ...
    @property
    def origin(self) -> str: ...

    def source(self, split: str, category: str | None = None) -> Source:
        """Samples of ``split``, of one category or of all, sorted by path.

        Every set has "train" and "test", some have "validation" and others.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What an objective, a schedule or a detector may know of the run that builds it."""

    total_steps: int
    batch_size: int
    samples: int
    classes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveTraits:
    """What is particular to an objective; the defaults fit most.

    Attributes:
      needs: what its batches hold beside the images.
      couples_batch: its loss depends on the batch as a whole (batch statistics, negatives), so
        that parts of a batch would give another result.
      source: what ``init_from`` has to name, for people; empty: it may start from nothing.

    """

    needs: Needs = dataclasses.field(default_factory=Needs)
    couples_batch: bool = False
    source: str = ""


#: Gives a new pass over the data in which every sample occurs exactly once, in batches of epoch 0;
#: the last one may be smaller.
Passes = Callable[[], Iterator[Batch]]


class EarlierWeights(NamedTuple):
    """Weights of an earlier run, of a file or of a hub, for ``Objective.adopt``.

    ``encoder`` is a ``models.family.Encoder``; ``params`` and ``extra`` are all that the earlier
    objective has, or what published tensors hold beside the encoder; ``facts`` tell what no shape
    does (``HasEncoder.stage_facts``); ``origin`` is text for people.
    """

    encoder: Any
    params: Tree
    extra: Tree
    facts: Mapping[str, Any]
    origin: str


@runtime_checkable
class Trainable(Protocol):
    """What the training step takes; all methods are pure and jittable.

    A class that names this one as its base need not say that nothing follows the parameters.
    ``extra`` holds everything that has no gradient: batch statistics, teacher, queue, frozen
    backbone. Its structure and dtypes never change.
    """

    traits: ObjectiveTraits

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Parameters and extra; traceable by ``eval_shape``."""
        ...

    def views(self, batch: Batch, key: jax.Array) -> Tree:
        """Augmented views of a batch, drawn from (key, epoch, sample index) only."""
        ...

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Scalar f32 loss, then the new extra and the scalars to log."""
        ...

    def after_update(self, params: Tree, extra: Tree, step: jax.Array) -> Tree:
        """New extra from the stepped parameters; ``step`` counts completed updates."""
        return extra


@runtime_checkable
class Objective(Trainable, Protocol):
    """A pretraining method; ``objectives/<name>.py`` exposes ``Config`` and ``build(cfg, run)``.

    ``mean`` and ``std`` are those of the pixels that ``features`` takes. What an objective may
    offer besides is one of the protocols below.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def adopt(self, earlier: EarlierWeights, params: Tree, extra: Tree) -> tuple[Tree, Tree, str]:
        """Take over earlier weights; the text lists what was taken."""
        ...

    def prepare(self, params: Tree, extra: Tree, passes: Passes) -> Tree:
        """Looks at the data before step 0, features included; returns the new extra."""
        ...

    def features(
        self, params: Tree, extra: Tree, images: jax.Array, layers: tuple[str, ...] | None = None
    ) -> FeatureMaps:
        """Feature maps, or only ``layers``, of normalised images (b, H, W, 3), in inference."""
        ...


@runtime_checkable
class HasEncoder(Protocol):
    """An objective whose encoder can be used elsewhere: exported, or adopted by other methods.

    Its ``features`` give the encoder's class token as well, where ``layers`` name it.
    ``stage_facts`` are what a later stage has to share with it, and no tensor's shape tells.
    """

    @property
    def stage_facts(self) -> Mapping[str, Any]: ...

    def encoder_weights(self, params: Tree, extra: Tree) -> Any:
        """The encoder as a ``models.family.Encoder``."""
        ...


@runtime_checkable
class ReadsTensors(Protocol):
    """An objective that adopts more of published tensors than an encoder."""

    def read_tensors(self, tensors: Mapping[str, Any]) -> tuple[Any, Tree, Tree]:
        """``EarlierWeights``'s encoder, params and extra from tensors under published names."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """A host of regularisers: whole images as vectors.

    ``embed`` gives at least ``pooled`` (b, d), and where the method has them ``z``, the
    projection, and ``p``, the prediction; the feature maps that ``layers`` name (b, h, w, c); and
    the new extra. With ``views`` > 1 the views of an image follow each other along the batch axis.
    """

    def embed(
        self, params: Tree, extra: Tree, images: jax.Array, *, train: bool, views: int = 1,
        layers: tuple[str, ...] = (),
    ) -> tuple[dict[str, jax.Array], Tree]: ...  # fmt: skip


@runtime_checkable
class PerSample(Protocol):
    """An objective that computes something of every sample once, before ``prepare``.

    It depends on nothing that training or ``prepare`` change. The arrays (b, ...) join the batch as
    ``features``.
    """

    def per_sample(self, params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]: ...


@runtime_checkable
class HasProjectors(Protocol):
    """An objective that trains projectors of residual maps, for ``projected:RUN:BACKBONE``.

    ``projectors`` are parameters of ``models.projector``, by layer; maps are brought to at most
    ``tokens`` cells a side first, see ``ops.residual.pooled``.
    """

    @property
    def tokens(self) -> int: ...

    def projectors(self, params: Tree) -> Mapping[str, Tree]: ...


@runtime_checkable
class HasPictures(Protocol):
    """An objective that shows people what it trains on; see ``assembly.strips``.

    ``pictures`` is pure and jittable: by title, in the order in which they are shown, RGB pixels
    (b, h, w, 3) f32 in [0, 1] (clipped to it), of which row i is of sample i. Titles are letters,
    digits, spaces and hyphens. ``key`` is the one that ``views`` gets, so that the views are those
    of the training; a batch holds what it does in ``prepare``.
    """

    def pictures(
        self, params: Tree, extra: Tree, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]: ...


@runtime_checkable
class HasParts(Protocol):
    """An objective whose loss ``dsad bench step`` can take apart."""

    def parts(self, params: Tree, extra: Tree, views: Tree) -> dict[str, tuple[Any, tuple]]:
        """Pieces of the loss by name, each (function, arguments)."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen network in inference mode: feature maps of normalised images.

    ``mean`` and ``std`` are of RGB pixels in [0, 1]; ``arch`` and ``description`` name the network
    and its weights; ``image_size`` is the side in pixels of the images it was trained on, None if
    nothing tells; ``layers`` are the maps it computes, None for all. One that is a pytree of arrays
    enters compiled programs as an argument.
    """

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def arch(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def layers(self) -> tuple[str, ...] | None: ...

    def only(self, layers: Sequence[str]) -> "Backbone":
        """The backbone that computes just these of its maps."""
        ...

    def __call__(self, images: jax.Array) -> FeatureMaps:
        """Feature maps of normalised images (b, H, W, 3); pure and jittable."""
        ...


@runtime_checkable
class HasTokens(Protocol):
    """A backbone that also gives vectors (b, d) of whole images, where ``only`` names them.

    ``tokens`` are their names: "cls" is the class token, behind the last norm.
    """

    @property
    def tokens(self) -> tuple[str, ...]: ...


@runtime_checkable
class HasFurther(Protocol):
    """A backbone with maps beside those of a plain call, which it computes where ``only`` asks.

    ``further`` are their names; none of a backbone that ``only`` gave.
    """

    @property
    def further(self) -> tuple[str, ...]: ...


@runtime_checkable
class KnowsFlops(Protocol):
    """An objective that says what the matrix products of a training step cost per image."""

    @property
    def flops_per_image(self) -> int: ...


#: Called with (done, total, message) by long work.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, message: str) -> None:
    """The progress of work that nobody watches."""
