"""The loop: exact resume after kill -9, stops, non-finite losses, device-resident data."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dsad.core import rng
from dsad.core.batch import BatchSpec
from dsad.core.errors import ConfigError, NonFiniteError, WorkdirError
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.core.metric_files import read_metrics
from dsad.core.types import ObjectiveTraits
from dsad.train import _orbax
from dsad.train.cache import abstract_store, fetch_with, put_store, rows_here
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.loop import Loop, train
from dsad.train.state import TrainState, abstract_state, initial_state
from dsad.train.step import make_step, placed_key
from dsad.train.writer import MetricWriter
from tests.helpers import alone


class Line:
    """A one-parameter objective whose whole path can be computed by hand; may turn NaN."""

    traits = ObjectiveTraits()

    def __init__(self, nan_at=None):
        self.nan_at = nan_at

    def init(self, key):
        return {"w": jnp.full((4,), 2.0, jnp.float32)}, {"seen": jnp.zeros((), jnp.float32)}

    def views(self, batch, key):
        return batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3)) / 255.0

    def loss(self, params, extra, views, *, key, step):
        loss = jnp.mean(jnp.square(params["w"])) * (1.0 + 0.0 * jnp.mean(views))
        if self.nan_at is not None:
            loss = jnp.where(step == self.nan_at, jnp.nan, loss)
        return loss, ({"seen": extra["seen"] + jnp.mean(views)}, {"view_mean": jnp.mean(views)})

    def after_update(self, params, extra, step):
        return extra


@pytest.fixture(autouse=True)
def closed():
    """Writers and checkpointers that a test opened are closed after it, also when it fails."""
    yield
    while OPENED:
        OPENED.pop().close()


OPENED = []


def checkpoints(path, **how):
    OPENED.append(Checkpointer(path, CheckpointConfig(every=3), **how))
    return OPENED[-1]


def metrics(path):
    OPENED.append(MetricWriter(path))
    return OPENED[-1]


class Batches:
    """Endless numbered batches with a position."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        image = np.full((8, 4, 4, 3), self.at, np.uint8)
        return {"image": image, "index": np.arange(8, dtype=np.int32)}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def parts(objective, mesh, accumulate=1):
    tx = optax.sgd(0.1)
    abstract = abstract_state(objective, tx, mesh, 2**18)
    state = initial_state(objective, tx, abstract, seed=0)
    step = make_step(objective, tx, lambda n: jnp.float32(0.1), abstract, mesh=mesh,
                     accumulate=accumulate)  # fmt: skip
    return abstract, state, step


def loop(tmp_path, step, mesh, batches, **changes):
    values = {
        "step": step, "batches": batches, "store": None, "mesh": mesh, "total_steps": 7,
        "key": placed_key(jax.random.key(0), mesh), "batch_size": 8, "log_every": 2,
        "writer": metrics(tmp_path), "checkpointer": checkpoints(tmp_path), "meta": {},
    }  # fmt: skip
    return Loop(**{**values, **changes})


@pytest.fixture
def mesh(devices):
    return make_mesh(MeshConfig(), devices)


