"""launch/ for schedulers: exit codes, SLURM, Kubernetes manifests, xpk; all with stand-ins."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from tests.helpers import ROOT, alone
from tests.launch_bench import HARD, LAUNCH, Bench, container_of


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# ---- exit codes for schedulers ----


@pytest.mark.parametrize(
    ("plan", "code"), [("complete", 0), ("stopped", 75), ("crash", 1), ("refuse", 2)]
)
def test_exit_codes(bench, plan, code):
    (bench.folder / "plan").write_text(plan)
    argv = ["pretrain", f"--workdir={bench.folder}/a b", "--continue"]
    assert bench.run("bash", "launch/run.sh", *argv).returncode == code
    assert bench.calls("dsad") == [argv]


def test_asked_to_stop_before_it_began(bench):
    """SIGTERM that dsad does not catch yet is no crash, unless nobody asked run.sh to stop."""
    argv = ["bash", "launch/run.sh", "pretrain", f"--workdir={bench.folder}/run"]
    (bench.folder / "plan").write_text("deaf")
    running = subprocess.Popen(argv, cwd=bench.folder, env=bench.env)
    for _ in range(600):
        if (bench.folder / "deaf").exists():
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 75
    (bench.folder / "plan").write_text("killed")
    assert bench.run(*argv).returncode == 143


@pytest.mark.slow
def test_exit_codes_of_the_real_program(tmp_path):
    """Stopped by SIGTERM: 75; continued to the end: 0."""
    dsad = tmp_path / "dsad"
    dsad.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsad "$@"\n')
    dsad.chmod(0o755)
    path = f"{tmp_path}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    work = tmp_path / "run"
    argv = ["bash", str(LAUNCH / "run.sh"), "pretrain", "--config=configs/ds2.py:smoke",
            "--config.steps=200", f"--workdir={work}", "--continue"]  # fmt: skip
    env = {**alone(), "PATH": path}
    running = subprocess.Popen(argv, cwd=tmp_path, env=env)
    while running.poll() is None and not (work / "metrics.jsonl").exists():
        time.sleep(0.1)
    while running.poll() is None and not (work / "metrics.jsonl").read_text():
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(300) == 75
    assert not (work / "complete.json").exists()
    assert subprocess.run(argv, cwd=tmp_path, env=env, timeout=300).returncode == 0
    assert json.loads((work / "complete.json").read_text())["step"] == 200


# ---- SLURM ----


def slurm(bench, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    job = {
        "SLURM_JOB_ID": "41", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:8",
        "WORKDIR": str(bench.folder / "run"),
    }  # fmt: skip
    return bench.run("bash", "launch/slurm.sbatch", *argv, **{**job, **env})


def test_slurm_runs_to_the_end(bench):
    assert slurm(bench, "pretrain", *HARD).returncode == 0
    args = ["pretrain", *HARD, "--distributed", f"--workdir={bench.folder}/run", "--continue"]
    assert len(bench.calls("srun")) == 1
    assert bench.calls("dsad") == [args]
    assert not bench.calls("scontrol")
    assert not list(bench.folder.glob("run.*"))


@pytest.mark.parametrize(
    ("array", "job"),
    [({}, "41"), ({"SLURM_ARRAY_JOB_ID": "39", "SLURM_ARRAY_TASK_ID": "2"}, "39_2")],
)
def test_slurm_requeues_itself_when_stopped(bench, array, job):
    (bench.folder / "plan").write_text("stopped")
    assert slurm(bench, "pretrain", **array).returncode == 0
    assert bench.calls("scontrol") == [["requeue", job]]
    called = bench.calls("dsad")[0]
    if array:
        assert {"--config.seed=2", f"--workdir={bench.folder}/run/2"} <= set(called)


def test_slurm_requeues_nothing_that_failed(bench):
    (bench.folder / "plan").write_text("crash")
    assert slurm(bench, "pretrain").returncode == 1
    assert not bench.calls("scontrol")
    assert not list(bench.folder.glob("run.*"))


def test_slurm_requeues_what_was_stopped_before_it_began(bench):
    (bench.folder / "tasks").write_text("2")
    (bench.folder / "plan").write_text("early")
    assert slurm(bench, "pretrain").returncode == 0
    assert bench.calls("scontrol") == [["requeue", "41"]]


@pytest.mark.parametrize("plan", ["crash", "refuse"])
def test_slurm_does_not_take_a_crash_for_a_stop(bench, plan):
    """srun ends the others by SIGTERM then, and that is the code it tells."""
    (bench.folder / "tasks").write_text("3")
    (bench.folder / "plan").write_text("deaf")
    (bench.folder / "plan-1").write_text(plan)
    assert slurm(bench, "pretrain").returncode == 143
    assert not bench.calls("scontrol")


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"WORKDIR": ""}, "WORKDIR"),
        ({"WORKDIR": "gs://b/r"}, "WORKDIR"),
        ({"SLURM_JOB_ID": ""}, "sbatch"),
        ({"SLURM_GPUS_PER_NODE": "4"}, "--gpus-per-node"),
    ],
)
def test_slurm_names_what_is_missing(bench, env, named):
    done = slurm(bench, "pretrain", **env)
    assert done.returncode == 2
    assert named in done.stderr
    assert not bench.calls("srun")


def test_slurm_options_exist():
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    options = dict(lines)
    assert len(options) == (LAUNCH / "slurm.sbatch").read_text().count("#SBATCH")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # without B: to dsad, not to the shell
    assert "requeue" in options
    assert not {"gpus-per-task", "gpu-bind"} & set(options)  # JAX has to see all of a node


# ---- Kubernetes ----

RENDER = [
    "--name=ds2", "--image=host/dsad:1", "--topology=v5e:4x4", "--data-bucket=images",
    "--workdir=gs://b/r",
]  # fmt: skip


def render(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IS", LAUNCH / "gke" / "render.py", *argv]
    return subprocess.run(command, capture_output=True, text=True)


def schema():
    return json.loads((ROOT / "tests" / "jobset_schema.json").read_text())


@pytest.mark.parametrize(
    ("topology", "more", "accelerator", "shape", "hosts"),
    [
        ("v5e:4x4", [], "tpu-v5-lite-podslice", "4x4", 4),
        ("v5e:2x4", ["--chips-per-host=8"], "tpu-v5-lite-podslice", "2x4", 1),
        ("v5p:2x2x1", [], "tpu-v5p-slice", "2x2x1", 1),
        ("v6e:16x16", [], "tpu-v6e-slice", "16x16", 64),
    ],
)
def test_manifests_are_valid(topology, more, accelerator, shape, hosts):
    done = render(*RENDER, f"--topology={topology}", *more, "--", "pretrain", *HARD)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    jsonschema.validate(manifest, schema())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (hosts, hosts, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    container = container_of(manifest)
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert hosts * chips == eval(shape.replace("x", "*"))
    assert container["args"] == [
        "pretrain", *HARD, "--distributed", "--workdir=gs://b/r", "--continue",
    ]  # fmt: skip
    # run.sh's code for "saved, not complete" restarts the run without counting as a crash.
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["values"], codes["containerName"]) == ([75], container["name"])
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    # Worker processes pass batches through it.
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_the_schema_refuses_what_it_does_not_know():
    manifest = yaml.safe_load(render(*RENDER, "--", "pretrain").stdout)
    container_of(manifest)["arguments"] = []
    with pytest.raises(jsonschema.ValidationError, match="arguments"):
        jsonschema.validate(manifest, schema())
    manifest = yaml.safe_load(render(*RENDER, "--", "pretrain").stdout)
    volumes = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "volumes"
    ]
    volumes[-1]["emptyDir"]["medium"] = "memory"
    with pytest.raises(jsonschema.ValidationError, match="memory"):
        jsonschema.validate(manifest, schema())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        *((["--", "pretrain"], flag.partition("=")[0]) for flag in RENDER),
        (["--name=Not_this", "--", "pretrain"], "--name"),
        (["--topology=v5e", "--", "pretrain"], "--topology"),
        (["--topology=v5e:1x1", "--", "pretrain"], "--chips-per-host"),
        (["--max-restarts=many", "--", "pretrain"], "--max-restarts"),
        (["--", "pretrain", "--workdir=x"], "--workdir"),
        ([], "pretrain"),
    ],
)
def test_render_names_what_is_missing(argv, named):
    kept = [a for a in RENDER if argv[:1] != ["--"] or argv[1:] != ["pretrain"]
            or a.partition("=")[0] != named]  # fmt: skip
    done = render(*kept, *argv)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert not done.stdout


XPK = {
    "PROJECT": "my-project", "ZONE": "us-west4-b", "CLUSTER": "c", "NAME": "ds2",
    "IMAGE": "host/dsad:1", "TPU_TYPE": "v5litepod-16", "WORKDIR": "gs://b/r",
}  # fmt: skip


def test_xpk(bench):
    argv = ["create", "--", "pretrain", *HARD]
    dry = bench.run("bash", "launch/gke/xpk.sh", "--dry-run", *argv, **XPK)
    assert not bench.calls("xpk")
    assert bench.run("bash", "launch/gke/xpk.sh", *argv, **XPK).returncode == 0
    called = bench.calls("xpk")[0]
    assert shlex.split(dry.stdout) == ["xpk", *called]
    command = next(a for a in called if a.startswith("--command=")).partition("=")[2]
    called = [a for a in called if not a.startswith("--command=")]
    assert called == [
        "workload", "create", "--workload=ds2", "--tpu-type=v5litepod-16", "--num-slices=1",
        "--docker-image=host/dsad:1", "--max-restarts=20", "--restart-on-user-code-failure",
        "--termination-grace-period-seconds=300", "--cluster=c", "--project=my-project",
        "--zone=us-west4-b",
    ]  # fmt: skip
    # xpk puts the command into a shell script.
    assert bench.run("bash", "-c", f"({command})", HOME="/nowhere").returncode == 0
    assert bench.calls("dsad") == [
        ["pretrain", *HARD, "--distributed", "--workdir=gs://b/r", "--continue"]
    ]
    where = ["--cluster=c", "--project=my-project", "--zone=us-west4-b"]
    for argv, expected in [
        (["list"], ["workload", "list", *where]),
        (["delete"], ["workload", "delete", "--workload=ds2", *where]),
    ]:
        assert bench.run("bash", "launch/gke/xpk.sh", *argv, **XPK).returncode == 0
        assert bench.calls("xpk")[-1] == expected


@pytest.mark.parametrize("name", XPK)
def test_xpk_names_what_is_missing(bench, name):
    done = bench.run("bash", "launch/gke/xpk.sh", "create", "--", "pretrain", **{**XPK, name: ""})
    assert done.returncode == 2
    assert name in done.stderr
    assert not bench.calls("xpk")
