"""A stopped evaluation goes on where it was, and what failed blocks no retry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import evaluate, workdir
from dsad.cli import main
from dsad.core.detection import DetectorTraits
from dsad.core.errors import WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.data import base
from dsad.evaluation import categories
from dsad.evaluation import localize as module
from dsad.evaluation.localize import EvalConfig, localize, read_results, write_results
from dsad.evaluation.support import Sampling
from tests.backbones import Plain
from tests.data import trees
from tests.evaluation.test_localize import Distance, Planted, Pooled

CATEGORIES = ("disc", "ring", "to/p", "[/x]")


FITTED = []


class Counting(Distance):
    def fit(self, source, **given):
        FITTED.extend(source.categories)
        return super().fit(source, **given)


class Stopping(Distance):
    def fit(self, source, **given):
        if source.categories == ("to/p",):
            raise KeyboardInterrupt
        return super().fit(source, **given)


def run(folder, detector, strength=9, **config):
    return localize(
        Pooled(), detector, Planted(categories=CATEGORIES, strength=strength),
        EvalConfig(image_size=48, batch_size=4, workers=2, false_alarm_rate=0.3, **config),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3), folder=folder,
        sampling=Sampling(seeds=(0, 1), shots=6),
    )  # fmt: skip


def same(one, other):
    assert (one.mean, one.std, one.kinds) == (other.mean, other.std, other.kinds)
    assert (one.images, one.cases, one.scales) == (other.images, other.cases, other.scales)
    assert (one.thresholds, one.support) == (other.thresholds, other.support)
    for name in one.metric_names:
        for category, row in one.categories.items():
            assert other.categories[category][name] == row[name]
    assert one.stamp["detector_state"] == other.stamp["detector_state"]
    for left, right in ((one.gallery, other.gallery), (one.curves, other.curves)):
        assert left.keys() == right.keys()
        for name, values in left.items():
            np.testing.assert_array_equal(values, right[name])


def test_measured_categories_are_not_measured_again(tmp_path):
    whole = run(None, Distance())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stopping())
    del FITTED[:]
    again = run(tmp_path, Counting())
    assert FITTED == ["to/p"] * 4 + ["[/x]"] * 4  # two seeds, two fits each
    same(again, whole)
    del FITTED[:]
    (tmp_path / "parts" / "ring" / "results.json").write_text("{")  # damaged
    same(run(tmp_path, Counting()), whole)
    assert FITTED == ["ring"] * 4
    del FITTED[:]
    run(tmp_path, Counting(), fpr_limit=0.2)
    assert len(FITTED) == 16
    write_results(again, tmp_path)
    same(read_results(tmp_path), whole)


class Trained(Counting):
    traits = property(lambda self: DetectorTraits(trains_on="features"))


def test_what_was_made_of_other_files_is_made_again(tmp_path):
    data = base.load(trees.mvtec(tmp_path / "data"))
    folders = []

    def again(kind=Counting):
        del FITTED[:], folders[:]
        localize(
            Pooled(), kind(), data, EvalConfig(image_size=16, workers=1),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
            folder=tmp_path / kind.__name__,
            train=lambda _, given: folders.append(given.folder),
        )  # fmt: skip
        return list(FITTED)

    assert again() == ["disc", "plate"]
    assert again() == []
    assert again(Trained) == ["disc", "plate"]
    before = dict(zip(FITTED, folders, strict=True))
    for name in ("test/good/000.png", "train/good/000.png"):
        trees.save(tmp_path / "data" / "plate" / name, trees.pixels(99))  # pixels of another seed
        assert again() == ["plate"]
    mask = next((tmp_path / "data" / "disc" / "ground_truth").glob("*/*.png"))
    trees.save(mask, np.rot90(trees.mask(), 2))
    assert again() == ["disc"]
    assert again(Trained) == ["disc", "plate"]
    assert len({*before.values(), *folders}) == 4


def test_files_are_looked_at_only_where_something_is_kept(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(module.support, "version", lambda sources: looks.append(1) or "")

    def looked(categories, **given):
        del looks[:]
        localize(
            Pooled(), given.pop("detector", Distance()), Planted(categories=categories),
            EvalConfig(image_size=16, workers=1), folder=tmp_path, train=lambda *given: None,
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
        )  # fmt: skip
        return len(looks)

    assert looked(("disc",)) == 0
    assert looked(("disc",), detector=Trained()) == 1
    assert looked(("disc", "ring")) == 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighted(Plain):
    weight: jax.Array

    def maps(self, images):
        return {n: m * self.weight for n, m in Pooled()(images).items()}


def test_other_weights_of_the_same_name_are_measured_anew(tmp_path):
    def again(**weights):
        del FITTED[:]
        localize(
            None, Counting(), Planted(categories=("disc", "ring")),
            EvalConfig(image_size=16, workers=1),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]), key=jax.random.key(3),
            folder=tmp_path, backbone_of=lambda c: Weighted(weight=jnp.float32(weights[c])),
        )  # fmt: skip
        return list(FITTED)

    assert again(disc=1, ring=2) == ["disc", "ring"]
    assert again(disc=1, ring=3) == ["ring"]
    assert again(disc=4, ring=3) == ["disc"]


def test_anomaly_maps_of_other_settings_are_not_replaced_unasked(tmp_path):
    workdir.claim(str(tmp_path), "evaluate", {"k": 1})
    workdir.claim(str(tmp_path), "evaluate", {"k": 2})
    (tmp_path / "anomaly_maps").mkdir()
    (tmp_path / "anomaly_maps" / "stamp.json").write_text("{}")
    workdir.claim(str(tmp_path), "evaluate", {"k": 2})
    with pytest.raises(WorkdirError, match=r"config.k: 2 → 1"):
        workdir.claim(str(tmp_path), "evaluate", {"k": 1})
    assert (tmp_path / "anomaly_maps" / "stamp.json").exists()
    workdir.claim(str(tmp_path), "evaluate", {"k": 1}, overwrite=True)


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Programs for one of the eight devices take less time to compile, and less memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


ARGV = (
    "--config=knn:smoke", "--config.data.categories=('tiles','wood')",
    "--config.detector.layers=('layer1',)", "--config.evaluation.gallery=1",
)  # fmt: skip


@pytest.mark.slow
def test_the_command_goes_on_by_itself(tmp_path, monkeypatch, capsys):
    argv = ["evaluate", *ARGV, f"--workdir={tmp_path / 'a'}"]
    assert main.main([*argv[:-1], f"--workdir={tmp_path / 'whole'}"]) == 0
    score = categories.score

    def stopping(reader, fitted, source, name, tick, **given):
        if name.startswith("wood"):
            raise MemoryError("planted")
        return score(reader, fitted, source, name, tick, **given)

    with monkeypatch.context() as patch:
        patch.setattr(categories, "score", stopping)
        with pytest.raises(MemoryError):
            main.main(argv)
    assert (tmp_path / "a" / "parts" / "tiles" / "results.json").exists()
    assert main.main([*argv, "--config.detector.k=2"]) == 2
    assert "unfinished evaluation with other settings" in capsys.readouterr().err
    names = []

    def watching(reader, fitted, source, name, tick, **given):
        names.append(name)
        return score(reader, fitted, source, name, tick, **given)

    with monkeypatch.context() as patch:
        patch.setattr(categories, "score", watching)
        assert main.main(argv) == 0
    assert names == ["wood/test"]
    assert not (tmp_path / "a" / "parts").exists()
    assert read_results(tmp_path / "a").mean == read_results(tmp_path / "whole").mean
    assert main.main(argv) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failure_before_anything_was_measured_blocks_no_retry(tmp_path, monkeypatch):
    argv = ["evaluate", *ARGV, f"--workdir={tmp_path / 'a'}"]
    with monkeypatch.context() as patch:
        patch.setattr(categories, "score", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main.main([*argv, "--config.detector.k=2"])
    assert main.main(argv) == 0
