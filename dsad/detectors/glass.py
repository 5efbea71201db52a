"""GLASS: a discriminator of normal cells and of anomalies made by gradient ascent and on images.

Chen et al., "A Unified Anomaly Synthesis Strategy with Gradient Ascent for Industrial Anomaly
Detection and Localization", ECCV 2024. With t the adapted patch features of normal images, c their
mean at every position, and D the probability of an anomaly, each step trains D on

- t as normal,
- global anomalies: t plus noise, moved by ascent steps to where D finds them less anomalous, and
  brought back after every fifth to a shell around c (hypersphere) or around t (manifold),
- local anomalies: features of images with textures pasted in, by the focal loss on the hardest half
  of the cells.

A cell's score is D. Unlike the published code, the batch statistics change once a step, c is exact
and follows the adaptor, and the state is that of the last step, not of the best on test images.
Textures are procedural here; the published ones are photographs of the set DTD.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsad.augment.perlin import blended, perlin_masks, textures
from dsad.core import rng
from dsad.core.config import Refused, field
from dsad.core.detection import FeatureSource, ImageMaps, Inside, Scores, highest
from dsad.core.errors import DataError
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import FeatureMaps, ObjectiveTraits, Progress, Scalars, Trainable, Tree
from dsad.detectors._discriminator import (
    PARTS,
    Discriminating,
    HeadConfig,
    adapted,
    fresh,
    hidden,
    judged,
    logits,
)
from dsad.ops.spectrum import fits_hypersphere

#: Ascent steps between two projections.
EVERY = 5
#: Of the focal loss: probabilities of the true class are smoothed by it.
SMOOTH = 1e-5
#: The adaptor's rate and decay; the discriminator's are 2e-4 and 0.01. All parameters decay.
OPTIM = OptimConfig(
    lr=1e-4, weight_decay=1e-5, exempt="$^", groups=(("^discriminator", 2.0, 1000.0, True),)
)


class Config(HeadConfig):
    """Which features are told apart, and from which anomalies.

    Attributes:
      adaptor: a linear map before the discriminator; ADPretrain leaves it out for its projected
        features, and takes ``noise`` 0.005.
      noise: standard deviation of the noise that global anomalies begin with, as all lengths in
        units of the adapted features.
      steps: of gradient ascent, 0 or a multiple of 5.
      ascent: length of a step.
      hypothesis: where global anomalies lie: "hypersphere" between the ``radius`` quantile r and 2
        r from c, where local ones are brought to between 2 r and 4 r; "manifold" between
        ``manifold`` and twice that from the cells that they come from, where local ones stay as
        they are; "auto" by the spectrum of the mean image (``ops.spectrum``).
      radius: quantile of the normal cells' distances from c.
      manifold: least distance of the other hypothesis.
      mining: share of the cells that the local loss leaves out, those with the smallest errors.
      blend_mean, blend_std: of the share of the image itself where a texture is pasted in, which is
        kept within 0.2 and 0.8.
      recipe: of the training. The published code has the adaptor's decay in its gradient, here it
        is beside it (AdamW), and ends an epoch after 400 images.

    """

    adaptor: bool = True
    noise: float = field(0.015, at_least=0)
    steps: int = field(20, at_least=0)
    ascent: float = field(0.001, at_least=0)
    hypothesis: Literal["auto", "hypersphere", "manifold"] = "auto"
    radius: float = field(0.75, within=(0, 1))
    manifold: float = field(0.5, above=0)
    mining: float = field(0.5, within=(0, 1))
    blend_mean: float = field(0.5, within=(0, 1))
    blend_std: float = field(0.1, at_least=0)
    recipe: Recipe = Recipe(epochs=640.0, batch_size=8, optim=OPTIM)

    def check(self) -> None:
        if self.steps % EVERY:
            raise Refused("steps", f"a multiple of {EVERY}", self.steps)


class Glass(Discriminating[Config]):
    """The detector; its state is {"adaptor", "discriminator", "statistics"}."""

    _learns_from = "images"

    def measured(
        self, source: FeatureSource, images: Callable[[], Iterator[np.ndarray]]
    ) -> dict[str, Tree]:
        """``centre`` (gh, gw, d) of all cells before the adaptor, and ``hypersphere`` () bool.

        Raises DataError without images, or for broken features.
        """
        total, count = np.zeros(()), 0
        for values, *_ in self._cells(source):
            total, count = total + values.sum(axis=0, dtype=np.float64), count + len(values)
        if not count:
            raise DataError("detector glass: expected at least 1 normal image, found 0.")
        sphere = self.config.hypothesis == "hypersphere"
        if self.config.hypothesis == "auto":
            image = np.zeros(())
            for part in images():
                image = image + part.sum(axis=0, dtype=np.float64)
            sphere = fits_hypersphere(image / count)
        return {"centre": np.float32(total / count), "hypersphere": np.asarray(sphere)}

    def objective(self, specs: Tree, backbone: ImageMaps | None) -> Trainable:
        """The three losses on batches of images."""
        assert backbone is not None
        return Synthesis(self, specs, backbone)

    def fit(
        self,
        source: FeatureSource,
        *,
        mesh: Mesh | None,
        key: jax.Array,
        progress: Progress,
        trained: Tree | None = None,
    ) -> Tree:
        """What was trained, without what only training needs."""
        state = super().fit(source, mesh=mesh, key=key, progress=progress, trained=trained)
        return {name: state[name] for name in PARTS if name in state}

    def score(
        self, state: Tree, features: FeatureMaps, *, mesh: Mesh | None = None,
        inside: Inside = None,
    ) -> Scores:  # fmt: skip
        """Map (b, gh, gw): probability of an anomaly; image (b,): its maximum."""
        maps = jax.nn.sigmoid(judged(state, self.embed(features)))
        return Scores(map=maps, image=highest(maps, inside))


class Synthesis(Trainable):
    """What the steps of GLASS do."""

    traits = ObjectiveTraits(couples_batch=True)

    def __init__(self, detector: Glass, specs: Tree, backbone: ImageMaps) -> None:
        def cells(batch: Tree, backbone: ImageMaps) -> jax.Array:
            return detector.embed(backbone(batch["image"], batch["index"]))

        self.detector, self.config = detector, detector.config
        self.shape = jax.eval_shape(cells, specs, backbone).shape

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Adaptor, discriminator, and its batch statistics."""
        return fresh(key, self.shape[-1], self.config.hidden, adaptor=self.config.adaptor)

    def views(self, batch: Any, key: jax.Array) -> Tree:
        """``images`` (b, 2, H, W, 3) from 0 to 255, the second of each with local anomalies.

        ``local`` (b, gh, gw) bool are the cells that these touch, ``noise`` (b, gh, gw, d) is
        standard normal, and ``index`` (b,) that of the batch.
        """
        keys = rng.sample_keys(key, batch["epoch"], batch["index"])
        image, cfg = batch["image"].astype(jnp.float32), self.config
        size = (image.shape[1], image.shape[2])

        def drawn(name: str) -> jax.Array:
            return jax.vmap(lambda k: rng.named(k, name))(keys)

        masks, fillings = perlin_masks(drawn("mask"), size), textures(drawn("texture"), size)
        normal = jax.vmap(jax.random.normal)(drawn("blend"))
        shares = jnp.clip(cfg.blend_mean + cfg.blend_std * normal, 0.2, 0.8)
        pasted = blended(image, 255 * fillings, masks, shares)
        noise = jax.vmap(lambda k: jax.random.normal(k, self.shape[1:]))(drawn("noise"))
        return {
            "images": jnp.stack([image, pasted], axis=1),
            "local": touched(masks, (self.shape[1], self.shape[2])),
            "noise": noise,
            "index": batch["index"],
        }

    def loss(
        self, params: Tree, extra: Tree, views: Tree, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Scalars]]:
        """Normal and global cells as they are, plus the focal loss of the local branch."""
        images = views["images"]
        images = images.reshape(-1, *images.shape[2:])
        maps = extra["backbone"](images, jnp.repeat(views["index"], 2))
        cells = lax.stop_gradient(self.detector.embed(maps))
        centre = lax.stop_gradient(adapted(params, extra["centre"]))
        synthetic = {
            "local": views["local"], "noise": views["noise"], "sphere": extra["hypersphere"]
        }  # fmt: skip
        total, statistics, scalars = self.losses(
            params, extra["statistics"], adapted(params, cells), centre, synthetic
        )
        return total, ({**extra, "statistics": statistics}, scalars)

    def losses(
        self, params: Tree, statistics: Tree, cells: jax.Array, centre: jax.Array, synthetic: Tree
    ) -> tuple[jax.Array, Tree, Scalars]:
        """The loss, new batch statistics, and its parts.

        Args:
          params: those of the adaptor have done their part already.
          statistics: of the discriminator.
          cells: (2 b, gh, gw, d) adapted: every image, and behind it the one with local anomalies.
          centre: (gh, gw, d), adapted.
          synthetic: ``local`` (b, gh, gw) and ``noise`` (b, gh, gw, d) of the views, and ``sphere``
            () bool, the hypothesis.

        """
        cfg = self.config
        pairs = cells.reshape(-1, 2, self.shape[1] * self.shape[2], self.shape[3])
        normal, pasted = pairs[:, 0], pairs[:, 1]
        local = synthetic["local"].reshape(normal.shape[:2])
        centre = centre.reshape(1, *normal.shape[1:])
        gaps = jnp.concatenate([lengths(pasted - centre), lengths(normal - centre)], axis=1)
        used = jnp.concatenate([~local, jnp.ones_like(local)], axis=1)
        radius = lax.stop_gradient(quantile(gaps, cfg.radius, used))
        sphere = synthetic["sphere"]
        base = jnp.where(sphere, centre, normal)
        least = jnp.where(sphere, radius, cfg.manifold)
        start = normal + cfg.noise * synthetic["noise"].reshape(normal.shape)
        moved = self._ascended(params, statistics, normal, start, (base, least))
        (low, high), after = logits(
            params, statistics, [hidden(params, x) for x in (normal, moved)], train=True
        )
        far = brought(pasted, centre, 2 * radius, 4 * radius)
        pasted = jnp.where((local & sphere)[..., None], far, pasted)
        # The statistics of this pass are left out: those above are of normal and global cells.
        (scores,), _ = logits(params, statistics, [hidden(params, pasted)], train=True)
        parts = {
            "normal": jnp.mean(jax.nn.softplus(low)),
            "global": jnp.mean(jax.nn.softplus(-high)),
            "local": hard_focal(jax.nn.sigmoid(scores), local, cfg.mining),
        }
        total = parts["normal"] + parts["global"] + parts["local"]
        return total, after, {**parts, "radius": radius}

    def _ascended(
        self, params: Tree, statistics: Tree, normal: jax.Array, start: jax.Array,
        shell: tuple[jax.Array, jax.Array],
    ) -> jax.Array:  # fmt: skip
        """Cells ``start`` (b, n, d) after all ascent steps and projections.

        The steps pass on no gradient, the projections do. ``shell`` is its base and least distance.
        """
        fixed = lax.stop_gradient(params)
        beside = hidden(fixed, lax.stop_gradient(normal))

        def loss(cells: jax.Array) -> jax.Array:
            parts = [beside, hidden(fixed, cells)]
            return jnp.mean(jax.nn.softplus(-logits(fixed, statistics, parts, train=True)[0][1]))

        def ascend(cells: jax.Array, _: None) -> tuple[jax.Array, None]:
            slope = jax.grad(loss)(cells)
            norm = jnp.sqrt(jnp.sum(jnp.square(slope), axis=-1, keepdims=True))
            return cells + self.config.ascent * slope / (norm + 1e-10), None

        def to_shell(cells: jax.Array, _: None) -> tuple[jax.Array, None]:
            before = lax.stop_gradient(cells)
            after, _ = lax.scan(ascend, before, None, length=EVERY)
            base, least = shell
            return brought(cells + lax.stop_gradient(after - before), base, least, 2 * least), None

        return lax.scan(to_shell, start, None, length=self.config.steps // EVERY)[0]


def lengths(vectors: jax.Array) -> jax.Array:
    """Lengths (...) of vectors (..., d); the gradient at 0 is 0."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1), 1e-20))


def brought(points: jax.Array, base: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """Points (..., d) moved along the lines to ``base`` until between two distances from it."""
    gap = points - base
    length = lengths(gap)
    return base + (jnp.clip(length, least, most) / length)[..., None] * gap


def quantile(values: jax.Array, share: float, used: jax.Array | None = None) -> jax.Array:
    """Linearly interpolated quantile () of all values that are ``used``, one or more."""
    used = jnp.ones(values.shape, bool) if used is None else used
    rising = jnp.sort(jnp.where(used, values, jnp.inf).reshape(-1))
    last = jnp.sum(used) - 1
    at = share * last.astype(jnp.float32)
    low = jnp.floor(at).astype(jnp.int32)
    below, above = rising[low], rising[jnp.minimum(low + 1, last)]
    return below + (at - low) * (above - below)


def focal(probabilities: jax.Array, anomalous: jax.Array) -> jax.Array:
    """Focal losses -(1 - p)² ln p (...), with p the smoothed probability of the true class."""
    weight = jnp.where(anomalous, 1 - SMOOTH, SMOOTH)
    true = weight * probabilities + (1 - weight) * (1 - probabilities) + SMOOTH
    return -jnp.square(1 - true) * jnp.log(true)


def hard_focal(probabilities: jax.Array, anomalous: jax.Array, mining: float) -> jax.Array:
    """Mean focal loss of the cells (b, n) whose squared error is at least its quantile."""
    errors = lax.stop_gradient(jnp.square(probabilities - anomalous))
    hard = errors >= quantile(errors, mining)
    return jnp.sum(jnp.where(hard, focal(probabilities, anomalous), 0)) / jnp.sum(hard)


def touched(masks: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Cells (b, gh, gw) of a grid over masks (b, h, w) that hold a pixel which is True."""
    owners = [np.arange(n) * g // n for n, g in zip(masks.shape[1:], grid, strict=True)]
    rows, columns = (
        jnp.asarray(owner[None, :] == np.arange(g)[:, None], jnp.float32)
        for owner, g in zip(owners, grid, strict=True)
    )
    return jnp.einsum("gh,bhw,kw->bgk", rows, masks.astype(jnp.float32), columns) > 0.5


build = Glass
