"""Optimisers and learning-rate schedules as optax transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsad.core.recipe import OptimConfig
from dsad.core.tree import mask_by_path, match_paths
from dsad.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate (f32 scalar) of update number n, counted from 0, and its peak."""

    rate: Callable[[Any], jax.Array]
    peak: float

    def __call__(self, count: Any) -> jax.Array:
        return self.rate(count)


def make_schedule(
    cfg: OptimConfig, *, batch_size: int, steps_per_epoch: Any, total_steps: Any
) -> Schedule:
    """The rate of every update of a run; lengths may be traced, but for schedule "periodic".

    Linear warm-up ends at ``warmup_epochs``; then the schedule's rate, where "periodic" counts its
    epochs from the start of the run and "cosine" from the end of the warm-up, unless it holds.
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
        if cfg.warmup_epochs:
            # The published counter advances by 2 and stops before the end of the warm-up.
            reached = jnp.minimum(2 * n + 1, warm - 1) if cfg.published_schedule else n
            done = jnp.minimum(reached / warm, 1.0)
        m, top = cfg.warmup_multiplier, peak
        if cfg.hold_epochs:
            top = _held(cfg, peak, warm, steps_per_epoch, total_steps)
        value = peak / m + (top - peak / m) * done if m else top * done
        if cfg.schedule == "step":
            passed = jnp.sum((n >= drops).astype(jnp.float32))
            value = value * jnp.power(jnp.float32(cfg.gamma), passed)
        elif cfg.hold_epochs:
            held = _held(cfg, peak, n, steps_per_epoch, total_steps)
            value = jnp.where(n < warm, value, held)
        elif cfg.schedule == "cosine":
            left = jnp.clip((total_steps - n) / jnp.maximum(total_steps - warm, 1.0), 0.0, 1.0)
            value = jnp.where(n < warm, value, _between(cfg.min_lr, peak, left))
        elif cfg.schedule == "periodic":
            epoch = jnp.sum((n >= jnp.asarray(starts, jnp.float32)).astype(jnp.float32))
            phase = jnp.remainder(epoch, 2 * cfg.period_epochs)
            left = jnp.abs(phase - cfg.period_epochs) / cfg.period_epochs
            value = jnp.where(n < warm, value, _between(cfg.min_lr, peak, left))
        return value.astype(jnp.float32)

    return Schedule(rate, peak)


def _held(cfg: OptimConfig, peak: float, n: Any, steps_per_epoch: Any, total_steps: Any) -> Any:
    """The rate of update n on a cosine over the whole run that moves in steps of some epochs."""
    hold = cfg.hold_epochs * steps_per_epoch
    # Half an update early: lengths may be fractions, and quotients of whole ones just miss.
    past = jnp.floor((n + 0.5) / hold) * hold
    return _between(cfg.min_lr, peak, jnp.clip(1 - past / total_steps, 0.0, 1.0))


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
    the gradient's moments and is multiplied by the rate; "stableadamw" differs in the moments.

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
    if cfg.name in ("adamw", "stableadamw"):
        scale = optax.scale_by_adam if cfg.name == "adamw" else scale_by_stable_adam
        adam = scale(b1=cfg.momentum, b2=cfg.b2)
        return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
    parts = [decay, optax.trace(cfg.momentum), optax.scale_by_learning_rate(rate)]
    if cfg.name == "lars":
        ratio = optax.scale_by_trust_ratio(trust_coefficient=cfg.trust, eps=1e-8)
        parts.insert(1, optax.masked(ratio, decayed))
    return optax.chain(*parts)


class StableAdamState(NamedTuple):
    """Updates so far, the two moments, and the largest second moment so far."""

    count: jax.Array
    mu: Any
    nu: Any
    peak: Any


def scale_by_stable_adam(b1: float, b2: float, eps: float = 1e-10) -> optax.GradientTransformation:
    """Adam with AMSGrad, whose updates are bounded as StableAdamW's (Wortsman et al. 2023).

    With the gradient g, its moments m and v, and v* the largest v so far, update n is

        m / (d · (1 - b1ⁿ) · max(1, RMS(g / d)))    with    d = √(v* / (1 - b2ⁿ)) + eps

    where RMS is the root mean square over an array; a stack of blocks is one. As in Dinomaly's
    code, whose maximum is of the moments before their bias is corrected, optax's of those after.
    """

    def init(params: Any) -> StableAdamState:
        zeros = [optax.tree.zeros_like(params) for _ in range(3)]
        return StableAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        peak = jax.tree.map(jnp.maximum, state.peak, nu)
        n = count.astype(jnp.float32)

        def step(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            d = jnp.sqrt(v / (1 - b2**n)) + eps
            excess = jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(g / d))))
            return m / d / ((1 - b1**n) * excess)

        updates = jax.tree.map(step, updates, mu, peak)
        return updates, StableAdamState(count, mu, nu, peak)

    return optax.GradientTransformation(init, update)


def lengths_in_state(
    cfg: OptimConfig, batch_size: int
) -> tuple[optax.GradientTransformation, Callable[[TrainState], jax.Array]]:
    """An optimiser that keeps the lengths of its run, and the rate of a training state.

    Runs of other lengths then share a program. The state is {"lengths": (steps per epoch, steps)
    as f32 (2,), which ``init`` leaves at 1, "inner": that of ``make_optimizer``}.
    """

    def schedule(lengths: jax.Array) -> Schedule:
        per_epoch, total = lengths
        return make_schedule(
            cfg, batch_size=batch_size, steps_per_epoch=per_epoch, total_steps=total
        )

    def init(params: Any) -> Any:
        lengths = jnp.ones(2, jnp.float32)
        inner = make_optimizer(cfg, schedule(lengths)).init(params)
        return {"lengths": lengths, "inner": inner}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        tx = make_optimizer(cfg, schedule(state["lengths"]))
        updates, inner = tx.update(updates, state["inner"], params)
        return updates, {**state, "inner": inner}

    def rate(state: TrainState) -> jax.Array:
        return schedule(state.opt_state["lengths"])(state.step)

    return optax.GradientTransformation(init, update), rate
