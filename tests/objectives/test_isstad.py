"""ISSTAD's second stage against its published numbers and float64 forms of its terms."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.augment.isstad_corruption import CorruptionConfig
from dsad.core import tree
from dsad.core.errors import ConfigError
from dsad.core.types import RunInfo
from dsad.models.decoder import DecoderConfig
from dsad.objectives import isstad, mae
from tests.helpers import earlier_weights
from tests.ops.test_ssim import oracle as ssim64

RUN = RunInfo(total_steps=1, batch_size=2, samples=2, classes=1)
ENCODER = mae.EncoderConfig(arch="mae_vit_tiny_patch16", width=48, depth=2, heads=4, patch=8)
DECODER = DecoderConfig(width=32, depth=3, heads=4)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def made(**changes):
    cfg = {"encoder": ENCODER, "decoder": DECODER, "side": 32, **changes}
    objective = isstad.build(isstad.Config(**cfg), RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    return objective, params, extra


def batch(b=4):
    g = np.random.default_rng(0)
    return {
        "image": g.integers(0, 256, (b, 40, 40, 3)).astype(np.uint8),
        "size": np.tile(np.array([[40, 30]], np.int32), (b, 1)),
        "index": np.arange(b, dtype=np.int32),
        "epoch": np.zeros(b, np.int32),
        "facts": {
            "original_size": np.tile(np.array([[800, 600]], np.int32), (b, 1)),
            "foreground_box": np.tile(np.array([[0, 0, 600, 800]], np.int32), (b, 1)),
        },
    }


def views_of(objective, b=4):
    return jax.device_get(jax.jit(objective.views)(batch(b), jax.random.key(3)))


class TestCrossEntropy:
    def test_published_values(self):
        labels = np.arange(8) < 4
        zero = isstad.pixel_cross_entropy(jnp.zeros((8, 2)), labels, (3.0, 1.0))
        assert float(zero) == pytest.approx(math.log(2), abs=1e-6)
        logits = jnp.tile(jnp.array([[0.0, 2.0]]), (8, 1))
        found = isstad.pixel_cross_entropy(logits, labels, (3.0, 1.0))
        expected = (3 * math.log(1 + math.e**2) + math.log(1 + math.e**-2)) / 4
        assert expected == pytest.approx(1.626928, abs=1e-6)
        assert float(found) == pytest.approx(expected, abs=1e-6)

    def test_equals_float64(self):
        g = np.random.default_rng(0)
        logits, labels = g.standard_normal((2, 5, 7, 2)), g.uniform(size=(2, 5, 7)) < 0.3
        shift = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.where(labels, shift[..., 1], shift[..., 0])
        w = np.where(labels, 1.0, 3.0)
        found = isstad.pixel_cross_entropy(jnp.asarray(logits, jnp.float32), labels, (3.0, 1.0))
        assert float(found) == pytest.approx((w * nll).sum() / w.sum(), rel=1e-5)


@pytest.mark.parametrize(("span", "target"), [("unit", "clean"), ("signed", "input")])
def test_loss_is_the_sum_of_its_terms(target, span):
    """Every term in float64 from the objective's own predictions."""
    objective, params, extra = made(target=target, ssim_range=span)
    views = views_of(objective)
    loss, (_, scalars) = jax.jit(lambda p: objective.loss(p, extra, views, key=None, step=None))(
        params
    )
    grid = (4, 4)
    h = objective.encode(extra, views["image"])
    pred, logits = objective._decode(params, extra, h, None, grid, lambda x: x)
    from dsad.models.decoder import patchify, unpatchify

    labels = np.asarray(patchify(jnp.asarray(views["label"])[..., None], 8))
    assert 0 < labels.mean() < 1
    logits = np.asarray(logits, np.float64)
    assert logits.shape == (3, 4, 16, 64, 2)
    shift = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.where(labels[None], shift[..., 1], shift[..., 0])
    w = np.where(labels, 1.0, 3.0)[None]
    ce = ((w * nll).sum((1, 2, 3)) / w.sum()).mean()
    painted = np.asarray(unpatchify(pred, 8, grid), np.float64) * STD + MEAN
    truth = np.asarray(views["clean" if target == "clean" else "image"], np.float64) * STD + MEAN
    error = ((2 * painted - 2 * truth) ** 2).mean()
    pair = (2 * painted - 1, 2 * truth - 1) if span == "signed" else (painted, truth)
    alike = ssim64(*pair).mean()
    assert float(loss) == pytest.approx(ce + 0.5 * error + 0.1 * (1 - alike), rel=1e-4)
    assert float(scalars["cross_entropy"]) == pytest.approx(ce, rel=1e-4)
    assert float(scalars["corrupted_share"]) == pytest.approx(labels.mean(), rel=1e-5)
    p = np.exp(shift[..., 1])
    assert float(scalars["p_corrupted"]) == pytest.approx(p[:, labels].mean(), rel=1e-4)
    assert float(scalars["p_normal"]) == pytest.approx(p[:, ~labels].mean(), rel=1e-4)


