"""Optimisers and learning-rate schedules as optax transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.core.errors import ConfigError
from dsad.core.tree import mask_by_path

Schedule = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule; lengths are in epochs.

    Attributes:
      lr: peak learning rate for ``lr_batch`` images; scaled in proportion to the batch size.
      lr_batch: 0 leaves ``lr`` as it is.
      trust: LARS trust coefficient.
      exempt: parameters whose path matches get neither weight decay nor trust ratio. By path, not
        by axes: the norm scales of stacked blocks have two axes, class and mask tokens have one.
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

    name: Literal["lars", "sgd", "adamw"] = "lars"
    lr: float = 2.0
    lr_batch: int = 256
    momentum: float = 0.9
    b2: float = 0.999
    weight_decay: float = 1e-5
    trust: float = 0.001
    exempt: str = r"(bias|scale|gamma)$"
    schedule: Literal["step", "cosine", "periodic", "constant"] = "step"
    warmup_epochs: float = 5.0
    warmup_multiplier: float = 100.0
    milestones: tuple[float, ...] = (120.0, 160.0, 200.0)
    gamma: float = 0.1
    min_lr: float = 1e-6
    period_epochs: float = 30.0
    published_schedule: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr: expected a positive number, found {self.lr}.")
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"optim.milestones: expected rising epochs, found {self.milestones}.")
        for field in ("warmup_epochs", "warmup_multiplier", "min_lr"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optim.{field}: expected >= 0, found {getattr(self, field)}.")
        if self.period_epochs <= 0:
            raise ConfigError(
                f"optim.period_epochs: expected a positive number, found {self.period_epochs}."
            )


def make_schedule(
    cfg: OptimConfig, *, batch_size: int, steps_per_epoch: float, total_steps: int
) -> Schedule:
    """Learning rate (f32 scalar) of update number n, counted from 0.

    Linear warm-up ends at ``warmup_epochs``; then the schedule's rate, where "periodic" counts its
    epochs from the start of the run and "cosine" from the end of the warm-up.
    """
    peak = cfg.lr * batch_size / cfg.lr_batch if cfg.lr_batch else cfg.lr
    warm = cfg.warmup_epochs * steps_per_epoch
    drops = jnp.asarray(cfg.milestones, jnp.float32) * jnp.float32(steps_per_epoch)
    if cfg.published_schedule:
        drops = drops - warm / 2
    starts = _epoch_starts(steps_per_epoch, total_steps) if cfg.schedule == "periodic" else ()

    def schedule(count: Any) -> jax.Array:
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

    return schedule


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
    """

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda x: not x, mask_by_path(params, cfg.exempt))

    decay = optax.add_decayed_weights(cfg.weight_decay, mask=decayed)
    if cfg.name == "adamw":
        adam = optax.scale_by_adam(b1=cfg.momentum, b2=cfg.b2)
        return optax.chain(adam, decay, optax.scale_by_learning_rate(schedule))
    parts = [decay, optax.trace(cfg.momentum), optax.scale_by_learning_rate(schedule)]
    if cfg.name == "lars":
        ratio = optax.scale_by_trust_ratio(trust_coefficient=cfg.trust, eps=1e-8)
        parts.insert(1, optax.masked(ratio, decayed))
    return optax.chain(*parts)
