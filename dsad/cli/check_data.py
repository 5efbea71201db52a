"""``dsad check-data``: every fault of a data set, a summary table, and an exit code."""

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsad.core import config as core_config
from dsad.data.base import DataConfig
from dsad.data.checks import TITLES, CheckReport, check
from dsad.terminal import console, flags

_COLOURS = {"error": "bold red", "warning": "yellow"}


def _print_faults(report: CheckReport, out: Console) -> None:
    """One fault a line: a line is never cut, whatever the width of the terminal."""
    for fault in report.faults:
        line = Text(f"{fault.severity:7} {fault}", _COLOURS[fault.severity])
        out.print(line, soft_wrap=True)


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
    texts = ("category", "width×height", "mode")
    for name in (*texts[:1], "train", "good", "bad", "kinds", *texts[1:], "area %", "vanish"):
        if name in texts:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        told = row.without_mask and "K1" not in report.skipped
        bad = f"{row.bad} ({row.without_mask} no mask)" if told else row.bad
        area = "-" if row.area is None else f"{row.area:.3g}"
        cells = (row.category, row.train, row.good, bad, row.kinds, row.sizes, row.modes, area)
        table.add_row(*map(str, cells), f"{row.vanished}/{row.regions}")
    return table


def run(config: DataConfig, out: Console | None = None) -> int:
    """Check the data set of ``config`` and print the outcome; 0 without errors, else 1.

    Raises ConfigError for a name, root or category that cannot be meant.
    """
    # Wide enough for the table where no terminal limits it.
    out = out or console.console(160)
    with console.progress("checking", out) as tell:
        report = check(config, progress=tell)
    _print_faults(report, out)
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
        "check-data", "check a data set and print every fault at once; exit code 1 with errors.",
        config="configs/data.py",
    )  # fmt: skip
    return run(data_config(command.parse(argv)[0]))


def data_config(config: Any) -> DataConfig:
    """The group ``data`` of a config; raises ConfigError."""
    group = core_config.require(config, "data", "configs/data.py").data
    return core_config.build_dataclass(DataConfig, dict(group.items()), "config.data")
