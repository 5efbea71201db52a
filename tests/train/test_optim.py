"""LARS, AdamW and the schedules against the numbers of the published recipes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.recipe import OptimConfig
from dsad.core.sharding import state_shardings
from dsad.core.tree import flatten
from dsad.train.optim import Schedule, lengths_in_state, make_optimizer, make_schedule
from dsad.train.state import TrainState

#: The published recipe of DS2.
DS2 = OptimConfig(
    name="lars", lr=2.0, lr_batch=256, weight_decay=1e-5, schedule="step", warmup_epochs=5.0,
    warmup_multiplier=100.0, milestones=(120.0, 160.0, 200.0), min_lr=1e-6,
)  # fmt: skip
#: 14 steps an epoch: what the published code makes of 3,629 images in batches of 256.
RECIPE = {"batch_size": 256, "steps_per_epoch": 14.0, "total_steps": 5600}


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0.02), (70, 2.0), (1679, 2.0), (1680, 0.2), (2240, 0.02), (2800, 0.002)]
)
def test_intended_schedule(step, want):
    schedule = make_schedule(DS2, **RECIPE)
    assert float(schedule(jnp.int32(step))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "want"),
    [(0, 0.0482857), (34, 1.9717143), (1644, 1.9717143), (1645, 0.19717143), (2205, 0.019717143),
     (2765, 0.0019717143)],
)  # fmt: skip
def test_published_schedule(step, want):
    schedule = make_schedule(dataclasses.replace(DS2, published_schedule=True), **RECIPE)
    assert float(schedule(jnp.int32(step))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "periodic", "constant"])
def test_the_published_counting_is_refused_with_other_schedules(schedule):
    message = (
        rf"optim\.published_schedule: expected False with optim\.schedule='{schedule}', found "
        r"True\. .* set optim\.schedule='step' or optim\.published_schedule=False"
    )
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DS2, schedule=schedule, published_schedule=True)


def test_cosine_schedule_ends_at_its_minimum():
    schedule = make_schedule(dataclasses.replace(DS2, schedule="cosine"), **RECIPE)
    assert float(schedule(jnp.int32(70))) == pytest.approx(2.0)
    assert float(schedule(jnp.int32(70 + (5600 - 70) // 2))) == pytest.approx(1.0, rel=1e-5)
    assert float(schedule(jnp.int32(5600))) == pytest.approx(1e-6, abs=1e-6)


#: MAE's schedule, and that of ISSTAD's first stage: warm-up from exactly 0, then to exactly 0.
MAE = OptimConfig(
    name="adamw",
    lr=1.5e-4,
    lr_batch=256,
    schedule="cosine",
    warmup_epochs=40.0,
    warmup_multiplier=0.0,
    min_lr=0.0,
)
STAGE_1 = dataclasses.replace(MAE, lr=1e-3)
#: ISSTAD's second stage: a rate that no batch scales, up and down without a warm-up.
STAGE_2 = dataclasses.replace(
    MAE, lr=1e-3, lr_batch=0, schedule="periodic", warmup_epochs=0.0, min_lr=1e-6
)


def rates(cfg, *, batch_size, per_epoch, epochs):
    """The rate of every update of a run, and of the one after its last."""
    total = round(epochs * per_epoch)
    schedule = make_schedule(
        cfg, batch_size=batch_size, steps_per_epoch=per_epoch, total_steps=total
    )
    return np.float64(jax.vmap(schedule)(jnp.arange(total + 1)))


def test_mae_schedule():
    found = rates(MAE, batch_size=4096, per_epoch=8.0, epochs=800)
    assert found[0] == found[6400] == 0
    assert found[8 * 40] == found.max() == pytest.approx(2.4e-3, rel=1e-6)
    assert found[8 * 20] == pytest.approx(1.2e-3, rel=1e-6)
    epochs = np.arange(6401) / 8
    falling = 2.4e-3 * (1 + np.cos(np.pi * (epochs - 40) / 760)) / 2
    expected = np.where(epochs < 40, 2.4e-3 * epochs / 40, falling)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_isstad_stage_1_schedule():
    found = rates(STAGE_1, batch_size=20, per_epoch=6.0, epochs=305)
    for epoch, rate in [(40, 7.8125e-5), (172.5, 3.90625e-5), (300, 6.8604e-8)]:
        assert found[round(6 * epoch)] == pytest.approx(rate, rel=1e-5)
    means = found[:-1].reshape(305, 6).mean(axis=1)
    for epoch, rate in [(0, 8.138021e-7), (1, 2.766927e-6), (304, 1.156437e-9)]:
        assert means[epoch] == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("per_epoch", [6.0, 10.45, 209 / 16, 0.4])
def test_isstad_stage_2_schedule(per_epoch):
    found = rates(STAGE_2, batch_size=16, per_epoch=per_epoch, epochs=200)
    first = lambda e: int(np.ceil(e * per_epoch - 1e-9))  # noqa: E731
    published = [(0, 1e-3), (15, 5.005e-4), (30, 1e-6), (60, 1e-3), (199, 2.97335e-4)]
    for epoch, rate in published if per_epoch > 1 else published[:1]:
        assert found[first(epoch)] == pytest.approx(rate, rel=1e-5)
    epochs = np.floor(np.arange(len(found)) / per_epoch + 1e-9)
    expected = 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * epochs / 30)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_periodic_schedule_can_warm_up():
    cfg = dataclasses.replace(STAGE_2, warmup_epochs=2.0)
    found = rates(cfg, batch_size=16, per_epoch=5.0, epochs=60)
    np.testing.assert_allclose(found[:10], 1e-3 * np.arange(10) / 10, rtol=1e-6)
    np.testing.assert_array_equal(
        found[10:], rates(STAGE_2, batch_size=16, per_epoch=5.0, epochs=60)[10:]
    )


def test_the_rate_scales_with_the_batch():
    schedule = make_schedule(OptimConfig(lr=2.0, lr_batch=256),
                             batch_size=64, steps_per_epoch=1, total_steps=10)  # fmt: skip
    assert float(schedule(jnp.int32(0))) == pytest.approx(0.5)


def descend(cfg, params, grads, steps):
    tx = make_optimizer(cfg, Schedule(lambda step: jnp.float32(2.0), peak=2.0))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_lars_by_hand():
    params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0, 2.0])}
    grads = {"kernel": jnp.array([0.0, 1.0]), "bias": jnp.array([0.1, 0.0])}
    one = descend(DS2, params, grads, 1)
    two = descend(DS2, params, grads, 2)
    assert float(one["kernel"][1]) == pytest.approx(3.99, abs=1e-6)
    assert float(two["kernel"][1]) == pytest.approx(3.9710159, abs=1e-6)
    np.testing.assert_allclose(one["bias"], [0.8, 2.0], atol=1e-6)
    np.testing.assert_allclose(two["bias"], [0.42, 2.0], atol=1e-6)


def test_zero_norms_leave_the_trust_ratio_at_one():
    cfg = dataclasses.replace(DS2, weight_decay=0.0)
    params, grads = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([0.0, 1.0])}
    np.testing.assert_allclose(descend(cfg, params, grads, 1)["kernel"], [0.0, -2.0], atol=1e-6)


def test_adamw_decays_as_torch_does():
    """Decoupled decay times the rate, in float64, on every leaf but norm scales and biases."""
    shapes = {
        "cls": (3,), "mask_token": (3,), "registers": (2, 3), "pos": (4, 3),
        "blocks": {
            "norm1": {"scale": (2, 3), "bias": (2, 3)}, "scale1": {"gamma": (2, 3)},
            "qkv": {"kernel": (2, 3, 9), "bias": (2, 9)},
        },
        "norm": {"scale": (3,), "bias": (3,)},
    }  # fmt: skip
    exempt = {"scale", "bias", "gamma"}
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
    params, grads, lr = draw(), [draw() for _ in range(5)], [0.1, 0.02, 0.3, 0.0, 0.05]
    cfg = dataclasses.replace(MAE, b2=0.95, weight_decay=0.05)
    tx = make_optimizer(cfg, Schedule(lambda step: jnp.asarray(lr, jnp.float32)[step], peak=0.3))
    found = jax.tree.map(jnp.float32, params)
    state = tx.init(found)
    for grad in grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, grad), state, found)
        found = optax.apply_updates(found, updates)

    def by_hand(path, value, *gradients):
        decay = 0.0 if path[-1].key in exempt else 0.05
        first, second = np.zeros_like(value), np.zeros_like(value)
        for t, (gradient, rate) in enumerate(zip(gradients, lr, strict=True), start=1):
            value = value * (1 - rate * decay)
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            step = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
            value = value - rate * step
        return value

    expected = jax.tree.map_with_path(by_hand, params, *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


#: Two groups and the rest; "predictor" keeps the peak rate, of which no other group has anything.
GROUPS = (("predictor", 3.0, 0.5, False), ("kernel$", 0.25, 2.0, True))
FACTORS = {  # rate, decay, scheduled; exempt paths have no decay whatever their group says
    "encoder/kernel": (0.25, 2.0, True), "encoder/bias": (1.0, 0.0, True),
    "token": (1.0, 1.0, True),
    "predictor/kernel": (3.0, 0.5, False), "predictor/bias": (3.0, 0.0, False),
}  # fmt: skip
RATES, PEAK = (0.0, 0.02, 0.05, 0.01), 0.05


def drawn(rng):
    shapes = {
        "encoder": {"kernel": (4, 3), "bias": (3,)}, "token": (3,),
        "predictor": {"kernel": (3, 2), "bias": (2,)},
    }  # fmt: skip
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def by_hand(cfg, params, gradients):
    """The updates of each named method in float64, a parameter at a time."""
    result = {}
    for path, x in flatten(params).items():
        factor, decay, scheduled = FACTORS[path]
        exempt, decay = decay == 0.0, decay * cfg.weight_decay
        first, second, v = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for t, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
            g, rate = flatten(gradient)[path], factor * (rate if scheduled else PEAK)
            if cfg.name == "adamw":
                first = cfg.momentum * first + (1 - cfg.momentum) * g
                second = cfg.b2 * second + (1 - cfg.b2) * g**2
                root = np.sqrt(second / (1 - cfg.b2**t)) + 1e-8
                x = x - rate * decay * x - rate * first / (1 - cfg.momentum**t) / root
                continue
            g = g + decay * x
            if cfg.name == "lars" and not exempt:
                g = g * cfg.trust * np.linalg.norm(x) / (np.linalg.norm(g) + 1e-8)
            v = cfg.momentum * v + g
            x = x - rate * v
        result[path] = x
    return result


def after(tx, params, gradients):
    """Parameters after the updates, and the optimiser's state."""
    values = jax.tree.map(jnp.float32, params)
    state = tx.init(values)
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.float32, gradient), state, values)
        values = optax.apply_updates(values, updates)
    return values, state


