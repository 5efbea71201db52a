"""SPD's losses by hand and in float64, its hosts, and what a weight of 0 leaves."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core import config as config_module
from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.core.recipe import OptimConfig
from dsad.core.tree import count
from dsad.core.types import RunInfo
from dsad.objectives import mocov2, simclr, simsiam, supervised
from dsad.objectives._spd import (
    SPDConfig,
    SPDTerm,
    classifier_loss,
    plain_loss,
    predictor_loss,
)
from dsad.objectives._term import WithTerm
from dsad.terminal import flags
from dsad.train.optim import make_optimizer, make_schedule
from tests.contracts.objectives import common
from tests.contracts.objectives.simsiam import TRIPLET
from tests.contracts.test_regulariser import stepped
from tests.helpers import command

G = np.random.default_rng(5)
BY_HAND = [np.float32([v]) for v in ((1, 0), (0.8, 0.6), (0.6, 0.8))]


def cos(a, b):
    a, b = np.float64(a), np.float64(b)
    return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_loss_and_its_gradients_by_hand():
    loss, grads = jax.value_and_grad(plain_loss, argnums=(0, 1, 2))(*BY_HAND)
    assert loss == pytest.approx(-0.2)
    expected = ((0, 0.2), (-0.36, 0.48), (0.64, -0.48))
    for gradient, value, vector in zip(grads, expected, BY_HAND, strict=True):
        np.testing.assert_allclose(gradient[0], value, atol=1e-6)
        assert abs(np.sum(gradient * vector)) < 1e-6


def test_bounds_scale_and_zero_vectors():
    loss = jax.jit(plain_loss)
    x, a, b = (np.float32(G.standard_normal((16, 8))) for _ in range(3))
    assert loss(x, a, a) == pytest.approx(0, abs=1e-6)
    assert loss(x, x, -x) == pytest.approx(-2, rel=1e-6)
    assert loss(x, -x, x) == pytest.approx(2, rel=1e-6)
    expected = np.mean(cos(x, b) - cos(x, a))
    assert loss(x, a, b) == pytest.approx(expected, abs=1e-6)
    assert loss(3 * x, 0.1 * a, 70 * b) == pytest.approx(expected, abs=1e-6)
    for i in range(3):
        vectors = [v.copy() for v in (x, a, b)]
        vectors[i][0] = 0
        value, grads = jax.jit(jax.value_and_grad(plain_loss, argnums=(0, 1, 2)))(*vectors)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in grads)


def test_the_predictor_form_has_no_gradient_for_projections():
    z, p = (tuple(np.float32(G.standard_normal((4, 6))) for _ in range(3)) for _ in range(2))
    expected = 0.5 * np.mean(cos(p[0], z[2]) + cos(p[2], z[0]) - cos(p[0], z[1]) - cos(p[1], z[0]))
    loss, (gz, gp) = jax.jit(jax.value_and_grad(predictor_loss, argnums=(0, 1)))(z, p)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert all((g == 0).all() for g in gz)
    assert all(np.abs(g).max() > 0 for g in gp)


def test_the_classifier_form_is_the_cross_entropy_of_positives_and_negatives():
    positive, negative = (np.float32(3 * G.standard_normal(7)) for _ in range(2))
    p = 1 / (1 + np.exp(-np.float64([positive, negative])))
    loss, right = classifier_loss(positive, negative)
    assert loss == pytest.approx(-np.mean([np.log(1 - p[0]), np.log(p[1])]), rel=1e-6)
    assert right == pytest.approx(np.mean([positive < 0, negative >= 0]))


def test_equal_predictions_and_projections_are_perfect():
    x = np.float32(G.standard_normal((5, 6)))
    assert simsiam.simsiam_loss((x, x), (x, x)) == pytest.approx(-1, rel=1e-6)
    p, z = (tuple(np.float32(G.standard_normal((5, 6))) for _ in range(2)) for _ in range(2))
    expected = -np.mean(cos(p[0], z[1]) + cos(p[1], z[0])) / 2
    loss, gradient = jax.value_and_grad(simsiam.simsiam_loss, argnums=1)(p, z)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert all((g == 0).all() for g in gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_cross_entropy_of_labels(smoothing):
    logits, label = G.standard_normal((6, 5)), G.integers(0, 5, 6)
    each = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(5)[label] + smoothing / 5
    expected = -np.mean(np.sum(target * each, axis=1))
    assert supervised.cross_entropy(logits, label, smoothing) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["simsiam", pytest.param("supervised", marks=pytest.mark.slow)])
def test_a_weight_adds_its_term_and_0_leaves_the_method(name):
    """The host's loss, views and gradients are those without SPD; the total differs by the term."""
    member = common.cases()[f"{name}+spd"]
    settings = member.case.config
    silent = member.module.build(
        member.module.Config(**{**settings, "spd": SPDConfig(weight=0.0)}), common.RUN
    )
    assert type(silent) is type(common.build(name))
    weighted = common.build(f"{name}+spd")
    views, ((loss, (_, scalars)), grads) = stepped(common.build(name), name, bitwise=False)
    more_views, ((total, (_, more)), other) = stepped(weighted, name, bitwise=False)
    jax.tree.map(np.testing.assert_array_equal, views, {n: more_views[n] for n in views})
    assert scalars.keys() < more.keys()
    weight = settings["spd"].weight
    assert total - loss == pytest.approx(weight * more["spd_loss"], abs=2e-6)
    kernels = grads["encoder"]["conv1"]["kernel"], other["encoder"]["conv1"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    assert 0 < more["spd_matte_peak"] <= 1


@pytest.mark.parametrize("name", ["simsiam", "mocov2", "simclr", "supervised"])
def test_at_weight_0_every_host_is_itself(name):
    member = common.cases()[f"{name}+spd"]
    build, settings = member.module.build, member.case.config
    silent = dataclasses.replace(settings["spd"], weight=0.0)
    alone = build(member.module.Config(**{**settings, "spd": silent}), common.RUN)
    assert type(alone) is type(common.build(name))
    assert type(build(member.module.Config(**settings), common.RUN)) is WithTerm


@pytest.mark.parametrize("form", ["plain", "predictor", "classifier"])
def test_a_vision_transformer_can_be_the_host(form):
    config = common.cases()["simsiam+spd"].case.config
    spd = dataclasses.replace(config["spd"], form=form)
    host = {**config, "arch": "vit_tiny_patch16_224", "last": "block1", "spd": spd}
    objective = simsiam.build(simsiam.Config(**host), common.RUN)

    def loss(key, batch):
        params, extra = objective.init(key)
        views = objective.views(batch, key)
        return objective.loss(params, extra, views, key=key, step=jnp.int32(0))[0]

    assert jax.eval_shape(loss, jax.random.key(0), common.batch("simsiam+spd")).shape == ()


def test_forms_that_a_host_cannot_give_are_refused():
    case = common.cases()["supervised+spd"].case.config
    for form in ("plain", "predictor"):
        cfg = supervised.Config(**{**case, "spd": SPDConfig(weight=1, form=form)})
        with pytest.raises(ConfigError, match=r"config\.objective\.spd\.form.*classifier"):
            supervised.build(cfg, common.RUN)
    other = dataclasses.replace(TRIPLET.view, mean=(0.0, 0.0, 0.0))
    triplet = dataclasses.replace(TRIPLET, view=other)
    cfg = supervised.Config(**{**case, "spd": SPDConfig(weight=1, form="classifier",
                                                         triplet=triplet)})  # fmt: skip
    with pytest.raises(Refused, match=r"spd\.triplet\.view\.mean"):
        supervised.build(cfg, common.RUN)
    with pytest.raises(ConfigError, match=r"at least 2 categories.*config\.data\.categories"):
        supervised.build(supervised.Config(), dataclasses.replace(common.RUN, classes=1))


@pytest.mark.parametrize("form", ["plain", "predictor", "classifier"])
def test_the_term_tells_positives_from_negatives(form):
    """Vectors that are the views themselves: each form reads the right ones of the batch."""
    host = common.build("simsiam")
    term = SPDTerm(host, SPDConfig(weight=1.0, form=form, triplet=TRIPLET))
    x, a, b = (np.float32(G.standard_normal((4, host.width))) for _ in range(3))
    views = {"anchor": x, "positive": a, "negative": b, "peak": np.ones(4, np.float32)}

    def embed(params, extra, images, *, train, views=1, layers=()):
        del params, train, views, layers
        return {"pooled": images, "z": images, "p": images[:, ::-1]}, extra

    head = term.head.init(jax.random.key(0)) if term.head else ({}, {})
    stand_in = types.SimpleNamespace(embed=embed)
    loss, *_ = jax.jit(lambda head, views: term.loss(stand_in, ({}, {}), head, views))(head, views)
    if form == "classifier":
        layer = head[0]["conv1"]
        logits = [np.float64(v) @ layer["kernel"][:, 0] + layer["bias"] for v in (a, b)]
        expected = np.mean(np.log1p(np.exp([logits[0], -logits[1]])))
    elif form == "plain":
        expected = np.mean(cos(x, b) - cos(x, a))
    else:
        px, pa, pb = (v[:, ::-1] for v in (x, a, b))
        expected = np.mean(cos(px, b) + cos(pb, x) - cos(px, a) - cos(pa, x)) / 2
    assert abs(expected) > 1e-3
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("module", [simsiam, mocov2, simclr])
def test_views_that_do_not_fit_each_other_are_refused(module):
    view = dataclasses.replace(common.VIEW, side=40)
    with pytest.raises(Refused, match=r"objective\.view2\.side: expected view1's 32, found 40"):
        module.Config(view1=common.VIEW, view2=view)


def test_joint_statistics_keep_what_all_negatives_share():
    """Projections of the negatives, all moved by one vector: a norm of their own removes that."""
    host = common.build("simsiam")
    params, extra = jax.jit(host.init)(jax.random.key(0))
    pooled = np.float32(G.standard_normal((8, host.width)))

    def embed(params, extra, images, *, train, views=1, layers=()):
        z, stats = host.heads["z"].apply(params["z"], extra["z"], images, train=train, views=views)
        return {"z": z}, {**extra, "z": stats}

    stand_in = types.SimpleNamespace(embed=embed)
    peak = np.ones(8, np.float32)
    views = {"anchor": pooled, "positive": pooled, "negative": pooled + 1, "peak": peak}

    def gap(statistics):
        term = SPDTerm(host, SPDConfig(weight=1.0, statistics=statistics, triplet=TRIPLET))
        run = jax.jit(lambda trees, views: term.loss(stand_in, trees, ({}, {}), views))
        loss, *_, scalars = run((params, extra), views)
        expected = scalars["cosine_negative"] - scalars["cosine_positive"]
        assert loss == pytest.approx(float(expected), abs=1e-6)
        return float(scalars["cosine_positive"] - scalars["cosine_negative"])

    assert gap("joint") > 0.1
    assert abs(gap("separate")) < 0.01


def test_published_networks_and_schedules():
    run = RunInfo(total_steps=1000, batch_size=512, samples=1_281_167, classes=1000)
    objective = simsiam.build(simsiam.Config(), run)
    params, extra = jax.eval_shape(objective.init, jax.random.key(0))
    assert count(params["encoder"]) == 23_508_032  # torchvision's ResNet-50 without its classifier
    assert params["z"]["conv3"]["kernel"].shape == (2048, 2048)
    assert "norm3" in extra["z"]
    assert "norm3" not in params["z"]
    assert params["p"]["conv1"]["kernel"].shape == (2048, 512)
    assert params["p"]["conv2"]["kernel"].shape == (512, 2048)
    config, _, _ = flags.Command("x", "", config="simsiam").parse([])
    optim = config_module.build_dataclass(OptimConfig, config.optim.to_dict())
    assert (optim.weight_decay, optim.momentum, config.batch_size) == (1e-4, 0.9, 512)
    schedule = make_schedule(optim, batch_size=256, total_steps=1000, steps_per_epoch=10)
    assert schedule(jnp.int32(500)) == pytest.approx(0.025)


def test_the_predictor_s_rate_is_constant():
    config, _, _ = flags.Command("x", "", config="simsiam").parse([])
    optim = config_module.build_dataclass(OptimConfig, config.optim.to_dict())
    tx = make_optimizer(
        optim, make_schedule(optim, batch_size=256, total_steps=2, steps_per_epoch=10)
    )
    params = {name: {"conv1": {"kernel": jnp.zeros((2, 2))}} for name in ("encoder", "z", "p")}
    gradients = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for half in (1.0, 0.5):
        updates, state = tx.update(gradients, state, params)
        momentum = 1.0 if half == 1 else 1.9
        for name, share in (("encoder", half), ("z", half), ("p", 1.0)):
            kernel = updates[name]["conv1"]["kernel"]
            np.testing.assert_allclose(kernel, -0.05 * share * momentum, rtol=1e-5)


@pytest.mark.slow
def test_training_moves_negatives_away_and_keeps_its_spread(tmp_path):
    """A few hundred steps on 64 textures, as a user runs them."""
    words = ["pretrain", "--config=simsiam:smoke,spd", "--workdir=run"]
    # Pieces that 32 pixels show, and a weight that 300 steps can follow.
    more = ("steps=300", "data.synthetic.train=13", "objective.spd.weight=2.0", "optim.name=adamw",
            "optim.lr=1e-3", "optim.lr_batch=0",
            "objective.spd.triplet.blend.area=(0.05, 0.15)")  # fmt: skip
    result = command(*words, *(f"--config.{m}" for m in more), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]

    def mean(name, part):
        return np.mean([v[name] for v in part if name in v])

    first, last = values[:20], values[-20:]
    assert mean("spd_loss", last) < mean("spd_loss", first) - 0.15
    assert mean("spd_cosine_positive", last) > mean("spd_cosine_negative", last) + 0.15
    assert mean("feature_std", last) > 0.5  # 1 is the whole sphere, 0 a collapse
