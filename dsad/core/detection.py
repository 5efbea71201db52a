"""The seams of detection: features, what changes them, and detectors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsad.core.recipe import Recipe
from dsad.core.types import Backbone, FeatureMaps, Progress, Trainable, Tree

#: As layer of a detector: the network's input itself, (b, H, W, 3) normalised.
PIXELS = "pixels"

#: Which part of each input counts, (b, 2, 2): rows and columns, from and to, as shares of it. The
#: rest is no part of the image, or counts in another of its inputs. None: all of it.
Inside = Any


def within(inside: Any, grid: tuple[int, int]) -> jax.Array:
    """The cells (b, gh, gw) bool of a grid whose centres lie inside, at least the most central."""
    parts = []
    for axis, cells in enumerate(grid):
        at = jnp.asarray((np.arange(cells, dtype=np.float32) + 0.5) / cells)[None, :]
        low, high = (jnp.asarray(inside)[:, axis, i, None] for i in (0, 1))
        central = jnp.argmin(jnp.abs(at - (low + high) / 2), axis=1)
        parts.append(((at >= low) & (at < high)) | (jnp.arange(cells)[None] == central[:, None]))
    return parts[0][:, :, None] & parts[1][:, None, :]


def highest(maps: jax.Array, inside: Inside = None) -> jax.Array:
    """The largest value (b,) of maps (b, gh, gw) that lies inside."""
    if inside is not None:
        maps = jnp.where(within(inside, (maps.shape[1], maps.shape[2])), maps, -jnp.inf)
    return jnp.max(maps, axis=(1, 2))


class FeatureBatch(NamedTuple):
    """Features of one batch for a detector; rows with ``valid`` False are padding."""

    maps: FeatureMaps
    valid: np.ndarray  # (b,) bool
    category: str
    index: np.ndarray  # (b,) int, sample index in its source
    inside: np.ndarray | None = None  # (b, 2, 2), see ``Inside``; None: all of it
    #: (b,) int, the image that an input is a window or a rotation of; None: each is an image.
    image: np.ndarray | None = None


class FeatureSource(Protocol):
    """Re-iterable feature batches: every ``iter`` starts a new pass in the same order.

    ``categories`` are those of its images, known without a pass.
    """

    categories: tuple[str, ...]

    def __iter__(self) -> Iterator[FeatureBatch]: ...


@runtime_checkable
class MapWrapper(Protocol):
    """Changes feature maps before a detector sees them, by what a support set shows."""

    def adapt(self, source: FeatureSource, *, mesh: Mesh | None, key: jax.Array) -> Tree:
        """The bank, a pytree of arrays, of one support set."""
        ...

    def transform(
        self, bank: Tree, maps: FeatureMaps, *, index: jax.Array, mesh: Mesh | None = None
    ) -> FeatureMaps:
        """The maps (b, h, w, ...) as a detector gets them; pure and jittable.

        ``index`` (b,) is the place of each image in the support set that the bank is of, as its
        ``FeatureBatch`` said, and -1 for other images: what the bank has of an image itself, in
        whichever rotation, must not serve it.
        """
        ...


class Scores(NamedTuple):
    """Anomaly scores of a batch: ``map`` (b, gh, gw) per cell and ``image`` (b,)."""

    map: jax.Array
    image: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorTraits:
    """What sets a detector apart from the others, for whoever evaluates it.

    ``patches``: SIZE/STRIDE of the patches that its maps are laid out for, as in a backbone's name;
    empty for any features. ``sigma``: of the Gaussian that its maps still need, in pixels of the
    network's input. ``image_score``: its "method"'s own, or of the smoothed map the "max" or, with
    "top", the mean of the ``image_share`` highest pixels.
    ``trains_on``: what a detector that ``TrainsOnData`` learns from before it is fitted; "labelled"
    are images with labels and masks, anomalous ones as well, and the network itself.
    ``fits_on``: the normal training images, or the test images, without their labels, which score
    each other: such a state is of no use elsewhere. ``tokens``: vectors of whole images that it
    reads beside its layers, see ``HasTokens``.
    ``least_images``: of those that it is fitted on, without which its fit is sure to fail.
    ``blocks``: of the vision transformers that its layers are counted for, as it says with the key
    ``depth``; 0: of any network.
    ``positions``: what it learns belongs to places of the input. ``leaves_out``: what does not lie
    inside (``Inside``) has no part in its fit and its image score. ``seeded``: its fit depends on
    the key; of one that does not, seeds with the same images are measured once.
    """

    patches: str = ""
    sigma: float = 0.0
    image_score: Literal["method", "max", "top"] = "method"
    image_share: float = 0.01
    trains_on: Literal["features", "images", "labelled"] | None = None
    fits_on: Literal["normals", "test"] = "normals"
    tokens: tuple[str, ...] = ()
    least_images: int = 1
    blocks: int = 0
    positions: bool = False
    leaves_out: bool = False
    seeded: bool = True


@runtime_checkable
class Detector(Protocol):
    """Turns features into anomaly maps; ``detectors/<name>.py`` has ``Config`` and ``build(cfg)``.

    ``layers`` names the feature maps it reads; ``config`` is what the stamp says of it.
    """

    @property
    def config(self) -> Any: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def traits(self) -> DetectorTraits: ...

    def fit(
        self,
        source: FeatureSource,
        *,
        mesh: Mesh | None,
        key: jax.Array,
        progress: Progress,
        trained: Tree | None = None,
    ) -> Tree:
        """State (a pytree of arrays) from the features of normal images.

        ``trained``, of a detector that ``TrainsOnData``: {"params", "extra"} as its steps left
        them, ``extra`` without the backbone.
        """
        ...

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Pure and jittable; ``mesh``, of several devices, may split the work.

        What does not lie ``inside`` has no part in an image score that is the highest of places.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """A detector that scores many batches faster with a state that was prepared for it once."""

    def prepared(self, state: Tree) -> Tree:
        """A state for ``score`` on one device, with the same results."""
        ...


class ImageMaps(Protocol):
    """The frozen maps that a detector is given, behind network and map wrappers; a pytree.

    What trains through it sees what it will be fitted on and will score.
    """

    def __call__(self, images: jax.Array, index: jax.Array) -> FeatureMaps:
        """The detector's layers and tokens, f32, of images (b, H, W, 3) from 0 to 255.

        ``images`` are the network's inputs before normalisation, in any type. ``index`` (b,) is
        that of a batch, the place of each image among those that are trained on, and -1 for other
        images: what map wrappers know of an image itself does not serve it.
        """
        ...


@runtime_checkable
class TrainsOnData(Protocol):
    """A detector that trains by gradient, as ``traits.trains_on`` says; ``recipe`` says how."""

    @property
    def recipe(self) -> Recipe: ...

    def objective(self, specs: Tree, backbone: ImageMaps | Backbone | None) -> Trainable:
        """What its steps do, for batches with the shapes and types ``specs``.

        Beside ``index`` and ``epoch`` (b,) a batch holds ``features`` {layer: (b, h, w, d)}, behind
        the map wrappers, or ``image`` (b, H, W, 3) uint8, the input of the backbone before
        normalisation, and ``size`` (b, 2). In the latter case the steps find ``ImageMaps`` at
        ``extra["backbone"]``, and call it with the batch's ``index`` also for changed images;
        ``init`` leaves it out, and the ``backbone`` here has shapes instead of arrays:
        ``jax.eval_shape`` tells what it gives. Trees are nested dicts.

        A batch of "labelled" images also holds ``label`` (b,), 1 for anomalous ones, ``mask`` (b,
        H, W) uint8, 1 on defects, and ``masked`` (b,), 0 where the mask says nothing. Then the
        ``backbone`` is the network itself, which an objective that ``Adopts`` starts from.
        """
        ...


@runtime_checkable
class Adopts(Protocol):
    """What the steps do of a detector that goes on training the network that it is given."""

    def adopt(self, params: Tree, extra: Tree, backbone: Backbone) -> tuple[Tree, Tree]:
        """Parameters and extra, of ``init``, with the weights of the backbone; jittable."""
        ...


@runtime_checkable
class Measures(Protocol):
    """A detector that trains, and looks at all its training images before."""

    def measured(
        self, source: FeatureSource, images: Callable[[], Iterator[np.ndarray]]
    ) -> dict[str, Tree]:
        """What stands in ``extra`` from the first step on, beside what ``init`` gives.

        ``source`` is that of the fit; ``images`` gives a pass over the network's inputs (n, H, W,
        3) uint8 in the order of ``index``.
        """
        ...


@runtime_checkable
class HasPanels(Protocol):
    """A detector that can show more of an image than its map.

    ``panel_layers`` are the feature maps this takes. ``panel_tops`` are the values {name: value} at
    which the colours of a panel of values end; for others it is the 99.9th percentile over the
    cases of a category. Colours begin at 0.
    """

    @property
    def panel_layers(self) -> tuple[str, ...]: ...
    @property
    def panel_tops(self) -> Mapping[str, float]: ...

    def panels(self, features: FeatureMaps) -> dict[str, jax.Array]:
        """{name: (b, h, w) values or (b, h, w, 3) pixels in [0, 1]}; pure and jittable."""
        ...
