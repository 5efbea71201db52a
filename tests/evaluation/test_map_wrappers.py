"""Map wrappers: a bank for every support set, no image its own neighbour, maps computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import evaluate, runs
from dsad.assembly.detectors import Trainer
from dsad.core.detection import FeatureBatch, MapWrapper
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.recipe import Recipe
from dsad.evaluation import compiled, extract, fitting
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.support import SupportConfig
from dsad.models import wrappers
from dsad.terminal import console, flags
from tests.evaluation.test_localize import Distance, Planted, Pooled
from tests.evaluation.test_stored import CELLS
from tests.evaluation.test_support import sampled
from tests.seams.detectors import linear
from tests.seams.wrappers import away


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(wrappers.KINDS, "away", away.KIND)


def run(names=("away",), devices=1, dataset=None, backbone=None, detector=None, **given):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    config = EvalConfig(image_size=48, batch_size=4, workers=2, **given.pop("config", {}))
    return localize(
        backbone or Pooled(), detector or Distance(), dataset or Planted(strength=3), config,
        mesh=mesh, key=jax.random.key(3), map_wrappers={n: away.Away() for n in names},
        sampling=sampled(given), **given,
    )  # fmt: skip


class Batches:
    categories = ("c",)

    def __init__(self, maps, batch):
        self.maps, self.batch = maps, batch

    def __iter__(self):
        count = len(self.maps)
        for start in range(0, count, self.batch):
            index = np.arange(start, start + self.batch)
            valid = index < count
            rows = self.maps[np.minimum(index, count - 1)]
            yield FeatureBatch({"a": jnp.asarray(rows)}, valid, "c", np.where(valid, index, -1))


def test_an_image_is_not_its_own_neighbour():
    """Against loops in float64; an image of the support set is asked about as one, or as new."""
    maps = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    wrapper = away.Away()
    bank = wrapper.adapt(Batches(maps, 2), mesh=None, key=jax.random.key(0))
    index = np.array([0, 3, -1], np.int32)
    transform = jax.jit(wrapper.transform)
    values = transform(bank, {"a": jnp.asarray(maps[[0, 3, 3]])}, index=jnp.asarray(index))["a"]
    for image, at, residual in zip(np.float64(maps[[0, 3, 3]]), index, values, strict=True):
        rows = [r for i, m in enumerate(maps) if i != at for r in np.float64(m).reshape(-1, 4)]
        for cell, gap in zip(image.reshape(-1, 4), residual.reshape(-1, 4), strict=True):
            distances = [((cell - row) ** 2).sum() for row in rows]
            np.testing.assert_allclose(gap, cell - rows[int(np.argmin(distances))], atol=1e-6)
    assert np.abs(values[1]).max() > 0.1
    np.testing.assert_array_equal(values[2], 0)


def test_every_support_set_has_its_bank():
    assert isinstance(away.Away(), MapWrapper)
    together = run(shots=2, seeds=(0, 1, 2))
    one_by_one = [run(shots=2, seeds=(seed,)) for seed in (0, 1, 2)]
    for seed, alone in zip("012", one_by_one, strict=True):
        assert together.seeds[seed]["mean"] == alone.mean
    assert len({alone.mean["pixel_ap"] for alone in one_by_one}) == 3
    assert together.std["mean"]["pixel_ap"] > 0
    assert together.stamp["map_wrappers"] == ["away"]
    assert run((), shots=2).mean != one_by_one[0].mean


def test_the_rotations_of_an_image_are_that_image(monkeypatch):
    asked, transform = [], compiled.Device.transform
    owners, adapt = [], away.Away.adapt

    def counted(self, banks, maps, index):
        asked.extend(index.tolist())
        return transform(self, banks, maps, index)

    def kept(self, source, **how):
        bank = adapt(self, source, **how)
        owners.append(bank["owner"])
        return bank

    monkeypatch.setattr(compiled.Device, "transform", counted)
    monkeypatch.setattr(away.Away, "adapt", kept)
    run(shots=2, support=SupportConfig(rotations=3))
    cells = len(owners[0]) // 6
    np.testing.assert_array_equal(owners[0], np.repeat([0, 1], 3 * cells))
    counts = {i: asked.count(i) for i in (0, 1)}
    assert counts[0] == counts[1] > 0
    assert counts[0] % 3 == 0
    assert max(asked) == 1


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_detector_trains_on_the_maps_that_it_scores(devices):
    """One fit on all images and one without those held out; each image three times, turned."""
    seen = []

    def compared(detector, data):
        images = np.concatenate(list(data.images()))
        rows = jnp.arange(len(images), dtype=jnp.int32)
        maps = jax.jit(lambda frozen, *batch: frozen(*batch))
        inside = np.asarray(maps(data.backbone, images, rows)["colour"])
        other = np.asarray(maps(data.backbone, images, 0 * rows - 1)["colour"])
        for batch in data.features:
            used = np.asarray(batch.valid)
            index = np.asarray(batch.index)[used]
            expected = np.asarray(batch.maps["colour"])[used]
            np.testing.assert_allclose(inside[index], expected, atol=1e-5)
        assert np.abs(inside).max() > 0.01
        np.testing.assert_array_equal(other, 0)  # what an image is to itself
        seen.append(len(images))
        return Trainer()(detector, data)

    recipe = Recipe(steps=2, batch_size=4)
    detector = linear.Linear(linear.Config(layers=("colour",), on="images", recipe=recipe))
    config = {"false_alarm_rate": 0.5, "holdout": 3}
    run(
        detector=detector, backbone=CELLS, devices=devices, train=compared, config=config,
        support=SupportConfig(rotations=3),
    )  # fmt: skip
    assert seen == [21, 12]


def test_devices_and_pooling_change_nothing():
    dataset = Planted(categories=("disc", "ring"), strength=3)
    one = run(dataset=dataset, pooled=True)
    eight = run(dataset=dataset, pooled=True, devices=8)
    for name, value in one.mean.items():
        assert eight.mean[name] == pytest.approx(value, abs=1e-6)


def test_maps_are_computed_once_for_all_wrappers_and_seeds(tmp_path, monkeypatch):
    """Stored are those of the network, which no bank has changed."""
    computed = []
    call = extract.Extractor.__call__

    def counted(self, images):
        computed.append(len(images))
        return call(self, images)

    monkeypatch.setattr(extract.Extractor, "__call__", counted)
    config = {"feature_cache": str(tmp_path)}
    first = run(backbone=CELLS, seeds=(0, 1), shots=3, config=config)
    assert computed
    del computed[:]
    assert run(backbone=CELLS, seeds=(0, 1), shots=3, config=config).mean == first.mean
    both = run(("away", "again"), backbone=CELLS, seeds=(0, 1), shots=3, config=config)
    assert both.mean != first.mean
    assert run((), backbone=CELLS, seeds=(0, 1), shots=3, config=config).mean != first.mean
    assert not computed


@pytest.mark.slow
def test_through_the_command_line_config(tmp_path, monkeypatch):
    drawn, supports = [], fitting.supports

    def counted(*arguments, **options):
        drawn.append(supports(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(fitting, "supports", counted)
    config, _, _ = flags.Command("evaluate", "", config="configs/knn.py:smoke").parse(
        ["--config.backbone=away:patches:32/8:resnet18", "--config.shots=2"]
    )
    parts = evaluate.prepare(config, console.console())
    results = evaluate.evaluate(parts, tmp_path, console.console())
    assert results.stamp["map_wrappers"] == ["away"]
    assert len(drawn) == 1  # the checks are made once, and their sets handed over
    assert results.stamp["backbone"]["arch"] == "patches:32/8:resnet18"


def test_specs_are_taken_apart():
    parts = wrappers.unwrap("away:away:patches:32/4:run:gs://a/b")
    assert parts.names == ("away", "away")
    assert (parts.network, parts.inner) == ("patches:32/4:run:gs://a/b", "run:gs://a/b")
    assert len(parts.images) == 1
    with pytest.raises(ConfigError, match="away has to stand in front"):
        wrappers.unwrap("patches:32/4:away:resnet18")
    with pytest.raises(ConfigError, match="expected away:BACKBONE"):
        wrappers.unwrap("away:")
    parts = wrappers.unwrap("projected:4:gs://a/b@5:residual:resnet18")
    assert parts.names == ("residual", "projected:4:gs://a/b@5")
    assert [wrapper.references for wrapper in parts.maps] == [8, 4]
    for number in (0, 1):
        with pytest.raises(ConfigError, match=rf"2 reference images or more, found {number};"):
            wrappers.unwrap(f"residual:{number}:resnet18")
    with pytest.raises(ConfigError, match="projected:run: expected the directory .* by itself"):
        wrappers.unwrap("projected:run:runs/a:resnet18")
    with pytest.raises(ConfigError, match=r"expected projected\[:REFERENCES\]:RUN:BACKBONE"):
        wrappers.unwrap("projected:runs/a")
    with pytest.raises(ConfigError, match="away needs the support set of an evaluation"):
        runs.backbone("away:resnet18", "", 0)
