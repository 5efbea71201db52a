"""ADPretrain: what is kept is what every step computes; centres, labels, what is frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsad.augment.corruptions import ShapesConfig
from dsad.augment.crops import whole_images
from dsad.core.batch import Companions
from dsad.core.config import Refused
from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.core.types import EarlierWeights
from dsad.data.companions import CompanionDraws
from dsad.objectives import adpretrain
from dsad.objectives._adpretrain import Config, LookConfig
from dsad.ops import residual as ops
from tests.contracts.objectives import common
from tests.contracts.objectives.adpretrain import CASE

#: Nothing random in the views.
STILL = LookConfig(jitter_probability=0, grey_probability=0, blur_probability=0)


def built(**changes):
    settings = {**CASE.config, "look": STILL, **changes}
    return adpretrain.build(Config(**settings), common.RUN)


@functools.cache
def trees():
    params, extra = jax.jit(built().init)(jax.random.key(2))
    centre = {n: 0.1 * jnp.arange(c.size, dtype=jnp.float32) for n, c in extra["centre"].items()}
    return params, {**extra, "centre": centre}


def image_batch(epoch=0, records=common.RECORDS, count=2):
    stored = dict(common.samples())
    stored["image"] = np.where(stored["mask"][..., None], 255, stored["image"]).astype(np.uint8)
    index = np.arange(common.BATCH, dtype=np.int32)
    drawn = CompanionDraws(records, Companions(count=count), 0)(index, np.full(len(index), epoch))
    references = {n: stored[n][drawn["index"]] for n in ("image", "size")}
    names = ("image", "size", "label", "mask", "masked")
    return {
        **{n: stored[n] for n in names}, "index": index, "epoch": np.full_like(index, epoch),
        "references": {**drawn, **references},
    }  # fmt: skip


def stored_batch(objective, batch):
    kept = jax.jit(objective.per_sample)(*trees(), batch)
    index = batch["references"]["index"]
    rows = {name: kept[name][index] for name in objective.cfg.layers}
    references = {n: batch["references"][n] for n in ("index", "valid")}
    return {**batch, "features": kept, "references": {**references, "features": rows}}


@functools.cache
def compiled(objective):
    def whole(params, batch, key):
        views = objective.views(batch, jax.random.key(key))
        return objective.loss(
            params, trees()[1], views, key=jax.random.key(key), step=jnp.int32(0)
        )  # fmt: skip

    return jax.jit(jax.value_and_grad(whole, has_aux=True))


def loss(objective, batch, key=7):
    (value, (_, scalars)), slopes = compiled(objective)(trees()[0], batch, key)
    return value, scalars, slopes


@pytest.mark.parametrize("anomalies", ["real", "synthetic"])
def test_maps_that_are_kept_give_the_loss_of_encoding_every_time(anomalies):
    shapes = ShapesConfig(
        probability=1.0, rectangle=(6, 8), scar_length=(6, 9), blob=(3, 4), sources=("own", "noise")
    )
    once = built(variants=1, anomalies=anomalies, shapes=shapes)
    every = built(encode="every_step", anomalies=anomalies, shapes=shapes)
    batch = image_batch()
    if anomalies == "synthetic":  # the same anomalies: those of the variant
        every._pair = lambda batch, key: once._variant(batch, 0)
    kept = stored_batch(once, batch)
    one, scalars, slopes = loss(once, kept)
    other, others, gradients = loss(every, batch)
    assert scalars["defect_radius"] > 0
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for name in scalars:
        np.testing.assert_allclose(scalars[name], others[name], rtol=1e-4, err_msg=name)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    for path, slope in flatten(slopes).items():
        np.testing.assert_allclose(slope, flatten(gradients)[path], atol=1e-4 * largest)


def test_the_loss_is_that_of_its_description():
    """Numbers of references as drawn; no cell of an image without annotation or reference."""
    objective, batch = built(variants=1), image_batch()
    batch["references"]["valid"][2] = False
    value, scalars, _ = loss(objective, stored_batch(objective, batch))
    params, extra = trees()
    kept = jax.jit(objective.per_sample)(params, extra, batch)
    used = np.ones(8, bool)
    used[[2, 7]] = False  # the last one has no annotation
    found = []
    for count in objective.cfg.references:
        angle = norm = 0
        for name in objective.cfg.layers:
            cells = np.asarray(kept[name]).reshape(8, -1, kept[name].shape[-1])
            bank = cells[batch["references"]["index"][:, :count]].reshape(8, -1, cells.shape[-1])
            valid = batch["references"]["valid"][:, :count].repeat(cells.shape[1], axis=1)
            left = ops.residual(cells, bank, valid)
            y = adpretrain.project(params["projectors"][name], left).reshape(-1, cells.shape[-1])
            grid = kept[name].shape[1:3]
            mask = adpretrain.sampled_mask(batch["mask"], batch["size"], 32)
            bad = np.asarray(ops.token_labels(mask, grid, pixels=8.0)).reshape(-1)
            counted = used.repeat(cells.shape[1])
            angle += ops.angle_loss(y, y, extra["centre"][name], bad, counted)
            norm += 2 * ops.norm_loss(y, bad, counted)
        found.append((angle, norm))
    near = [np.allclose((scalars["angle"], scalars["norm"]), pair, rtol=1e-4) for pair in found]
    assert sum(near) == 1
    np.testing.assert_allclose(value, scalars["angle"] + scalars["norm"], rtol=1e-6)
    keys = range(8)
    draws = {float(loss(objective, stored_batch(objective, batch), key)[0]) for key in keys[:3]}
    assert len(draws) > 1


@pytest.mark.parametrize("encode", ["once", "every_step"])
def test_centres_are_means_of_raw_residual_cells_of_normal_images(encode):
    objective, batch = built(encode=encode, variants=1, centre_references=1), image_batch()
    batch["references"]["valid"][0] = False
    if encode == "once":
        batch = stored_batch(objective, batch)
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 6), slice(6, 8))]
    extra = objective.prepare(*trees(), lambda: iter(parts))
    kept = jax.jit(built(variants=1).per_sample)(*trees(), image_batch())
    for name in objective.cfg.layers:
        cells = np.float64(kept[name]).reshape(8, -1, kept[name].shape[-1])
        left = []
        for i in (1, 2, 3):  # normal, with a reference
            rows = cells[batch["references"]["index"][i, 0]]
            cosine = cells[i] @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
            left.append(cells[i] - rows[cosine.argmax(1)])
        expected = np.concatenate(left).mean(0)
        np.testing.assert_allclose(extra["centre"][name], expected, atol=2e-5)
    batch["references"]["valid"][:] = False
    with pytest.raises(ConfigError, match=r"expected normal images.*config\.data\.split to all"):
        objective.prepare(*trees(), lambda: iter([batch]))


def test_a_moving_centre_follows_projected_normal_cells():
    objective = built(variants=1, centre_momentum=0.75)
    batch = stored_batch(objective, image_batch())
    params, extra = trees()
    views = objective.views(batch, jax.random.key(0))
    new = objective.loss(params, extra, views, key=jax.random.key(0), step=jnp.int32(0))[1][0]
    for name, centre in new["centre"].items():
        moved = (centre - 0.75 * extra["centre"][name]) / 0.25
        assert 0 < np.abs(moved).max() < 100
        assert not np.allclose(moved, extra["centre"][name], atol=1e-3)
    still = built(variants=1)
    same = still.loss(params, extra, views, key=jax.random.key(0), step=jnp.int32(0))[1][0]
    jax.tree.map(np.testing.assert_array_equal, same, extra)


def test_labels_as_released_differ_where_a_defect_misses_the_corner():
    area, released = built(), built(labels="released", defect_pixels=32.0)
    batch = image_batch()
    batch["mask"][:] = 0
    batch["mask"][5, 2:8, 2:8] = 1  # 36 pixels of the canvas, none a corner of a cell of 8
    batch["size"][:] = 40
    one, other = (x._labels(batch, adpretrain.sampled_mask(batch["mask"], batch["size"], 32))
                  for x in (area, released))  # fmt: skip
    assert one["norm_label"]["layer1"][5, 0, 0]
    assert one["angle_label"]["layer1"].sum() == 1
    assert not other["norm_label"]["layer1"].any()


def test_the_mask_is_stretched_like_the_image():
    masks = np.zeros((2, 40, 40), np.uint8)
    masks[0, :30, 10:20] = masks[1, 5, 7] = 1
    size = np.array([[30, 20], [40, 40]], np.int32)
    found = np.asarray(adpretrain.sampled_mask(masks, size, 60))
    np.testing.assert_array_equal(found[0], np.arange(60)[None, :].repeat(60, 0) >= 30)
    centre = ((np.arange(60) + 0.5) * 40 / 60).astype(int)
    np.testing.assert_array_equal(found[1], masks[1][centre[:, None], centre[None]])
    assert found[1].any()
    wide = whole_images({"image": 255 * masks[..., None].repeat(3, -1), "size": size}, 60)
    np.testing.assert_allclose(wide[0, :, :28], 0, atol=1e-6)
    np.testing.assert_allclose(wide[0, :, 32:], 1, atol=1e-6)


def test_views_share_their_geometry_and_variants_are_drawn():
    objective = built(look=LookConfig(blur_probability=0), variants=2)
    kept = stored_batch(objective, image_batch())
    chosen = []
    for epoch in range(4):
        pair = objective.views({**kept, "epoch": np.full(8, epoch, np.int32)}, jax.random.key(1))
        np.testing.assert_array_equal(pair["pair"]["layer1"][:, 0], kept["features"]["layer1"])
        second = np.asarray(pair["pair"]["layer1"][:, 1])
        each = [np.asarray(kept["features"][f"layer1.{i}.1"]) for i in range(2)]
        which = [[np.array_equal(second[b], x[b]) for x in each] for b in range(8)]
        assert (np.sum(which, axis=1) == 1).all()
        chosen.append(np.argmax(which, axis=1))
    assert 0.1 < np.mean(chosen) < 0.9


def test_float32_adam_moves_the_learned_references():
    """Of bfloat16 weights of this size 97.5 % would never change (T11)."""
    objective = built(variants=1)
    batch = stored_batch(objective, image_batch())
    params, extra = trees()
    tx = optax.adam(1e-4)
    views = objective.views(batch, jax.random.key(0))

    @jax.jit
    def step(params, state):
        slopes = jax.grad(
            lambda p: objective.loss(p, extra, views, key=jax.random.key(0), step=jnp.int32(0))[0]
        )(params)
        updates, state = tx.update(slopes, state)
        return optax.apply_updates(params, updates), state

    first, state = params, tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    for name in objective.cfg.layers:
        before, after = (x["projectors"][name]["references"] for x in (first, params))
        assert (before != after).mean() > 0.99


def test_the_encoder_is_taken_over_and_stays():
    objective = built()
    params, extra = trees()
    encoder = objective.encoder_weights(params, extra)
    _, taken, report = objective.adopt(EarlierWeights(encoder, {}, {}, {}, "a test"), params, extra)
    assert "frozen" in report
    jax.tree.map(np.testing.assert_array_equal, taken["encoder"], extra["encoder"])
    other = encoder._replace(
        preprocessing=dataclasses.replace(encoder.preprocessing, mean=(0.5, 0.5, 0.5))
    )
    with pytest.raises(ConfigError, match=r"wants pixels with mean \(0\.5, 0\.5, 0\.5\)"):
        objective.adopt(EarlierWeights(other, {}, {}, {}, "a test"), params, extra)
    maps = jax.jit(objective.features)(params, extra, jnp.ones((1, 32, 32, 3)))
    assert maps["layer1"].shape == (1, 8, 8, 64)  # as the encoder has them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": 7},
            r"config\.objective\.heads: expected a divisor of the 64 channels of layer1",
        ),
        ({"layers": ("layer9",)}, r"layers: expected some of layer1"),
        (
            {"anomalies": "synthetic", "shapes": ShapesConfig(), "side": 224},
            r"shapes\.sources: expected own and noise alone",
        ),
        ({"anomalies": "synthetic", "shapes": ShapesConfig()}, r"shapes\.scar_length: expected"),
        ({"temperature": 0.01}, r"temperature: expected a finite number >= 0\.03"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(Refused, match=message):
        built(**changes)
