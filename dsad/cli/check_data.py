"""``dsad check-data``: every fault of a data set, a summary table, and an exit code."""

import csv
import io
import os
import re
import shlex
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsad.assembly import catalogue, thumbnails
from dsad.core import config as core_config
from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.data import layout
from dsad.data.base import DataConfig, Fault, indexed
from dsad.data.checks import REMEDIES, TITLES, CheckReport, check_dataset
from dsad.terminal import console, flags

_COLOURS = {"error": "bold red", "warning": "yellow"}


def _alike(fault: Fault) -> tuple[str, ...]:
    """The same for faults that differ in the file alone, in names and numbers."""
    stem = os.path.splitext(os.path.basename(fault.path))[0]
    text = re.sub(rf"(?<!\w){re.escape(stem)}(?![^\W_])", "", fault.message)
    return fault.severity, fault.check, re.sub(r"\S*/\S*|\d+", "", text)


def _print_faults(report: CheckReport, out: Console, *, every: bool) -> None:
    """Equal faults as one, with the first file, or ``every`` one; paths are never cut."""
    groups: dict[Any, list[Fault]] = {}
    for number, fault in enumerate(report.faults):
        groups.setdefault(number if every else _alike(fault), []).append(fault)
    for first, *others in groups.values():
        count = f" {len(others) + 1} alike, the first:" if others else ""
        out.print(f"{first.severity:7}{count} {first}", style=_COLOURS[first.severity])
    if len(groups) < len(report.faults):
        out.print("every file by its name: --all")


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
        out.print(f"{name:4} {title}: {state}")


def _table(report: CheckReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("category", overflow="fold")
    for name in ("train", "good", "bad", "kinds", "width\n×height", "mode", "area\n%", "vanish"):
        table.add_column(name, justify="right", overflow="fold", no_wrap=name != "mode")
    for row in report.rows:
        told = row.without_mask and "K1" not in report.skipped
        bad = f"{row.bad}\n({row.without_mask} no mask)" if told else row.bad
        area = "-" if row.area is None else f"{row.area:.3g}"
        size = row.sizes.replace("×", "\n×")
        train = f"{row.train}\n(+{row.validation} val.)" if row.validation else row.train
        cells = (row.category, train, row.good, bad, row.kinds, size, row.modes, area)
        table.add_row(*map(str, cells), f"{row.vanished}/{row.regions}")
    return table


def fix_list(report: CheckReport) -> str:
    """Every fault as a line of a CSV file, with what to do about it."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("check", "severity", "path", "message", "what to do"))
    for f in report.faults:
        rows.writerow((f.check, f.severity, f.path, f.message, REMEDIES[f.check]))
    return text.getvalue()


def run(
    config: DataConfig, out: Console | None = None, *, every: bool = False, pictures: str = "",
    fixes: str = "",
) -> int:  # fmt: skip
    """Check the data set of ``config`` and print the outcome; 0 without errors, else 1.

    Equal faults are one line, or a line for ``every`` file. The files ``pictures`` and ``fixes``
    get thumbnails and the fix list, where they are named. Raises ConfigError for a name, root or
    category that cannot be meant, WorkdirError for a file that cannot be written.
    """
    out = out or console.console()
    for flag, path, suffix in (("pictures", pictures, ".png"), ("fix-list", fixes, ".csv")):
        if path and not path.lower().endswith(suffix):
            raise ConfigError(f"--{flag}={path}: expected a file name that ends in {suffix}.")
        if path:
            paths.check_place(path, f"Name another with --{flag}=FILE{suffix}.", file=True)
    dataset = indexed(config)
    with console.progress("checking", out) as tell:
        report = check_dataset(dataset, canvas=config.canvas, progress=tell)
    _print_faults(report, out, every=every)
    _print_checks(report, out)
    out.print(f"{report.protocol['dataset']}, split: {report.protocol['split']}", style="bold")
    out.print(_table(report))
    out.print(
        "kinds: of defects. area: median defect area of the anomalous images. vanish: defect "
        f"regions without a pixel on the canvas of {config.canvas}."
    )
    if fixes:
        paths.write_whole(fixes, fix_list(report))
        out.print(f"{len(report.faults):,} faults and what to do: {fixes}")
    if pictures:
        page, left = thumbnails.sheet(dataset)
        paths.write_whole(pictures, page)
        out.print(f"pictures: {pictures}{f' ({left})' if left else ''}")
    count = Counter(f.severity for f in report.faults)
    verdict = "usable" if report.ok else "NOT usable"
    out.print(f"{report.name}: {count['error']} errors, {count['warning']} warnings: {verdict}.")
    if report.ok and config.name != DataConfig().name:
        real = report.protocol.get("defects", "real") == "real"
        measurable = real and any(row.bad for row in report.rows)
        out.print(f"next:\n  {_next(config, measurable=measurable)}")
    return 0 if report.ok else 1


def _next(config: DataConfig, *, measurable: bool) -> str:
    """The command that measures on bad images where there are some, or fits on good ones."""
    usual = vars(DataConfig())
    keys = {k: v for k, v in vars(config).items() if v != usual[k] and k != "synthetic"}
    words = [shlex.quote(f"--config.data.{key}={value}") for key, value in keys.items()]
    command, place = ("evaluate", "workdir") if measurable else ("fit", "out")
    given = ["--config=configs/patchcore.py", "--config.weights=imagenet", *words, f"--{place}=DIR"]
    return f"dsad {command} {' '.join(given)}"


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "check-data", "[FOLDER]: check a data set and print every fault at once; exit code 1 with "
        "errors. In FOLDER, folders such as good, bad and masks are taken for what they are named.",
        config="configs/data.py", positional=True,
    )  # fmt: skip
    command.switch("all", "A line for every file instead of one for equal faults.")
    command.string("pictures", "", "FILE.png: thumbnails of every kind, defects marked, as one.")
    command.string("fix_list", "", "FILE.csv: every fault in it, with what to do.")
    command.switch("strict", "Counts that differ from the published ones are errors.")
    command.switch("list", "The published data sets; with --config.data.name=NAME more of one.")
    config, values, folders = command.parse(argv)
    if len(folders) > 1:
        raise ConfigError(f"dsad check-data: expected one folder, found also {folders[1]!r}.")
    out = console.console()
    if values["list"].value:
        given = any(a.startswith("--config.data.name") for a in argv)
        catalogue.print_one(config.data.name, out) if given else catalogue.print_all(out)
        return 0
    if values["strict"].value:
        flags.update(config, {"data.strict": True})
    for path in folders:
        if any(a.startswith("--config.data.name") for a in argv):
            raise ConfigError(
                f"dsad check-data: {path} or --config.data.name? A folder says its name itself; "
                "beside a name give --config.data.root."
            )
        keys, others = layout.of(path)
        flags.update(config, {f"data.{key}": value for key, value in keys.items()})
        out.print("taken: " + ", ".join(f"{key} {value}" for key, value in keys.items()))
        if others:
            out.print(f"left out, as their names say neither good nor bad: {', '.join(others)}")
    return run(
        data_config(config), out, every=bool(values["all"].value),
        pictures=str(values["pictures"].value), fixes=str(values["fix_list"].value),
    )  # fmt: skip


def data_config(config: Any) -> DataConfig:
    """The group ``data`` of a config; raises ConfigError."""
    group = core_config.require(config, "data", "configs/data.py").data
    return core_config.build_dataclass(DataConfig, dict(group.items()), "config.data")