def test_metrics_checkpoints_and_position(tmp_path, mesh):
    abstract, state, step = parts(Line(), mesh)
    batches = Batches()
    state, complete = train(loop(tmp_path, step, mesh, batches), state)
    assert complete
    assert int(state.step) == 7
    # Each step multiplies w by 1 − 0.1 · 2 / 4.
    np.testing.assert_allclose(state.params["w"], 2.0 * 0.95**7, rtol=1e-5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [2, 4, 6, 7]
    assert rows[0]["loss"] == pytest.approx(4 * (1 + 0.95**2) / 2, rel=1e-5)
    assert {"lr", "grad_norm", "update_norm", "param_norm", "view_mean"} <= set(rows[0])
    assert rows[1]["images_per_s"] > 0
    restored, meta = checkpoints(tmp_path).restore(abstract)
    assert meta["data"] == {"at": 7}
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_non_finite_loss_names_step_and_metric_and_keeps_the_last_good_checkpoint(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(nan_at=4), mesh)
    with pytest.raises(NonFiniteError, match=r"step 5: .*loss.*checkpoint of step 3"):
        train(loop(tmp_path, step, mesh, Batches()), state)
    assert checkpoints(tmp_path).latest() == 3


def test_a_non_finite_state_is_never_saved(tmp_path):
    """The NaN step is itself a checkpoint step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(nan_at=2), mesh)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(loop(tmp_path, step, mesh, Batches()), state)
    assert checkpoints(tmp_path).latest() is None


def test_accumulation_equals_the_whole_batch(mesh):
    if mesh.size == 8:
        pytest.skip("parts of a batch of 8 cannot be spread over 8 devices")
    inputs = place_batch(next(Batches()), mesh)
    key = placed_key(jax.random.key(0), mesh)
    _, whole, step1 = parts(Line(), mesh)
    _, split, step4 = parts(Line(), mesh, accumulate=4)
    whole, _ = step1(whole, inputs, None, key)
    split, _ = step4(split, inputs, None, key)
    np.testing.assert_allclose(whole.params["w"], split.params["w"], rtol=1e-6)


def test_accumulation_is_refused_where_it_would_change_the_result():
    objective = Line()
    objective.traits = ObjectiveTraits(couples_batch=True)
    with pytest.raises(ConfigError, match="config.accumulate=2"):
        parts(objective, make_mesh(MeshConfig(), jax.devices()[:1]), accumulate=2)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["replicated", "split"])
@pytest.mark.parametrize("shape", [(-1, 1), (4, 2)])
def test_device_store_returns_the_asked_rows(limit, shape):
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1]))
    g = np.random.default_rng(0)
    host = {
        "image": g.integers(0, 256, (13, 5, 5, 3)).astype(np.uint8),
        "size": g.integers(1, 5, (13, 2)).astype(np.int32),
        "category": g.integers(0, 3, 13).astype(np.int32),
        "facts": {},
    }
    index = g.integers(0, 13, 16).astype(np.int32)
    inputs = place_batch({"index": index, "epoch": np.zeros(16, np.int32)}, mesh)
    spec = BatchSpec(canvas=5)
    places, gather = abstract_store(spec, 13, mesh, replicate_below=limit)
    np.testing.assert_array_equal(rows_here(places, 13), np.arange(13))
    assert places["image"].sharding.is_fully_replicated == bool(limit)
    batch = jax.jit(fetch_with(gather, spec))(put_store(host, places), inputs)
    assert batch.pop("facts") == host.pop("facts") == {}
    for name, values in host.items():
        np.testing.assert_array_equal(batch[name], values[index])
        assert batch[name].dtype == values.dtype


def test_a_checkpoint_of_another_model_is_refused_by_path(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(), mesh)
    train(loop(tmp_path, step, mesh, Batches()), state)

    class Wider(Line):
        def init(self, key):
            return {"w": jnp.zeros((5,), jnp.float32)}, {"seen": jnp.zeros((), jnp.float32)}

    abstract, _, _ = parts(Wider(), mesh)
    with pytest.raises(WorkdirError, match=r"params/w: expected \(5,\) float32, found \(4,\)"):
        checkpoints(tmp_path).restore(abstract)


# --- the command, killed


def command(workdir, *flags):
    return [
        sys.executable, "-m", "dsad", "pretrain", "--config=ds2:smoke", "--config.steps=30",
        "--config.checkpoint.every=3", f"--workdir={workdir}", *flags,
    ]  # fmt: skip


def state(workdir):
    """The newest checkpoint: step, parameters, extra, and the optimiser's state."""
    checkpointer = checkpoints(workdir, read_only=True)
    step = checkpointer.latest()
    shapes = _orbax.shapes(epath.Path(workdir) / "checkpoints" / str(step) / "state")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = TrainState(
        **jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), shapes)
    )
    return checkpointer.restore(abstract, step)[0]


