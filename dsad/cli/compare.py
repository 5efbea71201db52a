"""``dsad compare``: detectors × backbones × data sets × seeds, to one table."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from dsad.assembly.compare import compare, prepare
from dsad.core import paths
from dsad.evaluation.compared import FILE, TABLE, told
from dsad.evaluation.report.page import metric_label
from dsad.terminal import console, flags


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "compare", "evaluate detectors × backbones × data sets × seeds, each once; the same "
        "command goes on where it was stopped.", config="configs/compare.py",
    )  # fmt: skip
    command.string("workdir", "", "Directory of the comparison, with one for each evaluation.")
    command.switch("overwrite", "Measure again what was measured with other settings.")
    command.switch("allow_different", "Compare numbers although their protocols differ.")
    command.distributed()
    config, values, _ = command.parse(argv)
    flags.start_distributed(values)
    out = console.console()
    made = prepare(
        config, values.workdir, out, overwrite=values.overwrite,
        allow_different=values.allow_different,
    )  # fmt: skip
    for note in made.notes:
        out.print(note)
    out.print(f"{len(made.cells)} evaluations, {len(made.done)} of them finished")
    if made.bytes:
        free = paths.free(paths.directory(made.features))
        out.print(
            f"features: about {paths.size(made.bytes)} to compute and to keep in {made.features}"
            + (f" ({paths.size(free)} free)" if free is not None else "")
        )
    content = compare(made, values.workdir, out, config.to_dict())
    for name in content["datasets"]:
        out.print(table(content, name))
    folder = values.workdir.rstrip("/")
    out.print(
        f"written: {folder}/{FILE}, {TABLE}; page:\n  dsad report {shlex.quote(values.workdir)}"
    )
    return 0


def table(content: Mapping[str, Any], name: str) -> Table:
    """A data set's numbers, a row for each backbone and detector, with the paired differences.

    Below a number is its difference to the baseline; the table fits 80 columns.
    """
    found, main = content["datasets"][name], content["main"]
    several = max(len(row["seeds"]) for row in found["rows"]) > 1
    columns = [metric_label(m) for m in main]
    made = console.table("backbone\ndetector", *columns, title=name, title_justify="left")
    for number, row in enumerate(found["rows"]):
        label = Text.assemble(row["backbone"], "\n", (row["detector"], "dim"))
        made.add_row(label, *(_cell(row, m, found["leads"].get(m) == number) for m in main))
        if number + 1 < len(found["rows"]) and _parts(found["rows"], number):
            made.add_section()
    made.caption = "\n".join(_captions(content, found, several)) or None
    return made


def _parts(rows: Any, number: int) -> bool:
    """Whether another backbone begins behind a row."""
    return rows[number]["backbone"] != rows[number + 1]["backbone"]


def _cell(row: Mapping[str, Any], metric: str, leads: bool) -> Text:
    own, gap = row["numbers"][metric], row["differences"].get(metric)
    text = Text(told(own) + ("*" if leads else ""), "bold" if leads else "")
    if row["baseline"]:
        text.append("\nbaseline", "dim")
    elif gap:
        text.append(f"\n{told(gap, '+.3f')}", "dim")
    return text


def _captions(content: Mapping[str, Any], found: Mapping[str, Any], several: bool) -> list[str]:
    lines = [found["defects"]] if found["defects"] else []
    if len(found["categories"]) > 1:
        lines.append(f"means over {len(found['categories'])} categories")
    if several:
        seeds = dict.fromkeys(s for row in found["rows"] for s in row["seeds"])
        lines.append(f"mean ± sample standard deviation over {len(seeds)} seeds")
    against = "/".join(filter(None, content["baseline"].values()))
    if against:
        lines.append(f"below: {'paired ' if several else ''}difference to {against}")
    if found["leads"]:
        lines.append("* higher than every other row by more than the deviation of that difference")
    if found["notices"]:
        lines.append("these numbers do not mean the same; the report says why")
    return lines
