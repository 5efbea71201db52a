"""CutPaste against the published numbers and an independent float64 implementation."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dsad.assembly.pretrain import parse
from dsad.augment.cutpaste import draw_cutpaste, draw_scar
from dsad.augment.views import make_view
from dsad.core.errors import ConfigError
from dsad.core.rng import named, sample_keys
from dsad.core.tree import count
from dsad.core.types import RunInfo
from dsad.objectives import cutpaste
from dsad.terminal import flags
from dsad.train.optim import make_schedule
from tests.contracts.objectives import common
from tests.helpers import earlier_weights

RUN = RunInfo(total_steps=65536, batch_size=32, samples=209, classes=1)


def published(config):
    config, _, _ = flags.Command("x", "", config=config).parse([])
    return config


def test_the_published_network():
    objective = cutpaste.build(cutpaste.Config(), RUN)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    assert count(params["encoder"]) == 11_176_512
    assert count(params) == 11_506_499
    for side in (64, 32):
        images = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
        embed = lambda p, e, x: objective.embed(p, e, x, train=False)[0]["pooled"]  # noqa: E731
        trees = jax.eval_shape(objective.init, jax.random.key(0))
        assert jax.eval_shape(embed, *trees, images).shape == (2, 512)


def test_every_encoder_can_be_trained():
    small = {"hidden": (8,), "arch": "vit_tiny_patch16_224"}
    objective = cutpaste.build(cutpaste.Config(**small), RUN)
    params, extra = jax.eval_shape(objective.init, jax.random.key(0))
    assert params["head"]["conv1"]["kernel"].shape == (192, 8)
    views = {name: np.zeros((2, 64, 64, 3), np.float32) for name in cutpaste.CLASSES}
    out = jax.eval_shape(
        lambda p, e: objective.loss(p, e, views, key=jax.random.key(0), step=0), params, extra
    )
    assert out[0].shape == ()


@pytest.mark.parametrize("words", ["mvtec", "mvtec,bottle", "published"])
def test_the_published_schedule(words):
    config = published(f"cutpaste:{words}")
    assert config.batch_size == (96 if words == "published" else 32)
    assert config.data.categories == (("bottle",) if "bottle" in words else ())
    assert (config.optim.name, config.optim.momentum) == ("sgd", 0.9)
    assert config.optim.weight_decay == 3e-5
    schedule = make_schedule(
        _optim(config), batch_size=config.batch_size, steps_per_epoch=10, total_steps=config.steps
    )
    rates = [float(schedule(n)) for n in (0, 32768, 65536)]
    np.testing.assert_allclose(rates, [0.03, 0.0150005, 1e-6], rtol=1e-5)
    every = np.array(jax.vmap(schedule)(np.arange(0, 65537, 64)))
    assert (np.diff(every) < 0).all()


def _optim(config):
    return parse(config)[0].optim


def test_decay_is_of_all_parameters():
    exempt = published("cutpaste").optim.exempt
    assert not re.search(exempt, "encoder/norm1/scale")


def logits_of(count=5):
    return np.random.default_rng(0).normal(size=(count, 3, 3)).astype(np.float32) * 3


def test_cross_entropy_against_float64():
    logits = logits_of()
    loss, right = cutpaste.cross_entropy(logits)
    wide = logits.astype(np.float64)
    total, hits = 0.0, np.zeros(3)
    for row in wide:
        for label in range(3):
            shares = np.exp(row[label]) / np.exp(row[label]).sum()
            total -= np.log(shares[label])
            hits[label] += shares.argmax() == label
    assert float(loss) == pytest.approx(total / 15, rel=1e-6)
    np.testing.assert_allclose(right, hits / 5, rtol=1e-6)
    zero, _ = cutpaste.cross_entropy(np.zeros((4, 3, 3), np.float32))
    assert float(zero) == pytest.approx(1.0986123, abs=2e-7)  # two units in the last place
    shuffled, _ = cutpaste.cross_entropy(logits[[3, 1, 4, 0, 2]])
    assert float(shuffled) == pytest.approx(float(loss), rel=1e-6)


def one_hot(x):
    return np.eye(3, dtype=np.float32)[np.asarray(x, int)]


class Recorded:
    """A network that keeps what it is given and gives what it is told."""

    def __init__(self, out):
        self.out = out

    def apply(self, params, extra, x, *, train):
        self.given, self.train = x, train
        return self.out(x), extra


def test_the_loss_labels_each_form_of_an_image():
    """A head that reads its class off the image makes no mistake; one class less is a third."""
    objective = common.build("cutpaste")
    images = np.zeros((4, 32, 32, 3), np.float32)
    views = {name: images + i for i, name in enumerate(cutpaste.CLASSES)}
    objective.family = Pixel()
    objective.head = Recorded(lambda x: 50 * one_hot(x[:, 0]))
    trees = {"encoder": {}, "head": {}}
    loss, (_, scalars) = objective.loss(trees, trees, views, key=None, step=None)
    assert objective.head.given.shape[0] == 12
    assert sorted(objective.head.given[:, 0].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert loss < 1e-6
    assert scalars["accuracy"] == 1
    objective.head = Recorded(lambda x: 50 * one_hot(np.minimum(x[:, 0], 1)))
    _, (_, scalars) = objective.loss(trees, trees, views, key=None, step=None)
    assert (scalars["accuracy_normal"], scalars["accuracy_scar"]) == (1, 0)
    assert scalars["accuracy"] == pytest.approx(2 / 3)


class Pixel:
    """A family whose pooled vector is the image's first pixel."""

    def run(self, network, params, extra, images, *, train):
        assert train
        return {}, images[:, 0, 0], extra


