"""``dsad report``: one self-contained page from one or more evaluations."""

import os
from typing import Any

from dsad.assembly import runs, workdir
from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.evaluation.report.page import write_report
from dsad.terminal import flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "report", "DIR [DIR ...]: write report.html from evaluations, side by side.",
        positional=True,
    )  # fmt: skip
    command.string("out", "", "File to write; default report.html in the first directory.")
    command.string("training", "", "Run whose training curves to show; default: the backbone's.")
    command.string("title", "", "Title of the page.")
    command.switch("allow_different", "Show runs together although their protocols differ.")
    _, values, rest = command.parse(argv)
    if not rest:
        raise ConfigError("dsad report: name at least one directory written by dsad evaluate.")
    out = values.out or os.path.join(rest[0], "report.html")
    paths.check_place(out, "Give another --out=FILE.", file=True)
    training = values.training or _training(rest)
    kwargs: dict[str, Any] = {"title": values.title} if values.title else {}
    write_report(
        out, [(_name(d, rest), d) for d in rest], training_dir=training or None,
        allow_different=values.allow_different, **kwargs,
    )  # fmt: skip
    print(f"written: {out}")
    return 0


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
