"""What an objective asks for reaches it, however the data are kept; passes; features once."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from dsad.assembly import training
from dsad.assembly.pretrain import default_config
from dsad.core.batch import Companions, Needs
from dsad.core.errors import ConfigError
from dsad.core.mesh import place_batch
from dsad.data import base, combined, facts
from dsad.objectives import ds2
from dsad.train.cache import fetch_with
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.state import initial_state
from tests.seams.objectives import frozen

CACHES = ("device", "host", "none")


@pytest.fixture
def config():
    config = default_config("ds2")
    config.data.synthetic.update(size=48, train=2, good=1, bad=1)
    config.data.canvas = 32  # smaller than the images
    config.batch_size, config.steps = 8, 1
    config.objective.update(hidden=16, out=8)
    config.objective.view1.side = config.objective.view2.side = 32
    return config


def asking(monkeypatch, *names):
    """The objective ds2 with a wish for facts."""
    plain = ds2.build

    def build(cfg, run):
        objective = plain(cfg, run)
        objective.traits = dataclasses.replace(objective.traits, needs=Needs(facts=names))
        return objective

    monkeypatch.setattr(ds2, "build", build)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(normal=True), r"takes all images for normal, and 24 of the 39 images of split all"),
        (
            Needs(companions=Companions(count=1, same=("category", "group"), label=2)),
            r"39 of 39 images have no companion: no other image of the same category, group\.",
        ),
    ],
)
def test_data_that_the_objective_cannot_use_are_refused(monkeypatch, config, needs, message):
    plain = ds2.build

    def build(cfg, run):
        objective = plain(cfg, run)
        objective.traits = dataclasses.replace(objective.traits, needs=needs)
        return objective

    monkeypatch.setattr(ds2, "build", build)
    config.data.split = "all"
    with pytest.raises(ConfigError, match=message):
        training.prepare(config, Console(file=io.StringIO()))


@pytest.mark.parametrize("cache", CACHES)
def test_a_pass_has_every_sample_once_with_its_facts(monkeypatch, config, cache):
    asking(monkeypatch, "original_size", "foreground_box")
    config.data.cache = cache
    made = training.build(config)
    source = base.load(made.run.config.data).source("train")
    for _ in range(2):  # passes are fresh
        batches = jax.device_get(list(training.passes(made)))
        assert [len(b["index"]) for b in batches] == [8, 2]
        assert np.concatenate([b["index"] for b in batches]).tolist() == list(range(10))
        for batch in batches:
            assert set(batch["facts"]) == {"original_size", "foreground_box"}
            np.testing.assert_array_equal(batch["epoch"], 0)
            np.testing.assert_array_equal(batch["size"], 32)
            np.testing.assert_array_equal(batch["facts"]["original_size"], 48)
            for row, index in zip(batch["facts"]["foreground_box"], batch["index"], strict=True):
                expected = facts.find(("foreground_box",), source[int(index)].image)
                np.testing.assert_array_equal(row, expected["foreground_box"])


def test_an_objective_without_wishes_gets_none(config):
    config.data.cache = "host"
    assert all(b["facts"] == {} for b in training.passes(training.build(config)))


def test_an_unknown_fact_is_refused_before_images_are_read(monkeypatch, config):
    asking(monkeypatch, "weight")
    calls = []
    with pytest.raises(ConfigError, match=r"no fact named 'weight'.*original_size"):
        training.build(config, progress=lambda *a: calls.append(a))
    assert not calls


@pytest.mark.parametrize("split", ["test", "all"])
@pytest.mark.parametrize("cache", CACHES)
def test_frozen_features_masks_and_companions_in_every_cache(monkeypatch, config, cache, split):
    """The whole way of an objective that computes per sample, on the mesh of eight devices."""
    monkeypatch.setattr(ds2, "build", lambda cfg, run: frozen.build(frozen.Config(), run))
    config.data.update(cache=cache, split=split)
    made = training.build(config)
    run = made.run
    source = combined.training_source(base.load(run.config.data), split)
    state = initial_state(run.objective, run.tx, run.abstract, seed=0)
    state = training.first_state(made, None, Console(quiet=True))
    made = training.with_features(made, state, Console(quiet=True))
    state = training.prepared(made, state)
    assert made.pipeline.spec == run.spec

    inputs = next(made.pipeline.iterator())
    placed = place_batch(inputs, run.mesh)
    fetch = jax.jit(fetch_with(run.gather, run.spec)) if run.gather else lambda store, drawn: drawn
    batch = jax.device_get(fetch(made.store, placed))
    cells = {}
    for each in training.passes(made):
        rows = run.objective.per_sample(state.params, state.extra, each)["cells"]
        cells |= dict(zip(np.asarray(each["index"]).tolist(), np.asarray(rows), strict=True))
    for row, index in enumerate(batch["index"].tolist()):
        sample = source[index]
        assert batch["mask"][row].any() == bool(sample.record.label)
        assert batch["masked"][row] == 1
        np.testing.assert_allclose(batch["features"]["cells"][row], cells[index], atol=1e-6)
        references = jax.tree.map(lambda a, row=row: a[row], batch["references"])
        for other, valid, features in zip(
            references["index"], references["valid"], references["features"]["cells"], strict=True
        ):
            np.testing.assert_allclose(features, cells[int(other)], atol=1e-6)
            if valid:
                record = source.records[int(other)]
                assert (record.label, record.category) == (0, sample.record.category)
                assert other != index
        assert "image" not in references
    state, scalars = run.step(state, placed, made.store, run.key)
    assert np.isfinite(scalars["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_a_resumed_run_computes_the_same_features_again(monkeypatch, config, tmp_path, cache):
    """Restored extra, features and position: the second half is the same to the last bit."""
    monkeypatch.setattr(ds2, "build", lambda cfg, run: frozen.build(frozen.Config(), run))
    config.data.update(cache=cache, split="all")
    config.steps, config.log_every = 4, 1
    config.checkpoint.every = 2
    quiet, folder = Console(quiet=True), epath.Path(tmp_path)
    assert training.pretrain(training.prepare(config, quiet), folder, quiet)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = Checkpointer(tmp_path, CheckpointConfig(), read_only=True).weights(4)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again, out = training.prepare(config, quiet, continued=True), Console(file=io.StringIO())
    assert training.pretrain(again, folder, out, resume=True)
    assert "resumed at step 2 of 4" in out.file.getvalue()
    jax.tree.map(
        np.testing.assert_array_equal, last[:2],
        Checkpointer(tmp_path, CheckpointConfig(), read_only=True).weights(4)[:2],
    )  # fmt: skip
    resumed = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line).get("loss") for line in text] for text in (lines, resumed)]
    assert losses[0] == losses[1]
    assert len(set(losses[0]) - {None}) == 4
