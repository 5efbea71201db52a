"""The probe: what it holds out, and that its numbers are those of an evaluation."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.types import Record
from dsad.data.base import DataConfig, SyntheticConfig, load
from dsad.detectors import knn
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.probe import NAMES, Probe, ProbeConfig, default_layers, hold_out, shares
from tests.backbones import Plain


def records(sizes, bad=2):
    """Groups of three and lone images, in ``sizes`` {category: normal images}."""
    made = []
    for category, count in sizes.items():
        for i in range(count + bad):
            label = int(i >= count)
            group = "" if i % 2 else f"{i // 6}"
            kind = "hole" if label else "good"
            path = f"{category}/{kind}/{i:03d}.png"
            made.append(Record(path=path, category=category, label=label, kind=kind, group=group))
    return made


SIZES = {"cap": 60, "disc": 33, "ring": 12}


@pytest.mark.parametrize("images", [1, 7, 16])
def test_held_out_images_and_their_groups_are_not_trained_on(images):
    rows = records(SIZES)
    held = hold_out(rows, ProbeConfig(images=images, support=9), seed=5)

    def of(numbers):
        return [rows[i] for i in numbers]

    trained, queries = of(held.training), [r for n in held.queries.values() for r in of(n)]
    keys = {(r.category, r.group or r.path) for r in queries}
    assert not keys & {(r.category, r.group or r.path) for r in trained}
    # Nothing else is lost, and the numbers that people read are true.
    lost = [r for r in rows if r not in trained]
    assert {(r.category, r.group or r.path) for r in lost} == keys
    assert held.held == sum(not r.label for r in lost) >= len(queries) == images
    assert held.normals == sum(SIZES.values())
    for category, numbers in held.support.items():
        assert set(numbers) <= set(held.training)
        assert {(r.category, r.label) for r in of((*numbers, *held.queries[category]))} == {
            (category, 0)
        }
    assert sum(map(len, held.support.values())) == 9
    assert f"{held.held} of 105 normal images" in str(held)


def test_the_draw_follows_the_seed_and_not_the_order():
    rows, config = records(SIZES), ProbeConfig(images=9, support=6)

    def paths(rows, seed=0, config=config):
        held = hold_out(rows, config, seed)
        return {
            name: {c: [rows[i].path for i in n] for c, n in getattr(held, name).items()}
            for name in ("queries", "support")
        }

    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert paths(rows) == paths(shuffled)
    assert paths(rows) != paths(rows, seed=1)


def test_more_images_hold_out_the_same_and_further_ones():
    """So that equal numbers of images mean equal images, as a resumed run takes it."""
    rows, before = records(SIZES), set(range(len(records(SIZES))))
    for images in range(1, 25):
        held = hold_out(rows, ProbeConfig(images=images), seed=2)
        assert set(held.training) <= before
        before = set(held.training)


def test_shares_are_in_proportion():
    assert shares(10, {"a": 70, "b": 20, "c": 10}) == {"a": 7, "b": 2, "c": 1}
    assert shares(15, dict.fromkeys("abcde", 200)) == dict.fromkeys("abcde", 3)
    assert shares(2, {"a": 5, "b": 5, "c": 5}) == {"a": 1, "b": 1, "c": 0}


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match=r"config\.probe\.images.*5 of 8 cap"):
        hold_out(records({"cap": 8}), ProbeConfig(images=5), seed=0)
    with pytest.raises(ConfigError, match=r"config\.probe\.images.*config\.probe\.every=0"):
        hold_out([r for r in records({"cap": 8}) if r.label], ProbeConfig(images=1), seed=0)


def test_maps_at_a_third_and_two_thirds_of_the_depth():
    assert default_layers([f"layer{i}" for i in (1, 2, 3, 4)]) == ("layer2", "layer3")
    assert default_layers([f"block{i}" for i in range(12)][::-1]) == ("block4", "block8")
    assert default_layers(["block0", "error", "probability"]) == ("block0",)
    assert default_layers(["cells"]) == ("cells",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches(Plain):
    """A random projection of patches; ``TRACED`` counts its traces."""

    kernel: jax.Array

    def maps(self, images):
        TRACED.append(images.shape)
        b, h, w, _ = images.shape
        cells = images.reshape(b, h // 4, 4, w // 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        return {"cells": jax.nn.relu(cells.reshape(b, h // 4, w // 4, 48) @ self.kernel)}


TRACED = []


def network(seed):
    return Patches(jax.random.normal(jax.random.key(seed), (48, 6)))


@pytest.fixture(scope="module")
def source():
    synthetic = SyntheticConfig(size=40, train=9)
    config = DataConfig(name="synthetic", synthetic=synthetic, categories=("tiles", "washer"))
    return load(config).source("train")


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_an_evaluation_and_nothing_is_compiled_twice(source, count):
    config = ProbeConfig(images=5, support=9)
    mesh = make_mesh(MeshConfig(), jax.devices()[:count])
    held = hold_out(source.records, config, seed=0)
    probe = Probe(source, held, config, layers=("cells",), image_size=32, mesh=mesh, seed=0)

    def parts(split, category=None):
        return probe.parts[category][("train", "test").index(split)]

    dataset = types.SimpleNamespace(
        name="probed", categories=tuple(probe.parts), protocol={}, faults=(), origin="",
        source=parts,
    )  # fmt: skip
    assert {c: len(held.queries[c]) for c in dataset.categories} == {"tiles": 3, "washer": 2}
    measured = []
    for seed in (0, 1):
        traced = len(TRACED)
        measured.append(probe(network(seed)))
        assert (len(TRACED) > traced) == (seed == 0)
        expected = localize(
            network(seed), knn.build(knn.Config(layers=("cells",))), dataset,
            EvalConfig(image_size=32, batch_size=16, method="streaming", gallery=0),
            mesh=mesh, key=jax.random.key(0),
        ).mean  # fmt: skip
        assert set(measured[-1]) == set(NAMES)
        for name, key in NAMES.items():
            assert measured[-1][name] == pytest.approx(expected[key], abs=1e-6), name
    assert measured[0] != measured[1]
    assert measured[0] == probe(network(0))
