"""``dsad check-data``: every fault of a data set, a summary table, and an exit code."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsad.core import config as core_config
from dsad.core.errors import ConfigError
from dsad.data.base import DataConfig
from dsad.data.checks import TITLES, CheckReport, check
from dsad.terminal import flags

_COLOURS = {"error": "bold red", "warning": "yellow"}


def _print_faults(report: CheckReport, console: Console) -> None:
    """One fault a line: a line is never cut, whatever the width of the terminal."""
    for fault in report.faults:
        console.print(
            f"{fault.severity:7} {fault}",
            style=_COLOURS[fault.severity],
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _print_checks(report: CheckReport, console: Console) -> None:
    counts = Counter((f.check, f.severity) for f in report.faults)
    for name, title in TITLES.items():
        found = [
            f"{n} {severity}{'s' if n != 1 else ''}"
            for severity in ("error", "warning")
            if (n := counts[name, severity])
        ]
        skipped = report.skipped.get(name)
        state = ", ".join(found) or (f"does not apply: {skipped}" if skipped else "ok")
        console.print(f"{name:4} {title}: {state}", markup=False, highlight=False, soft_wrap=True)


def _table(report: CheckReport) -> Table:
    title = f"{report.protocol['dataset']}, split: {report.protocol['split']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("category", overflow="fold")
    for name in ("train", "good", "bad", "kinds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("width×height", "mode"):
        table.add_column(name, overflow="fold")
    for name in ("area %", "vanish"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        without = f" ({row.without_mask} no mask)" if row.without_mask else ""
        table.add_row(
            row.category,
            str(row.train),
            str(row.good),
            f"{row.bad}{without}",
            str(row.kinds),
            row.sizes,
            row.modes,
            "-" if row.area is None else f"{row.area:.3g}",
            f"{row.vanished}/{row.regions}",
        )
    return table


def _plain_console() -> Console:
    """Standard output; wide enough for the table where no terminal limits it."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def run(config: DataConfig, console: Console | None = None) -> int:
    """Check the data set of ``config`` and print the outcome; 0 without errors, else 1.

    Raises ConfigError for a name, root or category that cannot be meant.
    """
    out = console or _plain_console()
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=None)
        report = check(
            config, progress=lambda done, total, _: bar.update(task, completed=done, total=total)
        )
    _print_faults(report, out)
    _print_checks(report, out)
    out.print(_table(report))
    out.print(
        "kinds: of defects. area: median defect area of the anomalous images. vanish: defect "
        f"regions without a pixel on the canvas of {config.canvas}.",
        highlight=False,
        soft_wrap=True,
    )
    errors = sum(f.severity == "error" for f in report.faults)
    warnings = len(report.faults) - errors
    verdict = "usable" if report.ok else "NOT usable"
    out.print(f"{report.name}: {errors} errors, {warnings} warnings: {verdict}.", highlight=False)
    return 0 if report.ok else 1


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "check-data", "check a data set and print every fault at once; exit code 1 with errors.",
        config="configs/data.py",
    )  # fmt: skip
    config, _, rest = command.parse(argv)
    if rest:
        raise ConfigError(f"dsad check-data: unexpected argument {rest[0]!r}.")
    data = core_config.build_dataclass(
        DataConfig,
        dict(core_config.require(config, "data", "configs/data.py").data.items()),
        "config.data",
    )
    return run(data)
