"""RotPred against the published numbers and an independent float64 implementation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dsad.augment.views import make_view
from dsad.core.rng import named
from dsad.core.tree import count
from dsad.core.types import RunInfo
from dsad.objectives import rotpred
from tests.contracts.objectives import common

KEY = jax.random.key(4)
loss_of = jax.jit(rotpred.rotation_loss, static_argnums=2)


def test_the_published_network():
    """6272 values of a pair: 64 of 7 × 7 cells, of both images."""
    objective = rotpred.build(
        rotpred.Config(), RunInfo(total_steps=9, batch_size=4, samples=9, classes=1)
    )
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    assert count(params["encoder"]) == 11_176_512
    shapes = {
        f"{net}/{layer}": leaf["kernel"].shape
        for net in ("cells", "pair", "logits")
        for layer, leaf in params[net].items()
        if "kernel" in leaf
    }
    assert shapes == {
        "cells/conv1": (512, 256), "cells/conv2": (256, 64), "pair/conv1": (6272, 1024),
        "pair/conv2": (1024, 512), "pair/conv3": (512, 512), "logits/conv1": (512, 4),
    }  # fmt: skip


def test_the_loss_of_sure_logits():
    for turn in range(4):
        logits = np.eye(4, dtype=np.float32)[[turn]] * 7
        quarters = np.array([turn], np.int32)
        loss, right = loss_of(logits, quarters, 0.2)
        assert float(loss) == pytest.approx(math.log(1 + 3 * math.exp(-5)), abs=1e-6)
        assert float(loss) == pytest.approx(0.0200123, abs=1e-6)
        assert np.asarray(right).all()


def test_the_loss_equals_float64():
    g = np.random.default_rng(0)
    logits = g.normal(size=(50, 4)).astype(np.float32)
    quarters = g.integers(0, 4, 50).astype(np.int32)
    for temperature in (0.2, 1.0):
        loss, right = loss_of(logits, quarters, temperature)
        wide = logits.astype(np.float64)
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        each = special.log_softmax(wide / temperature, axis=1)
        assert float(loss) == pytest.approx(-each[np.arange(50), quarters].mean(), abs=1e-6)
        np.testing.assert_array_equal(right, wide.argmax(axis=1) == quarters)
    zero = jax.grad(lambda x: loss_of(x, quarters, 0.2)[0])(jnp.zeros((50, 4)))
    assert np.isfinite(zero).all()


def test_turns_are_exact():
    images = np.random.default_rng(0).random((8, 5, 5, 3), dtype=np.float32)
    quarters = np.arange(8, dtype=np.int32) % 4
    found = jax.jit(rotpred.turned)(images, quarters)
    for i in range(8):
        np.testing.assert_array_equal(found[i], np.rot90(images[i], quarters[i]))


@functools.cache
def made(epoch=0, **changes):
    """Views of the contract's batch, on the host."""
    config = rotpred.Config(**{**common.cases()["rotpred"].case.config, **changes})
    objective = rotpred.build(config, common.RUN)
    return jax.device_get(jax.jit(objective.views)(common.batch("rotpred", epoch), KEY))


def test_a_turned_copy_is_the_view_turned():
    """With neither jitter, blur, grey nor solarizing, which are the copy's alone."""
    view = common.cases()["rotpred"].case.config["view"]
    still = dataclasses.replace(
        view, jitter_probability=0.0, blur_probability=0.0, grey_probability=0.0,
        solarize_probability=0.0,
    )  # fmt: skip
    views, changed = made(view=still), made()
    for number in (1, 2):
        plain, copy = views[f"view{number}"], views[f"turned{number}"]
        for image, other, quarters in zip(plain, copy, views["quarters"], strict=True):
            np.testing.assert_allclose(np.rot90(image, quarters), other, atol=1e-6)
        np.testing.assert_allclose(changed[f"view{number}"], plain, atol=1e-6)
        difference = np.abs(changed[f"turned{number}"] - copy).max(axis=(1, 2, 3))
        assert (difference > 0.1).sum() >= 6
    assert np.abs(views["view1"] - views["view2"]).max(axis=(1, 2, 3)).min() > 0.5
    np.testing.assert_array_equal(changed["quarters"], views["quarters"])


def test_the_copy_is_the_whole_recipe():
    case = common.cases()["rotpred"].case.config["view"]
    batch = common.batch("rotpred")
    view = jax.jit(lambda batch: make_view(batch, named(KEY, "view1"), case)["image"])(batch)
    views = made()
    for image, copy, quarters in zip(view, views["turned1"], views["quarters"], strict=True):
        np.testing.assert_allclose(np.rot90(image, quarters), copy, atol=1e-5)


