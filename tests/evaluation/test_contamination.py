"""Anomalous test images among the training images: drawn by seed, never tested, said."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from dsad.cli import main
from dsad.core.config import members
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.data.base import load
from dsad.evaluation import fitting, support
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.support import Sampling
from tests.data import trees
from tests.evaluation.test_labelled import DETECTOR, Grouped
from tests.evaluation.test_localize import Distance, Planted, Pooled

CONFIG = EvalConfig(image_size=32, batch_size=4, workers=2, gallery=0)
#: 2 anomalous images beside the 7 normal ones.
SHARE = Sampling(contamination=0.2, seeds=(0, 1, 2))


def sets(dataset, sampling=SHARE, detector=None, config=CONFIG):
    detector = detector or Distance()
    return fitting.supports(detector, dataset, dataset.categories, config, sampling)


@pytest.mark.parametrize(("share", "shots", "count"), [
    (0.2, 0, 2), (0.3, 0, 3), (0.5, 4, 4), (0.01, 0, 1), (0.25, 6, 2),
])  # fmt: skip
def test_so_many_that_they_are_this_share(share, shots, count):
    found = sets(Planted(), dataclasses.replace(SHARE, contamination=share, shots=shots))
    for own in found.by_category["disc"].values():
        normal = len(own.bank) - len(own.anomalous)
        assert (normal, len(own.anomalous)) == (shots or 7, count)
        assert set(own.anomalous) <= set(own.bank)
        # Another number is farther from the share.
        errors = [abs(n / (normal + n) - share) for n in (count - 1, count, count + 1)]
        assert count == 1 or min(errors) == errors[1]


def test_drawn_images_and_their_groups_are_not_tested():
    dataset, drawn = Grouped(), set()
    found, plain = sets(dataset), sets(dataset, Sampling(seeds=(0, 1, 2)))
    group_of = {r.path: r.group for r in dataset.source("test").records}
    for seed, own in found.by_category["disc"].items():
        out = {group_of[path] for path in own.anomalous}
        tested = {r.path for r in found.tested(dataset, "disc", seed).records}
        assert tested == {path for path, name in group_of.items() if name not in out}
        assert len(own.untested) > len(own.anomalous) or len(out) == 1
        clean = plain.by_category["disc"][seed]
        assert set(own.bank) - set(own.anomalous) == set(clean.bank)
        assert own.held_out == clean.held_out
        drawn.add(own.anomalous)
    assert len(drawn) > 1  # each seed has its own
    about = support.describe(found)
    assert about["contamination"]["share"] == 0.2
    assert about["contamination"]["images"] == {"disc": {"0": 2, "1": 2, "2": 2}}
    assert "not tested" in about["contamination"]["rule"]
    assert about["sha256"] != support.describe(plain)["sha256"]
    assert support.listing(found)["disc"]["1"]["anomalous"]


class Moved(Planted):
    """The same images by hand: ``paths`` of the test are normal training images, or gone."""

    def __init__(self, own, **settings):
        super().__init__(**settings)
        self.own = own

    def source(self, split, category=None):
        train, test = (Planted.source(self, s, category) for s in ("train", "test"))
        parts = [(train, i, r) for i, r in enumerate(train.records)]
        if split == "train":
            parts += [(test, i, r) for i, r in enumerate(test.records) if r.path in self.own.bank]
        else:
            parts = [
                (test, i, r) for i, r in enumerate(test.records) if r.path not in self.own.untested
            ]
        return Parts(sorted(parts, key=lambda part: part[2].path), split)


class Parts:
    def __init__(self, parts, split):
        self.parts = parts
        self.records = [
            dataclasses.replace(r, label=0, kind="good", masks=()) if split == "train" else r
            for _, _, r in parts
        ]

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        source, place, _ = self.parts[index]
        return dataclasses.replace(source[place], record=self.records[index])


def run(dataset, sampling, detector=None, **given):
    config = dataclasses.replace(CONFIG, false_alarm_rate=0.0, **given)
    return localize(
        Pooled(), detector or Distance(), dataset, config, sampling=sampling,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
    )  # fmt: skip


def scores(results):
    return {row["path"]: row["score"] for row in results.images["disc"]}


def test_numbers_are_those_of_a_data_set_that_is_so():
    for seed in (0, 1):
        sampling = Sampling(contamination=0.3, seeds=(seed,))
        own = sets(Planted(), sampling).by_category["disc"][seed]
        found = run(Planted(), sampling)
        expected = run(Moved(own), Sampling(seeds=(seed,)))
        clean = run(Planted(), Sampling(seeds=(seed,)))
        assert found.mean == expected.mean
        assert scores(found) == scores(expected)
        assert found.mean != clean.mean
        assert found.support["disc"][str(seed)]["untested"] == list(own.untested)
        assert len(found.images["disc"]) == 11 - len(own.untested)


def test_thresholds_are_set_by_normal_images():
    config = dataclasses.replace(CONFIG, false_alarm_rate=0.25)
    for own in sets(Planted(), config=config).by_category["disc"].values():
        assert own.held_out
        assert not set(own.held_out) & set(own.anomalous)


def test_what_cannot_be_is_refused():
    both = Planted(categories=("disc", "ring"))
    with pytest.raises(
        ConfigError,
        match=r"(?s)disc: 6 anomalous images, contamination = 0.5 of 14 .*ring: 6 anomalous",
    ):
        sets(both, dataclasses.replace(SHARE, contamination=0.5))
    with pytest.raises(ConfigError, match=r"0.46 of 13 training images leaves no anomalous image"):
        sets(Planted(), dataclasses.replace(SHARE, contamination=0.46))
    with pytest.raises(ConfigError, match=r"config\.contamination: .* learns from labelled images"):
        sets(Grouped(pool=True), detector=DETECTOR)
    drawn = Planted()
    drawn.protocol = {**drawn.protocol, "defects": "procedural"}
    with pytest.raises(ConfigError, match=r"config\.contamination: needs anomalous .*procedural"):
        sets(drawn)


def test_a_model_is_not_measured_on_what_it_saw(tmp_path, capsys):
    trees.mvtec(tmp_path / "data")
    common = ["--config.data.name=mvtec", f"--config.data.root={tmp_path / 'data'}",
              "--config.data.categories=disc"]  # fmt: skip
    fit = ["--config=patchcore:smoke", *common, "--config.contamination=0.2"]
    model = tmp_path / "model"
    first = ["evaluate", *fit, f"--workdir={tmp_path / 'first'}", f"--save-model={model}"]
    assert main.main(first) == 0
    again = ["evaluate", f"--model={model}", *common, f"--workdir={tmp_path / 'again'}"]
    assert main.main(again) == 2
    assert "was fitted on test images of mvtec" in capsys.readouterr().err


CASES = {m: importlib.import_module(f"tests.contracts.datasets.{m}") for m in members("data")}
NAMES = {n: case for m, case in CASES.items() for n in getattr(case, "NAMES", (m,))
         if getattr(case, "HAS_TEST", True)}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set(name, tmp_path):
    """Drawn shots by several seeds, with an anomalous image of each category among them."""
    dataset = load(NAMES[name].small(name, tmp_path))
    config = dataclasses.replace(CONFIG, false_alarm_rate=0.0)
    shots = Sampling(shots=1, seeds=(0, 1, 2))
    plain = sets(dataset, shots, config=config)
    anomalous = {c: {r.group or r.path for r in dataset.source("test", c).records if r.label == 1}
                 for c in dataset.categories}  # fmt: skip
    sampling = dataclasses.replace(shots, contamination=0.2)
    if few := [c for c, groups in anomalous.items() if len(groups) < 2]:
        with pytest.raises(ConfigError, match=rf"{few[0]}: .*contamination"):
            sets(dataset, sampling, config=config)
        return
    found = sets(dataset, sampling, config=config)
    for category in dataset.categories:
        test = dataset.source("test", category).records
        for seed, own in found.by_category[category].items():
            assert set(plain.by_category[category][seed].bank) < set(own.bank)
            tested = found.tested(dataset, category, seed).records
            groups = {r.group for r in test if r.path in own.anomalous and r.group}
            assert not {r.group for r in tested} & groups
            assert not {r.path for r in tested} & set(own.bank)
            bank = support.subset(found.pool(dataset, category, "train"), own.bank)
            assert [r.label for r in bank.records] == [int(p in own.anomalous) for p in own.bank]
            np.testing.assert_array_equal(bank[0].image.shape[2], 3)
