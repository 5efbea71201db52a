"""A command as several processes of this machine: equal results, shared errors, clean stops."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dsad.cli.main import main
from dsad.core.metric_files import read_metrics
from dsad.launch_local import free_port
from dsad.train.checkpoint import CheckpointConfig, Checkpointer
from tests.helpers import alone, dsad

SMOKE = ("pretrain", "--config=mae:smoke", "--config.data.name=folder")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "a").mkdir()
    g = np.random.default_rng(0)
    for i in range(21):
        Image.fromarray(g.integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"a/{i:02}.png")
    return root


def launched(*argv, processes=2, devices=2):
    return subprocess.Popen(
        [sys.executable, "-m", "dsad.launch_local", "-n", str(processes),
         "--devices", str(devices), "--", *argv],
        env=alone(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process):
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def weights(path):
    reader = Checkpointer(path, CheckpointConfig(), read_only=True)
    params, _, step = reader.weights()
    reader.close()
    return jax.tree.leaves(params), step


def assert_equal(one, two):
    """Adam turns rounding of gradients near zero into steps of up to the size of the rate."""
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.abs(a - b).mean() < 1e-6


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_train_as_one_and_either_continues_the_other(tmp_path, images, monkeypatch):
    """Four devices each time; the second half by the other kind. Both probe, and agree."""
    argv = (
        *SMOKE, f"--config.data.root={images}", "--config.checkpoint.every=3",
        "--config.probe.every=3", "--config.probe.images=3",
    )  # fmt: skip
    code, out = finished(launched(*argv, "--config.steps=6", f"--workdir={tmp_path}/two"))
    assert code == 0, out
    assert "[0] 18 normal images" in out
    assert "[1] 18 normal images" not in out  # one of them talks
    assert json.loads((tmp_path / "two/complete.json").read_text()) == {"step": 6}

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    one = dsad(*argv, "--config.steps=6", f"--workdir={tmp_path}/one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert_equal(weights(tmp_path / "one")[0], weights(tmp_path / "two")[0])
    rows = [read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "two")]
    assert [r["step"] for r in rows[1]] == [0, 1, 2, 3, 4, 5, 6]
    for name, count in (("loss", 6), ("probe_aupro", 3), ("probe_image_auroc", 3)):
        one, two = ([r[name] for r in each if name in r] for each in rows)
        assert len(one) == count
        np.testing.assert_allclose(two, one, 1e-5 if name == "loss" else 2e-3)

    # Take the last checkpoint away: the other kind makes the steps that are missing, equally.
    for name in ("one", "two"):
        last = tmp_path / name / "checkpoints" / "6"
        last.rename(tmp_path / f"{name}-6")
    again = (*argv, "--config.steps=6", "--continue")
    one = dsad(*again, f"--workdir={tmp_path}/two", cwd=tmp_path)
    assert "resumed at step 3 of 6" in one.stdout, one.stderr
    code, out = finished(launched(*again, f"--workdir={tmp_path}/one"))
    assert code == 0, out
    assert "[0] resumed at step 3 of 6" in out
    assert_equal(weights(tmp_path / "one")[0], weights(tmp_path / "two")[0])
    assert weights(tmp_path / "one")[1] == 6


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("cache", ["device", pytest.param("none", marks=pytest.mark.slow)])
def test_a_failure_of_one_process_ends_all_with_its_message(tmp_path, images, cache):
    """An unreadable file: found by both before the first step, or by one in the middle."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a").symlink_to(images / "a")
    argv = (*SMOKE, f"--config.data.root={bad}", f"--config.data.cache={cache}")
    (bad / "a").unlink()
    (bad / "a").mkdir()
    for path in (images / "a").iterdir():
        (bad / "a" / path.name).write_bytes(path.read_bytes())
    (bad / "a/07.png").write_bytes(b"x")
    code, out = finished(launched(*argv, "--config.steps=40", f"--workdir={tmp_path}/run"))
    assert code == 2, out
    for number in (0, 1):
        told = [line for line in out.splitlines() if line.startswith(f"[{number}] error:")]
        assert len(told) == 1, out
        named = "a/07.png: [K8] cannot be decoded"
        assert sum(x.startswith(f"[{number}] ") and named in x for x in out.splitlines()) == 1, out


