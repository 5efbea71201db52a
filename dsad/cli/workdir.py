"""Work directories: never mixed, never overwritten unless told to."""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from etils import epath

from dsad.core import distributed
from dsad.core.errors import ConfigError, WorkdirError

CONFIG = "config.json"


def claim(
    workdir: str, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> epath.Path:
    """Take a directory for a run as ``_claim`` says; one process does it, all learn how it went."""
    distributed.on_main(
        lambda: str(_claim(workdir, command, config, resume=resume, overwrite=overwrite))
    )
    return epath.Path(os.path.expanduser(workdir))


def _claim(
    workdir: str, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> epath.Path:
    """Take a directory for a run and write its config; returns the path.

    A directory in use needs ``resume`` (same command and config) or ``overwrite`` (it must hold a
    dsad run, so that a mistyped path costs nothing). Raises WorkdirError otherwise.
    """
    if not workdir:
        raise ConfigError(f"dsad {command}: --workdir=DIR is missing; it takes all outputs.")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
    path = epath.Path(os.path.expanduser(workdir))
    text = json.dumps({"command": command, "config": config}, indent=2) + "\n"
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"--workdir={workdir}: expected a directory, found a file.")
    if path.exists() and any(path.iterdir()):
        if resume:
            _check_same(path, text)
            return path
        if not overwrite:
            go_on = (
                "Continue its run with --resume, replace" if command == "pretrain" else "Replace"
            )
            raise WorkdirError(
                f"--workdir={workdir}: in use. {go_on} it with --overwrite, or choose another "
                "directory."
            )
        try:
            read(path)
        except WorkdirError as error:
            raise WorkdirError(
                f"--workdir={workdir}: holds files but no dsad run, and --overwrite only replaces "
                f"dsad runs. Choose another directory. ({error})"
            ) from error
        shutil.rmtree(path) if isinstance(path, os.PathLike) else path.rmtree()
    elif resume:
        raise WorkdirError(f"--workdir={workdir}: nothing to resume; start without --resume.")
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(text)
    return path


#: Written into the directory of a pretraining run that made all its steps.
COMPLETE = "complete.json"


def holds_run(workdir: str) -> bool:
    """Whether there is a run to continue; the same answer on every process."""
    path = epath.Path(os.path.expanduser(workdir))
    return bool(distributed.on_main(lambda: bool(workdir) and (path / CONFIG).exists()))


def mark_complete(path: epath.Path, step: int) -> None:
    """Say to schedulers and scripts that there is nothing left to do."""
    if distributed.is_main():
        (path / COMPLETE).write_text(json.dumps({"step": step}) + "\n")


def _check_same(path: epath.Path, text: str) -> None:
    found, wanted = read(path), json.loads(text)
    if found["command"] != wanted["command"]:
        raise WorkdirError(
            f"{path}: holds a run of dsad {found['command']}, not of dsad {wanted['command']}."
        )
    lines = differences(found["config"], wanted["config"])
    if lines:
        raise WorkdirError(
            f"{path}: --resume needs the run's own config; these keys differ (found there → now):"
            "\n  " + "\n  ".join(lines)
        )


def read(path: str | epath.PathLike) -> dict[str, Any]:
    """{"command", "config"} of the run in a directory; raises WorkdirError without one."""
    file = epath.Path(os.path.expanduser(path)) / CONFIG
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise WorkdirError(f"{path}: no dsad run there ({CONFIG} is missing).") from None
    except ValueError as error:
        raise WorkdirError(f"{file}: not readable as JSON: {error}.") from error
    ours = isinstance(found, dict) and set(found) == {"command", "config"}
    if not ours or not isinstance(found["config"], dict):
        raise WorkdirError(f"{file}: not written by dsad; expected the keys command and config.")
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any], where: str = "config") -> list[str]:
    """One line per key whose value differs."""
    lines = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key, "(absent)"), b.get(key, "(absent)")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{where}.{key}")
        elif left != right:
            lines.append(f"{where}.{key}: {left!r} → {right!r}")
    return lines