def interrupt(workdir, number, after, *flags):
    """Start a run and send it a signal when a checkpoint later than step ``after`` is complete."""
    process = subprocess.Popen(
        command(workdir, *flags), env=alone(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    end = time.monotonic() + 240
    folder = workdir / "checkpoints"
    while not any(p.name.isdigit() and int(p.name) > after for p in folder.glob("*")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out.decode()


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_an_undisturbed_one_bitwise(tmp_path):
    """30 steps = some, kill -9, resume, some, SIGTERM, resume, the rest."""
    done = subprocess.run(command(tmp_path / "whole"), env=alone(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

    broken = tmp_path / "broken"
    code, _ = interrupt(broken, signal.SIGKILL, 0)
    assert code == -signal.SIGKILL
    at = checkpoints(broken, read_only=True).latest()
    assert 3 <= at < 30
    code, out = interrupt(broken, signal.SIGTERM, at, "--resume")
    assert code == 0
    assert f"resumed at step {at}" in out
    if "done" not in out:
        assert "stopped and saved" in out
    last = subprocess.run(command(broken, "--resume"), env=alone(), capture_output=True)
    assert last.returncode == 0, last.stderr.decode()

    one, two = state(tmp_path / "whole"), state(broken)
    assert int(one.step) == int(two.step) == 30
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [read_metrics(d / "metrics.jsonl") for d in (tmp_path / "whole", broken)]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]


def test_a_stop_on_a_checkpoint_step_saves_once(tmp_path):
    """The signal arrives in the very step that is saved anyway; a line of metrics remains."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(), mesh)

    class Stopping(Batches):
        def __next__(self):
            if self.at == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    run = loop(tmp_path, step, mesh, Stopping(), log_every=5)
    state, complete = train(run, state)
    assert not complete
    assert int(state.step) == 3
    assert checkpoints(tmp_path, read_only=True).latest() == 3
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_reading_leaves_a_checkpoint_in_the_making_alone(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(), mesh)
    train(loop(tmp_path, step, mesh, Batches()), state)
    making = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    making.mkdir()
    params, _, found = checkpoints(tmp_path, read_only=True).weights()
    assert (found, params["w"].shape) == (7, (4,))
    assert making.is_dir()
    with pytest.raises(WorkdirError, match="no such directory"):
        checkpoints(tmp_path / "typo", read_only=True)
    assert not (tmp_path / "typo").exists()


def test_without_files_and_checkpoints(tmp_path, mesh):
    """A training inside another command: the same state, lines for its caller, nothing written."""
    _, state, step = parts(Line(), mesh)
    told = []
    bare = {"writer": None, "checkpointer": None, "on_log": lambda *line: told.append(line[:2])}
    state, complete = train(loop(tmp_path, step, mesh, Batches(), **bare), state)
    assert complete
    np.testing.assert_allclose(state.params["w"], 2.0 * 0.95**7, rtol=1e-5)
    assert told == [(1, 7), (2, 7), (4, 7), (6, 7), (7, 7)]  # the first one compiles
    _, state, step = parts(Line(nan_at=2), mesh)
    bare["settings"] = "config.detector.recipe.optim"
    with pytest.raises(NonFiniteError, match=r"kept no checkpoint.*detector\.recipe\.optim\.lr"):
        train(loop(tmp_path, step, mesh, Batches(), **bare), state)


class Drawn(Line):
    """Scalars that show the keys."""

    def views(self, batch, key):
        return jax.random.uniform(key, (8,))

    def loss(self, params, extra, views, *, key, step):
        loss, (extra, scalars) = super().loss(params, extra, views, key=key, step=step)
        return loss, (extra, {**scalars, "drawn": jax.random.uniform(key)})


def test_runs_of_other_seeds_share_the_program_but_no_draw(mesh):
    _, _, step = parts(Drawn(), mesh)
    inputs, found = place_batch(next(Batches()), mesh), []
    for seed in (0, 1, 0):
        _, state, _ = parts(Drawn(), mesh)
        key = placed_key(jax.random.key(seed), mesh)
        with jax.transfer_guard("disallow"):
            _, scalars = step(state, inputs, None, key)
        found.append((float(scalars["view_mean"]), float(scalars["drawn"])))
    assert step._cache_size() == 1
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])
    base = jax.random.key(1)
    views = jax.random.uniform(rng.named(base, "views"), (8,))
    drawn = jax.random.uniform(jax.random.fold_in(rng.named(base, "loss"), 0))
    assert found[1] == (pytest.approx(float(views.mean()), rel=1e-6), float(drawn))


def test_a_probe_is_on_its_steps_line_and_no_part_of_their_time(tmp_path, monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(), mesh)

    now, spent = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now() + spent[0])

    def probe(state):
        spent[0] += 1000.0
        return {"probe_w": float(state.params["w"][0])}

    run = loop(tmp_path, step, mesh, Batches(), probe=probe, probe_every=3, log_every=2)
    train(run, state)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 2, 3, 4, 6, 7]
    probed = {r["step"]: r["probe_w"] for r in rows if "probe_w" in r}
    assert probed == {n: pytest.approx(2.0 * 0.95**n, rel=1e-5) for n in (0, 3, 6, 7)}
    assert all(r["probe_seconds"] >= 1000 for r in rows if "probe_w" in r)
    assert max(r["step_ms"] for r in rows[2:]) < 1e5


def test_a_state_that_is_not_finite_is_not_probed(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, step = parts(Line(nan_at=2), mesh)
    seen = []
    probe = {"probe": lambda state: seen.append(int(state.step)) or {}, "probe_every": 1}
    with pytest.raises(NonFiniteError, match="step 3"):
        train(loop(tmp_path, step, mesh, Batches(), **probe), state)
    assert seen == [0, 1, 2]
