"""Support sets with labels: drawn by seed, from training or test, never tested; what is learnt."""

import dataclasses

import jax
import numpy as np
import pytest

from dsad.assembly import evaluate
from dsad.assembly.detectors import Trainer
from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.recipe import OptimConfig, Recipe
from dsad.core.types import Record, Sample
from dsad.detectors import twoclass
from dsad.evaluation import fitting, support
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.support import Sampling, Sets
from dsad.terminal import console, flags
from tests.contracts.detectors import twoclass as case
from tests.evaluation.test_localize import Planted

RECIPE = Recipe(steps=40, batch_size=8, optim=OptimConfig(lr=3e-3))
DETECTOR = twoclass.TwoClass(
    twoclass.Config(layers=("stem",), width=4, jitter=(0.0,) * 4, recipe=RECIPE)
)
SAMPLING = Sampling(shots=2, seeds=(0, 1, 2))
#: Defects of 20 noise levels.
PLAIN = {"strength": 120, "good": 7}


class Grouped(Planted):
    """Test images in pairs that show one object; with ``pool``, anomalous training images too."""

    def __init__(self, pool=False, **settings):
        super().__init__(**settings)
        self.pool = pool

    def source(self, split, category=None):
        found = super().source(split, category)
        if split == "train" and self.pool:
            found.rows = found.rows + [
                (c, "red", 1 + i) for c in self.categories for i in (0, 1, 2)
            ]
            found = type(found)(self, split, found.rows)
        if split == "test":
            # All defects are red ones, at three places.
            rows = [(c, "green" if kind == "blue" else kind, i) for c, kind, i in found.rows]
            found = type(found)(self, split, rows)
            found.records = [
                dataclasses.replace(r, group=f"object {i // 2}")
                for i, r in enumerate(found.records)
            ]
        return found


def chosen(dataset, labelled=True, measured=True, **sampling):
    sampling = dataclasses.replace(SAMPLING, **sampling)
    made = support.choose(
        dataset, dataset.categories, shots=sampling.shots, seeds=sampling.seeds, labelled=labelled,
        measured=measured,
    )  # fmt: skip
    return Sets(sampling, made)


def test_as_many_anomalous_images_from_the_pool_and_all_test_images_stay():
    sets, dataset = chosen(Grouped(pool=True)), Grouped(pool=True)
    for seed, own in sets.by_category["disc"].items():
        labels = [path.split("/")[2] for path in own.bank]
        assert (labels.count("good"), labels.count("red")) == (2, 2)
        assert all(path.startswith("disc/train/") for path in own.bank)
        assert own.untested == ()
        assert len(sets.tested(dataset, "disc", seed)) == 11
        red = [r.path for r in dataset.source("train").records if r.label]
        assert own.anomalous == support.draw(red, 2, seed, "disc")
    assert "training images" in support.describe(sets)["anomalous"]


def test_sets_are_the_same_again_and_without_labels_what_they_were():
    assert chosen(Grouped(pool=True)) == chosen(Grouped(pool=True))
    plain = chosen(Grouped(), labelled=False)
    assert plain == chosen(Planted(), labelled=False)
    for seed, own in chosen(Grouped()).by_category["disc"].items():
        normal = tuple(path for path in own.bank if "/good/" in path)
        assert normal == plain.by_category["disc"][seed].bank


def test_drawn_test_images_and_their_groups_are_not_tested():
    sets, dataset = chosen(Grouped()), Grouped()
    group_of = {r.path: r.group for r in dataset.source("test").records}
    sizes = set()
    for seed, own in sets.by_category["disc"].items():
        drawn = {group_of[path] for path in own.anomalous}
        tested = {r.path for r in sets.tested(dataset, "disc", seed).records}
        assert len(own.anomalous) == 2
        assert tested == {path for path, name in group_of.items() if name not in drawn}
        assert not tested & set(own.bank)
        sizes.add(tuple(sorted(tested)))
        found = support.subset(sets.pool(dataset, "disc", "train"), own.bank)
        assert [r.path for r in found.records] == list(own.bank)
    assert len(sizes) > 1  # each seed has its own
    about = support.describe(sets)
    assert "not tested" in about["anomalous"]
    assert min(about["untested"]["disc"].values()) >= 2


