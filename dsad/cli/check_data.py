"""``dsad check-data``: every fault of a data set, a summary table, and an exit code."""

import shlex
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsad.core import config as core_config
from dsad.core.errors import ConfigError
from dsad.data._places import guessed
from dsad.data.base import PLACES, DataConfig, check_command
from dsad.data.checks import TITLES, CheckReport, check
from dsad.terminal import console, flags

_COLOURS = {"error": "bold red", "warning": "yellow"}


#: Paths of equal faults that are shown without --all.
_SHOWN = 5


def _print_faults(report: CheckReport, out: Console, most: int) -> None:
    """One fault a line, equal ones below what they have in common, of these ``most`` paths.

    A line is never cut, whatever the width of the terminal.
    """
    equal: dict[tuple[str, str, str], list[str]] = {}
    for fault in report.faults:
        equal.setdefault((fault.severity, fault.check, fault.message), []).append(fault.path)
    for (severity, name, message), paths in equal.items():
        where = paths[0] if len(paths) == 1 else f"{len(paths)} files"
        lines = [f"{severity:7} {where}: [{name}] {message}"]
        if len(paths) > 1:
            lines += [f"          {path}" for path in paths[:most]]
            rest = len(paths) - len(lines) + 1
            lines += [f"          and {rest} more; --all shows them"] if rest else []
        out.print(Text("\n".join(lines), _COLOURS[severity]), soft_wrap=True)


def _print_checks(report: CheckReport, out: Console) -> None:
    counts = Counter((f.check, f.severity) for f in report.faults)
    for name, title in TITLES.items():
        found = [
            f"{n} {severity}{'s' if n != 1 else ''}"
            for severity in ("error", "warning")
            if (n := counts[name, severity])
        ]
        skipped = report.skipped.get(name)
        state = ", ".join(found) or (f"does not apply: {skipped}" if skipped else "ok")
        out.print(f"{name:4} {title}: {state}", highlight=False, soft_wrap=True)


def _table(report: CheckReport) -> Table:
    title = f"{report.protocol['dataset']}, split: {report.protocol['split']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    texts = ("category", "width × height", "mode")
    for name in (*texts[:1], "train", "good", "bad", "kinds", *texts[1:], "area %", "vanish"):
        if name in texts:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        told = row.without_mask and "K1" not in report.skipped
        bad = f"{row.bad} ({row.without_mask} no mask)" if told else row.bad
        area = "-" if row.area is None else f"{row.area:.3g}"
        # A narrow terminal breaks lines at spaces, and no number.
        size = row.sizes.replace("×", " × ")
        cells = (row.category, row.train, row.good, bad, row.kinds, size, row.modes, area)
        table.add_row(*map(str, cells), f"{row.vanished}/{row.regions}")
    return table


def run(config: DataConfig, out: Console | None = None, *, every: bool = False) -> int:
    """Check the data set of ``config`` and print the outcome; 0 without errors, else 1.

    Of equal faults the first paths are shown, or, with ``every``, all.

    Raises ConfigError for a name, root or category that cannot be meant.
    """
    # Wide enough for the table where no terminal limits it.
    out = out or console.console(160)
    with console.progress("checking", out) as tell:
        report = check(config, progress=tell)
    _print_faults(report, out, len(report.faults) if every else _SHOWN)
    _print_checks(report, out)
    out.print(_table(report))
    out.print(
        "kinds: of defects. area: median defect area of the anomalous images. vanish: defect "
        f"regions without a pixel on the canvas of {config.canvas}.",
        highlight=False,
        soft_wrap=True,
    )
    count = Counter(f.severity for f in report.faults)
    verdict = "usable" if report.ok else "NOT usable"
    text = f"{report.name}: {count['error']} errors, {count['warning']} warnings: {verdict}."
    out.print(text, highlight=False)
    return 0 if report.ok else 1


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "check-data", "[FOLDER]: check a data set and print every fault at once; exit code 1 with "
        "errors. FOLDER: of good pictures, with folders good and bad, or like MVTec AD.",
        config="configs/data.py", positional=True,
    )  # fmt: skip
    command.switch("all", "Of equal faults show every path.")
    config, values, rest = command.parse(argv)
    if not rest:
        return run(data_config(config), every=values.all)
    if len(rest) > 1:
        raise ConfigError(f"dsad check-data: expected one folder, found {shlex.join(rest)}.")
    if given := next((key for key in PLACES if config.data[key]), ""):
        raise ConfigError(f"dsad check-data: expected a folder or config.data.{given}, not both.")
    config.data.update(guessed(rest[0]))
    chosen = data_config(config)
    code = run(chosen, every=values.all)
    if not code:
        keys = check_command(chosen).removeprefix("dsad check-data ")
        verb, out = ("fit", "out=MODEL") if chosen.labelled else ("evaluate", "workdir=DIR")
        print(f"next:\n  dsad {verb} {keys} --config.weights=imagenet --{out}")
    return code


def data_config(config: Any) -> DataConfig:
    """The group ``data`` of a config; raises ConfigError."""
    group = core_config.require(config, "data", "configs/data.py").data
    return core_config.build_dataclass(DataConfig, dict(group.items()), "config.data")
