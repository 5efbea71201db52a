"""Whatever goes wrong ends with a message and a code, in time, and blocks nothing."""

import errno
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from dsad.assembly import datasets, pretrain, training, workdir
from dsad.cli import check_data, main
from dsad.cli.signals import Signals
from dsad.core.types import RunInfo
from dsad.data import base
from tests.helpers import ROOT, alone


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "dsad check-data: stopped; the same command again"),
        (PermissionError(errno.EACCES, "Permission denied", "a b"), 2, "a b: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: Input/output error. Mend"),
        (OSError(errno.ENOSPC, "No space left", "x"), 3, "x: the disk or quota is full"),
        (UnicodeEncodeError("utf-8", "0\tk\udcfc.png", 3, 4, ""), 2, r"'k\udcfc.png': not UTF-8"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_what_nobody_expected_ends_with_a_message(capsys, monkeypatch, error, code, told):
    def fail(argv):
        raise error

    monkeypatch.setattr(check_data, "main", fail)
    assert main.main(["check-data"]) == code
    text = capsys.readouterr().err
    assert told in text
    assert bool(text) == bool(told)


@pytest.fixture
def signals(request):
    """Caught as a command catches them, with the test as the command."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    caught = Signals("dsad x")
    caught.catch()
    caught.command = request.function.__code__
    yield caught
    for number, handler in kept.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


def wait():
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_an_import_comes_after_it(signals, tmp_path, monkeypatch, number):
    text = f"import signal\nsignal.raise_signal({int(number)})\nwhole = True\n"
    (tmp_path / f"interrupted_{number}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module(f"interrupted_{number}").whole
    with pytest.raises(KeyboardInterrupt):
        wait()
    assert signals.code == 128 + number


def test_a_signal_within_a_destructor_is_not_lost(signals, capsys):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def live_and_die():
        Dying()
        wait()

    with pytest.raises(KeyboardInterrupt):
        live_and_die()
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_signal_after_the_command_changes_nothing(signals):
    signals.command = wait.__code__
    signal.raise_signal(signal.SIGINT)  # would raise at once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_everything_is_imported_ends_at_once(number):
    script = (
        "import signal, sys, dsad.cli.main as m\n"
        "m.importlib.import_module = lambda name: signal.raise_signal(int(sys.argv.pop()))\n"
        "sys.argv = ['dsad', 'fit', sys.argv[1]]\nm.entry()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(int(number))], env=alone(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 128 + number
    assert done.stderr == "\ndsad: stopped\n"


def test_a_stop_ends_with_its_code_whatever_the_interpreters_end_does():
    script = (
        "import atexit, os, sys, types, dsad.cli.main as m\n"
        "from dsad.core.errors import StoppedError\n"
        "def stopped(argv):\n"
        "    raise StoppedError('stopped')\n"
        "m.importlib.import_module = lambda name: types.SimpleNamespace(main=stopped)\n"
        "class Crash:\n"
        "    def __del__(self, abort=os.abort):\n"
        "        abort()\n"
        "crash = Crash()\n"
        "atexit.register(lambda: print('closed', flush=True))\n"
        "sys.argv = ['dsad', 'fit']\nm.entry()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=alone(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "closed\n"), done.stderr
    assert "stopped" in done.stderr


PLACED = {
    "fit": ("fit", "--config=knn:smoke", "--out={}"),
    "evaluate": ("evaluate", "--config=knn:smoke", "--workdir={}"),
    "evaluate, saved": ("evaluate", "--config=knn:smoke", "--workdir=w", "--save-model={}"),
    "pretrain": ("pretrain", "--config=mae:smoke", "--workdir={}"),
    "export": ("export", "--backbone=run:nowhere", "--out={}"),
    "submit": ("submit", "nowhere", "--out={}"),
    "report": ("report", "nowhere", "--out={}/x.html"),
    "plan": ("plan", "--config=mae:smoke", "--json={}/x.json"),
    "demo": ("demo", "--config=demo:smoke", "--workdir={}"),
}


@pytest.mark.parametrize("name", PLACED)
def test_places_are_refused_before_anything_is_read(capsys, tmp_path, monkeypatch, name):
    def read(*given, **more):
        raise AssertionError("images are read")

    monkeypatch.setattr(base, "load", read)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    for place, told in (("a file", "a file"), ("a file/x", "a file"), ("/proc/x/y", "/proc")):
        assert main.main([a.format(place) for a in PLACED[name]]) == 2
        text = capsys.readouterr().err
        assert told in text
        assert "images are read" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]
    assert (tmp_path / "a file").read_text() == "mine"


def resumed(monkeypatch, *argv):
    """The exit code and the config with which ``dsad pretrain`` would go on."""
    configs = []

    def prepare(config, *given, **more):
        configs.append(config.to_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "loaded", lambda *given: None)
    monkeypatch.setattr(training, "prepare", prepare)
    return main.main(["pretrain", *map(str, argv)]), configs


def test_a_run_is_resumed_without_other_flags(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pretrain.default_config("mae")
    with config.unlocked():
        config.steps, config.data.categories = 9, ("ä b", "c")
    info = RunInfo(total_steps=9, batch_size=8, samples=40, classes=2)
    workdir.claim("rün 1", "pretrain", config.to_dict(), info=info)
    (tmp_path / "rün 1" / "checkpoints" / "4").mkdir(parents=True)
    assert main.main(["pretrain", "--config=mae:smoke", "--workdir=rün 1"]) == 2
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == "  dsad pretrain --resume '--workdir=rün 1'"
    for argv in (shlex.split(hint)[2:], ("--continue", "--workdir", "rün 1")):
        code, configs = resumed(monkeypatch, *argv)
        assert (code, configs) == (130, [config.to_dict()])
    code, configs = resumed(monkeypatch, *argv, "--config.log_every=3", "--config.data.workers=0")
    assert configs[0] == {**config.to_dict(), "log_every": 3}
    capsys.readouterr()
    for given in ("--config.seed=4", "--config=ds2:smoke"):
        code, configs = resumed(monkeypatch, *argv, given)
        assert (code, configs) == (2, [])
        text = capsys.readouterr().err
        assert ("config.seed: 0 → 4" if "seed" in given else "config.steps: 9 → 4") in text
    kept = json.loads((tmp_path / "rün 1" / "config.json").read_text())
    assert kept["config"] == json.loads(json.dumps(config.to_dict()))


def test_what_is_replaced_can_be_replaced_again_after_a_stop(tmp_path, monkeypatch):
    """A stop while the old files are removed leaves what says whose the directory is."""
    claim = {"command": "pretrain", "config": {"a": 1}}
    workdir.claim(str(tmp_path), **claim)
    for name in ("a", "b", "z"):
        (tmp_path / name).write_text("x")
    unlink, gone = type(workdir.paths.directory(tmp_path)).unlink, []

    def stopped(self, *given, **more):
        if gone:
            raise KeyboardInterrupt
        gone.append(self)
        unlink(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(workdir.paths.directory(tmp_path)), "unlink", stopped)
        with pytest.raises(KeyboardInterrupt):
            workdir.claim(str(tmp_path), **claim, overwrite=True)
    assert len(gone) == 1
    workdir.claim(str(tmp_path), **claim, overwrite=True)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "fails in line 2: ZeroDivisionError"),
        ("import nowhere\n", "fails in line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    return {}.x\n", "fails in line 2: AttributeError"),
        ("def get_config():\n    return 3\n", "returns a ConfigDict, found 3"),
    ],
)
def test_a_config_file_that_fails_says_where(capsys, tmp_path, text, told):
    (tmp_path / "own.py").write_text(text)
    assert main.main(["fit", f"--config={tmp_path}/own.py", "--out=x"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forty_faulty_calls_of_all_commands():
    """Drawn anew with DSAD_FAULTS='COUNT SEED'."""
    count = os.environ.get("DSAD_FAULTS", "40 0").split()
    done = subprocess.run(
        [sys.executable, ROOT / "tests/faults.py", *count], env=alone(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