def test_all_faults_of_draws_come_at_once():
    dataset = Grouped(categories=("disc", "ring"))
    with pytest.raises(ConfigError, match=r"(?s)disc: 6 anom.*shots = 7.*ring: 6 anom.*shots = 7"):
        chosen(dataset, shots=7)
    with pytest.raises(ConfigError, match=r"(?s)disc: no anomalous training image; config\.shots"):
        chosen(dataset, shots=0)
    with pytest.raises(ConfigError, match="leaves no anomalous image to test"):
        chosen(dataset, shots=6)
    for shots in (0, 6):  # where nothing is measured none has to be left
        (own,) = (
            chosen(Grouped(), shots=shots, seeds=(0,), measured=False).by_category["disc"].values()
        )
        assert len(own.anomalous) == 6
    everything = chosen(Grouped(pool=True), shots=0).by_category["disc"][0]
    assert (len(everything.bank), len(everything.anomalous)) == (10, 3)


class Tiny:
    """Defects that an input of 8 pixels does not show, an empty mask, and none."""

    def __init__(self):
        kinds = ("good", "tiny", "empty", "none", "large")
        self.records = [
            Record(path=kind, category="c", label=int(kind != "good"), kind=kind) for kind in kinds
        ]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        mask = np.zeros((64, 32), bool)
        mask[0, 0] = record.kind == "tiny"
        mask[:32, 8:] |= record.kind == "large"
        mask = None if record.kind == "none" else mask
        return Sample(record=record, image=np.zeros((64, 32, 3), np.uint8), mask=mask)


def test_a_defect_that_the_input_does_not_show_is_not_learnt_as_normal():
    config = EvalConfig(image_size=8)
    with pytest.warns(RuntimeWarning, match=r"c: the defects of 1 training .*8 x 8.*image_size"):
        rows = list(fitting._labelled([Tiny()], config, "c"))
    assert [row.masked for row in rows] == [True, False, True, False, True]
    assert [row.label for row in rows] == [0, 1, 1, 1, 1]
    expected = np.zeros((8, 8), np.uint8)
    expected[:4, 2:] = 1
    np.testing.assert_array_equal(rows[-1].mask, expected)
    assert not any(row.mask.any() for row in rows[:-1])


def run(dataset, detector=DETECTOR, **given):
    config = {"image_size": 32, "batch_size": 4, "workers": 2, "gallery": 2} | given
    return localize(
        case.network(), detector, dataset, EvalConfig(**config), train=Trainer(),
        sampling=dataclasses.replace(SAMPLING, seeds=(0, 1)),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
    )  # fmt: skip


def test_it_learns_from_two_shots_and_says_what_was_tested():
    results = run(Grouped(**PLAIN), further=("anomalous", "visa"))
    mean, about = results.mean, results.stamp
    assert mean["image_auroc"] > 0.85
    assert mean["pixel_auroc"] > 0.8
    assert mean["pixel_ap"] > 0.25  # of 0.02 by chance
    assert mean["pixel_ap_anomalous"] >= mean["pixel_ap"]
    assert abs(mean["pixel_auroc_visa"] - mean["pixel_auroc"]) < 0.01
    assert set(results.std["mean"]) == set(mean)
    assert about["further_numbers"]["pixel_aupr_visa"].startswith("202 thresholds")
    assert "not tested" in about["support"]["anomalous"]
    out = {path for path in results.support["disc"]["0"]["untested"]}
    assert not out & {row["path"] for row in results.images["disc"]}
    assert len(out) + len(results.images["disc"]) == 13


def test_missing_layers_are_refused_before_images_are_read():
    command = flags.Command("evaluate", "", config="configs/twoclass.py:smoke")
    config, _, _ = command.parse([])
    match = r"config\.detector\.layers: .* layer2, layer3, layer4; .*gives: stem, layer1\."
    with pytest.raises(ConfigError, match=match):
        evaluate.prepare(config, console.console(), Grouped(), network=case.network())


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(ConfigError, match=r"recalibrate: .*trains the network itself"):
        run(Grouped(), recalibrate=True)
    with pytest.raises(ConfigError, match=r"evaluation\.method: expected \"exact\" with"):
        run(Grouped(), further=("visa",), method="streaming")
