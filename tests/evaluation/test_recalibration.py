"""Batch statistics of the support set: whose images, in which batches, kept and undone when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad import models
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.evaluation import recalibration, support
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.support import Sampling
from tests.backbones import Plain
from tests.evaluation.test_localize import NUMBERS, Distance, Planted, Pooled

CONFIG = EvalConfig(image_size=48, batch_size=4, workers=2, recalibrate=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["extra"],
    meta_fields=["mean", "std", "arch", "description", "image_size", "layers"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Normed(Plain):
    """Colours of 4 × 4 pixels, of which a norm takes the mean and the deviation."""

    extra: dict

    statistics = property(lambda self: self.extra)

    def with_statistics(self, statistics):
        return dataclasses.replace(self, extra=statistics)

    def maps(self, images):
        norm = self.extra["norm"]
        cells = Pooled().maps(images)["colour"] - norm["mean"][None, None, None, :]
        return {"colour": cells * jax.lax.rsqrt(norm["var"] + 1e-5)[None, None, None, :]}

    def measured(self, images):
        cells = Pooled().maps(images)["colour"]
        return {"norm": {"mean": cells.mean((0, 1, 2))[None], "var": cells.var((0, 1, 2))[None]}}


def normed(mean=0.0, var=1.0):
    return Normed(extra={"norm": {"mean": jnp.full(3, mean), "var": jnp.full(3, var)}})


def run(backbone, devices=1, dataset=None, config=CONFIG, **changes):
    settings = {"mesh": make_mesh(MeshConfig(), jax.devices()[:devices]), "key": jax.random.key(3)}
    data = dataset or Planted(strength=9)
    return localize(backbone, Distance(), data, config, **settings, **changes)


def inputs(dataset, category="disc"):
    """The network's inputs of the training images."""
    source = dataset.source("train", category)
    return np.stack([CONFIG.preprocessing.to_input(source[i].image) for i in range(len(source))])


def cells(images):
    """What the norm gets, in float64, of uint8 inputs."""
    n, h, w, c = images.shape
    scaled = (images.astype(np.float64) / 255 - 0.5) / 0.25
    return scaled.reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4))


@pytest.mark.parametrize("devices", [1, 8])
def test_it_is_the_evaluation_with_the_moments_of_the_training_images(devices, tmp_path):
    data = Planted(strength=9)
    truth = cells(inputs(data))
    known = normed(truth.mean((0, 1, 2)), truth.var((0, 1, 2)))
    expected = run(known, config=dataclasses.replace(CONFIG, recalibrate=False))
    plain = run(normed(), config=dataclasses.replace(CONFIG, recalibrate=False))
    config = dataclasses.replace(CONFIG, feature_cache=str(tmp_path))
    for _ in range(2):  # the second one from the cache
        found = run(normed(), devices, config=config)
        for name in NUMBERS:
            assert found.mean[name] == pytest.approx(expected.mean[name], abs=1e-4)
        for a, b in zip(expected.images["disc"], found.images["disc"], strict=True):
            assert b["score"] == pytest.approx(a["score"], rel=1e-4)
    assert found.categories["disc"]["features_from_cache"] == {"train": 7, "test": 11}
    assert plain.images["disc"][0]["score"] != pytest.approx(found.images["disc"][0]["score"])
    assert found.stamp["batch_norm"] == recalibration.RULE
    assert "batch_norm" not in plain.stamp
    # A cache that the plain network fills too serves neither the other's features.
    run(normed(), config=dataclasses.replace(config, recalibrate=False))
    assert found.images == run(normed(), devices, config=config).images


def test_batches_are_cross_sections_of_equal_size(monkeypatch):
    monkeypatch.setattr(recalibration, "BATCH", 3)
    data, seen = Planted(strength=9), []

    class Watched(Normed):
        def measured(self, images):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
            return super().measured(images)

    monkeypatch.setattr(recalibration, "_measured", lambda n, x: n.measured(
        recalibration.normalised(n, x)))  # fmt: skip
    sources = [data.source("train", "disc"), data.source("train", "disc")]
    found = recalibration.measured(Watched(extra=normed().extra), sources, CONFIG)["norm"]
    images = np.concatenate([inputs(data)] * 2)
    jax.effects_barrier()
    assert [len(x) for x in seen] == [3, 3, 3, 3, 2]
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(seen[0], scaled[[0, 5, 10]], atol=1e-6)
    np.testing.assert_allclose(found["mean"], cells(images).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["var"], cells(images).var((0, 1, 2)), rtol=1e-4)


def test_every_category_seed_and_split_fit_has_its_own(monkeypatch):
    data, config = Planted(("a", "b"), strength=9), dataclasses.replace(
        CONFIG, false_alarm_rate=0.4
    )  # fmt: skip
    sampling, measured, used = Sampling(shots=5, seeds=(0, 1)), recalibration.measured, []

    def noted(backbone, sources, config):
        used.append([r.path for source in sources for r in source.records])
        return measured(backbone, sources, config)

    monkeypatch.setattr(recalibration, "measured", noted)
    together = run(normed(), dataset=data, config=config, sampling=sampling)
    expected = []
    for category in "ab":
        for seed in "01":
            row = together.support[category][seed]
            bank, held = row["paths"], row["held_out"]
            expected += [bank, [p for p in bank if p not in held]]
            assert held
    assert used == expected
    # Each alone gives the same: nothing of another seed or category is left in what is kept.
    for category in "ab":
        for seed in (0, 1):
            alone = run(
                normed(), dataset=data, config=config, categories=[category],
                sampling=dataclasses.replace(sampling, seeds=(seed,)),
            )  # fmt: skip
            assert (
                alone.thresholds[category][str(seed)]["scores"]
                == together.thresholds[category][str(seed)]["scores"]
            )
            rows = together.seeds[str(seed)]["categories"][category]
            for name in NUMBERS:
                assert alone.mean[name] == pytest.approx(rows[name], abs=1e-9)


def test_seeds_with_one_support_set_measure_once(monkeypatch):
    calls, measured = [], recalibration.measured
    monkeypatch.setattr(
        recalibration, "measured", lambda *given: calls.append(1) or measured(*given)
    )
    run(normed(), sampling=Sampling(seeds=(0, 1)))
    assert calls == [1]


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        (Pooled(), "plain has no batch norm"),
        (
            Normed(extra={"norm": {"mean": np.zeros(3), "var": np.full(3, np.float32(1 - 1e-5))}}),
            "folded into its convolutions",
        ),
    ],
)
def test_what_has_no_statistics_is_refused(backbone, why):
    with pytest.raises(ConfigError, match=f"evaluation.recalibrate: expected False.*{why}"):
        run(backbone)


def test_a_transformer_is_refused():
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224 has no batch norm"):
        recalibration.check(models.backbone("vit_tiny_patch16_224"))


def test_rotations_belong_to_the_support_set(monkeypatch):
    calls, measured = [], recalibration.measured
    monkeypatch.setattr(
        recalibration, "measured",
        lambda b, sources, c: calls.append(sum(map(len, sources))) or measured(b, sources, c),
    )  # fmt: skip
    run(normed(), sampling=Sampling(support=support.SupportConfig(rotations=2)))
    assert calls == [14]
