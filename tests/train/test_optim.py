"""LARS and the schedules against the numbers of the published recipe."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsad.core.errors import ConfigError
from dsad.train.optim import OptimConfig, make_optimizer, make_schedule

#: 14 steps an epoch: what the published code makes of 3,629 images in batches of 256.
RECIPE = {"batch_size": 256, "steps_per_epoch": 14.0, "total_steps": 5600}


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0.02), (70, 2.0), (1679, 2.0), (1680, 0.2), (2240, 0.02), (2800, 0.002)]
)
def test_intended_schedule(step, want):
    schedule = make_schedule(OptimConfig(), **RECIPE)
    assert float(schedule(jnp.int32(step))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "want"),
    [(0, 0.0482857), (34, 1.9717143), (1644, 1.9717143), (1645, 0.19717143), (2205, 0.019717143),
     (2765, 0.0019717143)],
)  # fmt: skip
def test_published_schedule(step, want):
    schedule = make_schedule(OptimConfig(published_schedule=True), **RECIPE)
    assert float(schedule(jnp.int32(step))) == pytest.approx(want, rel=1e-5)


def test_cosine_schedule_ends_at_its_minimum():
    schedule = make_schedule(OptimConfig(schedule="cosine", min_lr=1e-6), **RECIPE)
    assert float(schedule(jnp.int32(70))) == pytest.approx(2.0)
    assert float(schedule(jnp.int32(70 + (5600 - 70) // 2))) == pytest.approx(1.0, rel=1e-5)
    assert float(schedule(jnp.int32(5600))) == pytest.approx(1e-6, abs=1e-6)


def test_the_rate_scales_with_the_batch():
    schedule = make_schedule(OptimConfig(schedule="constant", warmup_epochs=0.0),
                             batch_size=64, steps_per_epoch=1, total_steps=10)  # fmt: skip
    assert float(schedule(jnp.int32(0))) == pytest.approx(0.5)


def descend(cfg, params, grads, steps):
    tx = make_optimizer(cfg, lambda step: jnp.float32(2.0))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_lars_by_hand():
    params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0, 2.0])}
    grads = {"kernel": jnp.array([0.0, 1.0]), "bias": jnp.array([0.1, 0.0])}
    one = descend(OptimConfig(), params, grads, 1)
    two = descend(OptimConfig(), params, grads, 2)
    assert float(one["kernel"][1]) == pytest.approx(3.99, abs=1e-6)
    assert float(two["kernel"][1]) == pytest.approx(3.9710159, abs=1e-6)
    np.testing.assert_allclose(one["bias"], [0.8, 2.0], atol=1e-6)
    np.testing.assert_allclose(two["bias"], [0.42, 2.0], atol=1e-6)


def test_zero_norms_leave_the_trust_ratio_at_one():
    cfg = OptimConfig(weight_decay=0.0)
    params, grads = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([0.0, 1.0])}
    np.testing.assert_allclose(descend(cfg, params, grads, 1)["kernel"], [0.0, -2.0], atol=1e-6)


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"milestones": (160.0, 120.0)}])
def test_unusable_settings_name_their_key(values):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values)


def test_the_published_variant_counts_steps_as_the_published_code():
    """Through the command's own arithmetic: 14 whole steps an epoch, 5,600 in all."""
    from dsad.cli import flags, pretrain

    config, _, _ = flags.Command("pretrain", "", config="ds2:published").parse([])
    run, _, method = pretrain.parse(config)
    per_epoch, total = pretrain.lengths(run, 3629)
    assert (per_epoch, total, method.momentum_steps) == (14.0, 5600, 5670)
    schedule = make_schedule(
        run.optim, batch_size=run.batch_size, steps_per_epoch=per_epoch, total_steps=total
    )
    assert float(schedule(jnp.int32(34))) == pytest.approx(1.9717143, rel=1e-6)
    assert float(schedule(jnp.int32(1645))) == pytest.approx(0.19717143, rel=1e-5)
