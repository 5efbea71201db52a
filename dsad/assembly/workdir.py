"""Work directories: never mixed, never overwritten unless told to."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dsad.core import distributed, paths
from dsad.core.errors import ConfigError, WorkdirError
from dsad.core.types import RunInfo
from dsad.evaluation.results import RESULTS

CONFIG = "config.json"
_ADVICE = "Choose another --workdir, or mend this one."
#: What an evaluation that goes on may change: where and how the same numbers are computed.
SAME_NUMBERS = (
    "config.mesh", "config.data.cache", "config.data.workers", "config.data.prefetch",
    "config.evaluation.feature_cache", "config.evaluation.cache_layers",
)  # fmt: skip
#: What a resumed run may change: where and how the same training is computed, kept and measured.
#: That a probe holds out the same images is seen by their number: more of them include the fewer.
FREE = (
    *SAME_NUMBERS, "config.checkpoint", "config.log_every", "config.probe",
    "config.compilation_cache", "config.feature_store",
)  # fmt: skip


def claim(
    workdir: str,
    command: str,
    config: Mapping[str, Any],
    *,
    info: RunInfo | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry: bool = False,
) -> epath.Path:
    """Take a directory for a run as ``_claim`` says; one process does it, all learn how it went.

    ``info``, of a pretraining run, is kept beside the config, so that the same objective can be
    built again without the data. ``dry``: only refuse, before anything is read, what would be
    refused later; nothing is touched.
    """
    about = {"command": command, "config": config}
    about |= {"info": dataclasses.asdict(info)} if info else {}
    distributed.on_main(lambda: _claim(workdir, about, resume=resume, overwrite=overwrite, dry=dry))
    return paths.directory(workdir)


def _claim(
    workdir: str, about: Mapping[str, Any], *, resume: bool, overwrite: bool, dry: bool
) -> None:
    """Take a directory for a run and write its config.

    A directory in use needs ``resume`` (same command, and the same config but for what ``FREE``
    names) or ``overwrite`` (it must hold a dsad run, so that a mistyped path costs nothing). An
    evaluation without results goes on by itself; one that kept nothing is replaced.
    Raises WorkdirError otherwise, also if the directory cannot be written.
    """
    _check_named(workdir, about)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
    path, text = paths.directory(workdir), json.dumps(about, indent=2) + "\n"
    paths.check_place(workdir, _ADVICE)
    with paths.writing(workdir, _ADVICE):
        now = json.loads(text)
        if _is_free(path):
            if resume:
                raise WorkdirError(f"--workdir={workdir}: nothing to resume; start without it.")
        elif resume:
            # Without a checkpoint nothing depends on the old config, such as one that did not fit
            # into memory.
            changed = _changed(path, now, free=not has_checkpoint(workdir))
            for line in [] if dry else changed:
                print(f"resumed with {line}")
        elif not overwrite and _is_unfinished(path, now):
            if not _differing(path, now):
                return
        elif not overwrite:
            raise _in_use(path, workdir, about["command"])
        else:
            _check_run(path, workdir)
        if dry:
            return
        if not resume and path.exists():
            paths.clear(path, CONFIG)
        paths.write_whole(path / CONFIG, text, _ADVICE)


def share(
    workdir: str, command: str, config: Mapping[str, Any], *, dry: bool = False
) -> epath.Path:
    """Take a directory for a run whose parts have directories of their own, claimed one by one.

    One of the same command there goes on with any config. ``dry``: as of ``claim``.
    """
    distributed.on_main(lambda: _share(workdir, {"command": command, "config": config}, dry=dry))
    return paths.directory(workdir)


def _share(workdir: str, about: Mapping[str, Any], *, dry: bool) -> None:
    _check_named(workdir, about)
    path = paths.directory(workdir)
    paths.check_place(workdir, _ADVICE)
    with paths.writing(workdir, _ADVICE):
        if not _is_free(path) and (found := read(path)["command"]) != about["command"]:
            raise WorkdirError(
                f"--workdir={workdir}: holds a run of dsad {found}, not of dsad "
                f"{about['command']}. Choose another directory."
            )
        if not dry:
            paths.write_whole(path / CONFIG, json.dumps(about, indent=2) + "\n", _ADVICE)


def _check_named(workdir: str, about: Mapping[str, Any]) -> None:
    if not workdir:
        raise ConfigError(
            f"dsad {about['command']}: --workdir=DIR is missing; it takes all outputs."
        )


def _is_free(path: epath.Path) -> bool:
    """A kill while the config was first written leaves nothing that would be worth keeping."""
    return not path.exists() or all(p.name.endswith(paths.TEMPORARY) for p in path.iterdir())


def _in_use(path: epath.Path, workdir: str, command: str) -> WorkdirError:
    go_on, again = "Replace", ""
    if command == "pretrain" and (path / CONFIG).exists():
        go_on = "Continue its run with --resume, replace"
        again = "\n  " + shlex.join(["dsad", "pretrain", "--resume", f"--workdir={workdir}"])
    return WorkdirError(
        f"--workdir={workdir}: in use. {go_on} it with --overwrite, or choose another directory."
        f"{again}"
    )


def _check_run(path: epath.Path, workdir: str) -> None:
    try:
        read(path)
    except WorkdirError as error:
        raise WorkdirError(
            f"--workdir={workdir}: holds files but no dsad run, and --overwrite only replaces "
            f"dsad runs. Choose another directory. ({error})"
        ) from error


def _is_unfinished(path: epath.Path, now: Mapping[str, Any]) -> bool:
    """Whether an evaluation can go on in a directory, or begin there anew."""
    if now["command"] != "evaluate" or (path / RESULTS).exists():
        return False
    try:
        return read(path)["command"] == "evaluate"
    except WorkdirError:
        return False


def _differing(path: epath.Path, now: Mapping[str, Any]) -> bool:
    """Whether an unfinished evaluation that kept nothing has other settings."""
    lines = changes(path, now["config"])
    # Folders hold what was measured, trained or mapped so far, perhaps by one that is at work.
    if lines and any(p.is_dir() for p in path.iterdir()):
        raise WorkdirError(
            f"{path}: holds an unfinished evaluation with other settings (there → now):\n  "
            + "\n  ".join(lines)
            + "\nGo on with its settings, replace it with --overwrite, or choose another directory."
        )
    return bool(lines)


def changes(
    path: epath.Path, config: Mapping[str, Any], free: Sequence[str] = SAME_NUMBERS
) -> list[str]:
    """One line per key in which a config differs from that of the run in a directory."""
    lines = differences(read(path)["config"], json.loads(json.dumps(config)))
    return [line for line in lines if not _may_change(line, free)]


OLDER = (
    "written by an older dsad, which did not keep what the run knew of its data (the key info). "
    "Train it again, or use the dsad that wrote it."
)
#: Written into the directory of a pretraining run that made all its steps.
COMPLETE = "complete.json"


def holds_run(workdir: str) -> bool:
    """Whether there is a run to continue; the same answer on every process."""
    return bool(
        distributed.on_main(lambda: bool(workdir) and (paths.directory(workdir) / CONFIG).exists())
    )


def mark_complete(path: epath.Path, step: int) -> None:
    """Say to schedulers and scripts that there is nothing left to do."""
    if distributed.is_main():
        paths.write_whole(path / COMPLETE, json.dumps({"step": step}) + "\n")


def has_checkpoint(workdir: str) -> bool:
    """Whether a directory holds a pretraining run that saved something."""
    folder = paths.directory(workdir) / "checkpoints"
    return bool(workdir) and folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def _changed(path: epath.Path, wanted: Mapping[str, Any], *, free: bool) -> list[str]:
    """What a resumed run changes, a line each; WorkdirError for what it may not unless ``free``."""
    there = read(path)
    if there["command"] != wanted["command"]:
        raise WorkdirError(
            f"{path}: holds a run of dsad {there['command']}, not of dsad {wanted['command']}."
        )
    if there["command"] == "pretrain" and "info" not in there:
        raise WorkdirError(f"{path}: {OLDER}")
    changed = differences(there["config"], wanted["config"])
    if not free and "info" in wanted:
        changed += differences(_data(there), _data(wanted), "data")
    lines = [line for line in changed if not free and not _may_change(line)]
    if lines:
        raise WorkdirError(
            f"{path}: --resume needs the run's own config and data; these differ (there → now):\n  "
            + "\n  ".join(lines)
            + "\nLeave these keys out: the run's own are read from its directory."
        )
    return changed


def _data(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's info is its data's; the rest follows from the config."""
    return {k: v for k, v in about.get("info", {}).items() if k in ("samples", "classes")}


def _may_change(line: str, keys: Sequence[str] = FREE) -> bool:
    key = line.partition(":")[0]
    return any(key == free or key.startswith(f"{free}.") for free in keys)


def read(path: str | epath.PathLike) -> dict[str, Any]:
    """``command``, ``config`` and for pretraining ``info`` of the run in a directory.

    Raises WorkdirError without one.
    """
    file = paths.directory(path) / CONFIG
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise WorkdirError(
            f"{path}: no dsad run there ({CONFIG} is missing). Name what dsad pretrain or dsad "
            "evaluate wrote; dsad report also takes what dsad predict wrote, by itself."
        ) from None
    except ValueError as error:
        raise WorkdirError(f"{file}: not readable as JSON: {error}.") from error
    keys = set(found) if isinstance(found, dict) else set()
    if not {"command", "config"} <= keys or not isinstance(found["config"], dict):
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
