"""``dsad report``: one page of evaluations, a comparison, predictions or a pretraining."""

import os
import runpy
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from dsad.assembly import label_probe, predict, runs, workdir
from dsad.assembly.fit import FALSE_ALARM_RATE
from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.evaluation.report.compared import write_compared
from dsad.evaluation.report.page import write_report, write_training
from dsad.evaluation.report.predicted import write_predictions
from dsad.evaluation.report.probed import write_probed
from dsad.terminal import flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "report", "DIR [DIR ...]: write report.html of evaluations, side by side, or of "
        "a comparison, predictions, probes by labels or a pretraining run.",
        positional=True,
    )  # fmt: skip
    command.string("out", "", "File to write; default report.html in the first directory.")
    command.string("training", "", "Run whose training curves to show; default: the backbone's.")
    command.string("title", "", "Title of the page.")
    command.switch("allow_different", "Show runs together although their protocols differ.")
    _, values, rest = command.parse(argv)
    if not rest:
        raise ConfigError(
            "dsad report: name a directory written by dsad evaluate, compare, predict or pretrain."
        )
    out = values.out or os.path.join(rest[0], "report.html")
    paths.check_place(out, "Give another --out=FILE.", file=True)
    kwargs: dict[str, Any] = {"title": values.title} if values.title else {}
    predictions = [read for d in rest if (read := predict.read(d))]
    pretrained = not predictions and any(_is_of("pretrain", d) for d in rest)
    table = not predictions and any(_is_of("compare", d) for d in rest)
    probed = not predictions and any(_is_probed(d) for d in rest)
    if (predictions or pretrained or probed or table) and len(rest) > 1:
        raise ConfigError(
            "dsad report: expected evaluations, or one directory of a comparison, of predictions, "
            "of probes by labels or of a pretraining run, whose curves --training=DIR shows beside "
            "evaluations."
        )
    if predictions:
        write_predictions(out, paths.directory(rest[0]), *predictions[0], **kwargs)
    elif pretrained:
        write_training(out, rest[0], **kwargs)
    elif table:
        write_compared(out, rest[0], **kwargs)
    elif probed:
        write_probed(out, rest[0], **kwargs)
    else:
        write_report(
            out, [(_name(d, rest), d) for d in rest],
            training_dir=values.training or _training(rest) or None,
            allow_different=values.allow_different,
            commands={_name(d, rest): _with_thresholds(d) for d in rest}, **kwargs,
        )  # fmt: skip
    print(f"written: {out}")
    return 0


def _is_of(command: str, directory: str) -> bool:
    return workdir.holds_run(directory) and workdir.read(directory)["command"] == command


def _is_probed(directory: str) -> bool:
    return workdir.holds_run(directory) and label_probe.is_meant(workdir.read(directory)["config"])


def _name(directory: str, all_: list[str]) -> str:
    """The folder's name, or the path when two folders share it."""
    short = paths.directory(directory).name
    return short if sum(paths.directory(d).name == short for d in all_) == 1 else directory


def _training(directories: list[str]) -> str:
    """The first run that a backbone came from and that is still there."""
    for directory in directories:
        spec = workdir.read(directory)["config"].get("backbone", "")
        if runs.is_run(spec):
            path = runs.place(spec).directory
            if (paths.directory(path) / "metrics.jsonl").is_file():
                return path
    return ""


def _with_thresholds(directory: str) -> str:
    """The command that evaluates again as a run was evaluated, and sets thresholds."""
    config = workdir.read(directory)["config"]
    name = config.get("detector", {}).get("name")
    if not name:
        return ""
    file = f"configs/{'isstad_detector' if name == 'isstad' else name}.py"
    usual = dict(_flat(runpy.run_path(flags.locate(file))["get_config"]().to_dict()))
    keys = dict(_flat(config)) | {"evaluation.false_alarm_rate": FALSE_ALARM_RATE}
    changed = [f"--config.{k}={v}" for k, v in keys.items() if k in usual and v != usual[k]]
    out = f"{directory.rstrip('/')}-decided"
    return shlex.join(["dsad", "evaluate", f"--config={file}", *changed, f"--workdir={out}"])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with their values; lists as text, as the command line takes them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            # In double quotes, which need none around them in a shell's single ones.
            words = isinstance(value, (list, tuple))
            yield f"{prefix}{key}", str(tuple(value)).replace("'", '"') if words else value