def drawn(epoch, fixed, count=2000):
    objective = rotpred.build(
        rotpred.Config(**common.cases()["rotpred"].case.config, fixed_classes=fixed), common.RUN
    )
    batch = {"index": np.arange(count, dtype=np.int32), "epoch": np.full(count, epoch, np.int32)}
    return np.asarray(jax.jit(objective._quarters)(batch, KEY))


def test_classes_are_drawn_anew_in_every_epoch_or_once():
    first, later = drawn(0, False), drawn(1, False)
    for quarters in (first, later):
        assert stats.chisquare(np.bincount(quarters, minlength=4)).pvalue > 1e-3
    assert (first == later).mean() == pytest.approx(0.25, abs=0.05)
    fixed = drawn(0, True)
    np.testing.assert_array_equal(fixed, drawn(1, True))
    assert stats.chisquare(np.bincount(fixed, minlength=4)).pvalue > 1e-3


def norm64(x, params):
    """Batch norm in training, the four images, or the two pairs, one after the other."""
    x = (x - x.mean(axis=tuple(range(x.ndim - 1)))) / np.sqrt(
        x.var(axis=tuple(range(x.ndim - 1))) + 1e-5
    )
    return x * params["scale"] + params["bias"]


def head64(params, maps):
    """The published head, in float64: maps (b, h, w, c) by name of the image to logits by view."""
    cells, pair = params["cells"], params["pair"]
    small = {}
    for name, x in maps.items():
        x = np.maximum(norm64(x @ cells["conv1"]["kernel"], cells["norm1"]), 0)
        x = x @ cells["conv2"]["kernel"] + cells["conv2"]["bias"]
        small[name] = x.reshape(len(x), -1)
    logits = []
    for number in (1, 2):
        x = np.concatenate([small[f"view{number}"], small[f"turned{number}"]], axis=1)
        for layer in (1, 2):
            x = norm64(x @ pair[f"conv{layer}"]["kernel"], pair[f"norm{layer}"])
            x = np.maximum(x, 0)
        x = x @ pair["conv3"]["kernel"] + pair["conv3"]["bias"]
        logits.append(x @ params["logits"]["conv1"]["kernel"] + params["logits"]["conv1"]["bias"])
    return logits


def test_the_objective_equals_float64():
    """Head, loss and accuracies on the encoder's maps, each image with statistics of its own."""
    objective, params, extra = common.perturbed("rotpred")
    views = made()

    @jax.jit
    def everything(params, extra, views):
        maps = {}
        for name in rotpred.SEEN:
            vectors, _ = objective.embed(
                params, extra, views[name], train=True, layers=(objective.layer,)
            )
            maps[name] = vectors[objective.layer]
        return maps, objective.loss(params, extra, views, key=KEY, step=0)

    maps, (loss, (_, scalars)) = jax.device_get(everything(params, extra, views))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, maps))
    quarters, losses = views["quarters"], []
    for number, logits in enumerate(head64(*wide), start=1):
        each = special.log_softmax(5 * logits / np.linalg.norm(logits, axis=1)[:, None], axis=1)
        losses.append(-each[np.arange(len(each)), quarters].mean())
        right = (logits.argmax(axis=1) == quarters).mean()
        assert scalars[f"accuracy{number}"] == pytest.approx(right)
    assert loss == pytest.approx(np.mean(losses), abs=2e-4)
    assert scalars["accuracy"] == pytest.approx(
        (scalars["accuracy1"] + scalars["accuracy2"]) / 2, abs=1e-6
    )


def test_other_encoders_can_be_trained():
    small = {"arch": "vit_tiny_patch16_224", "cells": (8, 4), "hidden": (8, 8)}
    config = rotpred.Config(**small, view=dataclasses.replace(rotpred.TURNED, side=64))
    objective = rotpred.build(config, common.RUN)
    params, extra = jax.eval_shape(objective.init, jax.random.key(0))
    assert params["pair"]["conv1"]["kernel"].shape == (2 * 4 * 4 * 4, 8)
    views = {name: np.zeros((2, 64, 64, 3), np.float32) for name in rotpred.SEEN}
    views["quarters"] = np.zeros(2, np.int32)
    loss, _ = jax.eval_shape(
        lambda p, e: objective.loss(p, e, views, key=KEY, step=0), params, extra
    )
    assert loss.shape == ()