def test_views_are_whole_images_and_only_labels_differ():
    objective, _, _ = made()
    views = views_of(objective, 16)
    assert views["image"].shape == (16, 32, 32, 3)
    same = np.all(np.abs(views["image"] - views["clean"]) < 1e-5, axis=-1)
    assert (same | views["label"]).all()
    assert views["label"].any()
    # Clean images keep a share of 1 / (k + 1).
    assert (~views["label"].any((1, 2))).any()
    import PIL.Image

    picture = PIL.Image.fromarray(batch()["image"][0][:40, :30])
    want = np.asarray(picture.resize((32, 32), PIL.Image.Resampling.BILINEAR), np.float64) / 255
    np.testing.assert_allclose(views["clean"][0] * STD + MEAN, want, atol=1.01 / 255)


class TestPermutation:
    def test_identity_equals_none(self):
        objective, params, extra = made()
        h = objective.encode(extra, views_of(objective)["image"])
        keep = lambda x: x  # noqa: E731
        order = jnp.tile(jnp.arange(16)[None], (4, 1))
        plain = objective._decode(params, extra, h, None, (4, 4), keep)
        same = objective._decode(params, extra, h, order, (4, 4), keep)
        np.testing.assert_allclose(plain[0], same[0], atol=1e-6)

    @pytest.mark.slow
    def test_shuffle_is_random_in_training_and_fixed_in_tests(self):
        objective, params, extra = made(permute="shuffle", permutations=2)
        views = views_of(objective)
        loss = jax.jit(lambda v: objective.loss(params, extra, v, key=None, step=None)[0])
        assert loss(views) == loss(views)
        assert loss(views) != loss({**views, "noise": views["noise"][:, ::-1]})
        features = jax.jit(objective.features, static_argnums=3)
        maps = features(params, extra, views["image"], isstad.PIXEL_MAPS)
        again = features(params, extra, views["image"][:2], isstad.PIXEL_MAPS)
        np.testing.assert_allclose(maps["probability"][:2], again["probability"], atol=1e-5)
        one = made(permute="shuffle", permutations=1)[0]
        other = jax.jit(one.features, static_argnums=3)(
            params, extra, views["image"], isstad.PIXEL_MAPS
        )
        assert np.abs(np.asarray(other["error"]) - maps["error"]).max() > 1e-6

    def test_the_encoder_is_equivariant(self):
        """So permuting after it, as done here, equals permuting before, as published."""
        objective, _, extra = made()
        images = views_of(objective)["image"]
        order = np.random.default_rng(0).permutation(16)
        enc, weights, table = objective.encoder, extra["encoder"], extra["encoder_table"]
        tokens = enc.embed(weights, table, images)
        before = enc.encode(weights, table, tokens[:, order])
        after = np.asarray(objective.encode(extra, images))
        np.testing.assert_allclose(before[:, 1:], after[:, 1:][:, order], atol=1e-5)
        np.testing.assert_allclose(before[:, 0], after[:, 0], atol=1e-5)


