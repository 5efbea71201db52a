"""Segmentation of corruptions: head and loss in float64, its views, and the term of a host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment.views import make_view
from dsad.core import rng
from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.models.norm import EPSILON
from dsad.objectives import corrupt, ds2, mae
from dsad.objectives._segmentation import (
    HEAD,
    Segmentation,
    SegmentationConfig,
    segmentation_loss,
)
from dsad.objectives._term import WithTerm
from tests.contracts.objectives import common
from tests.contracts.objectives.corrupt import SETTINGS, TERM
from tests.helpers import earlier_weights

G = np.random.default_rng(3)


def test_the_loss_is_the_weighted_cross_entropy():
    logits, labels = 3 * G.standard_normal((2, 5, 5)), G.uniform(size=(2, 5, 5))
    labels[0] = labels[0] > 0.5
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(4 * labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert segmentation_loss(logits, labels, 4.0) == pytest.approx(expected, rel=1e-6)
    extreme = segmentation_loss(jnp.array([300.0, -300.0]), jnp.array([0, 1]), 4.0)
    assert extreme == pytest.approx((300 + 4 * 300) / 2)


def bilinear(maps, size):
    """Half-pixel centres, clamped, in float64, along the two middle axes."""
    for axis in (1, 2):
        n = maps.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))
        maps = np.moveaxis(np.tensordot(maps, weights, (axis, 1)), -1, axis)
    return maps


def test_the_head_is_that_of_its_description():
    maps = {"a": G.standard_normal((3, 2, 2, 5)), "b": G.standard_normal((3, 4, 4, 3))}
    cfg = SegmentationConfig(
        layers=("a", "b"), width=6, view=common.CROP, shapes=SETTINGS["shapes"]
    )
    segmentation = Segmentation(cfg, maps, jnp.float32)
    params, stats = jax.jit(segmentation.head.init)(jax.random.key(0))
    params = jax.tree.map(lambda v: v + 0.1 * jnp.arange(v.size).reshape(v.shape) % 1, params)
    single = {n: jnp.asarray(m, jnp.float32) for n, m in maps.items()}
    logits, after = segmentation.logits(params, stats, single)
    w = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    x = np.concatenate([bilinear(maps["a"], 4), maps["b"]], -1) @ w["conv1"]["kernel"]
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) / np.sqrt(var + EPSILON) * w["norm1"]["scale"] + w["norm1"]["bias"]
    x = np.maximum(x, 0) @ w["conv2"]["kernel"] + w["conv2"]["bias"]
    np.testing.assert_allclose(logits, bilinear(x, common.SIDE)[..., 0], atol=2e-5)
    np.testing.assert_allclose(after["norm1"]["mean"], 0.1 * mean, atol=1e-6)


def test_views_are_corrupted_crops_and_know_where():
    objective, key = common.build("corrupt"), jax.random.key(4)
    batch = common.batch("corrupt")
    views = jax.device_get(jax.jit(objective.views)(batch, key))
    clean = jax.jit(lambda b, k: make_view(b, k, common.CROP))(batch, rng.named(key, "view"))
    np.testing.assert_allclose(
        views["image"][~views["label"]], np.asarray(clean["image"])[~views["label"]], atol=1e-5
    )
    assert 0.01 < views["label"].mean() < 0.5
    # Of two batches that differ in one image, the views differ in its own and the following one.
    image = np.array(batch["image"])
    image[3] = 255 - image[3]
    other = jax.device_get(jax.jit(objective.views)({**batch, "image": image}, key))
    differ = np.any(views["image"] != other["image"], axis=(1, 2, 3))
    assert differ[3]
    assert {*np.flatnonzero(differ)} <= {3, 4}


def test_scalars_of_the_segmentation():
    cfg = SegmentationConfig(layers=("a",), view=common.CROP, shapes=SETTINGS["shapes"])
    maps = {"a": jnp.asarray(G.standard_normal((2, 4, 4, 3)), jnp.float32)}
    segmentation = Segmentation(cfg, maps, jnp.float32)
    params, stats = jax.jit(segmentation.head.init)(jax.random.key(0))
    label = np.zeros((2, common.SIDE, common.SIDE), bool)
    label[0, :8, :8] = label[1, 9:12, :2] = True
    loss, (_, scalars) = segmentation.loss(params, stats, maps, jnp.asarray(label))
    logits, _ = segmentation.logits(params, stats, maps)
    assert loss == pytest.approx(float(segmentation_loss(logits, label, 4.0)))
    called = np.asarray(logits) > 0
    assert scalars["iou"] == pytest.approx((called & label).sum() / (called | label).sum())
    assert scalars["changed"] == pytest.approx(label.mean())


def test_another_image_needs_a_batch_of_two():
    objective, batch = common.build("corrupt"), common.batch("corrupt")
    one = jax.tree.map(lambda x: x[:1], batch)
    with pytest.raises(ConfigError, match=r"shapes\.sources: expected no 'other' .* single image"):
        jax.eval_shape(objective.views, one, jax.random.key(0))


@pytest.mark.parametrize("arch", ["mae_vit_tiny_patch16", "vit_small_patch16_dinov3"])
def test_a_transformer_ends_behind_its_deepest_layer_and_learns(arch):
    cfg = corrupt.Config(arch=arch, **{**SETTINGS, "layers": ("block0", "block1")})
    objective = corrupt.build(cfg, common.RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    assert {x.shape[0] for x in jax.tree.leaves(params["encoder"]["blocks"])} == {2}
    shape = (4, common.SIDE, common.SIDE)
    views = {
        "image": jnp.asarray(G.standard_normal((*shape, 3)), jnp.float32),
        "label": jnp.asarray(G.uniform(size=shape) < 0.1),
    }

    def loss(params):
        return objective.loss(params, extra, views, key=jax.random.key(0), step=jnp.int32(0))

    (value, (new, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["encoder"]["blocks"]))
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    assert objective.encoder_weights(params, extra).options == {"depth": 2}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": ("layer5",)}, "objective.layers: expected some of layer1, layer2"),
        ({"arch": "vit_tiny_patch16_224"}, "objective.layers: expected some of block0, block1"),
        ({"shapes": corrupt.Config().shapes}, r"objective.shapes.scar_length: expected shapes"),
    ],
)
def test_refusals_name_the_key(changes, text):
    with pytest.raises(Refused, match=text):
        corrupt.Config(**{**SETTINGS, **changes})


CASES = {
    "ds2": (ds2.DS2, ds2.Config(**common.cases()["ds2"].case.config)),
    "mae": (mae.MAE, mae.Config(**common.cases()["mae"].case.config)),
}
OF_BLOCKS = dataclasses.replace(TERM, layers=("block1",))


def stepped(objective, batch):
    """Views, loss, gradients, extra and scalars from the initial state."""
    params, extra = jax.jit(objective.init)(jax.random.key(0))

    def run(params, extra, batch):
        views = objective.views(batch, jax.random.key(5))
        loss = jax.value_and_grad(objective.loss, has_aux=True)
        return views, loss(params, extra, views, key=jax.random.key(6), step=jnp.int32(0))

    return (params, extra), jax.device_get(jax.jit(run)(params, extra, batch))


@pytest.mark.parametrize("name", ["mae", pytest.param("ds2", marks=pytest.mark.slow)])
def test_weight_0_is_the_host_itself_and_a_weight_adds_the_term(name):
    host, cfg = CASES[name]
    module = {"ds2": ds2, "mae": mae}[name]
    term = {"ds2": TERM, "mae": OF_BLOCKS}[name]
    silent = module.build(
        dataclasses.replace(cfg, corrupt=dataclasses.replace(term, weight=0.0)), common.RUN
    )
    assert type(silent) is host
    batch = common.batch(name)
    alone = stepped(silent, batch)
    objective = module.build(dataclasses.replace(cfg, corrupt=term), common.RUN)
    assert isinstance(objective, WithTerm)
    assert objective.traits.couples_batch
    (params, extra), (views, ((total, (new, scalars)), grads)) = stepped(objective, batch)
    (host_params, _), (host_views, ((loss, (_, host_scalars)), host_grads)) = alone
    jax.tree.map(np.testing.assert_array_equal, {**params, HEAD: 0}, {**host_params, HEAD: 0})
    for key, values in host_views.items():
        jax.tree.map(np.testing.assert_array_equal, values, views[key])
    assert {"corruption_loss", "corruption_iou", "corruption_changed"} == {
        *scalars.keys() - host_scalars.keys()
    }
    assert total == pytest.approx(loss + 0.5 * scalars["corruption_loss"], rel=1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[HEAD]))
    pairs = zip(*map(jax.tree.leaves, (grads["encoder"], host_grads["encoder"])), strict=True)
    assert any(np.abs(a - b).max() > 0 for a, b in pairs)
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    after = objective.after_update(params, new, jnp.int32(1))
    assert jax.tree.structure(after) == jax.tree.structure(extra)
    if name == "ds2":
        assert HEAD not in after["teacher"]


def test_a_host_with_the_term_adopts_what_the_host_does_and_keeps_the_head():
    objective = ds2.build(dataclasses.replace(CASES["ds2"][1], corrupt=TERM), common.RUN)
    params, extra = common.drawn(objective)
    other = jax.tree.map(lambda x: x + 1, (params, extra))
    earlier = earlier_weights(CASES["ds2"][0](CASES["ds2"][1], common.RUN), *other)
    taken, held, report = objective.adopt(earlier, params, extra)
    assert "encoder" in report
    assert jax.tree.structure((taken, held)) == jax.tree.structure((params, extra))
    jax.tree.map(np.testing.assert_array_equal, taken["encoder"], other[0]["encoder"])
    jax.tree.map(np.testing.assert_array_equal, held["teacher"]["encoder"], other[0]["encoder"])
    jax.tree.map(
        np.testing.assert_array_equal, (taken[HEAD], held[HEAD]), (params[HEAD], extra[HEAD])
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"layers": ("layer4",)},
            r"^config.objective.corrupt.layers: expected some of layer1, layer2, found",
        ),
        (
            {"view": dataclasses.replace(common.CROP, mean=(0.5, 0.5, 0.5))},
            r"^config.objective.corrupt.view.mean: expected the method's \(0.485",
        ),
    ],
)
def test_a_term_that_does_not_fit_its_host_is_refused(change, text):
    cfg = dataclasses.replace(CASES["ds2"][1], corrupt=dataclasses.replace(TERM, **change))
    with pytest.raises(Refused, match=text):
        ds2.build(cfg, common.RUN)