def scheduled(step):
    return jnp.asarray(RATES, jnp.float32)[step]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_groups_have_rates_and_decays_of_their_own(name):
    cfg = OptimConfig(name=name, b2=0.95, weight_decay=0.3, trust=0.5, groups=GROUPS)
    rng = np.random.default_rng(1)
    params, gradients = drawn(rng), [drawn(rng) for _ in RATES]
    found, _ = after(make_optimizer(cfg, Schedule(scheduled, PEAK)), params, gradients)
    expected = by_hand(cfg, params, gradients)
    for path, value in flatten(found).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
    # At rate 0 of the schedule only the unscheduled group moves.
    moved, _ = after(make_optimizer(cfg, Schedule(scheduled, PEAK)), params, gradients[:1])
    start = flatten(jax.tree.map(jnp.float32, params))
    assert {p for p, x in flatten(moved).items() if (x != start[p]).any()} == {
        "predictor/kernel", "predictor/bias",
    }  # fmt: skip


def test_a_schedule_carries_its_peak():
    """What unscheduled groups keep: the rate for this batch size, whatever the schedule does."""
    schedule = make_schedule(DS2, batch_size=64, steps_per_epoch=14.0, total_steps=5600)
    assert schedule.peak == 0.5
    assert max(float(schedule(jnp.int32(n))) for n in (0, 70, 1680)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_without_groups_and_clipping_the_chain_is_the_plain_one(name):
    """Bitwise, and with the same structure of state."""
    cfg = OptimConfig(name=name, weight_decay=0.3, b2=0.95)

    def decayed(params):
        paths = dict.fromkeys(flatten(params))
        keep = [not p.endswith("bias") for p in paths]
        return jax.tree.unflatten(jax.tree.structure(params), keep)

    decay = optax.add_decayed_weights(0.3, mask=decayed)
    rate = optax.scale_by_learning_rate(scheduled)
    ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001, eps=1e-8), decayed)
    plain = {
        "sgd": (decay, optax.trace(0.9), rate),
        "adamw": (optax.scale_by_adam(b1=0.9, b2=0.95), decay, rate),
        "lars": (decay, ratio, optax.trace(0.9), rate),
    }[name]
    rng = np.random.default_rng(2)
    params, gradients = drawn(rng), [drawn(rng) for _ in RATES]
    found = after(make_optimizer(cfg, Schedule(scheduled, PEAK)), params, gradients)
    jax.tree.map(
        np.testing.assert_array_equal, found, after(optax.chain(*plain), params, gradients)
    )


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_clipping_comes_first_and_sees_all_parameters(groups):
    rng = np.random.default_rng(3)
    params, gradients = drawn(rng), [drawn(rng) for _ in RATES]
    norms = [np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g))) for g in gradients]
    limit = (min(norms) + max(norms)) / 2  # some gradients are clipped, some are not
    clipped = [
        jax.tree.map(lambda x, n=norm: x * min(1.0, limit / n), g)
        for g, norm in zip(gradients, norms, strict=True)
    ]
    cfg = OptimConfig(name="sgd", weight_decay=0.3, groups=groups)
    found, _ = after(
        make_optimizer(dataclasses.replace(cfg, clip=float(limit)), Schedule(scheduled, PEAK)),
        params, gradients,
    )  # fmt: skip
    plain = make_optimizer(cfg, Schedule(scheduled, PEAK))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found, after(plain, params, clipped)[0],
    )  # fmt: skip
    unclipped = flatten(after(plain, params, gradients)[0])
    assert not np.allclose(flatten(found)["token"], unclipped["token"], rtol=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_moments_of_groups_lie_as_their_parameters_do(name):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    cfg = OptimConfig(name=name, groups=GROUPS)
    params = jax.tree.map(jnp.float32, drawn(np.random.default_rng(4)))
    state = make_optimizer(cfg, Schedule(scheduled, PEAK)).init(params)
    rules = (("encoder/kernel", "-,-"), ("kernel", "-,fsdp"))
    lies, rest = state_shardings(params, {"opt_state": state}, mesh, 1, rules)
    homes, shapes = flatten(lies), {p: x.shape for p, x in flatten(params).items()}
    assert tuple(homes["predictor/kernel"].spec) == (None, "fsdp")
    assert homes["encoder/kernel"] != homes["predictor/kernel"]
    count = dict.fromkeys(homes, 0)
    for path, leaf in flatten(state).items():
        for home in homes:
            if path.endswith(f"/{home}") and leaf.shape == shapes[home]:
                count[home] += 1
                assert flatten(rest["opt_state"])[path] == homes[home], path
    assert set(count.values()) == {2 if name == "adamw" else 1}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("predictr", 1.0, 1.0, True),),
         r"config.optim.groups\[0\] 'predictr' matches no array.*largest.*: encoder/kernel"),
        ((("kernel", 1.0, 1.0, True), ("encoder/kernel", 2.0, 1.0, True)),
         r"config.optim.groups\[1\] 'encoder/kernel' .*an earlier one takes them all"),
    ],
)  # fmt: skip
def test_groups_without_parameters_are_refused(groups, message):
    tx = make_optimizer(OptimConfig(groups=groups), Schedule(scheduled, PEAK))
    with pytest.raises(ConfigError, match=message):
        tx.init(drawn(np.random.default_rng(0)))


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"milestones": (160.0, 120.0)}, {"warmup_multiplier": -1.0}, {"min_lr": -1.0},
     {"period_epochs": 0.0}, {"clip": -1.0}, {"weight_decay": -0.1}, {"exempt": "(bias"},
     {"groups": (("hea(d", 1.0, 1.0, True),)}, {"groups": (("head", -1.0, 1.0, True),)}],
)  # fmt: skip
def test_unusable_settings_name_their_key(values):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values)


