"""MAE against the published definition's properties and numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.core import tree
from dsad.core.errors import ConfigError
from dsad.core.types import RunInfo
from dsad.models import transformer, vit
from dsad.models.decoder import Decoder, DecoderConfig
from dsad.objectives import mae
from tests.helpers import earlier_weights

RUN = RunInfo(total_steps=1, batch_size=2, samples=2, classes=1)
ENCODER = mae.EncoderConfig(arch="mae_vit_tiny_patch16", width=48, depth=2, heads=4, patch=8)
DECODER = DecoderConfig(width=32, depth=2, heads=4)


def config(**changes):
    view = dataclasses.replace(mae.CROP, side=32)
    return mae.Config(**{"encoder": ENCODER, "decoder": DECODER, "view": view, **changes})


def made(**changes):
    objective = mae.build(config(**changes), RUN)
    params, extra = jax.jit(objective.init)(jax.random.key(0))
    # Compiled: run operation by operation these take many times as long.
    objective.encode, objective.decode = jax.jit(objective.encode), jax.jit(objective.decode)
    return objective, params, extra


def views(seed=0, b=3):
    g = np.random.default_rng(seed)
    return {
        "image": g.standard_normal((b, 32, 32, 3)).astype(np.float32),
        "noise": g.uniform(size=(b, 16)).astype(np.float32),
    }


class TestMasking:
    def test_counts_and_inverse(self):
        noise = jax.random.uniform(jax.random.key(0), (5, 196))
        kept, restore, mask = mae.random_masking(noise, mae.kept_count(196, 0.75))
        assert kept.shape == (5, 49)
        np.testing.assert_array_equal(mask.sum(1), 147)
        order = np.argsort(np.asarray(noise), axis=1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(restore), order, 1)[0], range(196)
        )
        for row in range(5):
            assert not np.asarray(mask)[row, np.asarray(kept)[row]].any()

    def test_huge_keeps_64_of_256(self):
        assert mae.kept_count(256, 0.75) == 64
        assert [mae.kept_count(196, r) for r in (0.0, 0.5, 0.6)] == [196, 98, 78]

    def test_every_patch_is_hidden_with_the_ratio(self):
        noise = jax.random.uniform(jax.random.key(1), (4000, 16))
        mask = mae.random_masking(noise, 4)[2]
        np.testing.assert_allclose(mask.mean(0), 0.75, atol=0.03)

    def test_masks_come_from_key_epoch_and_sample(self):
        objective, _, _ = made()
        batch = {
            "image": np.full((2, 40, 40, 3), 7, np.uint8), "size": np.full((2, 2), 40, np.int32),
            "index": np.array([4, 9], np.int32), "epoch": np.zeros(2, np.int32),
        }  # fmt: skip
        noise = lambda key, **other: np.asarray(  # noqa: E731
            objective.views({**batch, **other}, jax.random.key(key))["noise"]
        )
        np.testing.assert_array_equal(noise(0), noise(0))
        swapped = noise(0, index=np.array([9, 4], np.int32))
        np.testing.assert_array_equal(noise(0), swapped[::-1])
        assert not np.array_equal(noise(0), noise(1))
        assert not np.array_equal(noise(0), noise(0, epoch=np.ones(2, np.int32)))


class TestLoss:
    target = np.random.default_rng(0).standard_normal((2, 6, 12)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], np.float32)

    def test_values(self):
        loss = lambda p: float(mae.masked_loss(p, self.target, self.mask))  # noqa: E731
        assert loss(self.target) == 0
        assert loss(self.target + 2) == pytest.approx(4, rel=1e-6)
        g = np.random.default_rng(1).standard_normal(self.target.shape)
        each = ((g - self.target) ** 2).mean(-1)
        assert loss(g.astype(np.float32)) == pytest.approx(
            (each * self.mask).sum() / self.mask.sum(), rel=1e-6
        )

    def test_visible_patches_count_for_nothing(self):
        pred = jnp.zeros_like(self.target)
        grad = np.asarray(jax.grad(mae.masked_loss)(pred, self.target, self.mask))
        assert not grad[self.mask == 0].any()
        assert grad[self.mask == 1].all()
        other = np.where(self.mask[:, :, None] == 0, 99, self.target)
        assert mae.masked_loss(pred, other, self.mask) == mae.masked_loss(
            pred, self.target, self.mask
        )

    def test_normalised_targets(self):
        images = views()["image"].copy()
        images[0, :8, :8] = 3.5
        found = np.asarray(mae.patch_targets(images, 8, norm_pix=True))
        assert not found[0, 0].any()
        np.testing.assert_allclose(found[1:].mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(found[1:].var(-1, ddof=1), 1, atol=1e-4)

    def test_loss_is_that_of_encoder_and_decoder(self):
        objective, params, extra = made()
        v = views()
        latent, restore, mask = objective.encode(params, extra, v)
        pred = objective.decode(params, extra, latent, restore)
        loss, (_, scalars) = objective.loss(params, extra, v, key=None, step=None)
        each = ((np.asarray(pred) - np.asarray(mae.patch_targets(v["image"], 8, False))) ** 2).mean(
            -1
        )
        mask = np.asarray(mask)
        assert float(loss) == pytest.approx((each * mask).sum() / mask.sum(), rel=1e-5)
        assert 0.5 < float(scalars["unexplained"]) < 3


def test_tokens_return_to_their_places():
    """A decoder that hands on its tokens shows each kept patch where it came from."""
    objective, params, extra = made()
    v = views()
    _, restore, mask = objective.encode(params, extra, v)
    tokens = np.broadcast_to(np.arange(16.0)[None, :, None], (3, 16, 1))
    kept = mae.random_masking(v["noise"], objective.keep)[0]
    shuffled = np.take_along_axis(tokens, np.asarray(kept)[:, :, None], 1)
    padded = np.concatenate([shuffled, np.full((3, 12, 1), -1.0)], axis=1)
    natural = np.take_along_axis(padded, np.asarray(restore)[:, :, None], 1)[:, :, 0]
    np.testing.assert_array_equal(natural, np.where(np.asarray(mask) == 0, np.arange(16), -1))


def test_without_masking_the_order_does_not_matter():
    objective, params, extra = made(mask_ratio=0.0)
    first, second = views(0), {**views(0), "noise": views(5)["noise"]}
    preds = []
    for v in (first, second):
        latent, restore, mask = objective.encode(params, extra, v)
        assert latent.shape == (3, 17, 48)
        assert not np.asarray(mask).any()
        preds.append(objective.decode(params, extra, latent, restore))
    np.testing.assert_allclose(preds[0], preds[1], atol=1e-5)


def test_encoder_sees_kept_patches_only():
    objective, params, extra = made()
    v = views()
    latent, _, mask = objective.encode(params, extra, v)
    assert latent.shape == (3, 5, 48)
    hidden = np.asarray(mask).reshape(3, 4, 4).repeat(8, 1).repeat(8, 2)[..., None]
    changed = {**v, "image": np.where(hidden == 1, np.float32(50), v["image"])}
    np.testing.assert_array_equal(objective.encode(params, extra, changed)[0], latent)


def test_published_parameter_counts():
    for arch, depth, expected in (
        ("mae_vit_base_patch16", 8, 111_655_680), ("mae_vit_large_patch16", 8, 329_239_296),
        ("mae_vit_huge_patch14", 8, 656_613_964), ("mae_vit_large_patch16", 6, 322_934_528),
    ):  # fmt: skip
        cfg = mae.Config(encoder=mae.EncoderConfig(arch=arch), decoder=DecoderConfig(depth=depth))
        params, extra = jax.eval_shape(mae.build(cfg, RUN).init, jax.random.key(0))
        assert tree.count(params) == expected
        if depth == 6:
            assert tree.count(extra) == 302_592


def test_multiply_adds_are_the_published_ones():
    """Giga multiply-adds of a forward pass per image at 224 px, to the digits of the fact sheet."""

    def giga(name, tokens):
        return transformer.forward_flops(vit.arch(f"mae_vit_{name}_patch16").blocks, tokens) / 2e9

    kept = mae.kept_count(196, 0.75) + 1
    assert kept == 50
    for name, tokens, expected in (
        ("large", kept, 15.2), ("large", 197, 61.4), ("base", kept, 4.3), ("base", 197, 17.4),
    ):  # fmt: skip
        assert giga(name, tokens) == pytest.approx(expected, abs=0.05)
    decoder = {}
    for depth, expected in ((6, 4.0), (8, 5.3), (12, 7.9)):
        blocks = Decoder(DecoderConfig(depth=depth), source=1024, patch=16, grid=14).blocks
        decoder[depth] = transformer.forward_flops(blocks, 197) / 2e9
        assert decoder[depth] == pytest.approx(expected, abs=0.05)
    patches = 196 * 768 * 1024 / 1e9
    assert patches == pytest.approx(0.15, abs=0.005)
    whole, masked = (patches + giga("large", n) + decoder[8] for n in (197, kept))
    assert whole / masked == pytest.approx(3.24, abs=0.01)


@pytest.mark.parametrize(("arch", "depth", "blocks"), [("large", 8, 20.5), ("base", 6, 8.3)])
def test_a_step_costs_three_forward_passes(arch, depth, blocks):
    """Forward, and twice that backward; beside the blocks are embedding, bridge and head."""
    cfg = mae.Config(
        encoder=mae.EncoderConfig(arch=f"mae_vit_{arch}_patch16"),
        decoder=DecoderConfig(depth=depth),
    )
    objective = mae.build(cfg, RUN)
    width = objective.encoder.spec.width
    ends = 196 * 768 * width + 50 * width * 512 + 196 * 512 * 768
    each = objective.flops_per_image / 3 / 2e9
    assert each == pytest.approx(blocks + ends / 1e9, abs=0.1)


class TestAdopt:
    def source(self, **changes):
        objective, params, extra = made(**changes)
        params = jax.tree.map(lambda x: x + 1, params)
        return earlier_weights(objective, params, extra)

    def test_everything_is_taken(self):
        objective, params, extra = made()
        source = self.source()
        taken, _, report = objective.adopt(source, params, extra)
        jax.tree.map(np.testing.assert_array_equal, taken, source.params)
        assert "encoder: " in report
        assert "decoder: " in report

    def test_a_deeper_decoder(self):
        deeper = self.source(decoder=dataclasses.replace(DECODER, depth=4))
        objective, params, extra = made()
        with pytest.raises(ConfigError, match=r"adopt_decoder='leading'[\s\S]*blocks/fc1/kernel"):
            objective.adopt(deeper, params, extra)
        objective, params, extra = made(adopt_decoder="leading")
        taken, _, report = objective.adopt(deeper, params, extra)
        assert "first 2 of 4 decoder blocks" in report
        np.testing.assert_array_equal(
            taken["decoder"]["blocks"]["qkv"]["kernel"],
            deeper.params["decoder"]["blocks"]["qkv"]["kernel"][:2],
        )

    def test_an_encoder_alone_and_a_fresh_decoder(self):
        source = self.source()._replace(params={})
        objective, params, extra = made()
        taken, _, report = objective.adopt(source, params, extra)
        assert "decoder starts anew" in report
        jax.tree.map(np.testing.assert_array_equal, taken["decoder"], params["decoder"])

    def test_other_meanings_of_fitting_tensors_are_refused(self):
        objective, params, extra = made()
        facts = {**objective.stage_facts, "norm_pix": True, "side": 64}
        source = self.source()._replace(facts=facts)
        with pytest.raises(ConfigError, match="norm_pix: True there, False here"):
            objective.adopt(source, params, extra)
        # Without the decoder only its encoder has to mean the same, and the side may differ.
        objective, params, extra = made(adopt_decoder="none")
        assert "anew" in objective.adopt(source, params, extra)[2]
        facts["encoder.heads"] = 2
        with pytest.raises(ConfigError, match=r"encoder\.heads: 2 there, 4 here"):
            objective.adopt(source, params, extra)

    def test_another_encoder_is_refused(self):
        other = dataclasses.replace(ENCODER, depth=3)
        objective, params, extra = made()
        with pytest.raises(
            ConfigError, match=r"encoder in an earlier run is not this[\s\S]*blocks/fc1/bias"
        ):
            objective.adopt(self.source(encoder=other), params, extra)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.99}, "mask_ratio: expected a share that leaves some .* found 0.99"),
        (
            {"encoder": dataclasses.replace(ENCODER, arch="deit_tiny_distilled_patch16_224")},
            "fixed positions",
        ),
        ({"encoder": dataclasses.replace(ENCODER, patch=7)}, "multiple of the patch"),
        ({"remat": "some"}, "remat"),
    ],
)
def test_impossible_settings_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        config(**changes)
