"""What an objective wants to know of each image reaches it, however the data are kept."""

import jax
import numpy as np
import pytest

from dsad.assembly import pretrain
from dsad.core.errors import ConfigError
from dsad.data import facts
from dsad.objectives import ds2


@pytest.fixture
def config():
    config = pretrain.default_config("ds2")
    config.data.synthetic.update(size=48, train=2)
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
        object.__setattr__(objective, "facts", names)
        return objective

    monkeypatch.setattr(ds2, "build", build)


@pytest.mark.parametrize("cache", ["device", "host", "none"])
def test_facts_of_the_objective_arrive_in_the_batch(monkeypatch, config, cache):
    asking(monkeypatch, "original_size", "foreground_box")
    config.data.cache = cache
    run = pretrain.build(config)
    source = pretrain.data_base.load(run.config.data).source("train")
    batches = list(pretrain._one_epoch(run))
    assert len(batches) == 2
    for batch in batches:
        assert set(batch["facts"]) == {"original_size", "foreground_box"}
        assert batch["facts"]["foreground_box"].sharding.is_equivalent_to(
            batch["image"].sharding, 2
        )
        found = jax.device_get(batch)
        np.testing.assert_array_equal(found["size"], 32)
        np.testing.assert_array_equal(found["facts"]["original_size"], 48)
        for row, index in zip(found["facts"]["foreground_box"], found["index"], strict=True):
            expected = facts.find(("foreground_box",), source[int(index)].image)
            np.testing.assert_array_equal(row, expected["foreground_box"])


def test_an_objective_without_wishes_gets_none(config):
    config.data.cache = "host"
    assert all(b["facts"] == {} for b in pretrain._one_epoch(pretrain.build(config)))


def test_an_unknown_fact_is_refused_before_images_are_read(monkeypatch, config):
    asking(monkeypatch, "weight")
    calls = []
    with pytest.raises(ConfigError, match=r"no fact named 'weight'.*original_size"):
        pretrain.build(config, progress=lambda *a: calls.append(a))
    assert not calls
