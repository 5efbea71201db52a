"""The probe in a training: what it logs, and that it leaves the training as it is."""

import io
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from dsad.assembly import runs, training, workdir
from dsad.assembly.pretrain import PretrainConfig, default_config, parse
from dsad.core.config import Settings, field
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh
from dsad.core.metric_files import read_metrics
from dsad.core.types import ObjectiveTraits
from dsad.data import base, combined
from dsad.detectors import knn
from dsad.evaluation.localize import EvalConfig, localize
from dsad.evaluation.probe import NAMES
from dsad.models.decoder import patchify
from dsad.plan import _samples
from dsad.train.checkpoint import CheckpointConfig, Checkpointer

QUIET = Console(quiet=True)
TRACED = []


class Config(Settings, place="objective"):
    width: int = field(8, at_least=1)


class Cells:
    """Makes the features of patches vary; draws from every key that it gets."""

    traits = ObjectiveTraits()
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, cfg, run):
        self.cfg = cfg

    def init(self, key):
        return {"kernel": jax.random.normal(key, (48, self.cfg.width)) / 7}, {"seen": jnp.zeros(())}

    def _cells(self, params, images):
        b, height, width, _ = images.shape
        cells = jax.nn.relu(patchify(images, 4) @ params["kernel"])
        return cells.reshape(b, height // 4, width // 4, -1)

    def views(self, batch, key):
        images = batch["image"].astype(jnp.float32) / 255
        return images + 0.1 * jax.random.normal(key, images.shape)

    def loss(self, params, extra, views, *, key, step):
        cells = self._cells(params, views)
        noise = jax.random.normal(key, cells.shape)
        seen = extra["seen"] + jnp.mean(views)
        return -jnp.mean(jnp.var(cells + 0.1 * noise, axis=(0, 1, 2))), ({"seen": seen}, {})

    def after_update(self, params, extra, step):
        return extra

    def adopt(self, earlier, params, extra):
        return params, extra, "nothing"

    def prepare(self, params, extra, passes):
        return extra

    def features(self, params, extra, images, layers=None):
        TRACED.append(images.shape)
        return {"cells": self._cells(params, images)}


build = Cells


def probed():
    """A config with a probe, made anew for everyone."""
    config = default_config(__name__)
    config.data.name, config.data.categories = "synthetic", ("tiles", "weave")
    config.data.synthetic.update(size=32, train=9)
    config.data.canvas = 32
    config.batch_size, config.steps, config.log_every = 8, 5, 3
    config.checkpoint.update(every=2, keep=3)
    config.optim.update(name="sgd", lr=0.5, schedule="constant", warmup_epochs=0.0)
    config.probe.update(every=2, images=5, support=6)
    return config


config = pytest.fixture(probed)


@pytest.fixture(autouse=True, scope="module")
def device():
    """One of the simulated devices, until a test asks for more."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices)
        yield patch


def trained(config, path, dataset=None, resume=False):
    """The rows of metrics without what depends on the time, and what was said."""
    out = Console(file=io.StringIO(), width=200)
    prepared = training.prepare(config, out, dataset, continued=resume)
    assert training.pretrain(prepared, epath.Path(path), out, resume=resume)
    timed = ("per_s", "per_chip", "step_ms", "input_wait", "peak_memory", "goodput", "_seconds")
    rows = [
        {k: v for k, v in row.items() if not any(word in k for word in timed)}
        for row in read_metrics(epath.Path(path) / "metrics.jsonl")
    ]
    return rows, out.file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a probe: its directory, its rows, what was said, and traces of the features."""
    path, before = tmp_path_factory.mktemp("probed"), len(TRACED)
    rows, said = trained(probed(), path)
    return types.SimpleNamespace(path=path, rows=rows, said=said, traced=len(TRACED) - before)


def weights(path):
    return Checkpointer(path, CheckpointConfig(), read_only=True).weights()


def splits(config):
    """The images that are trained on, and those of the probe, as data sets."""
    made = training.build(config)
    source, held = base.load(made.run.config.data).source("train"), made.held
    rest = combined.selected(source, held.training)
    probe = training.Probe(
        source, held, made.run.config.probe, layers=("cells",), image_size=32, mesh=made.run.mesh,
        seed=config.seed,
    )  # fmt: skip
    names = dict(name="part", categories=tuple(held.queries), protocol={}, faults=(), origin="")
    return (
        types.SimpleNamespace(**names, source=lambda split: rest),
        types.SimpleNamespace(
            **names, source=lambda split, c: probe.parts[c][("train", "test").index(split)]
        ),
    )


def test_beside_the_loss_at_the_start_every_so_many_steps_and_at_the_end(run):
    rows, said = run.rows, run.said
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 5]
    assert [row["step"] for row in rows if set(NAMES) <= set(row)] == [0, 2, 4, 5]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 5]
    whole = read_metrics(epath.Path(run.path) / "metrics.jsonl")
    assert [row["step"] for row in whole if row.get("probe_seconds", 0) > 0] == [0, 2, 4, 5]
    assert len({row["probe_pixel_auroc"] for row in rows if "probe_aupro" in row}) == 4
    assert "probe: 5 of 18 normal images held out (28%, by group), 5 of them scored" in said
    assert "13 normal images, 5 steps" in said
    assert f"step 4: loss {rows[3]['loss']:.3f}, probe AUPRO {rows[3]['probe_aupro']:.3f}" in said
    assert run.traced == 3  # its shapes, the maps it has, and one program for all steps


