"""A second loss beside that of any host that embeds whole images: views and a head of its own."""

import abc
import dataclasses
from typing import Any

import jax

from dsad.augment.views import ViewConfig
from dsad.core import rng
from dsad.core.batch import Batch
from dsad.core.config import Refused
from dsad.core.types import (
    EarlierWeights,
    HasPictures,
    ReadsTensors,
    Scalars,
    Trainable,
)
from dsad.models.functional import Functional
from dsad.objectives.encoder import EncoderObjective


class Term(abc.ABC):
    """What is added to a host's loss.

    Attributes:
      name: of its views, and before its scalars.
      head: a network of its own, None without.
      head_name: where the host's trees keep it.

    """

    name: str
    head: Functional | None
    head_name: str

    @abc.abstractmethod
    def views(self, batch: Batch, key: jax.Array) -> Any:
        """Views of a batch, as ``Trainable.views``."""

    @abc.abstractmethod
    def loss(
        self, host: EncoderObjective, trees: tuple[Any, Any], head: tuple[Any, Any], views: Any
    ) -> tuple[jax.Array, Any, Any, Scalars]:
        """Scalar loss, the host's new extra, the head's new statistics, and scalars to log.

        ``trees`` are the host's params and extra, ``head`` those of the head, empty without one.
        """

    @abc.abstractmethod
    def pictures(
        self, host: EncoderObjective, trees: tuple[Any, Any], head: tuple[Any, Any], batch: Batch,
        key: jax.Array,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """For ``HasPictures``."""


class WithTerm(Trainable):
    """A host with ``weight`` times a term beside its loss; its own views and loss stay as they are.

    What the host offers, it still offers, but for ``parts`` and the cost that it states, which are
    not those of the whole. Batch statistics follow the host's views, then those of the term.
    """

    def __init__(self, host: EncoderObjective, term: Term, weight: float) -> None:
        self.host, self.term, self.weight = host, term, weight
        self.traits = dataclasses.replace(host.traits, couples_batch=True)
        self.mean, self.std, self.stage_facts = host.mean, host.std, host.stage_facts
        self.features, self.embed, self.prepare = host.features, host.embed, host.prepare
        self.encoder_weights, self.after_update = host.encoder_weights, host.after_update
        if isinstance(host, ReadsTensors):
            self.read_tensors = host.read_tensors

    def _head(self, params: Any, extra: Any) -> tuple[Any, Any]:
        name = self.term.head_name
        return (params[name], extra[name]) if self.term.head else ({}, {})

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """The host's, and the head beside them."""
        params, extra = self.host.init(key)
        if self.term.head is None:
            return params, extra
        name = self.term.head_name
        head, stats = self.term.head.init(rng.named(key, name))
        return {**params, name: head}, {**extra, name: stats}

    def views(self, batch: Batch, key: jax.Array) -> Any:
        """The host's, and those of the term under its name."""
        name = self.term.name
        return {
            **self.host.views(batch, key),
            name: self.term.views(batch, rng.named(key, name)),
        }

    def loss(
        self, params: Any, extra: Any, views: Any, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Scalars]]:
        """The host's loss and ``weight`` times the term, which is logged by itself."""
        term = self.term
        total, (new, scalars) = self.host.loss(params, extra, views, key=key, step=step)
        head = self._head(params, extra)
        value, new, stats, more = term.loss(self.host, (params, new), head, views[term.name])
        if term.head is not None:
            new = {**new, term.head_name: stats}
        more = {"loss": value, **more}
        scalars |= {f"{term.name}_{n}": jax.lax.stop_gradient(v) for n, v in more.items()}
        return total + self.weight * value, (new, scalars)

    def pictures(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The host's, if it has some, and the term's."""
        shown = {}
        if isinstance(self.host, HasPictures):
            shown = self.host.pictures(params, extra, batch, key)
        return shown | self.term.pictures(
            self.host, (params, extra), self._head(params, extra), batch,
            rng.named(key, self.term.name),
        )  # fmt: skip

    def adopt(self, earlier: EarlierWeights, params: Any, extra: Any) -> tuple[Any, Any, str]:
        """As the host does; the head starts anew."""
        name = self.term.head_name
        alone = ({n: v for n, v in tree.items() if n != name} for tree in (params, extra))
        taken, held, report = self.host.adopt(earlier, *alone)
        if self.term.head is None:
            return taken, held, report
        report = f"{report}; {name} starts anew"
        return {**taken, name: params[name]}, {**held, name: extra[name]}, report


def check_pixels(host: EncoderObjective, view: ViewConfig, key: str) -> None:
    """Refuse a term's view, at ``key``, that is normalised otherwise than the host's."""
    for name in ("mean", "std"):
        if (value := getattr(view, name)) != (expected := getattr(host, name)):
            raise Refused(f"{key}.{name}", f"the method's {expected}", value)
