"""Optimisers and learning-rate schedules as optax transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.core.config import Refused, Settings, field
from dsad.core.tree import check_pattern, mask_by_path, match_paths

#: A pattern of parameters' paths, factors on their rate and decay, and whether they follow the
#: schedule; without it their rate is the peak times the factor in every step.
Group = tuple[str, float, float, bool]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate (f32 scalar) of update number n, counted from 0, and its peak."""

    rate: Callable[[Any], jax.Array]
    peak: float

    def __call__(self, count: Any) -> jax.Array:
        return self.rate(count)


class OptimConfig(Settings, place="optim"):
    """Optimiser and schedule; lengths are in epochs. The defaults are no method's own.

    Attributes:
      lr: peak learning rate for ``lr_batch`` images; scaled in proportion to the batch size.
      lr_batch: 0 leaves ``lr`` as it is.
      clip: gradients whose norm over all parameters is larger are scaled down to it; 0: never.
      trust: LARS trust coefficient.
      exempt: parameters whose path matches get neither weight decay nor trust ratio. By path, not
        by axes: the norm scales of stacked blocks have two axes, class and mask tokens have one.
      groups: parameters with a rate and decay of their own, see ``Group``; the first match wins.
      warmup_multiplier: the warm-up starts at the peak divided by this; 0: at rate 0.
      milestones: epochs at which schedule "step" multiplies the rate by ``gamma``.
      min_lr: end of schedule "cosine", and floor of schedule "periodic".
      period_epochs: schedule "periodic" falls along half a cosine for so many epochs, then rises
        for as many, and so on; the rate changes between whole epochs only (torch's
        CosineAnnealingLR, stepped once an epoch).
      published_schedule: as the published DS2 code runs: each warm-up step is counted twice, so
        the peak stays below ``lr`` and every milestone comes half a warm-up early, and an epoch
        has whole steps only, the rest of the images being dropped from the count.

    """

    name: Literal["lars", "sgd", "adamw"] = "adamw"
    lr: float = field(1e-3, above=0)
    lr_batch: int = field(0, at_least=0)
    momentum: float = field(0.9, at_least=0, below=1)
    b2: float = field(0.999, at_least=0, below=1)
    weight_decay: float = field(0.0, at_least=0)
    trust: float = field(0.001, above=0)
    clip: float = field(0.0, at_least=0)
    exempt: str = r"(bias|scale|gamma)$"
    groups: tuple[Group, ...] = ()
    schedule: Literal["step", "cosine", "periodic", "constant"] = "constant"
    warmup_epochs: float = field(0.0, at_least=0)
    warmup_multiplier: float = field(0.0, at_least=0)
    milestones: tuple[float, ...] = field((), rising=True)
    gamma: float = field(0.1, above=0)
    min_lr: float = field(0.0, at_least=0)
    period_epochs: float = field(30.0, above=0)
    published_schedule: bool = False

    def check(self) -> None:
        check_pattern("exempt", self.exempt)
        for i, (pattern, *factors, _) in enumerate(self.groups):
            check_pattern(f"groups[{i}][0]", pattern)
            if min(factors) < 0:
                raise Refused(f"groups[{i}]", "factors >= 0 on rate and decay", factors)