def test_the_forms_come_from_one_view():
    plain = dataclasses.replace(cutpaste.CROP, side=32, area=(0.5, 0.5), jitter_probability=0.0)
    patches = cutpaste.CutPasteConfig(jitter=0.0)
    objective = cutpaste.build(cutpaste.Config(view=plain, patches=patches), RUN)
    batch, key = common.batch("cutpaste"), jax.random.key(5)
    views = jax.device_get(jax.jit(objective.views)(batch, key))
    view = jax.jit(lambda batch: make_view(batch, named(key, "view"), objective.cfg.view))
    normal = view(batch)["image"]
    np.testing.assert_allclose(views["normal"], normal, atol=1e-5)
    for name, most in (("cutpaste", 0.17), ("scar", 0.1)):
        changed = (views[name] != views["normal"]).any(axis=-1).mean(axis=(1, 2))
        assert (changed > 0).all()
        assert (changed < most).all()


def test_no_draw_is_used_twice(monkeypatch):
    """Keys of view, piece and scar, of every image in every epoch: all different."""
    seen = []

    def recording(name, keys_of):
        called = getattr(cutpaste, name)

        def recorded(*given):
            seen.append(jax.random.key_data(keys_of(*given)))
            return called(*given)

        monkeypatch.setattr(cutpaste, name, recorded)

    recording("draw_cutpaste", lambda keys, *_: keys)
    recording("draw_scar", lambda keys, *_: keys)
    recording("make_view", lambda batch, key, _: sample_keys(key, batch["epoch"], batch["index"]))
    objective, batch = common.build("cutpaste"), common.batch("cutpaste")

    @jax.jit
    def words_of(epoch):
        seen.clear()
        objective.views({**batch, "epoch": batch["epoch"] * 0 + epoch}, jax.random.key(0))
        return list(seen)

    words = np.concatenate([w for epoch in range(2) for w in words_of(epoch)])
    assert len(np.unique(words, axis=0)) == len(words) == 6 * len(batch["index"])


def test_the_quantities_of_a_piece_do_not_go_together():
    keys = jax.random.split(jax.random.key(0), 64)
    for draw in (draw_cutpaste, draw_scar):
        drawn = jax.jit(draw, static_argnums=(1, 2))(keys, 64, cutpaste.Config().patches)
        values = np.concatenate([drawn.jitter.factors, drawn.jitter.shift[:, None]], 1)
        assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.45


def test_an_encoder_is_adopted_and_the_head_starts_anew():
    objective, params, extra = common.perturbed("cutpaste")
    earlier = earlier_weights(objective, params, extra)
    fresh = jax.tree.map(np.zeros_like, (params, extra))
    taken, statistics, _ = objective.adopt(earlier, *fresh)
    for found, there, start in ((taken, params, fresh[0]), (statistics, extra, fresh[1])):
        assert found["encoder"] == there["encoder"]
        assert found["head"] is start["head"]


def test_a_view_too_small_for_a_scar_is_refused():
    with pytest.raises(ConfigError, match=r"view\.side: expected at least the 31 pixels"):
        cutpaste.Config(
            view=cutpaste.ViewConfig(side=24), patches=cutpaste.CutPasteConfig(scar_side=24)
        )


def test_each_class_of_mvtec_has_its_published_model():
    aligned, free = (published(f"gde:cutpaste_{n}") for n in ("aligned", "free"))
    assert set(aligned.data.categories) == {
        "bottle", "cable", "capsule", "metal_nut", "pill", "toothbrush", "transistor", "zipper",
    }  # fmt: skip
    assert set(free.data.categories) == {
        "hazelnut", "screw", "carpet", "grid", "leather", "tile", "wood",
    }  # fmt: skip
    assert aligned.detector.per_position
    assert not free.detector.per_position
    assert aligned.backbone.startswith("patches:32/4:")
    assert (aligned.detector.components, aligned.evaluation.image_size) == (0, 256)
    image = published("gde:cutpaste_image")
    assert image.backbone.startswith("patches:256/256:")
    assert (image.detector.patch, image.detector.per_position) == (256, False)