SPLIT_STORE = """
import sys
import jax
import numpy as np
from dsad.core import distributed
from dsad.core.batch import BatchSpec, Companions, Needs
from dsad.core.mesh import MeshConfig, make_mesh, place_batch
from dsad.train.cache import abstract_store, fetch_with, put_store, rows_here

distributed.start(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = make_mesh(MeshConfig())
spec = BatchSpec(canvas=5, needs=Needs(companions=Companions(count=2)))
places, gather = abstract_store(spec, 13, mesh, replicate_below=0)
whole = np.random.default_rng(0).integers(0, 256, (13, 5, 5, 3)).astype(np.uint8)
size, category = np.arange(26, dtype=np.int32).reshape(13, 2), np.arange(13, dtype=np.int32)
own = rows_here(places, 13)
assert own.tolist() == [list(range(8)), list(range(8, 13))][distributed.index()]
known = np.zeros_like(whole)
known[own] = whole[own]
store = put_store({"image": known, "size": size, "facts": {}, "category": category}, places)
index = np.array([12, 0, 7, 8, 3, 3, 11, 1], np.int32)
others = np.stack([index[::-1], (index + 5) % 13], axis=1)
here = slice(4 * distributed.index(), 4 * distributed.index() + 4)
drawn = {"index": index[here], "epoch": index[here]}
drawn["references"] = {"index": others[here], "valid": others[here] > 1}
batch = jax.jit(fetch_with(gather, spec))(store, place_batch(drawn, mesh))
for found, rows in ((batch, index), (batch["references"], others)):
    for name, values in (("image", whole), ("size", size)):
        for shard in found[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[rows[shard.index[0]]])
"""


@pytest.mark.multihost
def test_a_split_store_needs_of_each_process_its_own_rows():
    port = free_port()
    environment = {**alone(), "JAX_NUM_CPU_DEVICES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SPLIT_STORE, f"localhost:{port}", str(i)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in running:
        code, out = finished(process)
        assert code == 0, out


CRASH = """
import sys
from dsad.cli import main
from dsad.core import distributed
from dsad.core.errors import WorkdirError

class Command:
    @staticmethod
    def main(argv):
        distributed.start(coordinator=words[1], num_processes=2, process_id=int(words[2]))
        with distributed.failing_together(words[3]):
            if distributed.index() == int(words[4]):
                error = WorkdirError("disk") if words[5] == "3" else RuntimeError("defect")
                error.code = 3
                raise error
            distributed.barrier("never reached by the other one")

words, sys.argv = sys.argv, ["dsad", "report"]
sys.modules["dsad.cli.report"] = Command
main.entry()
"""


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize(
    ("failing", "code", "text"), [(0, 1, "RuntimeError: defect"), (1, 3, "disk")]
)
def test_all_end_with_the_code_of_the_one_that_failed(tmp_path, failing, code, text):
    """Also where it can be tried again, so that schedulers do."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CRASH, f"localhost:{port}", str(i), str(tmp_path),
             str(failing), str(code)],
            env=alone(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for number, process in enumerate(running):
        found, out = finished(process)
        assert found == code, out
        assert text in out
        if number != failing:
            assert f"error: process {failing}: {text}" in out


@pytest.mark.slow
@pytest.mark.multihost
def test_processes_stop_together_on_sigterm_and_end_when_one_is_killed(tmp_path, images):
    argv = (
        *SMOKE, f"--config.data.root={images}", "--config.steps=100000",
        "--config.checkpoint.every=5", f"--workdir={tmp_path}/run", "--continue",
    )  # fmt: skip
    process = launched(*argv)
    newest = wait_for_checkpoint(tmp_path / "run", process, 0)
    process.send_signal(signal.SIGTERM)
    code, out = finished(process)
    assert code == 0, out
    assert "stopped and saved" in out
    assert not (tmp_path / "run/complete.json").exists()
    saved = weights(tmp_path / "run")[1]
    assert saved >= newest

    process = launched(*argv)  # Ctrl-C reaches one of them, and stops both as SIGTERM does
    wait_for_checkpoint(tmp_path / "run", process, saved)
    signal_second(tmp_path / "run", signal.SIGINT)
    code, out = finished(process)
    assert code == 130, out
    assert "stopped and saved" in out
    assert "Traceback" not in out
    assert "Event loop" not in out
    saved = weights(tmp_path / "run")[1]

    process = launched(*argv)
    wait_for_checkpoint(tmp_path / "run", process, saved)
    signal_second(tmp_path / "run", signal.SIGKILL)
    code, out = finished(process)
    assert code != 0
    assert f"[0] resumed at step {saved}" in out
    assert weights(tmp_path / "run")[1] > saved


def signal_second(workdir, number):
    """Send a signal to the second of two processes of a run."""
    pids = subprocess.run(
        ["pgrep", "-f", f"workdir={workdir} .*process-id=1"], capture_output=True, text=True
    ).stdout.split()
    assert pids
    for pid in map(int, pids):
        os.kill(pid, number)


def wait_for_checkpoint(workdir, process, after):
    end = time.monotonic() + 600
    while True:
        found = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        if max(found, default=0) > after:
            return max(found)
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--num-processes=2"], "need --coordinator=HOST:PORT"),
        (["--coordinator=here", "--num-processes=2", "--process-id=0"], "expected HOST:PORT"),
        (["--coordinator=a:1", "--process-id=0"], "--num-processes: expected at least 1"),
        (["--coordinator=a:1", "--num-processes=2", "--process-id=2"], "expected 0 to 1, found 2"),
        (["--coordinator=a:1", "--distributed"], "leave out --coordinator"),
    ],
)
def test_flags_of_processes_that_contradict_each_other(argv, text, capsys):
    assert main(["pretrain", *argv]) == 2
    assert text in capsys.readouterr().err