def make_schedule(
    cfg: OptimConfig, *, batch_size: int, steps_per_epoch: float, total_steps: int
) -> Schedule:
    """The rate of every update of a run.

    Linear warm-up ends at ``warmup_epochs``; then the schedule's rate, where "periodic" counts its
    epochs from the start of the run and "cosine" from the end of the warm-up.
    """
    peak = cfg.lr * batch_size / cfg.lr_batch if cfg.lr_batch else cfg.lr
    warm = cfg.warmup_epochs * steps_per_epoch
    drops = jnp.asarray(cfg.milestones, jnp.float32) * jnp.float32(steps_per_epoch)
    if cfg.published_schedule:
        drops = drops - warm / 2
    starts = _epoch_starts(steps_per_epoch, total_steps) if cfg.schedule == "periodic" else ()

    def rate(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        done = jnp.float32(1)
        if warm > 0:
            # The published counter advances by 2 and stops before the end of the warm-up.
            reached = jnp.minimum(2 * n + 1, warm - 1) if cfg.published_schedule else n
            done = jnp.minimum(reached / warm, 1.0)
        m = cfg.warmup_multiplier
        value = peak / m * ((m - 1.0) * done + 1.0) if m else peak * done
        if cfg.schedule == "step":
            passed = jnp.sum((n >= drops).astype(jnp.float32))
            value = value * jnp.power(jnp.float32(cfg.gamma), passed)
        elif cfg.schedule == "cosine":
            left = jnp.clip((total_steps - n) / max(total_steps - warm, 1.0), 0.0, 1.0)
            value = jnp.where(n < warm, value, _between(cfg.min_lr, peak, left))
        elif cfg.schedule == "periodic":
            epoch = jnp.sum((n >= jnp.asarray(starts, jnp.float32)).astype(jnp.float32))
            phase = jnp.remainder(epoch, 2 * cfg.period_epochs)
            left = jnp.abs(phase - cfg.period_epochs) / cfg.period_epochs
            value = jnp.where(n < warm, value, _between(cfg.min_lr, peak, left))
        return value.astype(jnp.float32)

    return Schedule(rate, peak)


def _between(low: float, high: float, left: jax.Array) -> jax.Array:
    """From ``low`` at ``left`` 0 to ``high`` at 1 along half a cosine: (1 - cos(π left)) / 2.

    As a squared sine, because the digits of that difference cancel where the rate is small.
    """
    return low + (high - low) * jnp.square(jnp.sin(jnp.pi / 2 * left))


def _epoch_starts(steps_per_epoch: float, total_steps: int) -> np.ndarray:
    """The first update of every epoch after the first; epochs may be fractions of updates."""
    epochs = np.arange(1, int(total_steps / steps_per_epoch) + 2, dtype=np.float64)
    return np.ceil(epochs * steps_per_epoch - 1e-6)


def make_optimizer(cfg: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    """The gradient transformation; weight decay and trust ratios skip exempt paths.

    LARS is You et al. 2017 as the DS2 code applies it: decay, trust ratio, momentum, then the
    learning rate (``optax.lars`` applies the rate before the momentum, which differs whenever
    the rate changes). AdamW is Loshchilov and Hutter 2019 as torch has it: the decay is no part of
    the gradient's moments and is multiplied by the rate.

    Its ``init`` raises ConfigError for a group that takes no parameter.
    """

    def rate_of(factor: float, scheduled: bool) -> Callable[[Any], jax.Array]:
        return lambda n: factor * (schedule(n) if scheduled else jnp.float32(schedule.peak))

    def group_of(params: Any) -> Any:
        patterns = [pattern for pattern, *_ in cfg.groups]
        return jax.tree.map(str, match_paths("config.optim.groups", patterns, params))

    whole = _recipe(cfg, schedule, cfg.weight_decay)
    if cfg.groups:
        parts: dict[Any, optax.GradientTransformation] = {"-1": whole}
        for i, (_, rate, decay, scheduled) in enumerate(cfg.groups):
            parts[str(i)] = _recipe(cfg, rate_of(rate, scheduled), cfg.weight_decay * decay)
        whole = optax.partition(parts, group_of)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), whole) if cfg.clip else whole


def _recipe(
    cfg: OptimConfig, rate: Callable[[Any], jax.Array], weight_decay: float
) -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda x: not x, mask_by_path(params, cfg.exempt))

    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    if cfg.name == "adamw":
        adam = optax.scale_by_adam(b1=cfg.momentum, b2=cfg.b2)
        return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
    parts = [decay, optax.trace(cfg.momentum), optax.scale_by_learning_rate(rate)]
    if cfg.name == "lars":
        ratio = optax.scale_by_trust_ratio(trust_coefficient=cfg.trust, eps=1e-8)
        parts.insert(1, optax.masked(ratio, decayed))
    return optax.chain(*parts)
