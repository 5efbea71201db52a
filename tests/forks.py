"""``dsad`` commands in forks of a process that has imported everything, and what they left."""

import csv
import dataclasses
import fcntl
import importlib
import json
import os
import pathlib
import pkgutil
import random
import resource
import signal
import sys
import time
import warnings

import numpy as np
import PIL.Image
import safetensors.numpy

from dsad import cli
from dsad.core import paths

#: Seconds after which a command counts as hanging.
LIMIT = 240
_PIPE = 1 << 20
_CAUGHT = 1 << (signal.SIGTERM - 1)


@dataclasses.dataclass
class Call:
    """A command and what happens to it: a signal after ``delay`` seconds, a limit on files."""

    argv: list[str]
    signal: int = 0
    delay: float = 0.0
    #: Bytes after which no file can grow.
    file_size: int = 0
    stdout: str = ""
    #: A process of its own, so that a signal comes while it imports.
    fresh: bool = False


@dataclasses.dataclass
class Ended:
    code: int
    text: str
    seconds: float


def preload():
    """Import what commands import, but start no device."""
    for module in pkgutil.iter_modules(cli.__path__):
        importlib.import_module(f"dsad.cli.{module.name}")
    for name in ("dsad.plan._command", "dsad.data.records_builder", "dsad.bench.neighbors"):
        importlib.import_module(name)
    warnings.filterwarnings("ignore", ".*fork.*")


def run(call, folder):
    """The exit code and everything that was printed; raises AssertionError for one that hangs."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
    sys.stdout.flush()
    start = time.monotonic()
    if (pid := os.fork()) == 0:
        _become(call, folder, writer)
    os.close(writer)
    if call.signal:
        _await_handlers(pid)
        time.sleep(call.delay)
        os.kill(pid, call.signal)
    status = _wait(pid, start)
    seconds = time.monotonic() - start
    with open(reader, "rb") as file:
        return Ended(os.waitstatus_to_exitcode(status), file.read().decode(), seconds)


def _become(call, folder, writer):
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(call.stdout, os.O_WRONLY) if call.stdout else writer, 1)
    os.dup2(writer, 2)
    # Those of the parent may be of files.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    if call.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.file_size, call.file_size))
    if call.fresh:
        os.execv(sys.executable, [sys.executable, "-m", "dsad", *call.argv])
    from dsad.cli.main import entry

    sys.argv = ["dsad", *call.argv]
    entry()


def _await_handlers(pid):
    """Until the command can be told to stop; before, it is Python's own start."""
    while True:
        try:
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        caught = int(status.partition("SigCgt:")[2].split()[0], 16) if "SigCgt" in status else 0
        if caught & _CAUGHT or "State:\tZ" in status:
            return
        time.sleep(0.005)


def _wait(pid, start):
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() - start > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs for {LIMIT} s")
        time.sleep(0.01)


# --- what is there


def snapshot(*folders):
    """Every file with its content's size and time of change."""
    return {
        str(p): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for folder in folders
        for p in pathlib.Path(folder).rglob("*")
        if not p.is_dir()
    }


def unfinished(folder):
    """What is half-written below a folder, a line each."""
    lines = []
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_dir() or path.is_symlink():
            continue
        if path.name.endswith((paths.TEMPORARY, ".incomplete", ".tmp")):
            lines.append(f"{path}: temporary")
        elif reader := _READERS.get(path.suffix):
            try:
                reader(path)
            except Exception as error:
                lines.append(f"{path}: {type(error).__name__}: {error}")
    return lines


def _png(path):
    with PIL.Image.open(path) as image:
        image.load()


def _npz(path):
    with np.load(path) as arrays:
        for name in arrays.files:
            arrays[name]


def _html(path):
    assert path.read_text().rstrip().endswith("</html>")


def _lines(path):
    text = path.read_text()
    assert not text or text.endswith("\n")
    for line in text.splitlines():
        json.loads(line)


_READERS = {
    ".json": lambda p: json.loads(p.read_text()),
    ".jsonl": _lines,
    ".csv": lambda p: list(csv.reader(p.open(newline=""), strict=True)),
    ".png": _png,
    ".tiff": _png,
    ".npz": _npz,
    ".html": _html,
    ".safetensors": lambda p: safetensors.numpy.load_file(p),
}


# --- how inputs are spoilt


def linked(source, target):
    """A copy of a folder whose files are links, so that it costs nothing."""
    for path in pathlib.Path(source).rglob("*"):
        place = pathlib.Path(target) / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if path.is_dir() else os.link(path, place)


def spoil(path, how, draw: random.Random):
    """Make a file missing, unreadable, truncated or something else."""
    data = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: draw.randint(1, max(1, len(data) * 6 // 10))])
    elif how == "garbage":
        path.write_bytes(draw.randbytes(len(data) // 2 + 1))
    elif how == "text":
        path.write_text("{'not': what was expected}\n")
    elif how == "folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif how == "loop":
        path.symlink_to(path)


HOW = ("missing", "empty", "truncated", "garbage", "text", "folder", "dangling", "loop")