def test_the_training_is_that_of_the_other_images_without_a_probe(config, run, tmp_path):
    rest, _ = splits(config)
    config.probe.every = 0
    plain, said = trained(config, tmp_path, rest)
    assert "probe" not in said
    jax.tree.map(np.testing.assert_array_equal, weights(run.path), weights(tmp_path))
    assert [row["step"] for row in plain] == [3, 5]
    loss = {row["step"]: row.get("loss") for row in run.rows}
    assert plain[0]["loss"] == pytest.approx((2 * loss[2] + loss[3]) / 3, rel=1e-6)
    assert plain[1]["loss"] == pytest.approx((loss[4] + loss[5]) / 2, rel=1e-6)


def test_the_numbers_are_those_of_the_weights_at_that_step(config, run):
    _, dataset = splits(config)
    detector = knn.build(knn.Config(layers=("cells",)))
    kernels = {0: Cells(Config(), None).init(jax.random.key(0))[0], 5: weights(run.path)[0]}
    for row in (run.rows[0], run.rows[-1]):
        network = runs.RunBackbone(
            params=kernels[row["step"]], extra={}, function=Cells(Config(), None).features,
            mean=Cells.mean, std=Cells.std, arch="cells", image_size=32, description="",
        )  # fmt: skip
        expected = localize(
            network, detector, dataset, EvalConfig(image_size=32),
            mesh=make_mesh(MeshConfig(), jax.devices()), key=jax.random.key(0),
        ).mean  # fmt: skip
        for name, key in NAMES.items():
            assert row[name] == pytest.approx(expected[key], abs=2e-5), (row["step"], name)


@pytest.mark.slow
def test_a_resumed_run_probes_as_one_that_never_stopped(config, run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run.path, path)
    for step in ("5", "4"):
        shutil.rmtree(path / "checkpoints" / step)
    rows, said = trained(config, path, resume=True)
    assert "resumed at step 2 of 5" in said
    assert rows == run.rows
    shutil.rmtree(path / "checkpoints")
    assert trained(config, path, resume=True)[0] == run.rows  # step 0 is there once


@pytest.mark.slow
def test_weights_in_parts_on_several_devices_give_the_same_numbers(config, run, device, tmp_path):
    device.undo()
    for name, mesh in (("whole", {}), ("parts", {"fsdp": 4, "min_fsdp_size": 8})):
        config.mesh.update(mesh)
        rows, _ = trained(config, tmp_path / name)
        for one, row in zip(run.rows, rows, strict=True):
            assert one.keys() == row.keys()
            np.testing.assert_allclose(list(row.values()), list(one.values()), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 17}, r"config\.probe\.images.*of 9 tiles.*config\.probe\.every=0"),
        ({"layers": ("cell",)}, r"config\.probe\.layers.*feature maps, cells; found cell\."),
        ({"image_size": 4, "layers": ("layer2",)}, r"config\.probe\.layers"),
    ],
)
def test_what_it_cannot_do_is_refused_before_images_are_read(config, change, message):
    config.probe.update(change)
    read = []
    with pytest.raises(ConfigError, match=message):
        training.build(config, progress=lambda *a: read.append(a))
    assert not read


def test_a_size_that_the_encoder_cannot_take_is_refused(config):
    config = default_config("mae")
    config.data.name = "synthetic"
    config.objective.encoder.update(arch="mae_vit_tiny_patch16")
    config.probe.update(every=1, image_size=40)
    with pytest.raises(ConfigError, match=r"config\.probe\.image_size.*40 × 40"):
        training.build(config)


def test_runs_from_before_go_on_and_another_probe_must_hold_out_the_same(config, tmp_path):
    def claim(resume=True):
        info = training.build(config).run.info
        workdir.claim(str(tmp_path), "pretrain", config.to_dict(), info=info, resume=resume)

    config.probe.every = 0
    claim(resume=False)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["config"]["probe"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim()
    config.probe.every = 1
    with pytest.raises(WorkdirError, match=r"data\.samples: 18 → 13"):
        claim()
    stored["info"]["samples"] = 13
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim()
    config.probe.update(every=4, support=2)
    claim()
    config.probe.images = 4
    with pytest.raises(WorkdirError, match=r"data\.samples: 13 → 14"):
        claim()


def test_a_plan_counts_what_is_trained_on(config):
    cfg, _, _ = parse(config)
    assert _samples.count(cfg, "any", 0)[0] == 13
    unseen = PretrainConfig(data=base.DataConfig(name="mvtec"), probe=cfg.probe)
    assert _samples.count(unseen, "ds2", 0)[0] == 3629 - 5
