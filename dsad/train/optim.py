"""Optimisers and learning-rate schedules as optax transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
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
      exempt: parameters whose path matches get neither weight decay nor trust ratio.
      warmup_multiplier: the warm-up starts at the peak divided by this.
      milestones: epochs at which schedule "step" multiplies the rate by ``gamma``.
      min_lr: end of schedule "cosine".
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
    exempt: str = r"(bias|scale)$"
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup_epochs: float = 5.0
    warmup_multiplier: float = 100.0
    milestones: tuple[float, ...] = (120.0, 160.0, 200.0)
    gamma: float = 0.1
    min_lr: float = 1e-6
    published_schedule: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr: expected a positive number, found {self.lr}.")
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"optim.milestones: expected rising epochs, found {self.milestones}.")


def make_schedule(
    cfg: OptimConfig, *, batch_size: int, steps_per_epoch: float, total_steps: int
) -> Schedule:
    """Learning rate (f32 scalar) of update number n, counted from 0."""
    peak = cfg.lr * batch_size / cfg.lr_batch if cfg.lr_batch else cfg.lr
    warm = cfg.warmup_epochs * steps_per_epoch
    drops = jnp.asarray(cfg.milestones, jnp.float32) * jnp.float32(steps_per_epoch)
    if cfg.published_schedule:
        drops = drops - warm / 2

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        done = jnp.float32(1)
        if warm > 0:
            # The published counter advances by 2 and stops before the end of the warm-up.
            reached = jnp.minimum(2 * n + 1, warm - 1) if cfg.published_schedule else n
            done = jnp.minimum(reached / warm, 1.0)
        m = cfg.warmup_multiplier
        value = peak / m * ((m - 1.0) * done + 1.0)
        if cfg.schedule == "step":
            passed = jnp.sum((n >= drops).astype(jnp.float32))
            value = value * jnp.power(jnp.float32(cfg.gamma), passed)
        elif cfg.schedule == "cosine":
            part = jnp.clip((n - warm) / max(total_steps - warm, 1.0), 0.0, 1.0)
            cosine = cfg.min_lr + (peak - cfg.min_lr) * (1.0 + jnp.cos(jnp.pi * part)) / 2.0
            value = jnp.where(n < warm, value, cosine)
        return value.astype(jnp.float32)

    return schedule


def make_optimizer(cfg: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    """The gradient transformation; weight decay and trust ratios skip exempt paths.

    LARS is You et al. 2017 as the DS2 code applies it: decay, trust ratio, momentum, then the
    learning rate (``optax.lars`` applies the rate before the momentum, which differs whenever
    the rate changes).
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