def test_the_published_variant_counts_steps_as_the_published_code():
    """Through the command's own arithmetic: 14 whole steps an epoch, 5,600 in all."""
    from dsad.assembly import pretrain
    from dsad.terminal import flags

    config, _, _ = flags.Command("pretrain", "", config="ds2:published").parse([])
    run, _, method = pretrain.parse(config)
    per_epoch, total = pretrain.lengths(run, 3629)
    assert (per_epoch, total, method.momentum_steps) == (14.0, 5600, 5670)
    schedule = make_schedule(
        run.optim, batch_size=run.batch_size, steps_per_epoch=per_epoch, total_steps=total
    )
    assert float(schedule(jnp.int32(34))) == pytest.approx(1.9717143, rel=1e-6)
    assert float(schedule(jnp.int32(1645))) == pytest.approx(0.19717143, rel=1e-5)


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_runs_of_other_lengths_share_a_program(schedule):
    """Lengths in the state: every rate and update is that of the run's own optimiser."""
    cfg = OptimConfig(
        lr=0.3, schedule=schedule, warmup_epochs=2.0, milestones=(3.0, 5.0), weight_decay=0.1,
        groups=((r"^a$", 0.5, 0.0, False),),
    )  # fmt: skip
    tx, rate = lengths_in_state(cfg, batch_size=8)
    start = {"a": jnp.ones(3), "b": jnp.asarray([-2.0, 1.0], jnp.float32)}

    @jax.jit
    def step(state):
        updates, opt_state = tx.update(state.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = TrainState(step=state.step + 1, params=params, extra={}, opt_state=opt_state)
        return after, rate(state)

    for per_epoch, total in ((2.5, 17), (4.0, 30)):
        plain = make_schedule(cfg, batch_size=8, steps_per_epoch=per_epoch, total_steps=total)
        expected, alone = start, make_optimizer(cfg, plain)
        inner = alone.init(start)
        opt_state = {**tx.init(start), "lengths": jnp.asarray([per_epoch, total], jnp.float32)}
        state = TrainState(step=jnp.int32(0), params=start, extra={}, opt_state=opt_state)
        for n in range(total):
            updates, inner = alone.update(expected, inner, expected)
            expected = optax.apply_updates(expected, updates)
            state, found = step(state)
            np.testing.assert_allclose(found, plain(n), rtol=1e-5, atol=1e-7)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.params, expected
        )
    assert step._cache_size() == 1


def test_stableadamw_equals_its_equations():
    """In float64; the third gradient is so large that its update is bounded."""
    cfg = OptimConfig(name="stableadamw", weight_decay=0.1, exempt="$^")
    rng = np.random.default_rng(0)
    p = rng.standard_normal((3, 4))
    tx = make_optimizer(cfg, Schedule(lambda step: jnp.float32(0.01), peak=0.01))
    params = {"kernel": jnp.asarray(p, jnp.float32)}
    state, (m, v, peak), bounded = tx.init(params), np.zeros((3, 3, 4)), []
    for n, size in enumerate([1, 0.01, 30, 0.1, 0.001, 0.001], start=1):
        g = size * rng.standard_normal((3, 4))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        peak = np.maximum(peak, v)
        d = np.sqrt(peak / (1 - 0.999**n)) + 1e-10
        bounded.append(np.sqrt(np.mean((g / d) ** 2)))
        p = p * (1 - 0.01 * 0.1) - 0.01 / (1 - 0.9**n) / max(1, bounded[-1]) * m / d
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    assert min(bounded) < 1 < max(bounded)
    assert (peak > v).any()
    np.testing.assert_allclose(params["kernel"], p, rtol=1e-5, atol=1e-6)
