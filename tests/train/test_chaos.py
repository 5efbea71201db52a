"""Runs that are killed again and again end as if nothing had happened.

$DSAD_CHAOS_KILLS kills (20), half with kill -9 and half with SIGTERM, at random moments of the
start-up, between saves and inside saves; spread over runs on 1, 2 and 4 devices, and one that goes
on with another mesh after every kill. $DSAD_CHAOS_SEED (0) draws the moments.
"""

import contextlib
import dataclasses
import itertools
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
from dsad.core.metric_files import read_metrics
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from tests.helpers import alone
from tests.train import test_loop

KILLS = int(os.environ.get("DSAD_CHAOS_KILLS", "20"))
SEED = int(os.environ.get("DSAD_CHAOS_SEED", "0"))
EVERY, PERMANENT = 4, 8
#: Devices of each run's processes; the last changes its mesh with every process.
RUNS = ("1", "2", "4", "mixed")
MESHES = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4))  # (devices, of them fsdp)
#: How the drawn moments are spread: each phase with both signals.
PHASES = ("save", "step", "start", "save", "step")
#: Steps that may be lost: of the checkpoint being written, and of the interval being computed.
LOST = 2 * EVERY


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
    drawn = []
    for number in range(KILLS):
        phase = PHASES[number // 2 % len(PHASES)]
        longest = {"start": 3.0, "step": 0.1, "save": 0.03}[phase]
        drawn.append(
            Kill(
                (signal.SIGKILL, signal.SIGTERM)[number % 2],
                phase,
                g.random(),
                g.random() * longest,
            )
        )
    g.shuffle(drawn)
    return drawn[RUNS.index(run) :: len(RUNS)]


def length(run: str) -> int:
    """Steps of a run."""
    return 20 if run == "mixed" else 40


def start(folder, steps, devices, fsdp=1, *flags):
    """A process that begins the run or continues it; large batches leave time between saves."""
    command = [
        sys.executable, "-m", "dsad", "pretrain", "--config=mae:smoke", f"--config.steps={steps}",
        f"--config.checkpoint.every={EVERY}", f"--config.checkpoint.permanent={PERMANENT}",
        f"--config.mesh.fsdp={fsdp}", "--config.mesh.min_fsdp_size=64", f"--workdir={folder}",
        "--config.batch_size=32", "--continue", *flags,
    ]  # fmt: skip
    env = {
        **alone(), "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def saved(folder):
    """The complete checkpoints."""
    try:
        names = os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        return []
    return sorted(int(n) for n in names if n.isdigit())


def halves(folder):
    """Checkpoints in the making or being deleted, told from those of the same name by inode."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder / "checkpoints"):
            if "tmp" in entry.name or entry.name.startswith("deleted"):
                with contextlib.suppress(FileNotFoundError):
                    found.add((entry.name, entry.inode(), entry.stat().st_ctime_ns))
    return found


def logged(folder):
    return len(read_metrics(folder / "metrics.jsonl"))


def opening(folder):
    """Tells a metrics file from that of the process before: each writes it anew when it begins."""
    try:
        return (folder / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return None


def await_moment(process, folder, kill, at, stale, opened):
    """Wait for the moment of a kill: in its phase, at a step or the first later one, and a bit."""
    end = time.monotonic() + 300
    while kill.phase != "start" and process.poll() is None and time.monotonic() < end:
        making = [n for n, *_ in halves(folder) - stale if "tmp" in n]
        if kill.phase == "save" and any(int(n.partition(".")[0]) >= at for n in making):
            break
        if kill.phase == "step" and opening(folder) != opened and logged(folder) >= at:
            break
        time.sleep(0.002)
    time.sleep(kill.delay)


def check(folder, before):
    """No checkpoint lost, none corrupt, no line twice; returns the newest step."""
    found = saved(folder)
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
    lines = [r["step"] for r in read_metrics(folder / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
    assert newest <= len(lines) <= newest + LOST
    return newest


def killed(folder, run, mesh, kill, before, left):
    """One process of a run, killed; returns the newest step afterwards.

    The moment lies at random among the steps that the kills which are left leave for this one.
    """
    at = before + 1 + int(kill.progress * max(0, (length(run) - 1 - before) // left - 1))
    stale, opened = halves(folder), opening(folder)
    process = start(folder, length(run), *mesh)
    await_moment(process, folder, kill, at, stale, opened)
    ended = process.poll() is not None
    saving = bool(halves(folder) - stale)
    process.send_signal(kill.signal)
    out, err = process.communicate(timeout=300)
    if kill.signal == signal.SIGKILL:  # what it left tells more
        saving = bool(halves(folder) - stale)
    begun = opening(folder) != opened
    kill.landed = "end" if ended else "save" if saving else "step" if begun else "start"
    now = check(folder, before)
    if resumed := re.search(r"resumed at step (\d+)", out):
        assert int(resumed[1]) == before
    if process.returncode == 0:
        assert ended or kill.signal == signal.SIGTERM
        assert ("done" if now == length(run) else "stopped and saved") in out
        assert now == logged(folder)  # not a step was lost
    else:
        assert process.returncode == -kill.signal, err
        if kill.signal == signal.SIGTERM and now < length(run):
            # Before the training begins there is nothing to save, and the signal ends the process.
            assert (kill.phase, now) == ("start", before)
    print(
        f"{signal.Signals(kill.signal).name} aimed at {kill.phase} of step {at}, landed in "
        f"{kill.landed}; {mesh[0]} devices, fsdp {mesh[1]}: step {before} → {now}"
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

    def run(steps, devices):
        if (steps, devices) not in made:
            made[steps, devices] = tmp_path_factory.mktemp("whole") / "run"
            finish(start(made[steps, devices], steps, devices))
        return made[steps, devices]

    return run


def states(*folders):
    found = [test_loop.state(folder) for folder in folders]
    while test_loop.OPENED:
        test_loop.OPENED.pop().close()
    assert len({int(s.step) for s in found}) == 1
    return found


def close(one, two):
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True)
    apart = max(float(np.abs(a - b).max()) for a, b in pairs)
    print(f"parameters at most {apart:.2g} apart")
    assert apart < 1e-4


def run_through(folder, run):
    """All kills of a run, then the rest of it; returns the kills with where they landed."""
    g, kills, now = random.Random(f"{SEED} {run}"), kills_of(run), 0

    meshes = itertools.cycle(g.sample(MESHES, len(MESHES)))  # never one twice in a row

    def mesh():
        return next(meshes) if run == "mixed" else (int(run), 1)

    for number, kill in enumerate(kills):
        now = killed(folder, run, mesh(), kill, now, len(kills) - number)
    finish(start(folder, length(run), *mesh()))
    assert check(folder, now) == length(run)
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
    want, got = whole(length(run), 1 if run == "mixed" else int(run)), tmp_path / "killed"
    tally += run_through(got, run)
    one, two = states(want, got)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (want, got)]
    assert [r["step"] for r in rows[1]] == list(range(1, length(run) + 1))
    if run == "mixed":
        close(one, two)
        return
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def start_many(folder, processes, devices):
    coordinator = f"--coordinator=localhost:{launch_local.free_port()}"
    ids = [("--num-processes=" + str(processes), f"--process-id={i}") for i in range(processes)]
    return [start(folder, 20, devices, 1, coordinator, *flags) for flags in ids]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole):
    """2 processes × 2 devices, kill -9 of both, 1 × 4, kill -9, 2 × 1 to the end."""
    folder, now = tmp_path / "run", 0
    for count, devices, until in ((2, 2, 6), (1, 4, 12)):
        opened = opening(folder)
        processes = start_many(folder, count, devices)
        kill = Kill(signal.SIGKILL, "step", 0.0, 0.02)
        await_moment(processes[0], folder, kill, until, set(), opened)
        for process in processes:
            process.kill()
        told = [process.communicate(timeout=300) for process in processes]
        after = check(folder, now)
        assert now < after < 20, told
        now = after
    finish(*start_many(folder, 2, 1))
    assert check(folder, now) == 20
    close(*states(whole(20, 1), folder))
