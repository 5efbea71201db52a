"""SPD: a host's vectors are to ignore weak changes of a whole image, and to notice a local one.

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022. Every image gives a triplet, see ``augment.triplets``. The authors
published no training code; what they leave open is a setting here.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsad.augment.triplets import TripletConfig, make_triplet
from dsad.core.batch import Batch
from dsad.core.config import Refused, Settings, field, listed
from dsad.core.types import Objective, Scalars
from dsad.models import heads
from dsad.objectives._term import Term, WithTerm, check_pixels
from dsad.objectives._vectors import VectorsObjective
from dsad.objectives.teacher import interleaved
from dsad.ops.similarity import unit

Form = Literal["plain", "predictor", "classifier"]
_PLACE = "config.objective.spd"


class SPDConfig(Settings, place="objective.spd"):
    """SPD as a term beside a method's loss.

    Attributes:
      weight: of the term, 0.1 where SPD is used; 0 leaves the method as it is.
      form: "plain", the published equation on projections; "predictor": SimSiam's predictions
        against projections without gradient (a third-party code); "classifier": a linear unit on
        the encoder's vectors tells negatives from positives, as published for training with labels.
      statistics: batch norms see the views of a triplet "joint", as one batch, so that they cannot
        take away what all negatives have in common, or each of them "separate".
      triplet: what is compared.

    """

    weight: float = field(0.0, at_least=0)
    form: Form = "plain"
    statistics: Literal["joint", "separate"] = "joint"
    triplet: TripletConfig = TripletConfig()


def cosine(first: jax.Array, second: jax.Array) -> jax.Array:
    """Cosines (n,) of vectors (n, d); 0, with a finite gradient, for a zero vector."""
    return jnp.sum(unit(first.astype(jnp.float32)) * unit(second.astype(jnp.float32)), axis=-1)


def plain_loss(anchor: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Mean over the batch of cos(x, x⁻) − cos(x, x⁺), vectors (n, d); in [−2, 2]."""
    return jnp.mean(cosine(anchor, negative) - cosine(anchor, positive))


def predictor_loss(z: tuple[jax.Array, ...], p: tuple[jax.Array, ...]) -> jax.Array:
    """The same on predictions ``p`` against projections ``z`` without gradient, both ways.

    ½ mean(cos(p_x, z₋) + cos(p₋, z_x) − cos(p_x, z₊) − cos(p₊, z_x)); ``z`` and ``p`` are those of
    anchor, positive and negative, (n, d) each.
    """
    zx, zp, zn = jax.lax.stop_gradient(z)
    px, pp, pn = p
    alike = cosine(px, zn) + cosine(pn, zx) - cosine(px, zp) - cosine(pp, zx)
    return 0.5 * jnp.mean(alike)


def classifier_loss(positive: jax.Array, negative: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of logits (n,) of "was changed locally", and the share that is right."""
    loss = jnp.mean(jax.nn.softplus(positive)) + jnp.mean(jax.nn.softplus(-negative))
    right = jnp.mean(positive < 0, dtype=jnp.float32) + jnp.mean(negative >= 0, dtype=jnp.float32)
    return loss / 2, right / 2


class SPDTerm(Term):
    """The term of a host whose ``embed`` gives the vectors that its ``form`` takes."""

    name, head_name = "spd", "spd_head"

    def __init__(self, host: VectorsObjective, cfg: SPDConfig) -> None:
        check_pixels(host, cfg.triplet.view, f"{_PLACE}.triplet.view")
        needed = {"plain": "z", "predictor": "p", "classifier": "pooled"}[cfg.form]
        if needed not in {*host.heads, "pooled"}:
            fitting = {"z": "plain", "p": "predictor"}
            forms = ["classifier", *(fitting[name] for name in host.heads if name in fitting)]
            raise Refused(f"{_PLACE}.form", f"one of {listed(forms)} with this method", cfg.form)
        self.cfg = cfg
        self.head = heads.mlp((host.width, 1)) if cfg.form == "classifier" else None

    def views(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """``anchor``, ``positive``, ``negative`` (b, S, S, 3) f32, normalised; ``peak`` (b,)."""
        return make_triplet(batch, key, self.cfg.triplet)

    def _embedded(
        self, host: VectorsObjective, trees: tuple[Any, Any], views: Any, names: tuple[str, ...]
    ) -> tuple[dict[str, jax.Array], Any]:
        """Vectors (n · b, d) of the n named views by kind, and the host's new extra.

        The views of an image lie next to each other: on any mesh, on the same device.
        """
        n = len(names)
        images = interleaved(*(views[name] for name in names))
        separate = n if self.cfg.statistics == "separate" else 1
        return host.embed(*trees, images, train=True, views=separate)

    def loss(
        self, host: Any, trees: tuple[Any, Any], head: tuple[Any, Any], views: Any
    ) -> tuple[jax.Array, Any, Any, Scalars]:
        """See ``plain_loss``, ``predictor_loss`` and ``classifier_loss``."""
        peak = {"matte_peak": jnp.mean(views["peak"])}
        if self.head is not None:
            vectors, extra = self._embedded(host, trees, views, ("positive", "negative"))
            logits, stats = self.head.apply(*head, vectors["pooled"], train=True)
            loss, right = classifier_loss(*_split(logits[:, 0].astype(jnp.float32), 2))
            return loss, extra, stats, {"accuracy": right, **peak}
        vectors, extra = self._embedded(host, trees, views, ("anchor", "positive", "negative"))
        z = _split(vectors["z"], 3)
        loss = (
            predictor_loss(z, _split(vectors["p"], 3))
            if self.cfg.form == "predictor"
            else plain_loss(*z)
        )
        alike = {n: jnp.mean(cosine(z[0], z[i])) for i, n in ((1, "positive"), (2, "negative"))}
        return loss, extra, {}, {**{f"cosine_{n}": v for n, v in alike.items()}, **peak}

    def pictures(
        self, host: Any, trees: tuple[Any, Any], head: tuple[Any, Any], batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Anchor, positive and negative."""
        del trees, head
        views = self.views(batch, key)
        return {n: host.pixels(views[n]) for n in ("anchor", "positive", "negative")}


def _split(rows: jax.Array, views: int) -> tuple[jax.Array, ...]:
    """Rows of ``interleaved`` views by view."""
    return tuple(rows[i::views] for i in range(views))


def with_spd(host: VectorsObjective, cfg: SPDConfig) -> Objective:
    """The host itself at weight 0, else with the term beside its loss."""
    return WithTerm(host, SPDTerm(host, cfg), cfg.weight) if cfg.weight else host
