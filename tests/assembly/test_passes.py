"""Passes and what is computed once, on 1 and 8 devices and 2 processes, wherever images are."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsad.assembly import pretrain, training
from dsad.core.batch import Companions, Needs
from dsad.core.mesh import place_batch
from dsad.core.tree import flatten
from dsad.core.types import ObjectiveTraits
from dsad.data import base, combined
from dsad.data.canvases import canvases
from dsad.launch_local import free_port
from dsad.objectives import ds2
from dsad.terminal import console
from dsad.train import cache as train_cache
from dsad.train.state import initial_state
from tests.helpers import alone


class Counting:
    """One parameter; knows the sum of every image's pixels, and tells what its batches hold."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, **needs):
        self.traits = ObjectiveTraits(needs=Needs(**needs))

    def init(self, key):
        return {"w": jnp.ones(())}, {}

    def views(self, batch, key):
        return batch

    def loss(self, params, extra, views, *, key, step):
        seen = {name: jnp.sum(value.astype(jnp.float32)) for name, value in flatten(views).items()}
        return params["w"] ** 2, (extra, seen)

    def after_update(self, params, extra, step):
        return extra

    def per_sample(self, params, extra, batch):
        total = batch["image"].astype(jnp.int32).sum((1, 2, 3))
        return {"sum": total, "row": batch["index"], "odd": total % 2 > 0}


def small():
    """A run on 18 images, of which 8 are trained on in a step."""
    config = pretrain.default_config("ds2")
    config.data.synthetic.update(size=48, train=2, good=2, bad=1)
    config.data.update(categories=("washer", "weave"), canvas=32, split="all")
    config.batch_size, config.steps = 8, 3
    return config


def read(config, devices):
    """As ``training.build`` does on all devices."""
    cfg, _, _ = pretrain.parse(config)
    source = combined.training_source(base.load(cfg.data), cfg.data.split)
    run = pretrain.assemble(config, devices, pretrain.DataFacts.of(source.records))
    return training.read(run, source), canvases(source, run.spec)


@pytest.fixture(params=["none", "host", "device", "device, split"])
def config(request, monkeypatch):
    """Small sets are whole on every device but for the last of these."""
    config = small()
    config.data.cache, _, split = request.param.partition(", ")
    if split:
        monkeypatch.setattr(train_cache, "REPLICATE_BELOW", 0)
    return config


def test_a_pass_has_every_sample_once_and_is_cut(monkeypatch, config, devices):
    facts = ("original_size", "foreground_box")
    objective = Counting(
        facts=facts, label=True, group=True, mask=True, companions=Companions(count=2)
    )
    monkeypatch.setattr(ds2, "build", lambda cfg, run: objective)
    made, stored = read(config, devices)
    for _ in range(2):  # a new pass every time
        batches = list(training.passes(made))
        assert [len(b["index"]) for b in batches] == [8, 8, 2]
        host = jax.tree.map(lambda *x: np.concatenate(x), *map(jax.device_get, batches))
        references = host.pop("references")
        np.testing.assert_array_equal(host.pop("index"), np.arange(18))
        assert not host.pop("epoch").any()
        assert flatten(host).keys() == flatten(stored).keys()
        for name, values in flatten(stored).items():
            np.testing.assert_array_equal(flatten(host)[name], values, err_msg=name)
        assert references["valid"].all()
        for name in ("image", "size"):
            np.testing.assert_array_equal(references[name], stored[name][references["index"]])
    assert len(batches[0]["image"].sharding.device_set) == len(devices)


@pytest.mark.parametrize("images", [True, False])
def test_what_is_computed_once_follows_its_sample(monkeypatch, config, devices, images):
    objective = Counting(mask=True, companions=Companions(count=2, images=images))
    monkeypatch.setattr(ds2, "build", lambda cfg, run: objective)
    made, stored = read(config, devices)
    run, sums = made.run, stored["image"].astype(np.int32).sum((1, 2, 3))
    state = initial_state(objective, run.tx, run.abstract, 0)
    made = training.with_features(made, state, console.console())
    batches = made.pipeline.iterator()
    for _ in range(4):
        drawn = next(batches)
        index, others = drawn["index"], drawn["references"]["index"]
        state, seen = run.step(state, place_batch(drawn, run.mesh), made.store, run.key)
        expected = {
            "features/row": index, "features/sum": sums[index], "mask": stored["mask"][index],
            "references/features/sum": sums[others], "references/features/row": others,
        }  # fmt: skip
        for name, values in expected.items():
            total = values.astype(np.float64).sum()
            np.testing.assert_allclose(seen[name], total, rtol=1e-6, err_msg=name)
        assert ("references/image" in seen) == images
        if made.store is None:
            np.testing.assert_array_equal(drawn["features"]["sum"], sums[index])
            np.testing.assert_array_equal(drawn["references"]["features"]["row"], others)


PASSES = """
import sys
import jax
import numpy as np
from dsad.assembly import training
from dsad.core import distributed, hosts
from dsad.core.batch import Companions
from dsad.core.mesh import place_batch
from dsad.core.tree import flatten
from dsad.data import base, combined
from dsad.data.canvases import canvases
from dsad.objectives import ds2
from dsad.terminal import console
from dsad.train import cache
from dsad.train.state import initial_state
from tests.assembly.test_passes import Counting, small

distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
cache.REPLICATE_BELOW = 0
objective = Counting(mask=True, label=True, companions=Companions(count=2))
ds2.build = lambda cfg, run: objective
config = small()
config.data.cache = sys.argv[3]
read = []
made = training.build(config, progress=lambda done, total, note: read.append(total))
run = made.run
stored = canvases(combined.training_source(base.load(run.config.data), "all"), run.spec)
if made.store:  # 18 samples as 20 rows on four devices; every process reads its own
    assert set(read) == {[10, 8][distributed.index()]}, read
batches = [jax.tree.map(hosts.whole, batch) for batch in training.passes(made)]
assert [len(batch["index"]) for batch in batches] == [8, 8, 2]
host = jax.tree.map(lambda *x: np.concatenate(x), *batches)
np.testing.assert_array_equal(host["index"], np.arange(18))
for name, values in flatten(stored).items():
    np.testing.assert_array_equal(flatten(host)[name], values)
references = host["references"]
np.testing.assert_array_equal(references["image"], stored["image"][references["index"]])
state = initial_state(objective, run.tx, run.abstract, 0)
made = training.with_features(made, state, console.console())
drawn = place_batch(next(made.pipeline.iterator()), run.mesh)
index = hosts.whole(drawn["references"]["index"])
state, seen = run.step(state, drawn, made.store, run.key)
sums = stored["image"].astype(np.int32).sum((1, 2, 3))
np.testing.assert_allclose(seen["references/features/sum"], sums[index].sum(), rtol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("cache", ["device", "none"])
def test_over_two_processes(cache):
    environment, address = {**alone(), "JAX_NUM_CPU_DEVICES": "2"}, f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PASSES, address, str(i), cache], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in running:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