class TestFeatures:
    def test_maps(self):
        objective, params, extra = made()
        images = views_of(objective)["image"]
        maps = jax.jit(objective.features, static_argnums=3)(params, extra, images, None)
        assert set(maps) == {"block0", "block1", *isstad.PIXEL_MAPS}
        assert maps["block0"].shape == (4, 4, 4, 48)
        assert maps["probability"].shape == maps["error"].shape == (4, 32, 32, 1)
        assert 0 <= maps["probability"].min() <= maps["probability"].max() <= 1
        h = objective.encode(extra, images)
        pred, logits = objective._decode(params, extra, h, None, (4, 4), lambda x: x)
        from dsad.models.decoder import unpatchify

        p = np.exp(np.asarray(logits, np.float64))
        p = (p[..., 1] / p.sum(-1)).mean(0)
        want = np.asarray(unpatchify(jnp.asarray(p, jnp.float32), 8, (4, 4)))
        np.testing.assert_allclose(maps["probability"], want, atol=1e-5)
        painted = np.asarray(unpatchify(pred, 8, (4, 4)), np.float64) * STD + MEAN
        truth = images.astype(np.float64) * STD + MEAN
        want = (4 * (painted - truth) ** 2).mean(-1, keepdims=True)
        np.testing.assert_allclose(maps["error"], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(maps["reconstruction"], np.clip(painted, 0, 1), atol=1e-5)

    def test_only_what_is_asked_for(self):
        objective, params, extra = made()
        images = views_of(objective)["image"]
        assert set(objective.features(params, extra, images, ("error",))) == {"error"}
        assert set(objective.features(params, extra, images, ("block1",))) == {"block1"}


def test_published_normalisation_feeds_pixels_in_minus_one_to_one():
    objective, _, _ = made(normalisation="published")
    views = views_of(objective)
    assert objective.mean == objective.std == (0.5, 0.5, 0.5)
    assert -1.001 < views["clean"].min() < -0.5
    assert 0.5 < views["clean"].max() < 1.001


def test_published_parameter_counts():
    cfg = isstad.Config(encoder=mae.EncoderConfig(arch="mae_vit_large_patch16"))
    params, extra = jax.eval_shape(isstad.build(cfg, RUN).init, jax.random.key(0))
    parts = 524_800 + 12 * 3_152_384 + 1_024 + 393_984 + 262_656
    assert tree.count(params) == parts == 39_011_072
    assert tree.count(extra["encoder"]) == 303_099_904


class TestAdopt:
    def first_stage(self, depth=2):
        decoder = dataclasses.replace(DECODER, depth=depth)
        view = dataclasses.replace(mae.CROP, side=32)
        cfg = mae.Config(encoder=ENCODER, decoder=decoder, view=view)
        objective = mae.build(cfg, RUN)
        params, extra = jax.jit(objective.init)(jax.random.key(7))
        return earlier_weights(objective, params, extra)

    def test_encoder_is_frozen_and_decoder_grows(self):
        objective, params, extra = made()
        source = self.first_stage()
        taken, new_extra, report = objective.adopt(source, params, extra)
        assert "frozen" in report
        assert "2 blocks taken over, 1 new" in report
        jax.tree.map(np.testing.assert_array_equal, new_extra["encoder"], source.params["encoder"])
        old = source.params["decoder"]
        for path, value in tree.flatten(taken["decoder"]["blocks"]).items():
            np.testing.assert_array_equal(value[:2], tree.flatten(old["blocks"])[path])
            np.testing.assert_array_equal(
                value[2:], tree.flatten(params["decoder"]["blocks"])[path][2:]
            )
        for name in ("embed", "norm", "head"):
            jax.tree.map(np.testing.assert_array_equal, taken["decoder"][name], old[name])
        jax.tree.map(np.testing.assert_array_equal, taken["classes"], params["classes"])
        assert "mask_token" not in taken["decoder"]

    def test_a_deeper_first_stage_and_a_bare_encoder_are_refused(self):
        objective, params, extra = made()
        with pytest.raises(ConfigError, match="at least the 5 blocks of the first stage, found 3"):
            objective.adopt(self.first_stage(5), params, extra)
        bare = self.first_stage()._replace(params={})
        with pytest.raises(ConfigError, match="encoder alone"):
            objective.adopt(bare, params, extra)

    @pytest.mark.parametrize(
        ("fact", "value"),
        [("encoder.heads", 2), ("decoder.heads", 2), ("side", 64), ("mean", (0.5, 0.5, 0.5)),
         ("norm_pix", True)],
    )  # fmt: skip
    def test_a_first_stage_that_meant_something_else_is_refused(self, fact, value):
        """Its tensors fit all the same."""
        objective, params, extra = made()
        facts = {**objective.stage_facts, fact: value}
        source = self.first_stage()._replace(facts=facts)
        with pytest.raises(ConfigError, match=rf"{re.escape(fact)}: .* there, .* here"):
            objective.adopt(source, params, extra)
        objective, params, extra = made(adopt_check="shapes")
        assert "frozen" in objective.adopt(source, params, extra)[2]

    def test_a_second_stage_is_no_first_stage(self):
        objective, params, extra = made()
        with pytest.raises(ConfigError, match="found a second stage"):
            objective.adopt(earlier_weights(objective, params, extra), params, extra)

    def test_the_encoder_gets_no_gradient(self):
        objective, params, extra = made()
        views = views_of(objective)

        def loss(encoder):
            return objective.loss(
                params, {**extra, "encoder": encoder}, views, key=None, step=None
            )[0]

        grads = jax.jit(jax.grad(loss))(extra["encoder"])
        assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"permutations": 0}, "permutations"),
        ({"class_weights": (0.0, 1.0)}, "class_weights"),
        ({"similarity": -1.0}, "similarity"),
        ({"target": "both"}, "target"),
        ({"side": 30}, "multiple of the patch"),
    ],
)
def test_impossible_settings_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        isstad.Config(**{"encoder": ENCODER, "decoder": DECODER, "side": 32, **changes})


def test_facts_follow_the_corruption():
    assert made()[0].traits.needs.facts == ("original_size", "foreground_box")
    free = CorruptionConfig(limit_box=False)
    assert made(corruption=free)[0].traits.needs.facts == ("original_size",)


@pytest.mark.slow
def test_the_box_is_the_fact_that_the_corruption_asks_for():
    padded = made(corruption=CorruptionConfig(most_draw=50))[0]
    published = made(corruption=CorruptionConfig(most_draw=50, box="published"))[0]
    both = batch()
    both["facts"]["foreground_box_published"] = np.tile([[300, 400, 600, 800]], (4, 1))

    def labels(objective, given):
        return np.asarray(jax.jit(objective.views)(given, jax.random.key(3))["label"])

    swapped = batch()
    swapped["facts"]["foreground_box"] = both["facts"]["foreground_box_published"]
    np.testing.assert_array_equal(labels(published, both), labels(padded, swapped))
    assert (labels(published, both) != labels(padded, both)).any()
