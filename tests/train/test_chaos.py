"""Runs that are killed again and again end as if nothing had happened.

$DSAD_CHAOS_KILLS kills (20), half with kill -9 and half with SIGTERM, at random moments of the
start-up, between saves and inside saves; spread over runs on 1, 2 and 4 devices, and one that goes
on with another mesh after every kill. $DSAD_CHAOS_SEED (0) draws the moments.
"""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dsad import launch_local
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from dsad.train.writer import read_metrics
from tests.helpers import alone
from tests.train import test_loop

KILLS = int(os.environ.get("DSAD_CHAOS_KILLS", "20"))
SEED = int(os.environ.get("DSAD_CHAOS_SEED", "0"))
STEPS, PERMANENT = 20, 5
#: Devices of each run's processes; the last changes its mesh with every process.
RUNS = ("1", "2", "4", "mixed")
MESHES = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4))  # (devices, of them fsdp)
#: What may be lost: the checkpoint being written, and the interval being computed.
LOST = 2


@dataclasses.dataclass
class Kill:
    """A moment drawn at random: which signal, in which phase, how long after its beginning."""

    signal: int
    phase: str
    progress: float
    delay: float
    landed: str = ""


def kills_of(run: str) -> list[Kill]:
    """This run's share; drawn for all runs at once, so that half of all are of each kind."""
    g = random.Random(SEED)
    signals = [signal.SIGKILL, signal.SIGTERM] * ((KILLS + 1) // 2)
    drawn = []
    for number in signals[:KILLS]:
        phase = g.choices(("start", "step", "save"), (1, 2, 3))[0]
        longest = {"start": 5.0, "step": 0.1, "save": 0.03}[phase]
        drawn.append(Kill(number, phase, g.random(), g.random() * longest))
    g.shuffle(drawn)
    return drawn[RUNS.index(run) :: len(RUNS)]


def start(folder, devices, fsdp=1, *flags):
    """A process that begins the run or continues it."""
    command = [
        sys.executable, "-m", "dsad", "pretrain", "--config=mae:smoke", f"--config.steps={STEPS}",
        "--config.checkpoint.every=1", f"--config.checkpoint.permanent={PERMANENT}",
        f"--config.mesh.fsdp={fsdp}", "--config.mesh.min_fsdp_size=64", f"--workdir={folder}",
        "--continue", *flags,
    ]  # fmt: skip
    env = {
        **alone(), "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def names(folder):
    try:
        return os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        return []


def steps(folder):
    return sorted(int(n) for n in names(folder) if n.isdigit())


def halves(folder):
    """Steps of checkpoints in the making, and names of those being deleted."""
    return [n for n in names(folder) if "tmp" in n or n.startswith("deleted")]


def await_moment(process, folder, kill, before, left):
    """Wait for the moment of a kill: a random step of those that this kill has to itself."""
    at = before + 1 + int(kill.progress * max(0, (STEPS - 1 - before) // left - 1))
    end = time.monotonic() + 300
    if kill.phase != "start":
        while process.poll() is None and time.monotonic() < end:
            making = [int(n.partition(".")[0]) for n in names(folder) if "tmp" in n]
            if max([*steps(folder), 0]) >= at or (kill.phase == "save" and max([*making, 0]) >= at):
                break
            time.sleep(0.002)
    time.sleep(kill.delay)


def check(folder, before):
    """No checkpoint lost, none corrupt, no line twice; returns the newest step."""
    found = steps(folder)
    newest = max(found, default=0)
    assert newest >= before, f"went back from {before} to {newest}"
    permanent = set(range(PERMANENT, newest + 1, PERMANENT))
    assert permanent <= set(found), f"lost {permanent - set(found)}"
    if found:
        reader = Checkpointer(folder, CheckpointConfig(), read_only=True)
        try:
            for step in found:
                assert reader.weights(step)[2] == step
        finally:
            reader.close()
    logged = [r["step"] for r in read_metrics(folder / "metrics.jsonl")]
    assert logged == list(range(1, len(logged) + 1))
    assert newest <= len(logged) <= newest + LOST
    return newest


def killed(folder, devices, fsdp, kill, before, left):
    """One process of a run, killed; returns the newest step afterwards."""
    process = start(folder, devices, fsdp)
    await_moment(process, folder, kill, before, left)
    ended = process.poll() is not None
    saving = bool(halves(folder))
    process.send_signal(kill.signal)
    out, err = process.communicate(timeout=300)
    saving = bool(halves(folder)) if kill.signal == signal.SIGKILL else saving
    begun = "resumed at step" in out or max([*steps(folder), 0]) > before or "starting" in out
    kill.landed = "end" if ended else "save" if saving else "step" if begun else "start"
    now = check(folder, before)
    if resumed := re.search(r"resumed at step (\d+)", out):
        assert int(resumed[1]) == before
    if ended or (kill.signal == signal.SIGTERM and process.returncode == 0):
        assert process.returncode == 0, err
        assert ("done" in out) == (now == STEPS), out
        assert now == len(read_metrics(folder / "metrics.jsonl"))  # not a step was lost
    elif kill.signal == signal.SIGTERM:
        # Before the training begins there is nothing to save, and the signal ends the process.
        assert process.returncode == -signal.SIGTERM, err
        assert now == before
    else:
        assert process.returncode == -signal.SIGKILL, err
    print(
        f"{signal.Signals(kill.signal).name} aimed at {kill.phase}, landed in {kill.landed}; "
        f"{devices} devices, fsdp {fsdp}: step {before} → {now}"
    )
    return now


def finish(*processes):
    told = [process.communicate(timeout=600) for process in processes]
    for process, (_, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, err
    assert "done" in told[0][0]  # of several processes the first one talks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run on so many devices."""
    made = {}

    def run(devices):
        if devices not in made:
            made[devices] = tmp_path_factory.mktemp("whole") / "run"
            finish(start(made[devices], devices))
        return made[devices]

    return run


def states(*folders):
    found = [test_loop.state(folder) for folder in folders]
    while test_loop.OPENED:
        test_loop.OPENED.pop().close()
    assert all(int(s.step) == STEPS for s in found)
    return found


def close(one, two):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def run_through(folder, run):
    """All kills of a run, then the rest of it; returns the kills with where they landed."""
    g, kills, now = random.Random(f"{SEED} {run}"), kills_of(run), 0
    for number, kill in enumerate(kills):
        devices, fsdp = g.choice(MESHES) if run == "mixed" else (int(run), 1)
        now = killed(folder, devices, fsdp, kill, now, len(kills) - number)
    devices, fsdp = g.choice(MESHES) if run == "mixed" else (int(run), 1)
    finish(start(folder, devices, fsdp))
    assert check(folder, now) == STEPS
    return kills


@pytest.fixture(scope="module")
def tally():
    """Where all kills landed."""
    found = []
    yield found
    where = {p: sum(k.landed == p for k in found) for p in ("start", "step", "save", "end")}
    print(f"\n{len(found)} kills landed: {where}")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_killed_again_and_again(tmp_path, run, tally, whole):
    if not kills_of(run):
        pytest.skip("no kill left for this run; raise DSAD_CHAOS_KILLS")
    want, got = whole(1 if run == "mixed" else int(run)), tmp_path / "killed"
    kills = run_through(got, run)
    tally += kills
    one, two = states(want, got)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (want, got)]
    assert [r["step"] for r in rows[1]] == list(range(1, STEPS + 1))
    if run == "mixed":
        close(one, two)
        return
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def start_many(folder, processes, devices):
    coordinator = f"--coordinator=localhost:{launch_local.free_port()}"
    return [
        start(folder, devices, 1, coordinator, f"--num-processes={processes}", f"--process-id={i}")
        for i in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole):
    """2 processes × 2 devices, kill -9 of both, 1 × 4, kill -9, 2 × 1 to the end."""
    folder, now = tmp_path / "run", 0
    for count, devices, until in ((2, 2, 6), (1, 4, 12)):
        processes = start_many(folder, count, devices)
        await_moment(processes[0], folder, Kill(signal.SIGKILL, "step", 0.0, 0.02), until, 1)
        for process in processes:
            process.kill()
        told = [process.communicate(timeout=300) for process in processes]
        after = check(folder, now)
        assert now < after < STEPS, told
        now = after
    finish(*start_many(folder, 2, 1))
    assert check(folder, now) == STEPS
    close(*states(whole(1), folder))
